"""What makes the engine faster without changing what it computes: work shared by the guidance branches, and compiled
regions for GPUs. Both leave the lockstep loop as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from t2vz.engine.attention import AnchorState

# Where the norms and activations are: elementwise work that a compiler fuses into the matrix products around it.
_REGIONS = ("Transformer2DModel", "BasicTransformerBlock", "ResnetBlock2D")
# A region is compiled for each shape of its layers (Stable Diffusion's UNet has 4 of transformers and 14 of
# residual blocks), for batches that write the anchor's keys and values and for those that read them, and for the
# sizes of a chunk: the anchor alone, a full one, the last. Torch's own limit is 8 and falls back to eager silently.
_RECOMPILE_LIMIT = 512


@contextmanager
def shared_beginning(models: Sequence[nn.Module], state: AnchorState, same: Sequence[int]) -> Iterator[None]:
    """While the block runs, compute what comes before the first look at the prompt once, not once a branch.

    Up to the first cross-attention the guidance branches of a UNet or ControlNet differ in nothing: the first
    convolution, the first residual block and the first self-attention (the largest there is) see the same latents.

    models: with `anchor_attention` installed, of which `state` is. Models whose branches differ from the start, as
    SDXL's by their pooled prompts, and those without attention in their first block, are left as they are.
    same: for each branch, the first branch that is given the same latents: (0, 0) for classifier-free guidance,
    (0, 1, 1) for InstructPix2Pix, whose first branch sees no source. While there is another number of branches
    (guidance cut off), nothing is shared.
    """
    undo: list[Any] = []
    try:
        for model in models if len(set(same)) < len(same) else ():
            attention = _first_self_attention(model)
            if attention is None:
                continue
            parts: Any = [model.conv_in, getattr(model, "controlnet_cond_embedding", None)]
            parts.append(model.down_blocks[0].resnets[0])  # type: ignore[index, union-attr]
            for module in filter(None, parts):
                before = module.register_forward_pre_hook(partial(_narrow, state, same), with_kwargs=True)
                undo += [before.remove, module.register_forward_hook(partial(_widen, state, same)).remove]
            undo.append(partial(attention.set_processor, attention.processor))
            attention.set_processor(_SharedAttention(attention.processor, same))
        yield
    finally:
        for put_back in undo:
            put_back()


class _SharedAttention:
    """An AnchorProcessor of a layer whose input is the same in several branches."""

    def __init__(self, processor: Any, same: Sequence[int]) -> None:
        self.processor = processor
        self.same = same

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        state = self.processor.state
        branches = state.branches
        if branches != len(self.same):
            return self.processor(attn, hidden_states, encoder_hidden_states)
        state.branches = len(set(self.same))
        try:
            out = self.processor(attn, _distinct(hidden_states, self.same), encoder_hidden_states)
        finally:
            state.branches = branches
        return _spread(out, self.same)


def _first_self_attention(model: Any) -> Any:
    """The layer, or None if the branches differ before it or there is none in the model's first block."""
    config = model.config
    if any(config.get(name) for name in ("addition_embed_type", "class_embed_type", "only_cross_attention")):
        return None
    attentions = getattr(model.down_blocks[0], "attentions", None)
    blocks = getattr(attentions[0], "transformer_blocks", None) if attentions else None
    return None if not blocks else blocks[0].attn1


def _narrow(
    state: AnchorState, same: Sequence[int], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if state.branches == len(same):
        args = tuple(_distinct(each, same) if isinstance(each, Tensor) else each for each in args)
    return args, kwargs


def _widen(state: AnchorState, same: Sequence[int], module: nn.Module, args: object, out: Tensor) -> Tensor:
    return _spread(out, same) if state.branches == len(same) else out


def _distinct(x: Tensor, same: Sequence[int]) -> Tensor:
    """(B·f, …) → the rows of the branches that differ."""
    branches = x.unflatten(0, (len(same), -1))
    return torch.cat([branches[branch] for branch in sorted(set(same))])


def _spread(x: Tensor, same: Sequence[int]) -> Tensor:
    """The inverse of `_distinct`."""
    order = sorted(set(same))
    branches = x.unflatten(0, (len(order), -1))
    return torch.cat([branches[order.index(branch)] for branch in same])


def compile_regions(model: nn.Module, *, backend: str = "inductor") -> None:
    """Have the model's repeated blocks compiled, each at its first call. For a model that makes many clips on a GPU:
    compiling takes minutes, and on the CPU it gains little. A second call changes nothing.

    Shapes are static, so a chunk of another size compiles anew; `chunk_size` should divide the frames. Not with CUDA
    graphs of torch's own (mode="reduce-overhead"): their outputs are overwritten by the next replay, and the anchor's
    keys and values are outputs of one call that later calls read. `engine.graphs` records what is compiled here.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    for module in model.modules():
        if type(module).__name__ in _REGIONS and module._compiled_call_impl is None and _is_small(module):
            module.compile(backend=backend, dynamic=False)


def _is_small(module: Any) -> bool:
    """SDXL has up to ten blocks in a transformer, all alike: one of them is compiled then, not all in a row."""
    blocks = getattr(module, "transformer_blocks", ())
    return len(blocks) <= 1
