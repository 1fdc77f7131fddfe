"""Edges by Canny's detector, as the canny ControlNets were trained on: white on black."""

from __future__ import annotations

import numpy as np

from t2vz.clip import allocate
from t2vz.conditions import ConditionOptions, Extracted, Frames


def extract(frames: Frames, options: ConditionOptions) -> Extracted:
    """Edge maps, 0 or 255 in three equal channels: uint8 (F, H, W, 3) from RGB frames of that shape."""
    import cv2

    edges = allocate(frames.shape, options.workspace)
    for frame, edge in zip(frames, edges, strict=True):
        # On colour, not grey: OpenCV then takes a pixel's strongest channel, as in ControlNet's training.
        edge[:] = cv2.Canny(np.ascontiguousarray(frame), options.canny_low, options.canny_high)[..., None]
    return edges, ()
