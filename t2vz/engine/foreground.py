"""Background smoothing (paper, eq. 10), and the foreground that it spares: where the prompt's words attend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from t2vz.engine.attention import AnchorState

# UNet layers have 1, 1/2, 1/4, … of the latent's side. Words have their places where it is a quarter (16×16 for
# 512 px): coarser maps are blobs, finer ones follow texture (Hertz et al., arXiv 2208.01626).
_MEDIUM = 2


def smooth(latents: Tensor, background: Tensor, masks: Tensor, weight: float) -> Tensor:
    """Outside the foreground, the weighted sum of each frame's own latents and of `background`.

    latents, background: (N, C, h, w), of one noise level. masks: bool (N, h, w), True is foreground.
    weight: a of eq. 10, a frame's own share; 1 leaves all as it is.
    """
    return torch.where(masks[:, None], latents, weight * latents + (1 - weight) * background)


def to_cells(masks: NDArray[np.bool_], latent_size: tuple[int, int]) -> Tensor:
    """bool (F, H, W) → bool (F, h, w): a latent cell is foreground if any of its pixels is. H and W are multiples
    of h and w."""
    count, height, width = masks.shape
    h, w = latent_size
    return torch.from_numpy(masks.reshape(count, h, height // h, w, width // w).any(axis=(2, 4)))


def positions(tokens: Sequence[int], words: Sequence[int]) -> list[int]:
    """Positions in `tokens` that belong to an occurrence of the sequence `words`."""
    starts = (i for i in range(len(tokens) - len(words) + 1) if list(tokens[i : i + len(words)]) == list(words))
    return sorted({start + i for start in starts for i in range(len(words))})


@dataclass
class WordMaps:
    """How much each place of a picture attends to some tokens of its prompt, summed over layers and steps.

    tokens: their positions. maps: number of places n of a layer → float32 (n,).
    """

    tokens: list[int]
    maps: dict[int, Tensor] = field(default_factory=dict)

    def add(self, attn: Any, query: Tensor, key: Tensor) -> None:
        """query: (B, heads, n, d), of one frame. key: (B, heads, m, d). The prompt's branch is the last."""
        scores = query[-1].float() @ key[-1].float().transpose(1, 2) * query.shape[-1] ** -0.5
        share = scores.softmax(-1)[..., self.tokens].sum(-1).mean(0)
        self.maps[len(share)] = self.maps.get(len(share), 0) + share

    def mask(self, latent_size: tuple[int, int]) -> Tensor:
        """Where more than usual attends to the tokens, by Otsu's threshold: bool (h, w), on the CPU.

        Of the layers nearest to a quarter of the latent's side. Nothing is foreground if all attends alike.
        """
        h, w = latent_size
        levels = [(-(-h // 2**i), -(-w // 2**i)) for i in range(max(h, w).bit_length() + 1)]  # as strided layers round
        near_first = sorted(range(len(levels)), key=lambda i: abs(i - _MEDIUM))
        rows, columns = next(levels[i] for i in near_first if levels[i][0] * levels[i][1] in self.maps)
        places = self.maps[rows * columns].view(1, 1, rows, columns).cpu()
        share = F.interpolate(places, (h, w), mode="bilinear", align_corners=False)[0, 0].numpy()
        low, high = share.min(), share.max()
        if high - low <= 1e-6 * high:  # rounding, not a map
            return torch.zeros(h, w, dtype=torch.bool)
        grey = np.rint((share - low) / (high - low) * 255).astype(np.uint8)
        return torch.from_numpy(cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[1].astype(bool))


@contextmanager
def watching(state: AnchorState, tokens: list[int]) -> Iterator[WordMaps]:
    """Sum up the attention to `tokens` of all that is denoised in the block: one frame."""
    seen = WordMaps(tokens)
    state.on_text = seen.add
    try:
        yield seen
    finally:
        state.on_text = None
