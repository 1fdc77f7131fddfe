"""Surface normals by NormalBAE, in the colours that the normalbae ControlNet was trained on."""

from __future__ import annotations

from typing import Any

from t2vz.conditions import ConditionOptions, Extracted, Frames
from t2vz.conditions.annotators import annotate, detector
from t2vz.conditions.loading import load

FILES = ("scannet.pt",)


def extract(frames: Frames, options: ConditionOptions) -> Extracted:
    """Surface normals: uint8 (F, H, W, 3) from RGB frames of that shape."""
    return annotate(load(_loader, options.annotators, options.device, "annotators"), frames, options.workspace), ()


def _loader(reference: str, device: str) -> Any:
    return detector("NormalBaeDetector", FILES, reference, device)
