"""Control signals from frames: the table of conditions, and what every one of them shares.

A condition is one file with `extract(frames, options)` and a line in CONDITIONS. Nothing heavy is imported
before a condition is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from t2vz.errors import ConditionError, translating
from t2vz.spec import JobSpec

Frames = NDArray[np.uint8]  # (F, H, W, 3), RGB
Extracted = tuple[Frames, tuple[str, ...]]  # condition frames, and warnings that the user should see


@dataclass(frozen=True)
class Condition:
    """module: where its `extract` is. controlnet: the condition whose ControlNet reads it."""

    module: str
    controlnet: str


CONDITIONS: dict[str, Condition] = {
    "edge": Condition("t2vz.conditions.edge", "edge"),
    "depth": Condition("t2vz.conditions.depth", "depth"),
    "pose": Condition("t2vz.conditions.pose", "pose"),
    "openpose": Condition("t2vz.conditions.openpose", "pose"),
    "hed": Condition("t2vz.conditions.hed", "hed"),
    "lineart": Condition("t2vz.conditions.lineart", "lineart"),
    "normal": Condition("t2vz.conditions.normal", "normal"),
}


@dataclass(frozen=True)
class ConditionOptions:
    """How conditions are extracted. Models are folders, hub ids or names of embedded ones (`mini/depth`).

    canny_low, canny_high: Canny thresholds in levels.
    device: torch device of the annotator models ("cpu", "cuda:0").
    batch_size: frames, or persons, that a model sees at once; memory and speed only.
    workspace: folder for the arrays of a long clip (see `clip.allocate`).
    person_threshold: score, 0 to 1, from which a detection counts as a person.
    keypoint_threshold: score, 0 to 1, from which a keypoint is drawn.
    """

    depth_model: str
    pose_model: str
    person_detector: str
    annotators: str
    canny_low: int = 100
    canny_high: int = 200
    device: str = "cpu"
    batch_size: int = 4
    workspace: Path | None = None
    person_threshold: float = 0.5
    keypoint_threshold: float = 0.3

    @classmethod
    def of(
        cls, spec: JobSpec, device: str = "cpu", batch_size: int = 4, workspace: Path | None = None
    ) -> ConditionOptions:
        """The row's options; models that the row doesn't name are its model family's usual ones."""
        from t2vz.models.table import annotator_references

        models = annotator_references(spec)
        return cls(
            depth_model=models["depth"],
            pose_model=models["pose"],
            person_detector=models["detector"],
            annotators=models["annotators"],
            canny_low=spec.canny_low,
            canny_high=spec.canny_high,
            device=device,
            batch_size=batch_size,
            workspace=workspace,
        )


def extract(name: str, frames: Frames, options: ConditionOptions) -> Extracted:
    """The condition frames of a clip, and warnings that the user should see.

    frames: uint8 (F, H, W, 3), RGB, F >= 1; may be a memory map. The result has the same shape.
    Raises ConditionError, ModelError and its kinds, OutOfDeviceMemory, DeviceLost.
    """
    if name not in CONDITIONS:
        raise ConditionError(f"no condition `{name}`; there are {', '.join(CONDITIONS)}")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ConditionError(
            f"{name} needs frames as uint8 (F, H, W, 3), not empty, but got {frames.dtype} {frames.shape}"
        )
    with translating("conditions", name):
        return import_module(CONDITIONS[name].module).extract(frames, options)


def fit_condition(frames: Frames, count: int) -> Extracted:
    """The first `count` frames of an already rendered condition, with a warning if that leaves some out.

    Raises ConditionError if there are too few: a condition is never repeated or slowed down to fit.
    """
    given = len(frames)
    check_condition_length(given, count)
    if given == count:
        return frames, ()
    return frames[:count], (f"condition video cut from {given} to {count} frames",)


def check_condition_length(given: int, count: int) -> None:
    """Raise ConditionError if a rendered condition of `given` frames can't control `count`."""
    if given < count:
        raise ConditionError(
            f"the condition video has {given} frame{'' if given == 1 else 's'}, but {count} are asked for; "
            f"lower video_length to {given} or give a longer video"
        )
