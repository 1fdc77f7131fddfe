"""Measures on finished frames that need no ground truth: flicker, warp error, seams, drift, edges, CLIP.

They are made of frames as they pass, before encoding: of a clip only a frame or two are held.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2vz.errors import UnsupportedModel

Frame = NDArray[np.uint8]  # (H, W, 3), RGB

# Optical flow is computed, and warp error measured, on frames reduced to this longer side: about 15 pairs a second.
FLOW_PX = 512
# A frame with no level above this is black; the mean difference, in levels, below which a frame repeats the last one.
_BLACK_LEVEL = 15
_FROZEN_LEVELS = 0.1
_FLICKER_GRID = 8
# An edge pixel is found again if there is one among it and its eight neighbours.
EDGE_TOLERANCE_PX = 1.5

_CLIP_FILES = ("config.json", "preprocessor_config.json", "model.safetensors", "vocab.json", "merges.txt",
               "tokenizer_config.json")  # fmt: skip


def measure(frames: Iterable[NDArray[np.uint8]], **settings: Any) -> dict[str, float]:
    """The measures of a clip, by name; those that it is too short for, or that nothing is given for, are left out.

    frames: batches of uint8 (f, H, W, 3), RGB; for an array of a whole clip give `[array]`.
    settings: `Meter`'s. Raises ModelError and its kinds.

    black_frames: share of the frames that have no level above 15.
    frozen_frames: share of the frames from the second on that differ from the one before by less than 0.1 levels.
    flicker: mean |m_t − (m_{t−1} + m_{t+1}) / 2| of the mean luma m of each field of an 8 × 8 grid, in levels.
        Steady fading and slow motion give about 0.
    warp_error: see `warp_error`, by optical flow, mean over neighbouring frames.
    flow_coverage: share of the pixels that entered into it; where it is low, the flow found nothing to follow.
    seam_ratio: mean warp error between chunks of `chunk_size` ÷ mean within them.
    colour_drift: CIELAB distance (ΔE 1976) of the mean colours of the first and the last frame.
    edge_f1: see `edge_f1`, mean over frames.
    clip_frame_consistency: mean cosine of the CLIP embeddings of neighbouring frames.
    clip_prompt_consistency: mean cosine of the CLIP embeddings of frame and prompt. (Tables in papers show 100 times
        these two.)
    """
    meter = Meter(**settings)
    for batch in frames:
        meter.add(batch)
    return meter.values()


class Meter:
    """Measures frames as they come.

    chunk_size: frames that were denoised together. edges: the edge condition, uint8 (F, H, W, 3), whose extraction
    had the thresholds `canny`. prompt: what the frames should show, for CLIP. clip_model: folder or hub id of a
    CLIPModel (safetensors). device: CLIP's.
    """

    def __init__(
        self,
        *,
        chunk_size: int | None = None,
        edges: NDArray[np.uint8] | None = None,
        canny: tuple[int, int] = (100, 200),
        prompt: str = "",
        clip_model: str | None = None,
        device: str = "cpu",
    ) -> None:
        self._chunk_size, self._edges, self._canny = chunk_size, edges, canny
        self._clip = None if clip_model is None else ClipScores(clip_model, prompt, device)
        self._black: list[bool] = []
        self._frozen: list[bool] = []
        self._flickers: list[float] = []
        self._edge_f1: list[float] = []
        self._coverage: list[float] = []
        self._last: Frame | None = None
        self._luma: list[NDArray[np.float32]] = []
        self._first_colour = self._last_colour = np.zeros(3)
        self.warp_errors: list[float | None] = []
        """Of each pair of neighbouring frames; None where the flow covers nothing."""

    def add(self, frames: NDArray[np.uint8]) -> None:
        """The next frames: uint8 (f, H, W, 3), RGB."""
        for frame in frames:
            self._add(np.ascontiguousarray(frame))
        if self._clip is not None:
            self._clip.add(frames)

    def _add(self, frame: Frame) -> None:
        import cv2

        index = len(self._black)
        self._black.append(int(frame.max()) <= _BLACK_LEVEL)
        if self._edges is not None:
            again = cv2.Canny(frame, *self._canny) > 0
            self._edge_f1.append(edge_f1(again, self._edges[index].max(axis=-1) >= 128))
        lab = cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
        self._last_colour = lab.mean(axis=(0, 1))
        if index == 0:
            self._first_colour = self._last_colour
        small = _reduced(frame)
        if self._last is not None:
            self._frozen.append(float(cv2.absdiff(small, self._last).mean()) < _FROZEN_LEVELS)
            flow, valid = optical_flow(self._last, small)
            self._coverage.append(float(valid.mean()))
            self.warp_errors.append(warp_error(self._last, small, flow, valid))
        grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
        self._luma.append(cv2.resize(grey, (_FLICKER_GRID, _FLICKER_GRID), interpolation=cv2.INTER_AREA))
        if len(self._luma) == 3:
            before, now, after = self._luma
            self._flickers.append(float(np.abs(now - (before + after) / 2).mean()))
            del self._luma[0]
        self._last = small

    def values(self) -> dict[str, float]:
        """The measures of all frames so far: see `measure`."""
        if not self._black:
            return {}
        found = {
            "black_frames": _mean(self._black),
            "frozen_frames": _mean(self._frozen),
            "flicker": _mean(self._flickers),
            "warp_error": _mean(self.warp_errors),
            "flow_coverage": _mean(self._coverage),
            "seam_ratio": seam_ratio(self.warp_errors, self._chunk_size) if self._chunk_size else None,
            "edge_f1": _mean(self._edge_f1),
        }
        if len(self._black) > 1:
            found["colour_drift"] = float(np.linalg.norm(self._last_colour - self._first_colour))
        if self._clip is not None:
            found |= self._clip.values()
        return {name: value for name, value in found.items() if value is not None}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _reduced(frame: Frame) -> Frame:
    import cv2

    height, width = frame.shape[:2]
    scale = FLOW_PX / max(height, width)
    if scale >= 1:
        return frame
    return cv2.resize(frame, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)


def optical_flow(first: Frame, second: Frame) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Where each pixel of `first` is in `second`, and where that can be trusted: float32 (H, W, 2), displacement in
    px, and bool (H, W).

    DIS flow (Kroeger et al., ECCV 2016). A pixel is left out if it leaves the frame, or if going there and back ends
    elsewhere: |w + ŵ|² > 0.01 (|w|² + |ŵ|²) + 0.5, the occlusion check of Sundaram et al. (ECCV 2010).
    """
    import cv2

    method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    a, b = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (first, second))
    nothing: Any = None  # to begin from
    there, back = method.calc(a, b, nothing), method.calc(b, a, nothing)
    x, y = _targets(there)
    returned = cv2.remap(back, x, y, cv2.INTER_LINEAR)
    gap, lengths = ((there + returned) ** 2).sum(-1), (there**2).sum(-1) + (returned**2).sum(-1)
    height, width = x.shape
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return there, inside & (gap <= 0.01 * lengths + 0.5)


def _targets(flow: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Places (x, y) that the pixels are carried to: float32 (H, W) each."""
    height, width = flow.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return x + flow[..., 0], y + flow[..., 1]


def warp_error(first: Frame, second: Frame, flow: NDArray[np.float32], valid: NDArray[np.bool_]) -> float | None:
    """E = Σ M (I_t(x) − I_{t+1}(x + w(x)))² ÷ Σ M over pixels x and channels, levels as 0–1; None where M is empty.

    E_warp of Lai et al., Learning Blind Video Temporal Consistency (ECCV 2018). flow: w, float32 (H, W, 2), in px.
    valid: M, bool (H, W).
    """
    import cv2

    if not valid.any():
        return None
    back = cv2.remap(second.astype(np.float32), *_targets(flow), cv2.INTER_LINEAR)
    return float((((back - first) / 255) ** 2)[valid].mean())


def seam_ratio(errors: list[float | None], chunk_size: int, offset: int = 0) -> float | None:
    """Mean warp error at chunk borders ÷ mean inside chunks; None without borders or where one of them can't be told.

    errors: of each pair of neighbouring frames, the pair (t, t + 1) at t. Borders are before the frames number
    offset + k · chunk_size, k ≥ 1 (or 0, where offset is not).
    """
    border = [error for t, error in enumerate(errors, start=1) if (t - offset) % chunk_size == 0]
    inside = [error for t, error in enumerate(errors, start=1) if (t - offset) % chunk_size]
    at_border, within = _mean(border), _mean(inside)
    return at_border / within if at_border is not None and within else None


def edge_f1(found: NDArray[np.bool_], wanted: NDArray[np.bool_], tolerance_px: float = EDGE_TOLERANCE_PX) -> float:
    """2PR ÷ (P + R): P, the share of found edge pixels with a wanted one within the tolerance; R, the other way.

    Both bool (H, W). 1 if both are empty, 0 if one is.
    """
    import cv2

    if not found.any() or not wanted.any():
        return float(found.any() == wanted.any())

    def near(edges: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return cv2.distanceTransform((~edges).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= tolerance_px

    precision, recall = float(near(wanted)[found].mean()), float(near(found)[wanted].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


class ClipScores:
    """The measures of CLIP, as frames come. reference: folder or hub id of a CLIPModel. Raises ModelError."""

    def __init__(self, reference: str, prompt: str, device: str) -> None:
        from t2vz.conditions.loading import load

        self._processor, tokenizer, self._model = load(_load_clip, reference, device, "clip_model")
        self._tokens = tokenizer([prompt], truncation=True, return_tensors="pt").to(device)
        self._last: Any = None
        self._between: list[float] = []
        self._with_prompt: list[float] = []

    def add(self, frames: NDArray[np.uint8]) -> None:
        """The next frames: uint8 (f, H, W, 3), RGB."""
        import torch

        pictures = self._processor(images=list(frames), input_data_format="channels_last", return_tensors="pt")
        with torch.inference_mode():
            out = self._model(**self._tokens, pixel_values=pictures["pixel_values"].to(self._model.device))
        embeddings = out.image_embeds.float()  # of length 1
        self._with_prompt += (embeddings @ out.text_embeds[0].float()).tolist()
        for embedding in embeddings:
            if self._last is not None:
                self._between.append(float(embedding @ self._last))
            self._last = embedding

    def values(self) -> dict[str, float]:
        """The measures of all frames so far: see `measure`."""
        found = {
            "clip_frame_consistency": _mean(self._between),
            "clip_prompt_consistency": _mean(self._with_prompt),
        }
        return {name: value for name, value in found.items() if value is not None}


def check_clip_model(reference: str) -> None:
    """Raise ModelError (or one of its kinds) unless there is a folder or a hub model of this name. Loads nothing."""
    from t2vz.models.table import revision

    revision(reference, column="clip_model")
    if Path(reference).is_file():
        raise UnsupportedModel(f"clip_model: {reference}: a file; name the folder of a CLIPModel or a hub id")


def _load_clip(reference: str, device: str) -> tuple[Any, Any, Any]:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    from t2vz.conditions.loading import fetch

    folder = fetch(reference, _CLIP_FILES)
    model, report = CLIPModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype="float32", output_loading_info=True
    )
    if report["missing_keys"]:
        raise ValueError(f"{len(report['missing_keys'])} of its weights are missing")
    return (
        CLIPImageProcessor.from_pretrained(folder, local_files_only=True),
        CLIPTokenizer.from_pretrained(folder, local_files_only=True),
        model.to(device).eval().requires_grad_(False),
    )
