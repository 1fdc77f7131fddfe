"""Keyed noise: every Gaussian draw is a function of (seed, purpose, frame, step), and of nothing else.

So the noise is the same for every chunk size, device, number of workers and point of resumption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

# What a draw is for: the start of the denoising, the motion's noising, a stochastic sampler's step.
Purpose = Literal["initial", "motion", "step"]


def generator(seed: int, purpose: Purpose, frame: int, step: int = 0) -> torch.Generator:
    """A CPU generator at the start of the stream that belongs to the key."""
    key = f"{seed}/{purpose}/{frame}/{step}".encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little", signed=True))


def draw(seed: int, purpose: Purpose, frames: Sequence[int], shape: tuple[int, ...], step: int = 0) -> Tensor:
    """Standard normal noise, one independent draw a frame: float32 (len(frames), *shape) on the CPU."""
    # The dtype is said: torch's default may be another for a moment, while a half-precision model is loaded.
    return torch.stack(
        [torch.randn(shape, generator=generator(seed, purpose, frame, step), dtype=torch.float32) for frame in frames]
    )
