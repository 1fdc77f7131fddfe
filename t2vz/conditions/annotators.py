"""What the conditions of controlnet-aux share: a quiet import, safe loading, and undistorted frames.

Its weights are pickles, which may carry code. controlnet-aux 0.0.10 reads them with a plain `torch.load`,
which from torch 2.6 on takes tensors only (`weights_only=True`): a file with anything else in it is refused
with a ModelError. (The environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD undoes that: don't set it.)
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from t2vz.clip import allocate
from t2vz.conditions import Frames
from t2vz.conditions.loading import fetch

_MULTIPLE_PX = 64

_log = logging.getLogger(__name__)


@contextmanager
def controlnet_aux() -> Iterator[Any]:
    """The module controlnet_aux; what any thread prints in the block goes to the log, at debug level."""
    # It sets this one, which hides real clashes of OpenMP libraries.
    kmp = os.environ.get("KMP_DUPLICATE_LIB_OK")
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import controlnet_aux as module

            yield module
        finally:
            if kmp is None:
                os.environ.pop("KMP_DUPLICATE_LIB_OK", None)
    if printed.getvalue():
        _log.debug("controlnet-aux: %s", printed.getvalue().strip())


def detector(class_name: str, files: tuple[str, ...], reference: str, device: str) -> Any:
    """A detector of controlnet-aux with its weights, `files` of the folder or hub id `reference`."""
    folder = fetch(reference, files)
    with controlnet_aux() as module:
        return getattr(module, class_name).from_pretrained(str(folder)).to(device)


def annotate(detect: Any, frames: Frames, workspace: Path | None = None) -> Frames:
    """What a detector makes of each RGB frame, undistorted and of the frames' size: uint8 (F, H, W, 3).

    The detectors stretch a picture until both sides are multiples of 64. So frames are padded to such sizes
    with their last row and column, detected at exactly that size, and cut.
    """
    import cv2

    _, height, width, _ = frames.shape
    below, right = -height % _MULTIPLE_PX, -width % _MULTIPLE_PX
    shorter = min(height + below, width + right)
    out = allocate(frames.shape, workspace)
    for frame, picture in zip(frames, out, strict=True):
        padded = cv2.copyMakeBorder(np.ascontiguousarray(frame), 0, below, 0, right, cv2.BORDER_REPLICATE)
        detected = detect(padded, detect_resolution=shorter, image_resolution=shorter, output_type="np")
        picture[:] = detected[:height, :width]
    return out
