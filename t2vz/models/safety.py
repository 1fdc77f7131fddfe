"""What the model's own safety checker makes of finished frames. It judges them one by one, as pictures."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2vz.errors import is_out_of_memory
from t2vz.models import LOADING, loading
from t2vz.spec import JobSpec

_asking = threading.Lock()  # rows share the model, and one of them may move it


class Checker:
    """diffusers' StableDiffusionSafetyChecker with its image processor. May be used by several threads."""

    def __init__(self, model: Any, extractor: Any) -> None:
        self._model, self._extractor = model, extractor

    def flagged(self, frames: NDArray[np.uint8]) -> list[bool]:
        """For each of the frames, uint8 (F, H, W, 3), RGB, whether it shows what the model shall not show."""
        with _asking:
            try:
                return self._flagged(frames)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self._model.device.type == "cpu":
                    raise
            with LOADING:
                self._model.to("cpu")  # what generates needs the device's memory more; a frame takes some 0.3 s here
            return self._flagged(frames)

    def _flagged(self, frames: NDArray[np.uint8]) -> list[bool]:
        import torch
        from PIL import Image

        pixels = self._extractor([Image.fromarray(frame) for frame in frames], return_tensors="pt").pixel_values
        with torch.no_grad():
            # It blackens the pictures that it is handed: none of ours.
            _, flags = self._model(
                clip_input=pixels.to(self._model.device, self._model.dtype), images=[np.empty(0)] * len(frames)
            )
        return [bool(flag) for flag in flags]


def checker(spec: JobSpec, device: str) -> Checker | None:
    """The checker of the row's model; None if it has none. To be called where models are loaded. Raises ModelError."""
    found = loading.safety_checker(spec, device)
    if found is None:
        return None
    # Its warning says that a black picture is returned.
    logging.getLogger("diffusers.pipelines.stable_diffusion.safety_checker").setLevel(logging.ERROR)
    return Checker(*found)
