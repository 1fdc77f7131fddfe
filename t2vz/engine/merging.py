"""Token merging for self-attention (Bolya & Hoffman, Token Merging for Fast Stable Diffusion, arXiv 2303.17604).

A lossy step: like tokens are averaged before the attention and given its result alike. Each frame is merged by
itself and without chance, so that the frames stay independent of chunks and processes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Change = Callable[[Tensor], Tensor]


def bipartite(tokens: Tensor, h: int, w: int, ratio: float) -> tuple[Change, Change]:
    """How to merge the part `ratio` of the tokens into their likest neighbours, and how to undo it.

    tokens: (N, h·w, C), row by row. ratio: 0 … 0.75; the upper left token of each 2 × 2 cells takes in others, so
    no more than the other three can go. Returns functions (N, h·w, C) → (N, n, C) and (N, n, C) → (N, h·w, C),
    n = h·w − ⌊ratio · h·w⌋ or the number of cells if that is more.
    """
    count = h * w
    grid = torch.arange(count, device=tokens.device).view(h, w)
    # Not by a mask: the host would have to ask the device how many it picks.
    into = grid[::2, ::2].flatten()
    others = torch.cat([grid[::2, 1::2].flatten(), grid[1::2].flatten()]).sort().values
    going = min(int(ratio * count), len(others))
    unit = F.normalize(tokens.float(), dim=-1)
    likeness, nearest = (unit[:, others] @ unit[:, into].mT).max(dim=-1)  # (N, others) each
    order = likeness.argsort(dim=-1, descending=True, stable=True)
    gone, stay = order[:, :going], order[:, going:]
    target = nearest.gather(1, gone)  # the position in `into` that each takes
    # A matrix product adds in a fixed order; scatter_reduce on a GPU and index_put on the CPU do not, and a rerun would
    # round differently. The matrix is smaller than `likeness`.
    taking = torch.arange(len(into), device=tokens.device)[:, None] == target[:, None]  # (N, into, gone)
    taken = 1 + taking.sum(dim=-1, keepdim=True)

    def picked(states: Tensor, which: Tensor) -> Tensor:
        return states[:, others].gather(1, _wide(which, states))

    def merge(states: Tensor) -> Tensor:
        joined = (states[:, into] + taking.to(states.dtype) @ picked(states, gone)) / taken
        return torch.cat([picked(states, stay), joined.to(states.dtype)], dim=1)

    def unmerge(states: Tensor) -> Tensor:
        kept, joined = states.split([stay.shape[1], len(into)], dim=1)
        whole = states.new_empty(len(states), count, states.shape[2])
        whole[:, into] = joined
        whole.scatter_(1, _wide(others[stay], states), kept)
        return whole.scatter_(1, _wide(others[gone], states), joined.gather(1, _wide(target, states)))

    return merge, unmerge


def _wide(index: Tensor, states: Tensor) -> Tensor:
    return index[:, :, None].expand(-1, -1, states.shape[2])
