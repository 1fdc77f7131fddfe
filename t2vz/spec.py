"""JobSpec: everything a manifest row can ask for, checked; and job_id, the identity of the work it means.

The table of columns in manifests/README.md is made from this file. Nothing here touches a file or a model.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

Mode = Literal["text", "control", "edit"]
ConditionName = Literal["edge", "depth", "pose", "openpose", "hed", "lineart", "normal"]
SchedulerName = Literal["ddim", "euler", "euler_a", "dpmpp_2m", "unipc", "lcm"]
Format = Literal["mp4", "webm", "gif", "png", "mkv"]
Codec = Literal["h264", "hevc", "vp9", "ffv1"]
Fit = Literal["crop", "pad"]
Anchor = Literal["first", "first_previous", "scene"]

# Raised when a change of the engine changes the frames: every job then counts as not done.
ENGINE_VERSION = 3

# Of a text row that doesn't say: the paper's demo. There is no source to take them from.
TEXT_FRAMES = 8
TEXT_FPS = Fraction(4)

_MAX_SEED = 2**63 - 1  # the results table keeps seeds as int64


def _parts(value: Any) -> Any:
    """ "edge+depth" → ("edge", "depth"), as cells hold several values joined by `+`; a number alone stands for one."""
    if isinstance(value, int | float):
        return (value,)
    parts = tuple(part.strip() for part in value.split("+")) if isinstance(value, str) else value
    if isinstance(parts, (tuple, list)) and "" in parts:
        raise PydanticCustomError("parts", "has an empty part: remove the +")
    return parts


def _rational(value: Any) -> Any:
    """ "30000/1001", "23.976", 24 or 24.0 → Fraction; NTSC's decimals become their exact rationals."""
    return value if isinstance(value, Fraction) else _rate(str(value).strip())


@functools.lru_cache(maxsize=256)  # a manifest of a million rows has few rates, and Fraction is slow
def _rate(text: str) -> Fraction:
    # Not all that Fraction reads: 1e9999999 would keep it busy for hours.
    if not re.fullmatch(r"\d{1,9}(\.\d{0,18})?|\.\d{1,18}|\d{1,9}/\d{1,9}", text) or re.search(r"/0+$", text):
        raise PydanticCustomError("rate", "not a rate: write 24, 23.976 or 30000/1001")
    rate = Fraction(text)
    ntsc = Fraction(round(rate * 1001 / 1000) * 1000, 1001)
    if rate.denominator != 1 and abs(rate - ntsc) < Fraction(1, 1000):
        rate = ntsc
    if not 0 < rate <= 1000:
        raise PydanticCustomError("rate", "a rate must be above 0 and at most 1000 frames a second")
    return rate


Rate = Annotated[Fraction, BeforeValidator(_rational)]


def _column(default: Any, meaning: str, *, unit: str = "", modes: str = "text control edit", **checks: Any) -> Any:
    return Field(default, description=meaning, json_schema_extra={"unit": unit, "modes": modes}, **checks)


class JobSpec(BaseModel):
    """One manifest row: which video to make, from what, and how. Frozen; a column of the manifest a field.

    A column that the row's mode doesn't use must be left empty. `None` means "chosen from the source, the
    model or the mode", as the column's meaning says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, str_max_length=10_000)

    id: str = _column(
        "", "names the row in results and file names; made from the row's content if absent", max_length=200
    )
    mode: Mode = _column("text", "what to do: text to video, control by conditions, or edit by instruction")
    prompt: str = _column(..., "what to show; in edit mode the instruction (“make it snow”)", min_length=1)
    negative_prompt: str = _column("", "what to avoid")
    source: str | None = _column(
        None, "source video, GIF or folder of images; relative to the manifest", modes="control edit"
    )
    condition: Annotated[tuple[ConditionName, ...], BeforeValidator(_parts)] = _column(
        (), "what of the source controls the frames; several joined by `+`", modes="control"
    )
    condition_video: str | None = _column(
        None, "an already rendered condition (a skeleton video, say) instead of `source`", modes="control"
    )
    controlnet_conditioning_scale: Annotated[tuple[float, ...], BeforeValidator(_parts)] = _column(
        (1.0,), "weight of each condition, joined by `+`; one value serves all", modes="control"
    )
    model: str = _column("mini", "a known name, a diffusers folder, a hub id or a .safetensors file", min_length=1)
    revision: str | None = _column(None, "branch, tag or commit of a hub model")
    base_config: str | None = _column(
        None, "for a .safetensors file: folder or hub id with the configs and tokenizer of its family"
    )
    controlnet: Annotated[tuple[str, ...], BeforeValidator(_parts)] = _column(
        (),
        "ControlNet of each condition, joined by `+`; the model family's usual ones if absent",
        modes="control",
    )
    control_guidance_start: Annotated[tuple[float, ...], BeforeValidator(_parts)] = _column(
        (0.0,), "part of the steps from which each condition acts, joined by `+`; one value serves all", modes="control"
    )
    control_guidance_end: Annotated[tuple[float, ...], BeforeValidator(_parts)] = _column(
        (1.0,), "part of the steps up to which it acts", modes="control"
    )
    lora: Annotated[tuple[str, ...], BeforeValidator(_parts)] = _column(
        (), "LoRA files (.safetensors), folders or hub ids, joined by `+`"
    )
    lora_scale: Annotated[tuple[float, ...], BeforeValidator(_parts)] = _column(
        (1.0,), "weight of each LoRA, joined by `+`; one value serves all"
    )
    textual_inversion: Annotated[tuple[str, ...], BeforeValidator(_parts)] = _column(
        (), "embeddings of new words (.safetensors files, folders or hub ids), joined by `+`"
    )
    ip_adapter: str | None = _column(None, "IP-Adapter weights (.safetensors), for a picture as part of the prompt")
    ip_adapter_image: str | None = _column(None, "that picture; relative to the manifest")
    ip_adapter_scale: float = _column(1.0, "weight of the picture", ge=0, le=10)
    image_encoder: str | None = _column(
        None, "CLIP vision model of the IP-Adapter; the folder `image_encoder` beside its file if absent"
    )
    vae: str | None = _column(None, "a VAE (folder, .safetensors file or hub id) instead of the model's own")
    depth_model: str | None = _column(None, "depth estimator (transformers) for `depth`", modes="control")
    pose_model: str | None = _column(None, "pose estimator (VitPose in transformers) for `pose`", modes="control")
    person_detector: str | None = _column(None, "person detector (transformers) for `pose`", modes="control")
    annotators: str | None = _column(
        None,
        "folder or hub id of controlnet-aux's weights, for openpose, hed, lineart, normal",
        modes="control",
    )
    canny_low: int = _column(100, "lower Canny threshold", unit="level", modes="control", ge=0, le=1000)
    canny_high: int = _column(200, "upper Canny threshold", unit="level", modes="control", ge=0, le=1000)
    width: int | None = _column(
        None,
        "output width, multiple of 8; from the model, or from the source's aspect",
        unit="px",
        ge=64,
        le=4096,
        multiple_of=8,
    )
    height: int | None = _column(
        None,
        "output height, multiple of 8; from the model, or from the source's aspect",
        unit="px",
        ge=64,
        le=4096,
        multiple_of=8,
    )
    fit: Fit = _column(
        "crop",
        "how a source of another aspect is brought to width × height, never stretched: `crop` its edges, "
        "or `pad` with black",
        modes="control edit",
    )
    fps: Rate | None = _column(
        None, "frame rate of the output; the source's if absent, 4 in text mode", unit="frames/s"
    )
    start_s: float = _column(0.0, "start of the range in the source", unit="s", modes="control edit", ge=0)
    end_s: float | None = _column(
        None, "end of the range in the source; its end if absent", unit="s", modes="control edit", gt=0
    )
    video_length: int | None = _column(
        None, "number of frames; 8 in text mode, else all of the range", unit="frames", ge=1, le=100_000
    )
    num_inference_steps: int = _column(50, "denoising steps", ge=1, le=999)
    guidance_scale: float = _column(7.5, "weight of the prompt; 1 or less switches guidance off", ge=0, le=100)
    image_guidance_scale: float = _column(
        1.5, "weight of the source frame; below 1 switches guidance off", modes="edit", ge=0, le=100
    )
    scheduler: SchedulerName | None = _column(None, "sampler; ddim, in edit mode euler_a")
    motion_field_strength_x: float = _column(
        12.0,
        "motion to the left a frame, where the shorter side has 512 px",
        unit="px",
        modes="text",
        ge=-512,
        le=512,
    )
    motion_field_strength_y: float = _column(
        12.0,
        "motion upwards a frame, where the shorter side has 512 px",
        unit="px",
        modes="text",
        ge=-512,
        le=512,
    )
    t0: int | None = _column(
        None,
        "end of the motion's noising, counted in steps from the clean end; 0.88 of the steps",
        modes="text",
        ge=0,
    )
    t1: int | None = _column(None, "its start, noisier than `t0`; 0.94 of the steps", modes="text", ge=1)
    warp: Literal["nearest", "subpixel"] = _column(
        "nearest",
        "how latents are moved: whole cells (the paper) or sub-pixel with variance kept",
        modes="text",
    )
    pan_x_per_s: float = _column(0.0, "camera to the right, in shorter sides", unit="1/s", modes="text", ge=-10, le=10)
    pan_y_per_s: float = _column(0.0, "camera down, in shorter sides", unit="1/s", modes="text", ge=-10, le=10)
    zoom_per_s: float = _column(
        1.0, "camera closer: factor of the picture's scale", unit="1/s", modes="text", ge=0.1, le=10
    )
    rotation_deg_per_s: float = _column(
        0.0, "camera turning, the picture counter-clockwise", unit="°/s", modes="text", ge=-360, le=360
    )
    camera_path: str | None = _column(
        None,
        "keyframes `seconds: x y zoom degrees; …` of the camera (x, y in shorter sides), instead of steady motion",
        modes="text",
    )
    motion_bound: float | None = _column(
        None,
        "how far motion may carry the picture, in shorter sides; there it turns back. Unbounded if absent",
        modes="text",
        gt=0,
        le=10,
    )
    motion_dynamics: bool = _column(
        True, "off: every frame starts from noise of its own (the paper's ablation)", modes="text"
    )
    cross_frame_attention: bool = _column(True, "off: every frame attends to itself (the paper's ablation)")
    attention_anchor: Anchor = _column(
        "first",
        "frames whose keys and values all attend to: the first (the paper), also the one before, "
        "or the first of each scene of the source",
    )
    background_smoothing: float | None = _column(
        None,
        "weight a of a frame's own background (the paper's eq. 10; 0.4 there); no smoothing if absent",
        modes="text",
        ge=0,
        le=1,
    )
    foreground_mask: str | None = _column(
        None,
        "what smoothing spares: `attention` (the words of `foreground`), `segmentation` (a model), or a mask video",
        modes="text",
    )
    foreground: str | None = _column(
        None, "words of the prompt that are the foreground; its nouns can't be told, so all if absent", modes="text"
    )
    segmentation_model: str | None = _column(
        None, "transformers model for `foreground_mask=segmentation`", modes="text"
    )
    guidance_end: float = _column(
        1.0, "part of the steps after which guidance is switched off: faster, not the same frames", gt=0, le=1
    )
    token_merging_ratio: float = _column(
        0.0, "part of the attention's tokens that are merged: faster, not the same frames", ge=0, le=0.75
    )
    seed: int | None = _column(None, "seed of all noise; drawn from the job's id if absent", ge=0, le=_MAX_SEED)
    chunk_size: int = _column(8, "frames denoised at once; memory and speed only, never the frames", ge=1, le=1000)
    dtype: Literal["float32", "float16", "bfloat16"] = _column("float32", "arithmetic of the models")
    offload: bool = _column(
        False, "keep the parts of the model in the host's memory while they are not at work; slower, the same frames"
    )
    vae_tiling: bool = _column(
        False, "encode and decode in overlapping tiles: for frames too large for the VAE at once"
    )
    format: Format = _column("mp4", "container; `png` is a folder of images, `mkv` is lossless (FFV1)")
    codec: Codec | None = _column(None, "h264 or hevc in mp4, vp9 in webm, ffv1 in mkv; the format's first if absent")
    crf: int | None = _column(None, "quality, lower is better; 17 for h264 and hevc, 14 for vp9", ge=0, le=63)
    preset: str | None = _column(None, "encoder speed of h264 and hevc; medium if absent")
    pix_fmt: Literal["yuv420p", "yuv444p"] | None = _column(None, "chroma of h264, hevc and vp9; yuv420p if absent")
    watermark: str | None = _column(
        None,
        "1 to 8 letters, written into every frame invisibly (`t2vz provenance` reads them); none if absent",
    )
    audio: bool = _column(True, "carry the source's sound of the range over", modes="control edit")

    @model_validator(mode="after")
    def _columns_agree(self, info: ValidationInfo) -> JobSpec:
        problems = _disagreements(self)
        if not self.model_fields_set.isdisjoint(_IDLE):
            # The context names the columns that a manifest's defaults filled: those may be of no use to some rows.
            problems += [problem for problem in _idle(self) if problem[0] not in (info.context or ())]
        if problems:
            # One error with all of them in its context: `manifest.explained` takes them apart again.
            text = "; ".join(f"{column}: {reason}" for column, reason in problems)
            raise PydanticCustomError("columns", "{text}", {"text": text, "problems": problems})
        return self

    @property
    def conditions_extracted(self) -> bool:
        """True if the conditions are computed from `source`, False if rendered ones are given."""
        return self.mode == "control" and self.condition_video is None

    @property
    def scheduler_name(self) -> SchedulerName:
        """The scheduler as used: the row's, else the mode's default."""
        return self.scheduler or ("euler_a" if self.mode == "edit" else "ddim")

    @property
    def scales(self) -> tuple[float, ...]:
        """One ControlNet weight for each condition."""
        return _for_each(self.condition, self.controlnet_conditioning_scale)

    @property
    def control_spans(self) -> tuple[tuple[float, float], ...]:
        """(start, end) of each condition, as parts of the steps."""
        starts = _for_each(self.condition, self.control_guidance_start)
        return tuple(zip(starts, _for_each(self.condition, self.control_guidance_end), strict=True))

    @property
    def lora_scales(self) -> tuple[float, ...]:
        """One weight for each LoRA."""
        return _for_each(self.lora, self.lora_scale)

    @property
    def sources(self) -> tuple[str, ...]:
        """All files that the frames are made from."""
        return tuple(filter(None, (self.condition_video or self.source, self.mask_video, self.ip_adapter_image)))

    @property
    def mask_video(self) -> str | None:
        """The foreground's mask video, if that is what `foreground_mask` names."""
        return None if self.foreground_mask in (None, *MASK_SOURCES) else self.foreground_mask

    @property
    def moves_camera(self) -> bool:
        """True if the camera columns move the picture instead of motion_field_strength."""
        return not self.model_fields_set.isdisjoint(_CAMERA)


def _for_each(of: tuple[str, ...], given: tuple[float, ...]) -> tuple[float, ...]:
    return given * len(of) if len(given) == 1 else given


# Columns that name sources (files the frames are made from) and models, which many rows share. Several are joined by +.
SOURCE_COLUMNS = ("source", "condition_video", "foreground_mask", "ip_adapter_image")
MODEL_COLUMNS = (
    *("model", "base_config", "controlnet", "lora", "textual_inversion", "ip_adapter", "image_encoder", "vae"),
    *("depth_model", "pose_model", "person_detector", "annotators", "segmentation_model"),
)
# What may stand in `foreground_mask` beside the name of a mask video.
MASK_SOURCES = ("attention", "segmentation")
_CAMERA = ("pan_x_per_s", "pan_y_per_s", "zoom_per_s", "rotation_deg_per_s", "camera_path")


COLUMN_MODES: dict[str, frozenset[str]] = {
    name: frozenset(field.json_schema_extra["modes"].split())  # type: ignore[index,union-attr]
    for name, field in JobSpec.model_fields.items()
}
_EVERYWHERE = frozenset(("text", "control", "edit"))
_RESTRICTED = frozenset(name for name, modes in COLUMN_MODES.items() if modes != _EVERYWHERE)

FORMAT_CODECS: dict[str, tuple[str, ...]] = {
    "mp4": ("h264", "hevc"),
    "webm": ("vp9",),
    "mkv": ("ffv1",),
    "gif": (),
    "png": (),
}
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")


def default_t0_t1(num_inference_steps: int) -> tuple[int, int]:
    """t0 and t1 for a number of steps: the paper's 44 and 47 of 50, scaled."""
    t1 = min(round(0.94 * num_inference_steps), num_inference_steps - 1)
    return min(round(0.88 * num_inference_steps), t1 - 1), t1


def evaluations(spec: JobSpec, frames: int) -> int:
    """UNet evaluations (of one frame, all guidance branches) that the job takes: the least possible."""
    steps = spec.num_inference_steps
    if spec.mode != "text" or frames == 1:
        return steps * frames
    if not spec.motion_dynamics:
        return steps * frames
    t0, t1 = t0_t1(spec)
    return (steps - 1 - t0) + (t1 + 1) * frames + smoothing_evaluations(spec, frames)


def smoothing_evaluations(spec: JobSpec, frames: int) -> int:
    """What a foreground mask costs: nothing if a video gives it, else a first look at the anchor or all frames."""
    if spec.background_smoothing is None or spec.mask_video is not None:
        return 0
    return (t0_t1(spec)[1] + 1) * (1 if spec.foreground_mask == "attention" else frames)


def t0_t1(spec: JobSpec) -> tuple[int, int]:
    """t0 and t1 as used."""
    t0, t1 = default_t0_t1(spec.num_inference_steps)
    return t0 if spec.t0 is None else spec.t0, t1 if spec.t1 is None else spec.t1


def _disagreements(spec: JobSpec) -> list[tuple[str, str]]:
    """(column, reason) for every rule that spans columns. Cheap for the common row: it runs a million times."""
    bad: list[tuple[str, str]] = []
    mode = spec.mode
    for name in spec.model_fields_set & _RESTRICTED:
        if mode not in COLUMN_MODES[name]:
            users = " and ".join(sorted(COLUMN_MODES[name]))
            bad.append((name, f"is used by {users}, not in {mode} mode: leave it empty or change the mode"))
    if not spec.prompt.strip():
        bad.append(("prompt", "is empty"))
    if "\0" in spec.prompt or "\0" in spec.negative_prompt:
        bad.append(("prompt", "contains a NUL character"))
    if spec.scheduler == "lcm" and spec.num_inference_steps > 50:
        bad.append(("num_inference_steps", "must be at most 50 with lcm, which was distilled from 50"))
    if spec.end_s is not None and spec.end_s <= spec.start_s:
        bad.append(("end_s", f"must be after start_s ({spec.start_s:g})"))
    if spec.model_fields_set & _MODEL_PARTS:
        bad += _model_disagreements(spec)
    if spec.guidance_end < 1 and not _is_guided(spec):
        bad.append(("guidance_end", "has no effect while guidance is off"))
    if spec.attention_anchor != "first" and not spec.cross_frame_attention:
        bad.append(("attention_anchor", "has no effect without cross_frame_attention"))
    if spec.attention_anchor == "scene" and spec.source is None:
        bad.append(("attention_anchor", "can be scene where there is a source, whose scenes it means"))
    if mode == "text":
        bad += _text_disagreements(spec)
    elif mode == "control":
        bad += _control_disagreements(spec)
    elif spec.source is None:
        bad.append(("source", "is needed in edit mode: the video to edit"))
    if spec.model_fields_set & {"codec", "crf", "preset", "pix_fmt"}:
        bad += _encoding_disagreements(spec)
    if spec.watermark is not None:
        bad += _watermark_disagreements(spec)
    return bad


def _is_guided(spec: JobSpec) -> bool:
    return spec.guidance_scale > 1 and (spec.mode != "edit" or spec.image_guidance_scale >= 1)


# Columns that only some conditions read, with these conditions.
_EXTRACTING = {
    "depth_model": ("depth",),
    "pose_model": ("pose",),
    "person_detector": ("pose",),
    "annotators": ("openpose", "hed", "lineart", "normal"),
    "canny_low": ("edge",),
    "canny_high": ("edge",),
}
_MANY_FRAMES = ("t0", "t1", "warp", "background_smoothing")
_IDLE = frozenset(("revision", "base_config", "negative_prompt", *_EXTRACTING, *_MANY_FRAMES))


def _idle(spec: JobSpec) -> list[tuple[str, str]]:
    """(column, reason) for what is given and has no effect in this row."""
    bad: list[tuple[str, str]] = []
    given, model = {name for name in spec.model_fields_set if getattr(spec, name) is not None}, spec.model
    if spec.revision is not None and (model.startswith(("mini/", "/", "./", "../")) or model == "mini"):
        bad.append(("revision", f"has no effect with model {model}: it is for models on the hub"))
    if spec.base_config is not None and not model.endswith(".safetensors"):
        bad.append(("base_config", "has no effect unless model is a single .safetensors file"))
    if spec.negative_prompt and not _is_guided(spec):
        bad.append(("negative_prompt", "has no effect while guidance is off"))
    if spec.mode == "control" and spec.condition:
        for name, readers in _EXTRACTING.items():
            if name in given and name.startswith("canny") and "edge" in spec.condition:
                continue  # of a rendered condition `--quality` still takes the result's edges by them
            if name in given and spec.condition_video is not None:
                bad.append((name, "has no effect with condition_video, which is taken as it is"))
            elif name in given and not set(readers) & set(spec.condition):
                bad.append((name, f"has no effect without {' or '.join(readers)} in condition"))
    if spec.mode == "text" and spec.video_length == 1 and spec.motion_dynamics:
        bad += [(name, "has no effect with video_length=1") for name in _MANY_FRAMES if name in given]
    return bad


_IP_ADAPTER = ("ip_adapter_image", "ip_adapter_scale", "image_encoder")
_MODEL_PARTS = frozenset(("lora", "lora_scale", "textual_inversion", "ip_adapter", *_IP_ADAPTER))


def _model_disagreements(spec: JobSpec) -> list[tuple[str, str]]:
    bad: list[tuple[str, str]] = []
    if spec.lora and len(spec.lora_scale) not in (1, len(spec.lora)):
        bad.append(("lora_scale", f"has another count of values than lora ({len(spec.lora)})"))
    if "lora_scale" in spec.model_fields_set and not spec.lora:
        bad.append(("lora_scale", "has no effect without lora"))
    if not all(-10 <= scale <= 10 for scale in spec.lora_scale):
        bad.append(("lora_scale", "must be between -10 and 10"))
    if len(set(spec.textual_inversion)) != len(spec.textual_inversion):
        bad.append(("textual_inversion", "names one twice: remove one of them"))
    if spec.ip_adapter is None:
        bad += [(name, "has no effect without ip_adapter") for name in _IP_ADAPTER if name in spec.model_fields_set]
    elif spec.ip_adapter_image is None:
        bad.append(("ip_adapter_image", "is needed with ip_adapter: the picture"))
    return bad


def _text_disagreements(spec: JobSpec) -> list[tuple[str, str]]:
    bad = _motion_disagreements(spec) if spec.model_fields_set & _MOTION else []
    if not spec.motion_dynamics:
        return bad
    if spec.num_inference_steps < 3 and (spec.video_length or TEXT_FRAMES) > 1:
        bad.append(("num_inference_steps", "must be at least 3 in text mode: motion dynamics needs two noise levels"))
        return bad
    if spec.t0 is None and spec.t1 is None:
        return bad
    last = spec.num_inference_steps - 1
    t0, t1 = t0_t1(spec)
    if t1 > last:
        bad.append(("t1", f"must be at most num_inference_steps - 1 ({last})"))
    elif t0 >= t1 and spec.t0 is None:
        bad.append(("t1", f"must be above t0, which is {t0} here: t1 is the noisier end"))
    elif t0 >= t1:
        bad.append(("t0", f"must be below t1 ({t1}): t1 is the noisier end"))
    return bad


_STRENGTHS = ("motion_field_strength_x", "motion_field_strength_y")
_SMOOTHING = ("foreground_mask", "foreground", "segmentation_model")
_MOTION = frozenset((*_CAMERA, *_SMOOTHING, "motion_dynamics", "background_smoothing", "motion_bound"))


def _motion_disagreements(spec: JobSpec) -> list[tuple[str, str]]:
    bad: list[tuple[str, str]] = []
    given = spec.model_fields_set
    if spec.moves_camera:
        bad += [
            (name, "can't be used with the camera's columns: both say how to move")
            for name in _STRENGTHS
            if name in given
        ]
        steady = [name for name in _CAMERA if name in given and name != "camera_path"]
        if spec.camera_path is not None:
            bad += [(name, "can't be used with camera_path, which says it all") for name in steady]
            bad += [("camera_path", reason) for reason in [_path_problem(spec.camera_path)] if reason]
    if not spec.motion_dynamics:
        moving = [*_CAMERA, *_STRENGTHS, "t0", "t1", "warp", "motion_bound", "background_smoothing"]
        bad += [(name, "has no effect without motion_dynamics") for name in moving if name in given]
    if spec.background_smoothing is None:
        bad += [(name, "has no effect without background_smoothing") for name in _SMOOTHING if name in given]
        return bad
    if spec.foreground_mask is None:
        bad.append(("foreground_mask", "is needed for background_smoothing: attention, segmentation or a mask video"))
    if spec.foreground is not None and spec.foreground_mask != "attention":
        bad.append(("foreground", "is used with foreground_mask=attention only"))
    if spec.foreground is not None and spec.foreground.lower() not in spec.prompt.lower():
        bad.append(("foreground", "must be words of the prompt, as they stand there"))
    if (spec.segmentation_model is not None) != (spec.foreground_mask == "segmentation"):
        bad.append(("segmentation_model", "is needed with foreground_mask=segmentation, and only there"))
    return bad


Keyframe = tuple[float, float, float, float, float]


def keyframes(path: str) -> tuple[Keyframe, ...]:
    """`camera_path` read: (seconds, x, y, zoom, degrees) of each keyframe. Raises ValueError saying what is wrong."""
    frames: list[Keyframe] = []
    for part in filter(None, (part.strip() for part in path.split(";"))):
        when, colon, where = part.partition(":")
        try:
            second, x, y, zoom, degrees = (float(number) for number in (when, *where.split()))
        except ValueError:
            colon = ""
        if not colon:
            raise ValueError(f"“{part}” is not `seconds: x y zoom degrees`, four numbers after the colon")
        if not all(abs(number) <= 1e6 for number in (second, x, y, zoom, degrees)) or not 0.01 <= zoom <= 100:
            raise ValueError(f"“{part}”: zoom must be between 0.01 and 100, the others of sane size")
        if second < 0 or (frames and second <= frames[-1][0]):
            raise ValueError(f"“{part}”: its seconds must be 0 or more, and rise from keyframe to keyframe")
        frames.append((second, x, y, zoom, degrees))
    if not frames:
        raise ValueError("names no keyframe")
    return tuple(frames)


def _path_problem(path: str) -> str | None:
    try:
        keyframes(path)
    except ValueError as error:
        return str(error)
    return None


def acts(span: tuple[float, float], step: int, steps: int) -> bool:
    """Whether a condition with this span acts at step number `step`, as diffusers counts its control_guidance."""
    return step / steps >= span[0] and (step + 1) / steps <= span[1]


def _control_disagreements(spec: JobSpec) -> list[tuple[str, str]]:
    bad: list[tuple[str, str]] = []
    n = len(spec.condition)
    if not n:
        bad.append(("condition", "is needed in control mode: edge, depth, pose, … (several joined by +)"))
    if len(set(spec.condition)) != n:
        bad.append(("condition", "names a condition twice"))
    if spec.source is None and spec.condition_video is None:
        bad.append(("source", "is needed in control mode, or a condition_video"))
    if spec.source is not None and spec.condition_video is not None:
        bad.append(("condition_video", "can't be used with source: the condition comes from one of them"))
    if spec.condition_video is not None and n > 1:
        bad.append(("condition", "must be a single one with condition_video: it says what the video shows"))
    if n and len(spec.controlnet_conditioning_scale) not in (1, n):
        bad.append(("controlnet_conditioning_scale", f"has another count of values than condition ({n})"))
    if not all(0 <= scale <= 10 for scale in spec.controlnet_conditioning_scale):
        bad.append(("controlnet_conditioning_scale", "must be between 0 and 10"))
    spans = [name for name in ("control_guidance_start", "control_guidance_end") if name in spec.model_fields_set]
    for name in spans:
        if n and len(getattr(spec, name)) not in (1, n):
            return [*bad, (name, f"has another count of values than condition ({n})")]
    if n and spans and not all(0 <= start < end <= 1 for start, end in spec.control_spans):
        bad.append((spans[-1], "must be parts of the steps, 0 ≤ start < end ≤ 1"))
    elif n and spans:
        steps = spec.num_inference_steps
        idle = [span for span in spec.control_spans if not any(acts(span, step, steps) for step in range(steps))]
        bad += [(spans[-1], f"no whole one of the {steps} steps lies between {a:g} and {b:g}") for a, b in idle]
    if spec.controlnet and len(spec.controlnet) != n:
        bad.append(("controlnet", f"has another count of values than condition ({n})"))
    if spec.canny_low > spec.canny_high:
        bad.append(("canny_low", f"must not be above canny_high ({spec.canny_high})"))
    return bad


def _encoding_disagreements(spec: JobSpec) -> list[tuple[str, str]]:
    bad: list[tuple[str, str]] = []
    codecs = FORMAT_CODECS[spec.format]
    codec = spec.codec or (codecs[0] if codecs else None)
    if spec.codec is not None and spec.codec not in codecs:
        fitting = " or ".join(codecs) or "none: leave it empty"
        return [("codec", f"does not go into {spec.format}; that takes {fitting}")]
    if spec.crf is not None and codec not in ("h264", "hevc", "vp9"):
        bad.append(("crf", f"does not apply to {codec or spec.format}: leave it empty"))
    elif spec.crf is not None and codec in ("h264", "hevc") and spec.crf > 51:
        bad.append(("crf", f"must be at most 51 for {codec}"))
    if spec.preset is not None and codec not in ("h264", "hevc"):
        bad.append(("preset", f"does not apply to {codec or spec.format}: leave it empty"))
    elif spec.preset is not None and spec.preset not in PRESETS:
        bad.append(("preset", f"must be one of {', '.join(PRESETS)}"))
    if spec.pix_fmt is not None and codec not in ("h264", "hevc", "vp9"):
        bad.append(("pix_fmt", f"does not apply to {codec or spec.format}: leave it empty"))
    return bad


WATERMARK_BYTES = 8


def _watermark_disagreements(spec: JobSpec) -> list[tuple[str, str]]:
    text = spec.watermark or ""
    if not 1 <= len(text.encode("utf-8", "replace")) <= WATERMARK_BYTES or "\0" in text:
        return [("watermark", f"must be 1 to {WATERMARK_BYTES} letters, fewer if they are not ASCII")]
    return []


# What says where things are or how fast they are made, not which frames come out. Files and models are in
# the identity by their content's fingerprint, wherever they lie.
_NOT_IN_IDENTITY = frozenset(
    (
        *MODEL_COLUMNS,
        *("source", "condition_video", "ip_adapter_image", "revision", "chunk_size", "offload"),
    )
)


@functools.cache
def _identity_columns(mode: Mode) -> tuple[str, ...]:
    return tuple(name for name in JobSpec.model_fields if name not in _NOT_IN_IDENTITY and mode in COLUMN_MODES[name])


def canonical(spec: JobSpec) -> dict[str, Any]:
    """The columns that decide the frames and their encoding, defaults included, JSON-ready."""
    values = spec.__dict__  # as pydantic keeps them; iterating over the model takes ten times as long
    out: dict[str, Any] = {name: values[name] for name in _identity_columns(spec.mode)}
    if spec.fps is not None:
        out["fps"] = str(spec.fps)
    out["scheduler"] = spec.scheduler_name
    if spec.mask_video is not None:
        out["foreground_mask"] = "video"
    if spec.watermark is None:  # rows that were made before there were any keep their identity
        del out["watermark"]
    if spec.mode == "text":  # a camera's column that is given holds the camera still even at its default
        out["camera"] = spec.moves_camera
    if spec.mode == "control":
        out["extracted"] = spec.conditions_extracted
    return out


# How the frames are written, not which they are.
ENCODING_COLUMNS = frozenset(("format", "codec", "crf", "preset", "pix_fmt", "watermark", "audio"))


def job_id(spec: JobSpec, model_revision: str, source_fingerprint: str | None) -> str:
    """Identity of the work: 32 hex digits, the same for the same row, model and source wherever they lie.

    model_revision: what identifies the weights (commit, or fingerprint of the files), ControlNets included.
    source_fingerprint: of `spec.sources`, joined by `+`; None if there are none.
    """
    return _identity(canonical(spec), model_revision, source_fingerprint)


def seed_of(spec: JobSpec, model_revision: str, source_fingerprint: str | None) -> int:
    """The row's seed, or one drawn from what it asks for: arbitrary, yet the same for every try and rerun.

    Rows that differ in their id get different seeds; how the frames are written doesn't matter.
    """
    if spec.seed is not None:
        return spec.seed
    asked = {name: value for name, value in canonical(spec).items() if name not in ENCODING_COLUMNS}
    return int(_identity(asked, model_revision, source_fingerprint)[:15], 16)


_identity_text = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode


def _identity(columns: dict[str, Any], model_revision: str, source_fingerprint: str | None) -> str:
    identity = {"engine": ENGINE_VERSION, "spec": columns, "model": model_revision, "source": source_fingerprint}
    text = _identity_text(identity)
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()
