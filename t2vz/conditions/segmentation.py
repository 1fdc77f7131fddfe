"""The foreground of frames by a semantic segmentation model of transformers: what is not its background class.

Salient-object models that bring code of their own (BiRefNet, RMBG) are not loaded: remote code is refused.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2vz.conditions import Frames
from t2vz.conditions.loading import load, transformers_model
from t2vz.errors import ConditionError, UnsupportedModel, translating

_BACKGROUND = re.compile(r"(?i)background|bg")
_UNNAMED = re.compile(r"LABEL_\d+")


def foreground(frames: Frames, model: str, device: str = "cpu", batch_size: int = 4) -> NDArray[np.bool_]:
    """True where a frame shows anything but background: bool (F, H, W) from uint8 (F, H, W, 3), RGB.

    model: folder or hub id of a transformers model for semantic segmentation, with a class that is called
        background, with unnamed classes of which 0 is the background, or with one class: the foreground.
    device: torch device. batch_size: frames that the model sees at once; memory and speed only.
    Raises ModelError and its kinds, ConditionError, OutOfDeviceMemory, DeviceLost.
    """
    import torch
    import torch.nn.functional as F

    processor, network = load(_loader, model, device, "segmentation_model")
    background = background_classes(network.config, model)
    # Some processors crop the middle out, which classification wants and masks of the whole picture don't.
    whole = {"do_center_crop": False} if getattr(processor, "do_center_crop", None) else {}
    masks = np.empty(frames.shape[:3], bool)
    for start in range(0, len(frames), batch_size):
        batch = list(np.asarray(frames[start : start + batch_size]))
        with translating("conditions", f"segmentation_model {model}"), torch.inference_mode():
            inputs = processor(images=batch, input_data_format="channels_last", return_tensors="pt", **whole)
            logits = network(pixel_values=inputs["pixel_values"].to(device)).logits.float()
            margin = _margin(logits, background)
            margin = F.interpolate(margin, frames.shape[1:3], mode="bilinear", align_corners=False)
        if not torch.isfinite(margin).all():
            raise ConditionError(f"segmentation_model {model}: predicts NaN or infinite values; name another")
        masks[start : start + len(batch)] = (margin[:, 0] > 0).cpu().numpy()
    return masks


def background_classes(config: Any, model: str) -> list[int]:
    """Numbers of the background's classes in a transformers configuration; none if its one class is the foreground.

    Raises UnsupportedModel where classes have names and none is the background's.
    """
    names = config.id2label
    if len(names) == 1:
        return []
    found = [number for number, name in names.items() if _BACKGROUND.fullmatch(name.strip())]
    if 0 < len(found) < len(names):
        return found
    if all(_UNNAMED.fullmatch(name) for name in names.values()):
        return [0]
    raise UnsupportedModel(
        f"segmentation_model {model}: none of its {len(names)} classes is called background; "
        "name one that tells things from background (trained on Pascal VOC, say)"
    )


def _margin(logits: Any, background: list[int]) -> Any:
    """By how much the likeliest thing beats the background: (N, classes, h, w) → (N, 1, h, w)."""
    if not background:
        return logits
    things = [number for number in range(logits.shape[1]) if number not in background]
    return logits[:, things].amax(1, keepdim=True) - logits[:, background].amax(1, keepdim=True)


def _loader(reference: str, device: str) -> tuple[Any, Any]:
    processor, model = transformers_model("AutoModelForSemanticSegmentation", reference, device)
    # The head of a model for something else would be made up of random weights.
    trained_for = (model.config.architectures or ["nothing known"])[0]
    if not trained_for.endswith("ForSemanticSegmentation"):
        raise UnsupportedModel(
            f"segmentation_model {reference}: a {trained_for}; name one that ends in ForSemanticSegmentation"
        )
    return processor, model
