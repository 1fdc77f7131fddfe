"""Cross-frame attention: every frame takes keys and values from the anchor (paper § 3.3.2).

The processors are installed for the length of a `with` block and always put back. Batches are laid out
branch by branch: (B·f, n, C) holds the f frames of guidance branch 0, then those of branch 1, …
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from t2vz.errors import UnsupportedModel

_COVERED = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor")


@dataclass
class AnchorState:
    """What the layers share during a clip.

    branches: B, guidance branches in a batch.
    write: True while a batch starts with the anchor: its keys and values are computed and kept for the batches
        that follow; those read them.
    anchor: layer → (K, V) of the anchor, each (B, heads, n, d); one step's only.
    text: layer → (K, V) of the prompt, each (B, heads, m, d); the same for all steps and frames.
    """

    branches: int
    write: bool = True
    anchor: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    text: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class AnchorProcessor:
    """diffusers attention processor: self-attention over the anchor, cross-attention over the cached prompt."""

    def __init__(self, state: AnchorState) -> None:
        self.state = state

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states: (B·f, n, C). encoder_hidden_states: (B, m, c), the prompt of each branch. → (B·f, n, C)."""
        residual = hidden_states
        batch, n, _ = hidden_states.shape
        branches = self.state.branches
        if encoder_hidden_states is None:
            key, value = self._anchor(attn, hidden_states)
        else:
            key, value = self._text(attn, encoder_hidden_states)
        # The frames of a branch share K and V, so they fold into the query axis: one call, nothing repeated.
        query = attn.to_q(hidden_states).view(branches, batch // branches * n, attn.heads, -1).transpose(1, 2)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        out = F.scaled_dot_product_attention(query, key, value)
        out = out.transpose(1, 2).reshape(batch, n, -1)
        out = attn.to_out[1](attn.to_out[0](out))
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor

    def _anchor(self, attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        if self.state.write:
            frames = hidden_states.unflatten(0, (self.state.branches, -1))
            self.state.anchor[id(attn)] = _key_value(attn, frames[:, 0])
        return self.state.anchor[id(attn)]

    def _text(self, attn: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
        if id(attn) not in self.state.text:
            if attn.norm_cross:
                prompt = attn.norm_encoder_hidden_states(prompt)
            self.state.text[id(attn)] = _key_value(attn, prompt)
        return self.state.text[id(attn)]


def _key_value(attn: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n, C) → K and V, each (B, heads, n, d)."""
    key = attn.to_k(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    value = attn.to_v(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return (key if attn.norm_k is None else attn.norm_k(key)), value


@contextmanager
def anchor_attention(models: Sequence[nn.Module], branches: int) -> Iterator[AnchorState]:
    """Cross-frame attention in all of `models` (UNet and ControlNets) while the block runs.

    LoRA layers keep working: they replace the projections, which are called as they are. Raises
    UnsupportedModel, with nothing installed, where a layer can't be covered.
    """
    for model in models:
        _check_covered(model)
    state = AnchorState(branches)
    installed: list[tuple[Any, dict[str, Any]]] = []
    try:
        for model in models:
            originals = dict(model.attn_processors)  # type: ignore[arg-type]
            installed.append((model, originals))
            model.set_attn_processor({name: AnchorProcessor(state) for name in originals})  # type: ignore[operator]
        yield state
    finally:
        for model, originals in installed:
            model.set_attn_processor(originals)


def _check_covered(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        processor = getattr(layer, "processor", None)
        if processor is None or not hasattr(layer, "to_q"):
            continue
        kind = type(processor).__name__
        special = layer.group_norm is not None or layer.spatial_norm is not None or layer.to_k is None
        if kind not in _COVERED or special or getattr(layer, "add_k_proj", None) is not None:
            raise UnsupportedModel(
                f"{type(model).__name__}: attention layer {name} ({kind}) can't take cross-frame attention"
            )
