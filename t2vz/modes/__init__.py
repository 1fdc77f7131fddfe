"""The modes: a model's components and arrays in, latents of frames out. A mode is a file and a line in MODES."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from t2vz.spec import TEXT_FPS, JobSpec

if TYPE_CHECKING:  # torch is imported where a mode runs
    from torch import Tensor

    from t2vz.engine.lockstep import OnSnapshot, Snapshot
    from t2vz.models.loading import Components


@dataclass(frozen=True)
class Request:
    """What a mode is asked for.

    spec: the row. seed: of all noise. width, height: px, multiples of 8. frames: F.
    source: uint8 (F, H, W, 3), RGB, the frames to edit; None in the other modes.
    conditions: one uint8 (F, H, W, 3) for each of spec.condition; empty in the other modes.
    on_step: called with the number of UNet evaluations since its last call.
    fps: frames a second, which motion in units a second goes by. picture: uint8 (H, W, 3), RGB, the IP-Adapter's.
    scenes: frames at which the source's scenes begin. masks: bool (F, H, W), the foreground that smoothing spares,
    if a video gives it; segment: what finds it in finished frames, uint8 (F, H, W, 3) → bool (F, H, W).
    part: (i, n), which of n parts of the frames to make; the anchors are made in each.
    start, on_snapshot: to go on from a snapshot of the same request, and to be offered some (`engine.lockstep`).
    """

    spec: JobSpec
    seed: int
    width: int
    height: int
    frames: int
    source: NDArray[np.uint8] | None = None
    conditions: tuple[NDArray[np.uint8], ...] = ()
    fps: Fraction = TEXT_FPS
    picture: NDArray[np.uint8] | None = None
    scenes: tuple[int, ...] = (0,)
    masks: NDArray[np.bool_] | None = None
    segment: Callable[[NDArray[np.uint8]], NDArray[np.bool_]] | None = None
    part: tuple[int, int] = (0, 1)
    on_step: Callable[[int], None] = lambda evaluations: None
    start: Snapshot | None = None
    on_snapshot: OnSnapshot = lambda take: None


@dataclass(frozen=True)
class Generated:
    """latents: float32 (F, C, h, w), clean; `engine.vae.decode` makes frames of them.
    indices: number of each in the clip: all of it, but for a request for a part.
    evaluations: UNet evaluations that they took. warnings: what the user should know.
    """

    latents: Tensor
    indices: tuple[int, ...]
    evaluations: int
    warnings: tuple[str, ...] = field(default=())


MODES: dict[str, str] = {
    "text": "t2vz.modes.text",
    "control": "t2vz.modes.control",
    "edit": "t2vz.modes.edit",
}


def generate(components: Components, request: Request) -> Generated:
    """Run the row's mode."""
    mode: Any = importlib.import_module(MODES[request.spec.mode])
    return mode.generate(components, request)
