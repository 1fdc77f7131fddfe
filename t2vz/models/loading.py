"""Loading models: the real `from_pretrained` and `from_single_file`, safetensors only, no remote code, cached."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t2vz.errors import ModelError, UnsupportedModel
from t2vz.models import LOADING, hub, table
from t2vz.spec import JobSpec

# Loaded models that a process keeps: one for generation beside one for edits, say.
KEPT = 2

_COVERED = (
    "StableDiffusionPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionInstructPix2PixPipeline",
)
# What the parts are loaded as. Of another class the weights might load all the same, and mean something else.
_CLASSES = {"text_encoder": "CLIPTextModel", "vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}
_BYTE_TOKENS = 512  # CLIP's tokenizer knows every byte, inside and at the end of a word


@dataclass(frozen=True)
class Components:
    """The parts of a Stable Diffusion model, on their device and in evaluation mode.

    scheduler_config: the model's own: noise schedule and prediction type.
    controlnets: one for each condition of the row.
    """

    tokenizer: Any
    text_encoder: Any
    vae: Any
    unet: Any
    scheduler_config: dict[str, Any]
    controlnets: tuple[Any, ...] = ()

    @property
    def cell_px(self) -> int:
        """Side of the square of pixels that a latent cell stands for."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


_cache: OrderedDict[tuple[Any, ...], Any] = OrderedDict()


def load(spec: JobSpec, device: str) -> Components:
    """The row's model with its ControlNets on `device`. Loaded once a process while it is in use.

    Raises UnknownModel, UnsupportedModel, ModelError, each naming the model and what to do.
    """
    base = _cached(
        ("base", table.base_identity(spec), spec.mode == "edit", spec.dtype, device),
        lambda: _load(spec, device),
    )
    expected = 8 if spec.mode == "edit" else 4
    channels = base.unet.config.in_channels
    if channels != expected:
        kind = {4: "a text-to-image model", 8: "an InstructPix2Pix model", 9: "an inpainting model"}
        raise UnsupportedModel(
            f"model {spec.model}: {kind.get(channels, f'a UNet of {channels} channels')}, "
            f"but {spec.mode} mode needs {kind[expected]}"
        )
    if spec.mode != "control":
        return base
    return replace(
        base,
        controlnets=tuple(_controlnet(ref, base, spec, device) for ref in table.controlnet_references(spec)),
    )


def native_px(spec: JobSpec) -> int:
    """Side of the square pictures that the row's model was trained on, from its configuration alone."""
    reference = table.model_reference(spec)
    if Path(reference).is_file():
        if spec.base_config is None:
            return 512
        reference = spec.base_config
    with _loading(reference):
        from diffusers import AutoencoderKL, UNet2DConditionModel

        pinned = _pinned(reference, spec.revision if reference != spec.base_config else None)
        unet = UNet2DConditionModel.load_config(table.resolve(reference), subfolder="unet", **pinned)
        vae = AutoencoderKL.load_config(table.resolve(reference), subfolder="vae", **pinned)
        return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)


def _cached(key: tuple[Any, ...], make: Any, kept: int = KEPT) -> Any:
    with LOADING:
        if key not in _cache:
            same_kind = [k for k in _cache if k[0] == key[0]]
            for old in same_kind[: max(0, len(same_kind) - kept + 1)]:
                del _cache[old]
            _cache[key] = make()
        _cache.move_to_end(key)
        return _cache[key]


def _load(spec: JobSpec, device: str) -> Components:
    reference = table.model_reference(spec)
    with _loading(reference):
        if Path(reference).is_file():
            parts = _from_single_file(reference, spec)
        else:
            parts = _from_folder(table.resolve(reference), spec)
        # transformers makes an empty tokenizer of a folder without one; every prompt would then mean the same.
        if len(parts.tokenizer) < _BYTE_TOKENS:
            raise ModelError(f"model {spec.model}: no tokenizer with it; complete the model or its base_config")
        for module in (parts.text_encoder, parts.vae, parts.unet):
            _ready(module, spec.model, device)
        return parts


def _ready(module: Any, reference: str, device: str) -> Any:
    """The module on its device. diffusers leaves weights that a file lacks without values, on the meta device."""
    lost = [name for name, weight in module.named_parameters() if weight.is_meta]
    if lost:
        raise _incomplete(module, reference, lost)
    return module.to(device).eval().requires_grad_(False)


def _incomplete(module: Any, reference: str, lost: list[str]) -> ModelError:
    return ModelError(
        f"model {reference}: {len(lost)} weights of its {type(module).__name__} are missing ({lost[0]}, …); "
        "complete the model or name another"
    )


def _pinned(reference: str, wanted: str | None = None) -> dict[str, str]:
    """The `revision` argument for a hub model; nothing for what lies on this machine."""
    if reference.startswith("mini/") or Path(reference).exists():
        return {}
    return {"revision": hub.commit(reference, wanted)}


def _from_folder(reference: str, spec: JobSpec) -> Components:
    """A diffusers folder or hub id. Component by component: no safety checker, no pipeline class of theirs."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    pinned = _pinned(reference, spec.revision)
    index = DiffusionPipeline.load_config(reference, **pinned)
    if index.get("_class_name") not in _COVERED:
        raise UnsupportedModel(
            f"model {spec.model}: a {index.get('_class_name')}; so far these are covered: {', '.join(_COVERED)}"
        )
    for part, covered in _CLASSES.items():
        named = index.get(part, (None, None))[1]
        if named != covered:
            raise UnsupportedModel(f"model {spec.model}: its {part} is a {named}; so far only {covered} is covered")
        if not pinned:
            _require_safetensors(Path(reference) / part)
    weights = {"use_safetensors": True, "torch_dtype": _dtype(spec), **pinned}
    text_weights = {"use_safetensors": True, "dtype": _dtype(spec), **pinned}
    config = DDIMScheduler.load_config(reference, subfolder="scheduler", **pinned)
    # transformers makes weights up that it doesn't find.
    text_encoder, report = CLIPTextModel.from_pretrained(
        reference, subfolder="text_encoder", output_loading_info=True, **text_weights
    )
    if report["missing_keys"]:
        raise _incomplete(text_encoder, spec.model, sorted(report["missing_keys"]))
    return Components(
        tokenizer=CLIPTokenizer.from_pretrained(reference, subfolder="tokenizer", **pinned),
        text_encoder=text_encoder,
        vae=AutoencoderKL.from_pretrained(reference, subfolder="vae", **weights),
        unet=UNet2DConditionModel.from_pretrained(reference, subfolder="unet", **weights),
        scheduler_config={**config},
    )


def _require_safetensors(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    if any(file.suffix in (".bin", ".ckpt", ".pt", ".pth") for file in folder.glob("*")):
        raise UnsupportedModel(
            f"{folder}: pickled weights only, which can run code; convert the model to .safetensors "
            "(load it in diffusers where you trust it, and save_pretrained)"
        )
    raise ModelError(f"{folder}: no .safetensors weights there; complete the model or name another")


def _from_single_file(path: str, spec: JobSpec) -> Components:
    """A checkpoint in the original Stable Diffusion layout, as DreamBooth models are shared."""
    from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
    from huggingface_hub.errors import LocalEntryNotFoundError

    if Path(path).suffix != ".safetensors":
        raise UnsupportedModel(f"{path}: only .safetensors files are loaded (others can run code)")
    kind = StableDiffusionInstructPix2PixPipeline if spec.mode == "edit" else StableDiffusionPipeline
    config = {"config": table.resolve(spec.base_config), **_pinned(spec.base_config)} if spec.base_config else {}
    try:
        pipeline = kind.from_single_file(
            path, torch_dtype=_dtype(spec), safety_checker=None, feature_extractor=None, **config
        )
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{path}: weights only, and the configs of their family are not on this machine; "
            "name a folder that has them in `base_config`"
        ) from error
    return Components(
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder,
        vae=pipeline.vae,
        unet=pipeline.unet,
        scheduler_config=dict(pipeline.scheduler.config),
    )


def _controlnet(reference: str, base: Components, spec: JobSpec, device: str) -> Any:
    key = ("controlnet", table.revision(reference), spec.dtype, device)
    model = _cached(key, lambda: _load_controlnet(reference, base, spec, device), kept=4)
    theirs, ours = model.config.cross_attention_dim, base.unet.config.cross_attention_dim
    if theirs != ours or model.config.block_out_channels != base.unet.config.block_out_channels:
        raise UnsupportedModel(
            f"ControlNet {reference}: made for another family than model {spec.model}; name a fitting one"
        )
    return model


def _load_controlnet(reference: str, base: Components, spec: JobSpec, device: str) -> Any:
    import torch
    from diffusers import ControlNetModel

    with _loading(reference):
        if Path(reference).is_file():
            # Weights only; they have the shape of the UNet that they are for.
            with tempfile.TemporaryDirectory() as config:
                with torch.device("meta"):
                    ControlNetModel.from_unet(base.unet, load_weights_from_unet=False).save_config(config)
                model = ControlNetModel.from_single_file(reference, config=config, torch_dtype=_dtype(spec))
        else:
            if Path(table.resolve(reference)).is_dir():
                _require_safetensors(Path(table.resolve(reference)))
            model = ControlNetModel.from_pretrained(
                table.resolve(reference), use_safetensors=True, torch_dtype=_dtype(spec), **_pinned(reference)
            )
        return _ready(model, reference, device)


def _dtype(spec: JobSpec) -> Any:
    import torch

    return getattr(torch, spec.dtype)


@contextmanager
def _loading(reference: str) -> Iterator[None]:
    """`hub.loading`, with the libraries' progress bars off: the terminal is the command's."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with hub.loading(reference):
        yield
