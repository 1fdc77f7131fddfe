"""The modes as pipelines in diffusers' manner: arguments and arrays in, frames out; no manifest, no video files.

    pipe = TextToVideoZero.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", torch_dtype=torch.float16)
    video = pipe.to("cuda")("a panda surfing", video_length=16, generator=torch.Generator().manual_seed(0))
    diffusers.utils.export_to_video(video.frames[0], "panda.mp4", fps=4)

Not for several threads at once: pipelines of one model share its weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from t2vz.errors import ManifestError, SourceError, translating
from t2vz.manifest import Problem, explained, meant
from t2vz.models import table
from t2vz.spec import COLUMN_MODES, ENCODING_COLUMNS, MASK_SOURCES, SOURCE_COLUMNS, TEXT_FPS, TEXT_FRAMES, JobSpec, Mode

if TYPE_CHECKING:  # heavy
    import torch

    from t2vz.models.components import Components
    from t2vz.modes import Request

_OUTPUT_TYPES = ("np", "tensor", "pil", "pt", "latent")
_OF_MANIFESTS = ENCODING_COLUMNS | {"id", "mode", "start_s", "end_s", "fit"}
# Arguments of diffusers' pipelines that can do nothing here: the value that is let pass, and what to do instead.
_FOREIGN: dict[str, tuple[Any, str]] = {
    "callback": (None, "give callback_on_step_end"),
    "callback_steps": (1, "callback_on_step_end is called after every step"),
    "eta": (0.0, "choose a stochastic scheduler (euler_a)"),
    "frame_ids": (None, "ask for all frames at once: chunk_size bounds the memory and never changes them"),
    "latents": (None, "all noise is made of the seed"),
    "num_videos_per_prompt": (1, "call once for each seed"),
    "return_dict": (True, "the call returns a VideoOutput"),
}


@dataclass(frozen=True)
class VideoOutput:
    """images: the frames, as TextToVideoZeroPipeline returns them: for output_type "np" or "tensor" float32
        (F, H, W, 3) in 0 … 1, "pil" a list of PIL images, "pt" float32 (F, 3, H, W) in 0 … 1, "latent" the latents.
    seed: what all noise was made of. latents: float32 (F, C, h, w), on the CPU.
    evaluations: UNet evaluations that they took. warnings: what the user should know of.
    """

    images: Any
    seed: int
    latents: torch.Tensor
    evaluations: int
    warnings: tuple[str, ...]

    @property
    def frames(self) -> list[Any]:
        """A batch of one video, as diffusers' other video pipelines return it: `frames[0]` is `images`."""
        return [self.images]


class _Pipeline:
    """What the three pipelines share. Keyword arguments are the columns of the manifest (manifests/README.md) that
    the mode uses, but for those that say how files are read and written. What names a file of pictures there is an
    array here; None means not given.
    """

    mode: ClassVar[Mode]

    def __init__(self, device: str = "cpu", **columns: Any) -> None:
        self.device, self.columns = device, _cells(columns)

    @classmethod
    def from_pretrained(
        cls, model: str | os.PathLike[str] = "mini", *, torch_dtype: Any = None, **columns: Any
    ) -> Self:
        """The pipeline of a model: a known name ("mini", "sd15", "sdxl"), a diffusers folder, a hub id or a
        .safetensors file. The weights are loaded by the first call, onto the device of then.

        columns: of every call that doesn't say otherwise (lora, vae, scheduler, offload, …).
        Raises UnknownModel, UnsupportedModel, ModelError; ManifestError for an argument that there isn't.
        """
        pipe = cls(**{"model": model, "dtype": torch_dtype, **columns})
        with translating("model", str(model)):  # unchecked: what only a call gives isn't there yet
            table.base_identity(JobSpec.model_construct(prompt="", mode=cls.mode, **pipe.columns))
        return pipe

    def to(self, *device_or_dtype: Any) -> Self:
        """Compute on another device ("cuda", a torch.device) or in another dtype (a torch.dtype) from now on."""
        for wanted in map(str, device_or_dtype):
            if wanted.startswith("torch."):
                self.columns |= _cells({"dtype": wanted})
            else:
                self.device = wanted
        return self

    def __call__(
        self,
        prompt: str,
        *,
        generator: torch.Generator | None = None,
        output_type: str = "np",
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], Any] | None = None,
        **columns: Any,
    ) -> VideoOutput:
        """Make a video.

        seed, or generator: of all noise. Of a generator its `initial_seed()` counts, not how much was drawn from it:
            the same one gives the same video again. Without either a seed is drawn from torch's global generator.
        callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": …})` after each step that all
            frames take, with a copy of the latents; what it returns isn't used. KeyboardInterrupt passes through.
        Raises ManifestError (arguments: all that is wrong), SourceError (frames that don't fit), and the errors of
        conditions, models and generation.
        """
        import torch

        from t2vz.models.loading import load
        from t2vz.modes import generate

        if output_type not in _OUTPUT_TYPES:
            raise ManifestError(f"output_type must be one of {', '.join(_OUTPUT_TYPES)} (it is {output_type!r})")
        given = _cells({"prompt": prompt, **columns})
        if generator is not None:
            if "seed" in given:
                raise ManifestError("seed and generator: give one of them")
            given["seed"] = generator.initial_seed() % 2**63  # a JobSpec's seeds are int64
        given = {**self.columns, **given}
        if "seed" not in given:
            given["seed"] = int(torch.randint(2**63 - 1, ()))
        arrays = {name: given[name] for name in SOURCE_COLUMNS if not isinstance(given.get(name, ""), str)}
        try:
            cells = {**given, **dict.fromkeys(arrays, "(an array)"), "mode": self.mode}
            spec = JobSpec.model_validate(cells, context=self.columns.keys())
        except ValidationError as error:
            raise ManifestError("; ".join(str(Problem(0, "", *problem)) for problem in explained(error))) from None
        with translating("generate"):
            request, warnings = _request(spec, arrays, self.device)
            components = load(spec, self.device)
            if callback_on_step_end is not None:
                told = _told(self, callback_on_step_end, spec, components)
                request = replace(request, on_snapshot=told)
            made = generate(components, request)
            images = _images(output_type, components.vae, made.latents)
        return VideoOutput(images, request.seed, made.latents.cpu(), made.evaluations, (*warnings, *made.warnings))


class TextToVideoZero(_Pipeline):
    """Text to video: `pipe("a panda surfing", video_length=16, motion_field_strength_x=12, t0=44, t1=47)`.

    Motion is in pixels of a picture whose shorter side has 512; t0 and t1 keep the paper's proportion to
    num_inference_steps if left out. foreground_mask: "attention", "segmentation", or bool (F, H, W).
    """

    mode = "text"


class TextToVideoZeroControlNet(_Pipeline):
    """Text to video under conditions: `pipe("a robot", condition="edge+depth", source=frames)` extracts them from
    frames; `pipe("a robot", condition="pose", condition_video=skeletons)` takes a rendered one.

    Frames: uint8 (F, H, W, 3), RGB, or floats of 0 … 1, or a tensor (F, 3, H, W), or a list of PIL images. The video
    has their size, in multiples of 8. `t2vz.media.decode.decode(path, width=512).frames` reads them from a file.
    """

    mode = "control"


class VideoInstructPix2Pix(_Pipeline):
    """Edits by instruction: `pipe("make it snow", source=frames, image_guidance_scale=1.5)`; frames as there."""

    mode = "edit"


def _cells(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments as JobSpec takes them; those that mean nothing are left out."""
    cells: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in _OF_MANIFESTS:
            raise ManifestError(f"{name} belongs to manifests: no video file is read or written here")
        if name not in COLUMN_MODES and name not in _FOREIGN:
            raise ManifestError(f"there is no argument {name!r}{meant(name, COLUMN_MODES)}")
        if value is None or (name in _FOREIGN and isinstance(value, int | float) and value == _FOREIGN[name][0]):
            continue
        if name in _FOREIGN:
            raise ManifestError(f"there is no {name} here: {_FOREIGN[name][1]}")
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        if name in SOURCE_COLUMNS and isinstance(value, str) and value not in MASK_SOURCES:
            raise ManifestError(f"{name}: give the pictures themselves, not a file")
        one_of_many = isinstance(JobSpec.model_fields[name].default, tuple) and not isinstance(
            value, (str, list, tuple)
        )
        cells[name] = str(value).removeprefix("torch.") if name == "dtype" else (value,) if one_of_many else value
    return cells


def _request(spec: JobSpec, arrays: dict[str, Any], device: str) -> tuple[Request, tuple[str, ...]]:
    """What the mode is asked for, and warnings."""
    from t2vz.conditions import ConditionOptions, extract, fit_condition
    from t2vz.conditions.segmentation import foreground
    from t2vz.media.scenes import scene_starts
    from t2vz.models.loading import native_px
    from t2vz.modes import Request

    assert spec.seed is not None
    more: dict[str, Any] = {"fps": spec.fps or TEXT_FPS}
    extracted: list[tuple[NDArray[np.uint8], tuple[str, ...]]] = []
    if spec.mode == "text":
        width, height = spec.width or native_px(spec), spec.height or native_px(spec)
        count = spec.video_length or TEXT_FRAMES
    else:
        name = "condition_video" if spec.source is None else "source"
        frames = _frames(name, arrays[name])
        height, width = frames.shape[1:3]
        if (spec.width or width, spec.height or height) != (width, height) or width % 8 or height % 8:
            raise SourceError(f"{name}: the video has its frames' size, {width}x{height}, and needs multiples of 8")
        if spec.condition_video is not None:
            extracted = [fit_condition(frames, spec.video_length or len(frames))]
        frames = frames[: spec.video_length]
        count = len(frames)
        if spec.conditions_extracted:
            options = ConditionOptions.of(spec, device=device)
            extracted = [extract(condition, frames, options) for condition in spec.condition]
        if spec.mode == "edit":
            more["source"] = frames
        if spec.attention_anchor == "scene":
            more["scenes"] = scene_starts(frames)
        more["conditions"] = tuple(pictures for pictures, _ in extracted)
    if "ip_adapter_image" in arrays:
        more["picture"] = _frames("ip_adapter_image", [arrays["ip_adapter_image"]])[0]
    if "foreground_mask" in arrays:
        more["masks"] = masks = np.asarray(arrays["foreground_mask"])
        if masks.dtype != np.bool_ or masks.shape != (count, height, width):
            raise SourceError(f"foreground_mask: needs bool {count, height, width}, not {masks.dtype} {masks.shape}")
    if spec.segmentation_model is not None:
        more["segment"] = partial(foreground, model=spec.segmentation_model, device=device)
    warnings = tuple(warning for _, told in extracted for warning in told)
    return Request(spec, spec.seed, width, height, count, **more), warnings


def _frames(name: str, given: Any) -> NDArray[np.uint8]:
    """uint8 (F, H, W, 3), RGB, of whatever diffusers' users have their frames in."""
    try:
        if hasattr(given, "movedim"):  # a tensor
            given = (given.float() if given.is_floating_point() else given).movedim(-3, -1).cpu().numpy()
        if not isinstance(given, np.ndarray):
            given = np.stack([np.asarray(one.convert("RGB") if hasattr(one, "convert") else one) for one in given])
    except (TypeError, ValueError) as error:
        raise SourceError(f"{name}: not frames of one size ({error})") from error
    if given.dtype.kind == "f" and given.size and given.min() >= 0 and given.max() <= 1:
        given = (given * 255).round().astype(np.uint8)
    if given.dtype != np.uint8 or given.ndim != 4 or given.shape[-1] != 3 or not given.size:
        raise SourceError(f"{name}: needs uint8 (F, H, W, 3), or floats in 0 … 1, not {given.dtype} {given.shape}")
    return given


def _told(pipe: _Pipeline, callback: Callable[..., Any], spec: JobSpec, components: Components) -> Callable[..., None]:
    from t2vz.engine.schedule import make_scheduler

    scheduler = make_scheduler(spec.scheduler_name, components.scheduler_config, spec.num_inference_steps)

    def told(take: Callable[[], Any]) -> None:
        taken = take()
        callback(pipe, taken.step - 1, scheduler.timesteps[taken.step - 1], {"latents": taken.latents})

    return told


def _images(output_type: str, vae: Any, latents: torch.Tensor) -> Any:
    import torch
    from PIL import Image

    from t2vz.engine.vae import decode

    if output_type == "latent":
        return latents.cpu()
    frames = np.concatenate(list(decode(vae, latents)))
    if output_type == "pil":
        return [Image.fromarray(frame) for frame in frames]
    levels = frames.astype(np.float32) / 255
    return torch.from_numpy(levels).permute(0, 3, 1, 2) if output_type == "pt" else levels
