"""The modes: a model's components and arrays in, latents of frames out. A mode is a file and a line in MODES."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from t2vz.spec import JobSpec

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
    start, on_snapshot: to go on from a snapshot of the same request, and to be offered some (`engine.lockstep`).
    """

    spec: JobSpec
    seed: int
    width: int
    height: int
    frames: int
    source: NDArray[np.uint8] | None = None
    conditions: tuple[NDArray[np.uint8], ...] = ()
    on_step: Callable[[int], None] = lambda evaluations: None
    start: Snapshot | None = None
    on_snapshot: OnSnapshot = lambda take: None


@dataclass(frozen=True)
class Generated:
    """latents: float32 (F, C, h, w), clean; `engine.vae.decode` makes frames of them.
    evaluations: UNet evaluations that they took. warnings: what the user should know.
    """

    latents: Tensor
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
