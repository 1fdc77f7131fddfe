"""Soft edges by HED (holistically-nested edge detection): bright on black."""

from __future__ import annotations

from typing import Any

from t2vz.conditions import ConditionOptions, Extracted, Frames
from t2vz.conditions.annotators import annotate, detector
from t2vz.conditions.loading import load

FILES = ("ControlNetHED.pth",)


def extract(frames: Frames, options: ConditionOptions) -> Extracted:
    """Soft edges: uint8 (F, H, W, 3) from RGB frames of that shape."""
    return annotate(load(_loader, options.annotators, options.device, "annotators"), frames, options.workspace), ()


def _loader(reference: str, device: str) -> Any:
    return detector("HEDdetector", FILES, reference, device)
