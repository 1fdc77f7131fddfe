"""Depth by a monocular estimator of transformers, normalised over the whole clip: near is bright.

With a range of its own for each frame, an object that comes nearer would darken a background at rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2vz.clip import allocate
from t2vz.conditions import ConditionOptions, Extracted, Frames
from t2vz.conditions.loading import load, transformers_model
from t2vz.errors import ConditionError, UnsupportedModel

# Percentiles of the clip that become black and white: a few stray pixels must not set the range.
PERCENTILES = (2.0, 98.0)
# Values that the percentiles are taken from at most; 67 MB as float32.
_SAMPLE = 2**24
# Distances below this, in the model's unit (metres), count as this, so that their inverse is finite.
_NEAREST = 1e-3


def extract(frames: Frames, options: ConditionOptions) -> Extracted:
    """Inverse depth in three equal channels, 255 nearest: uint8 (F, H, W, 3) from RGB frames of that shape.

    The float32 predictions of the whole clip are kept, at the model's resolution; of a long one on disk.
    """
    depth = predict(frames, options)
    _, height, width, _ = frames.shape
    pictures = render(depth, height, width, options.workspace)
    if pictures.any():
        return pictures, ()
    return pictures, ("depth is the same everywhere in the clip: the depth condition is black",)


def predict(frames: Frames, options: ConditionOptions) -> NDArray[np.float32]:
    """Inverse depth, larger is nearer, in no particular unit: float32 (F, h, w) at the model's resolution."""
    import torch

    processor, model = load(_loader, options.depth_model, options.device, "depth_model")
    distance = gives_distance(model.config, options.depth_model)
    source = frames.shape[1:3]
    clip: NDArray[np.float32] | None = None
    for start in range(0, len(frames), options.batch_size):
        batch = np.asarray(frames[start : start + options.batch_size])
        inputs = processor(images=list(batch), input_data_format="channels_last", return_tensors="pt")
        with torch.inference_mode():
            outputs = model(pixel_values=inputs["pixel_values"].to(options.device))
        prediction = outputs.predicted_depth
        if model.config.model_type == "zoedepth":
            prediction = _unpadded(processor, outputs, source)
        if distance:
            prediction = 1 / prediction.clamp(min=_NEAREST)
        if clip is None:
            clip = allocate((len(frames), *prediction.shape[1:]), options.workspace, np.float32)
        clip[start : start + len(batch)] = prediction.float().cpu().numpy()
        if not np.isfinite(clip[start : start + len(batch)]).all():
            raise ConditionError(f"depth_model {options.depth_model}: predicts NaN or infinite depth; name another")
    assert clip is not None  # F >= 1
    return clip


def gives_distance(config: Any, reference: str) -> bool:
    """True if a model of this transformers configuration predicts distance, False if inverse depth.

    Raises UnsupportedModel for model types of which that isn't known: guessing would swap near and far.
    """
    match config.model_type:
        case "depth_anything" | "prompt_depth_anything":
            return config.depth_estimation_type == "metric"
        case "dpt":  # MiDaS's predict inverse depth; those on DINOv2 were trained on distance (NYU, KITTI)
            return getattr(config.backbone_config, "model_type", None) == "dinov2"
        case "zoedepth" | "glpn":
            return True
        case "depth_pro":  # before its post-processing, which is not used
            return False
    raise UnsupportedModel(
        f"depth_model {reference}: a {config.model_type} model; "
        "name one of Depth Anything, DPT, ZoeDepth, GLPN or Depth Pro"
    )


def render(depth: NDArray[np.float32], height: int, width: int, workspace: Path | None = None) -> Frames:
    """Inverse depth (F, h, w) as pictures of one range for the whole clip: uint8 (F, height, width, 3)."""
    import cv2

    low, high = value_range(depth)
    pictures = allocate((len(depth), height, width, 3), workspace)
    method = cv2.INTER_AREA if depth[0].size > height * width else cv2.INTER_CUBIC
    for plane, picture in zip(depth, pictures, strict=True):
        level = cv2.resize(normalise(plane, low, high), (width, height), interpolation=method)
        picture[:] = np.rint(level.clip(0, 1) * 255)[..., None]
    return pictures


def value_range(depth: NDArray[np.float32]) -> tuple[float, float]:
    """The values of `depth` (F, h, w) that become 0 and 1; equal only if all of it is equal."""
    step = int(np.ceil(np.sqrt(max(1.0, depth.size / _SAMPLE))))
    low, high = np.percentile(depth[:, ::step, ::step], PERCENTILES)
    if low == high:  # almost all is background: the object must not vanish with it
        low, high = depth.min(), depth.max()
    return float(low), float(high)


def normalise(depth: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    """`depth` with low → 0 and high → 1, clipped; all 0 if low == high. float32 of the same shape."""
    if low == high:
        return np.zeros_like(depth)
    return np.clip((depth - np.float32(low)) / np.float32(high - low), 0, 1)


def _unpadded(processor: Any, outputs: Any, source: tuple[int, int]) -> Any:
    """ZoeDepth's prediction at its own resolution without the border that its processor pads frames with."""
    import torch

    count, height, width = outputs.predicted_depth.shape
    done = processor.post_process_depth_estimation(outputs, [source] * count, [(height, width)] * count)
    return torch.stack([each["predicted_depth"] for each in done])


def _loader(reference: str, device: str) -> tuple[Any, Any]:
    return transformers_model("AutoModelForDepthEstimation", reference, device)
