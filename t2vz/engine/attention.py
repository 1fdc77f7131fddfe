"""Cross-frame attention: every frame takes keys and values from an anchor (paper § 3.3.2).

The processors are installed for the length of a `with` block and always put back. Batches are laid out
branch by branch: (B·f, n, C) holds the f frames of guidance branch 0, then those of branch 1, …
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2vz.engine import merging
from t2vz.errors import UnsupportedModel

KeyValue = tuple[Tensor, Tensor]
Attends = Literal["anchor", "anchor_previous", "self"]
OnText = Callable[[Any, Tensor, Tensor], None]

_COVERED = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor")
_IP_ADAPTERS = ("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor")


@dataclass
class AnchorState:
    """What the layers share during a clip.

    branches: B, guidance branches in a batch.
    attends: what frames take their keys and values from: the anchor (the paper), the anchor and the frame before,
        or themselves (the paper's ablation).
    merge: part of the tokens to merge in the layers of the finest resolution, (h, w) = `latent_size`.
    on_text: called with (layer, query (B, heads, f·n, d), key (B, heads, m, d)) in each attention to the prompt.
    in_place: keep each layer's keys and values where they are while their shapes stay, for recorded graphs
        (`engine.graphs`) that know them by their place.
    write: True while a batch starts with an anchor: its keys and values are computed and kept for the batches
        that follow; those read them.
    layers: their processors, which keep the keys and values.
    """

    branches: int
    attends: Attends = "anchor"
    merge: float = 0.0
    latent_size: tuple[int, int] = (0, 0)
    on_text: OnText | None = None
    in_place: bool = False
    write: bool = True
    layers: list[AnchorProcessor] = field(default_factory=list)

    def select(self, branches: int) -> None:
        """Go on with another number of branches: what is kept of the prompt belongs to the former ones."""
        if branches != self.branches:
            self.branches = branches
            for layer in self.layers:
                layer.text, layer.image = None, None

    def keep(self, former: KeyValue | None, new: KeyValue) -> KeyValue:
        """The new keys and values, in the former's place if that is asked for."""
        if not self.in_place or former is None or former[0].shape != new[0].shape:
            return new
        for place, each in zip(former, new, strict=True):
            place.copy_(each)
        return former

    def commit(self) -> None:
        """The batch is done: its last frame is the one before the next batch's first."""
        for layer in self.layers:
            layer.previous, layer.pending = layer.pending, None


class AnchorProcessor:
    """diffusers attention processor: self-attention over the anchor, cross-attention over the cached prompt.

    ip_adapter: the processor that it stands in for, if that is an IP-Adapter's: its projections and weights are used.
    anchor: (K, V) of the anchor, each (B, heads, n, d); one step's only.
    previous: (K, V) of the last frame of the batch before, and pending: of the batch under way.
    text, image: (K, V) of the prompt, and of each IP-Adapter's picture, each (B, heads, m, d); the same for all steps
        and frames. All here, not in a table of the layers: then layers of one shape share a compiled graph.
    """

    def __init__(self, state: AnchorState, ip_adapter: Any = None) -> None:
        self.state = state
        self.ip_adapter = ip_adapter
        self.anchor: KeyValue | None = None
        self.previous: KeyValue | None = None
        self.pending: KeyValue | None = None
        self.text: KeyValue | None = None
        self.image: list[KeyValue] | None = None
        state.layers.append(self)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, list[Tensor]] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states: (B·f, n, C). encoder_hidden_states: (B, m, c), the prompt of each branch; with an
        IP-Adapter (prompt, [picture tokens (B, images, m, c), …]). Returns (B·f, n, C)."""
        if encoder_hidden_states is None:
            out = self._self_attention(attn, hidden_states)
        else:
            out = self._to_prompt(attn, hidden_states, encoder_hidden_states)
        if attn.residual_connection:
            out = out + hidden_states
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor

    def _self_attention(self, attn: Any, hidden_states: Tensor) -> Tensor:
        h, w = self.state.latent_size
        if self.state.merge and hidden_states.shape[1] == h * w:
            merge, unmerge = merging.bipartite(hidden_states, h, w, self.state.merge)
            return unmerge(self._attend_frames(attn, merge(hidden_states)))
        return self._attend_frames(attn, hidden_states)

    def _attend_frames(self, attn: Any, hidden_states: Tensor) -> Tensor:
        state, frames = self.state, hidden_states.unflatten(0, (self.state.branches, -1))
        if state.attends == "anchor":
            if state.write:
                self.anchor = state.keep(self.anchor, _key_value(attn, frames[:, 0]))
            return _attend(attn, hidden_states, [_kept(self.anchor)])
        key, value = _key_value(attn, hidden_states)  # of every frame: (B·f, heads, n, d)
        if state.attends == "anchor_previous":
            key, value = self._anchor_and_previous(attn, key, value)
        query = _heads(attn, attn.to_q(hidden_states), attn.norm_q)
        return _leave(attn, F.scaled_dot_product_attention(query, key, value))

    def _anchor_and_previous(self, attn: Any, key: Tensor, value: Tensor) -> KeyValue:
        """K and V of every frame (B·f, heads, n, d) → of the anchor and the frame before it (B·f, heads, 2·n, d)."""
        state = self.state
        frames = [each.unflatten(0, (state.branches, -1)) for each in (key, value)]  # (B, f, heads, n, d)
        # Copies: a view would keep the whole batch's alive.
        self.pending = (frames[0][:, -1].contiguous(), frames[1][:, -1].contiguous())
        if state.write:
            self.anchor = (frames[0][:, 0].contiguous(), frames[1][:, 0].contiguous())
        # The anchor itself has none before it: attending to itself twice is attending to itself.
        last = _kept(self.anchor if state.write else self.previous)
        joined = []
        for each, anchor, first in zip(frames, _kept(self.anchor), last, strict=True):
            before = torch.cat([first[:, None], each[:, :-1]], dim=1)
            joined.append(torch.cat([anchor[:, None].expand_as(before), before], dim=3).flatten(0, 1))
        return joined[0], joined[1]

    def _to_prompt(self, attn: Any, hidden_states: Tensor, prompt: Tensor | tuple[Tensor, list[Tensor]]) -> Tensor:
        text, pictures = prompt if isinstance(prompt, tuple) else (prompt, [])
        if self.text is None:
            self.text = _key_value(attn, attn.norm_encoder_hidden_states(text) if attn.norm_cross else text)
        kept, weights = [self.text], [1.0]
        if self.ip_adapter is not None:
            if self.image is None:
                self.image = [
                    (_heads(attn, to_k(tokens.flatten(1, 2))), _heads(attn, to_v(tokens.flatten(1, 2))))
                    for tokens, to_k, to_v in zip(
                        pictures, self.ip_adapter.to_k_ip, self.ip_adapter.to_v_ip, strict=True
                    )
                ]
            kept += self.image
            weights += self.ip_adapter.scale
        return _attend(attn, hidden_states, kept, weights, self.state.on_text)


def _attend(
    attn: Any,
    hidden_states: Tensor,
    kept: Sequence[KeyValue],
    weights: Sequence[float] = (1.0,),
    on_text: OnText | None = None,
) -> Tensor:
    """Attention of all frames to keys and values that the frames of a branch share, summed by weight.

    Sharing them, the frames fold into the query axis: one call, nothing repeated.
    """
    batch, n, _ = hidden_states.shape
    branches = len(kept[0][0])
    query = attn.to_q(hidden_states).view(branches, batch // branches * n, attn.heads, -1).transpose(1, 2)
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if on_text is not None:
        on_text(attn, query, kept[0][0])
    out = F.scaled_dot_product_attention(query, *kept[0])
    for (key, value), weight in zip(kept[1:], weights[1:], strict=True):
        out = out + weight * F.scaled_dot_product_attention(query, key, value)
    return _leave(attn, out.transpose(1, 2).reshape(batch, n, attn.heads, -1).transpose(1, 2))


def _kept(key_value: KeyValue | None) -> KeyValue:
    assert key_value is not None, "a batch that reads the anchor came before one that writes it"
    return key_value


def _leave(attn: Any, out: Tensor) -> Tensor:
    """(B·f, heads, n, d) → (B·f, n, C)."""
    return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


def _heads(attn: Any, states: Tensor, norm: Any = None) -> Tensor:
    """(B, n, C) → (B, heads, n, d)."""
    split = states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return split if norm is None else norm(split)


def _key_value(attn: Any, states: Tensor) -> KeyValue:
    """(B, n, C) → K and V, each (B, heads, n, d)."""
    return _heads(attn, attn.to_k(states), attn.norm_k), _heads(attn, attn.to_v(states))


@contextmanager
def anchor_attention(models: Sequence[nn.Module], branches: int, **settings: Any) -> Iterator[AnchorState]:
    """Cross-frame attention in all of `models` (UNet and ControlNets) while the block runs.

    settings: further fields of AnchorState. LoRA layers keep working: they replace the projections, which are called
    as they are. Raises UnsupportedModel, with nothing installed, where a layer can't be covered.
    """
    for model in models:
        _check_covered(model)
    state = AnchorState(branches, **settings)
    installed: list[tuple[Any, dict[str, Any]]] = []
    try:
        for model in models:
            originals = dict(model.attn_processors)  # type: ignore[arg-type]
            installed.append((model, originals))
            ours = {name: AnchorProcessor(state, _ip_adapter(processor)) for name, processor in originals.items()}
            model.set_attn_processor(ours)  # type: ignore[operator]
        yield state
    finally:
        for model, originals in installed:
            model.set_attn_processor(originals)


def _ip_adapter(processor: Any) -> Any:
    return processor if type(processor).__name__ in _IP_ADAPTERS else None


def _check_covered(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        processor = getattr(layer, "processor", None)
        if processor is None or not hasattr(layer, "to_q"):
            continue
        kind = type(processor).__name__
        special = layer.group_norm is not None or layer.spatial_norm is not None or layer.to_k is None
        if kind not in _COVERED + _IP_ADAPTERS or special or getattr(layer, "add_k_proj", None) is not None:
            raise UnsupportedModel(
                f"{type(model).__name__}: attention layer {name} ({kind}) can't take cross-frame attention"
            )
