"""The playground's controls, made from JobSpec: a column's kind, range, choices, default and meaning are said there.

What is here beside is order: what the tabs are, what they begin with, and which columns stand together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_origin

from t2vz.columns import choices
from t2vz.spec import COLUMN_MODES, MASK_SOURCES, SOURCE_COLUMNS, JobSpec, Mode

Kind = Literal["text", "number", "slider", "switch", "choice", "choices", "video", "picture"]

_WIDEST = 1024  # a slider with a wider range can't be set to a value by hand


@dataclass(frozen=True)
class Control:
    """How a column is asked for.

    kind: a `number` is typed, a `slider` set. label: the column, with its unit. choices: of `choice` and `choices`.
    low, high, step: of numbers, None if open.
    default: of JobSpec; None where the source, the model or the mode decides.
    """

    column: str
    kind: Kind
    label: str
    meaning: str
    default: Any = None
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    step: float | None = None
    lines: int = 1


def control(name: str) -> Control:
    """The control of a column."""
    column = JobSpec.model_fields[name]
    extra: Any = column.json_schema_extra
    label = f"{name} ({extra['unit']})" if extra["unit"] else name
    default = None if column.is_required() else column.default
    common: dict[str, Any] = {"column": name, "label": label, "meaning": column.description or "", "default": default}
    kinds = _types(column.annotation)
    if name in SOURCE_COLUMNS:
        return Control(kind="picture" if name.endswith("_image") else "video", **common)
    if bool in kinds:
        return Control(kind="switch", **common)
    if offered := choices(column.annotation):
        return Control(kind="choices" if isinstance(default, tuple) else "choice", choices=offered, **common)
    if isinstance(default, tuple) or not {int, float} & kinds:
        common["default"] = "+".join(f"{part:g}" for part in default) if isinstance(default, tuple) else default
        return Control(kind="text", lines=2 if "prompt" in name else 1, **common)
    whole = int in kinds
    low, high, multiple = _bounds(column.metadata)
    is_slider = default is not None and low is not None and high is not None and high - low <= _WIDEST
    step = multiple or (1 if whole else None)
    if is_slider and step is None and low is not None and high is not None:
        step = 0.01 if high - low <= 1 else 0.05 if high - low <= 20 else 0.5
    if is_slider and any(hasattr(one, "gt") for one in column.metadata):
        low = step  # the end itself is refused
    if not is_slider and default is not None:
        common["default"] = f"{default:g}"  # as it is typed
    return Control(kind="slider" if is_slider else "number", low=low, high=high, step=step, **common)


def mask_choice() -> Control:
    """`foreground_mask` can be a word instead of a video."""
    video = control("foreground_mask")
    return Control("foreground_mask", "choice", video.label, "instead of a mask video", choices=MASK_SOURCES)


@dataclass(frozen=True)
class Group:
    """Controls that stand together. open: seen from the beginning."""

    title: str
    controls: tuple[Control, ...]
    open: bool = False


_FIRST = ("prompt", "negative_prompt", "source", "condition_video", "condition", "model", "seed")
_MAIN = (
    *("controlnet_conditioning_scale", "num_inference_steps", "guidance_scale", "image_guidance_scale"),
    *("motion_field_strength_x", "motion_field_strength_y", "t0", "t1", "video_length", "width", "height", "fps"),
)
_GROUPS: Mapping[str, Sequence[str]] = {
    "Motion": (
        *("warp", "pan_x_per_s", "pan_y_per_s", "zoom_per_s", "rotation_deg_per_s", "camera_path", "motion_bound"),
        *("motion_dynamics", "background_smoothing", "foreground_mask", "foreground", "segmentation_model"),
    ),
    "Attention and guidance": (
        *("cross_frame_attention", "attention_anchor", "guidance_end", "token_merging_ratio", "scheduler"),
        *("control_guidance_start", "control_guidance_end"),
    ),
    "Range of the source": ("start_s", "end_s", "fit", "audio"),
    "LoRAs, adapters, other models": (
        *("lora", "lora_scale", "textual_inversion", "ip_adapter", "ip_adapter_image", "ip_adapter_scale"),
        *("image_encoder", "vae", "controlnet", "revision", "base_config"),
    ),
    "How conditions are extracted": (
        *("canny_low", "canny_high", "depth_model", "pose_model", "person_detector", "annotators"),
    ),
    "Memory and precision": ("chunk_size", "dtype", "offload", "vae_tiling"),
    "File": ("format", "codec", "crf", "preset", "pix_fmt", "watermark"),
}
_DECIDED = ("id", "mode")  # by the tab, and by what the row asks for


def groups(mode: Mode) -> tuple[Group, ...]:
    """All columns that a mode uses, each once; a column that nobody put into a group stands in the last."""
    used = [name for name, modes in COLUMN_MODES.items() if mode in modes and name not in _DECIDED]
    named = {"": _FIRST, "Parameters": _MAIN, **_GROUPS}
    placed = {name for names in named.values() for name in names}
    named["More"] = [name for name in used if name not in placed]
    found = []
    for title, names in named.items():
        controls = [control(name) for name in names if name in used]
        if "foreground_mask" in names and "foreground_mask" in used:
            controls.insert([one.column for one in controls].index("foreground_mask"), mask_choice())
        if controls:
            found.append(Group(title, tuple(controls), open=title in ("", "Parameters")))
    return tuple(found)


@dataclass(frozen=True)
class Preset:
    """Cells to begin with. A source is the name of one of `t2vz.mini.clips`."""

    name: str
    cells: Mapping[str, Any]


@dataclass(frozen=True)
class Tab:
    """A tab of the page. presets: the first is what it begins with."""

    title: str
    mode: Mode
    presets: tuple[Preset, ...] = field(default=())


# `mini` was made to move between these; see t2vz/mini/README.md.
_TEXT: Mapping[str, Any] = {
    "num_inference_steps": 20, "t0": 8, "t1": 10, "motion_field_strength_x": 12, "motion_field_strength_y": 0
}  # fmt: skip
_STEPS: Mapping[str, Any] = {"num_inference_steps": 20}

TABS = (
    Tab(
        "Text to video",
        "text",
        (
            Preset("A drifting heart", {**_TEXT, "prompt": "a pink heart on the grass by day", "seed": 1}),
            Preset(
                "A camera that zooms",
                {"prompt": "a red house on the grass by day", "num_inference_steps": 20, "t0": 8, "t1": 10,
                 "zoom_per_s": 1.2, "warp": "subpixel", "seed": 2},
            ),
            Preset("In sepia, by a LoRA", {**_TEXT, "prompt": "a red car on the road", "lora": "mini/lora", "seed": 3}),
        ),
    ),
    Tab(
        "Pose",
        "control",
        (
            Preset(
                "A dancer's skeleton",
                {**_STEPS, "prompt": "a person in red on the sea at night", "condition": ["pose"],
                 "condition_video": "skeleton", "seed": 7},
            ),
            Preset(
                "A dancer's video",
                {**_STEPS, "prompt": "a person in green on the grass", "condition": ["pose"], "source": "dancer",
                 "seed": 6},
            ),
        ),
    ),
    Tab(
        "Edges",
        "control",
        (
            Preset(
                "Another cat",
                {**_STEPS, "prompt": "a yellow cat in the snow at night", "condition": ["edge"], "source": "cat",
                 "seed": 4},
            ),
        ),
    ),
    Tab(
        "Depth",
        "control",
        (
            Preset(
                "Another house",
                {**_STEPS, "prompt": "a red house on the sand at night", "condition": ["depth"], "source": "house",
                 "seed": 5},
            ),
        ),
    ),
    Tab(
        "DreamBooth",
        "control",
        (
            Preset(
                "A zorp with a cat's edges",
                {**_STEPS, "prompt": "a zorp in the snow at night", "model": "mini/dreambooth", "condition": ["edge"],
                 "source": "cat", "seed": 2},
            ),
            Preset(
                "A zorp with a dancer's pose",
                {**_STEPS, "prompt": "a zorp on the grass", "model": "mini/dreambooth", "condition": ["pose"],
                 "condition_video": "skeleton", "seed": 3},
            ),
        ),
    ),
    Tab(
        "Edit",
        "edit",
        (
            Preset("Make it night", {**_STEPS, "prompt": "make it night", "source": "ball", "seed": 8}),
            Preset("Make the ball blue", {**_STEPS, "prompt": "make the ball blue", "source": "ball", "seed": 9}),
        ),
    ),
)  # fmt: skip


def cells(mode: Mode, controls: Sequence[Control], values: Sequence[Any]) -> dict[str, str]:
    """What a manifest's row would say: the mode, and every control that is not at its default. Of controls of one
    column the last that is filled counts.
    """
    said: dict[str, str] = {"mode": mode}
    for one, value in zip(controls, values, strict=True):
        if value is None or value in ("", []) or value == one.default:
            continue
        said[one.column] = _cell(value)
    return said


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value))
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(round(value, 6))
    return str(value).strip()


def _types(annotation: Any) -> set[Any]:
    """All types in an annotation."""
    if get_origin(annotation) is Literal or not hasattr(annotation, "__args__"):
        return {annotation}
    return {found for part in annotation.__args__ for found in _types(part)}


def _bounds(constraints: Sequence[Any]) -> tuple[float | None, float | None, float | None]:
    """Lowest, highest and step that a number may have."""
    low = high = step = None
    for one in constraints:
        low = getattr(one, "ge", getattr(one, "gt", low))
        high = getattr(one, "le", getattr(one, "lt", high))
        step = getattr(one, "multiple_of", step)
    return low, high, step
