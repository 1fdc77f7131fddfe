"""Loading models: the real `from_pretrained` and `from_single_file`, safetensors only, no remote code, cached."""

from __future__ import annotations

import json
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from t2vz.engine.schedule import make_scheduler
from t2vz.errors import ModelError, UnsupportedModel
from t2vz.models import LOADING, hub, table
from t2vz.models.adapters import put_on
from t2vz.models.components import Components, twin
from t2vz.spec import JobSpec

# Loaded models that a process keeps: one for generation beside one for edits, say.
KEPT = 2

_PARTS = {"text_encoder": "CLIPTextModel", "vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}
_XL_PARTS = _PARTS | {"text_encoder_2": "CLIPTextModelWithProjection"}
# Pipelines that are covered, and what their parts are loaded as. Of another class the weights might load all the
# same, and mean something else.
_COVERED: dict[str, dict[str, str]] = {
    "StableDiffusionPipeline": _PARTS,
    "StableDiffusionControlNetPipeline": _PARTS,
    "StableDiffusionInstructPix2PixPipeline": _PARTS,
    "StableDiffusionXLPipeline": _XL_PARTS,
    "StableDiffusionXLControlNetPipeline": _XL_PARTS,
    "StableDiffusionXLInstructPix2PixPipeline": _XL_PARTS,
}
_XL_NATIVE_PX = 1024
_BYTE_TOKENS = 512  # CLIP's tokenizer knows every byte, inside and at the end of a word

_MOST_LAYERS, _MOST = 512, 2**20  # of any kind, in one part of a model; of anything else

_cache: OrderedDict[tuple[Any, ...], Any] = OrderedDict()


def load(spec: JobSpec, device: str, *, compiled: bool = False) -> Components:
    """The row's model with its ControlNets and adapters, to compute on `device`. What rows share is loaded once a
    process while it is in use: adapters are put onto a model that stays as it is.

    compiled: have torch compile its blocks (`engine.speed.compile_regions`).
    Raises UnknownModel, UnsupportedModel, ModelError, each naming the model and what to do.
    """
    base_key = ("base", table.base_identity(spec), spec.mode == "edit", *_place(spec, device))
    parts = base = _cached(base_key, lambda: _load(spec, device))
    _check_mode(base, spec)
    adapters_key = (table.adapters_identity(spec), spec.lora_scales, spec.ip_adapter_scale)
    if adapters_key[0]:
        encoder = None if spec.ip_adapter is None else _image_encoder(spec, device)
        parts = _cached(("adapters", base_key, *adapters_key), lambda: put_on(base, spec, encoder))
    if spec.vae is not None:
        parts = replace(parts, vae=_own_vae(spec.vae, base, spec, device))
    if spec.mode == "control":
        controlnets = [_controlnet(reference, base, spec, device) for reference in table.controlnet_references(spec)]
        parts = replace(parts, controlnets=tuple(controlnets))
    if spec.vae_tiling:
        parts = replace(parts, vae=twin(parts.vae))
        parts.vae.enable_tiling()
    parts = _offloaded(parts) if spec.offload else parts
    if compiled:
        from t2vz.engine.speed import compile_regions

        for model in (parts.unet, *parts.controlnets):
            compile_regions(model)
    return parts


def _place(spec: JobSpec, device: str) -> tuple[Any, ...]:
    """What beside its files a loaded model depends on."""
    return spec.dtype, device, spec.offload


def _check_mode(base: Components, spec: JobSpec) -> None:
    expected = 8 if spec.mode == "edit" else 4
    channels = base.unet.config.in_channels
    if channels != expected:
        kind = {4: "a text-to-image model", 8: "an InstructPix2Pix model", 9: "an inpainting model"}
        raise UnsupportedModel(
            f"model {spec.model}: {kind.get(channels, f'a UNet of {channels} channels')}, "
            f"but {spec.mode} mode needs {kind[expected]}"
        )


def _offloaded(parts: Components) -> Components:
    """The parts on twins that come to the device when they are called. Text and image encoders leave when the next
    one is; the UNet and its ControlNets stay until `Components.release`; the VAE is `engine.vae`'s to send home, as
    it decodes one row while another is in the UNet."""
    from accelerate import cpu_offload_with_hook

    from t2vz.engine.vae import offloaded

    hooks: list[Any] = []

    def hooked(module: Any, *, after: Any = None) -> Any:
        module, hook = cpu_offload_with_hook(twin(module), parts.device, after)
        hooks.append(hook)
        return module

    changed: dict[str, Any] = {}
    last = None
    for name in ("text_encoder", "text_encoder_2", "image_encoder"):
        if getattr(parts, name) is not None:
            changed[name] = hooked(getattr(parts, name), after=last)
            last = hooks[-1]
    changed["controlnets"] = tuple(hooked(model, after=last) for model in parts.controlnets)
    changed["unet"] = hooked(parts.unet, after=last)
    return replace(parts, **changed, vae=offloaded(twin(parts.vae), parts.device), hooks=tuple(hooks))


def native_px(spec: JobSpec) -> int:
    """Side of the square pictures that the row's model was trained on, from its configuration alone."""
    reference = table.model_reference(spec)
    column = "model"
    if Path(reference).is_file():
        if spec.base_config is None:
            with _loading(reference):
                return _XL_NATIVE_PX if _is_xl_file(reference) else 512
        reference, column = spec.base_config, "base_config"
    with _loading(reference, column):
        from diffusers import AutoencoderKL, UNet2DConditionModel

        pinned = _pinned(reference, spec.revision if column == "model" else None)
        unet = UNet2DConditionModel.load_config(table.resolve(reference), subfolder="unet", **pinned)
        vae = AutoencoderKL.load_config(table.resolve(reference), subfolder="vae", **pinned)
        return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)


def _cached(key: tuple[Any, ...], make: Any, kept: int = KEPT) -> Any:
    with LOADING:
        if key not in _cache:
            same_kind = [k for k in _cache if k[0] == key[0]]
            for old in same_kind[: max(0, len(same_kind) - kept + 1)]:
                for gone in [k for k in _cache if k == old or old in k]:  # what was put onto it holds its weights
                    del _cache[gone]
            _cache[key] = make()
        _cache.move_to_end(key)
        return _cache[key]


def _load(spec: JobSpec, device: str) -> Components:
    reference = table.model_reference(spec)
    with _loading(reference):
        if Path(reference).is_file():
            parts = _from_single_file(reference, spec, device)
        else:
            parts = _from_folder(table.resolve(reference), spec, device)
        # transformers makes an empty tokenizer of a folder without one; every prompt would then mean the same.
        for tokenizer in (parts.tokenizer, *([parts.tokenizer_2] if parts.is_sdxl else [])):
            if len(tokenizer) < _BYTE_TOKENS:
                raise ModelError(f"model {spec.model}: no tokenizer with it; complete the model or its base_config")
        for module in (parts.text_encoder, parts.text_encoder_2, parts.unet):
            if module is not None:
                _ready(module, f"model {spec.model}", spec, device)
        _ready_vae(parts.vae, f"model {spec.model}", spec, device, is_sdxl=parts.is_sdxl)
        make_scheduler(
            spec.scheduler_name, parts.scheduler_config, spec.num_inference_steps
        )  # what is wrong is told now
        return parts


def _ready(module: Any, name: str, spec: JobSpec, device: str) -> Any:
    """The module at its place. diffusers leaves weights that a file lacks without values, on the meta device.

    name: column and reference, for the error.
    """
    import torch

    lost = [name for name, weight in module.named_parameters() if weight.is_meta]
    if lost:
        raise _incomplete(module, name, lost)
    module.eval().requires_grad_(False)
    if device.startswith("cuda"):
        module.to(memory_format=torch.channels_last)  # what cuDNN's convolutions are fastest in
    return module.to("cpu" if spec.offload else device)


def _ready_vae(vae: Any, name: str, spec: JobSpec, device: str, *, is_sdxl: bool) -> Any:
    """SDXL's own VAE overflows in float16, and says so."""
    import torch

    if is_sdxl and vae.dtype == torch.float16 and vae.config.force_upcast:
        vae.to(torch.float32)
    return _ready(vae, name, spec, device)


def _incomplete(module: Any, name: str, lost: list[str]) -> ModelError:
    return ModelError(
        f"{name}: {len(lost)} weights of its {type(module).__name__} are missing ({lost[0]}, …); "
        "complete the model or name another"
    )


def _pinned(reference: str, wanted: str | None = None) -> dict[str, str]:
    """The `revision` argument for a hub model; nothing for what lies on this machine."""
    if reference.startswith("mini/") or Path(reference).exists():
        return {}
    return {"revision": hub.commit(reference, wanted)}


def _from_folder(reference: str, spec: JobSpec, device: str) -> Components:
    """A diffusers folder or hub id. Component by component: no safety checker, no pipeline class of theirs."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

    pinned = _pinned(reference, spec.revision)
    index = DiffusionPipeline.load_config(reference, **pinned)
    kind = index.get("_class_name")
    classes = _COVERED.get(kind) if isinstance(kind, str) else None
    if classes is None or index.get("is_cosxl_edit"):
        kind = "CosXL model" if classes else kind
        raise UnsupportedModel(f"model {spec.model}: a {kind}; so far these are covered: {', '.join(_COVERED)}")
    for part, covered in classes.items():
        named = index.get(part, (None, None))[1]
        if named is None:
            raise UnsupportedModel(f"model {spec.model}: a {kind} without {part} (a refiner?); name a whole model")
        if named != covered:
            raise UnsupportedModel(f"model {spec.model}: its {part} is a {named}; so far only {covered} is covered")
        if not pinned:
            _require_safetensors(Path(reference) / part)
    if not pinned:
        check_sizes(Path(reference) / "scheduler", "model")
    weights = {"use_safetensors": True, "torch_dtype": _dtype(spec), **pinned}
    config = DDIMScheduler.load_config(reference, subfolder="scheduler", **pinned)
    _check_parametrisation(spec.model, config, AutoencoderKL.load_config(reference, subfolder="vae", **pinned))

    def second(make: Any) -> Any:
        return make("_2") if "text_encoder_2" in classes else None

    def text_encoder(suffix: str = "") -> Any:
        part = f"text_encoder{suffix}"
        return _transformers_model(classes[part], reference, spec, subfolder=part, **pinned)

    def tokenizer(suffix: str = "") -> Any:
        return CLIPTokenizer.from_pretrained(reference, subfolder=f"tokenizer{suffix}", **pinned)

    return Components(
        device=torch.empty(0, device=device).device,  # with its number, as tensors have it
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=AutoencoderKL.from_pretrained(reference, subfolder="vae", **weights),
        unet=UNet2DConditionModel.from_pretrained(reference, subfolder="unet", **weights),
        scheduler_config={**config},
        tokenizer_2=second(tokenizer),
        text_encoder_2=second(text_encoder),
        zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def _check_parametrisation(model: str, scheduler: Any, vae: Any) -> None:
    """Of another one the model would load all the same, and give pictures of something else."""
    kind = str(scheduler.get("_class_name", ""))
    if kind.startswith(("EDM", "FlowMatch")):
        raise UnsupportedModel(f"model {model}: trained for {kind}; only noise schedules in betas are covered")
    if vae.get("latents_mean") is not None or vae.get("shift_factor") is not None:
        raise UnsupportedModel(f"model {model}: its VAE's latents are shifted, which isn't covered")


def _transformers_model(name: str, reference: str, spec: JobSpec, column: str = "model", **where: Any) -> Any:
    """A model of transformers', which makes weights up that it doesn't find."""
    import transformers

    model, report = getattr(transformers, name).from_pretrained(
        reference, output_loading_info=True, use_safetensors=True, dtype=_dtype(spec), **where
    )
    if report["missing_keys"]:
        raise _incomplete(model, f"{column} {reference}", sorted(report["missing_keys"]))
    return model


def _require_safetensors(folder: Path, column: str = "model") -> None:
    """And a configuration of a size that weights can have."""
    check_sizes(folder, column)
    if any(folder.glob("*.safetensors")):
        return
    if any(file.suffix in (".bin", ".ckpt", ".pt", ".pth") for file in folder.glob("*")):
        raise UnsupportedModel(
            f"{column} {folder}: pickled weights only, which can run code; convert the model to .safetensors "
            "(load it in diffusers where you trust it, and save_pretrained)"
        )
    raise ModelError(f"{column} {folder}: no .safetensors weights there; complete the model or name another")


def check_sizes(folder: Path, column: str) -> None:
    """Raise UnsupportedModel if a configuration in the folder asks for a model beyond any: libraries would build it,
    for hours, before they compare it with its weights. What is no JSON is left to them.
    """
    for file in sorted(folder.glob("*config.json")):
        with suppress(OSError, ValueError, RecursionError):
            for name, number in _numbers(json.loads(file.read_text("utf-8"))):
                most = _MOST_LAYERS if "layers" in name or name.startswith("number of ") else _MOST
                if abs(number) > most:
                    raise UnsupportedModel(f"{column} {file}: {name} is {number:g}, more than any model has ({most})")


def _numbers(node: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a JSON value, with the name that it, or the list that it is in, goes by."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _numbers(value, key)
    elif isinstance(node, list):
        yield f"number of {name}", len(node)
        for value in node:
            yield from _numbers(value, name)
    elif isinstance(node, int | float):
        yield name, node


def _from_single_file(path: str, spec: JobSpec, device: str) -> Components:
    """A checkpoint in the original Stable Diffusion layout, as DreamBooth models are shared."""
    import diffusers
    import torch
    from huggingface_hub.errors import LocalEntryNotFoundError

    if Path(path).suffix != ".safetensors":
        raise UnsupportedModel(f"{path}: only .safetensors files are loaded (others can run code)")
    is_sdxl = _is_xl_file(path)
    task = "InstructPix2Pix" if spec.mode == "edit" else ""
    kind = getattr(diffusers, f"StableDiffusion{'XL' if is_sdxl else ''}{task}Pipeline")
    without: dict[str, Any] = {"add_watermarker": False} if is_sdxl else {"safety_checker": None}
    config = {"config": table.resolve(spec.base_config), **_pinned(spec.base_config)} if spec.base_config else {}
    try:
        pipeline = kind.from_single_file(
            path, torch_dtype=_dtype(spec), feature_extractor=None, image_encoder=None, **without, **config
        )
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{path}: weights only, and the configs of their family are not on this machine; "
            "name a folder that has them in `base_config`"
        ) from error
    return Components(
        device=torch.empty(0, device=device).device,  # with its number, as tensors have it
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder,
        vae=pipeline.vae,
        unet=pipeline.unet,
        scheduler_config=dict(pipeline.scheduler.config),
        tokenizer_2=getattr(pipeline, "tokenizer_2", None),
        text_encoder_2=getattr(pipeline, "text_encoder_2", None),
        zeros_for_empty_prompt=bool(pipeline.config.get("force_zeros_for_empty_prompt")),
    )


def _is_xl_file(path: str) -> bool:
    """True if a checkpoint has SDXL's second text encoder. Reads its header alone."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return any(name.startswith("conditioner.embedders.1.") for name in file.keys())  # noqa: SIM118


def _image_encoder(spec: JobSpec, device: str) -> Any:
    reference = table.image_encoder_reference(spec)

    def make() -> Any:
        with _loading(reference, "image_encoder"):
            pinned = _pinned(reference)
            if not pinned:
                _require_safetensors(Path(reference), "image_encoder")
            model = _transformers_model("CLIPVisionModelWithProjection", reference, spec, "image_encoder", **pinned)
            return _ready(model, f"image_encoder {reference}", spec, device)

    identity = table.revision(reference, column="image_encoder")
    return _cached(("image_encoder", identity, *_place(spec, device)), make)


def _own_vae(reference: str, base: Components, spec: JobSpec, device: str) -> Any:
    # A file has no configuration of its own: it takes the base's.
    base_key = table.base_identity(spec) if Path(reference).is_file() else ""
    key = ("vae", table.revision(reference, column="vae"), base_key, base.is_sdxl, *_place(spec, device))
    vae = _cached(key, lambda: _load_vae(reference, base, spec, device))
    theirs, ours = vae.config.latent_channels, base.vae.config.latent_channels
    if theirs != ours:
        raise UnsupportedModel(
            f"vae {reference}: its latents have {theirs} channels, those of model {spec.model} {ours}; "
            "name one of the model's family"
        )
    return vae


def _load_vae(reference: str, base: Components, spec: JobSpec, device: str) -> Any:
    from diffusers import AutoencoderKL

    with _loading(reference, "vae"):
        if Path(reference).is_file():
            # Weights only; they have the shape of the model's own.
            with tempfile.TemporaryDirectory() as config:
                base.vae.save_config(config)
                vae = AutoencoderKL.from_single_file(reference, config=config, torch_dtype=_dtype(spec))
        else:
            weights = {"use_safetensors": True, "torch_dtype": _dtype(spec), **_pinned(reference)}
            if Path(reference).is_dir():
                _require_safetensors(Path(reference), "vae")
            vae = AutoencoderKL.from_pretrained(reference, **weights)
        return _ready_vae(vae, f"vae {reference}", spec, device, is_sdxl=base.is_sdxl)


def _controlnet(reference: str, base: Components, spec: JobSpec, device: str) -> Any:
    key = ("controlnet", table.revision(reference, column="controlnet"), *_place(spec, device))
    model = _cached(key, lambda: _load_controlnet(reference, base, spec, device), kept=4)
    same = ("cross_attention_dim", "block_out_channels", "addition_embed_type")
    if any(model.config[name] != base.unet.config[name] for name in same):
        raise UnsupportedModel(
            f"controlnet {reference}: made for another family than model {spec.model}; name a fitting one"
        )
    return model


def _load_controlnet(reference: str, base: Components, spec: JobSpec, device: str) -> Any:
    import torch
    from diffusers import ControlNetModel

    with _loading(reference, "controlnet"):
        if Path(reference).is_file():
            # Weights only; they have the shape of the UNet that they are for.
            with tempfile.TemporaryDirectory() as config:
                with torch.device("meta"):
                    ControlNetModel.from_unet(base.unet, load_weights_from_unet=False).save_config(config)
                model = ControlNetModel.from_single_file(reference, config=config, torch_dtype=_dtype(spec))
        else:
            if Path(table.resolve(reference)).is_dir():
                _require_safetensors(Path(table.resolve(reference)), "controlnet")
            model = ControlNetModel.from_pretrained(
                table.resolve(reference), use_safetensors=True, torch_dtype=_dtype(spec), **_pinned(reference)
            )
        return _ready(model, f"controlnet {reference}", spec, device)


def safety_checker(spec: JobSpec, device: str) -> tuple[Any, Any] | None:
    """The safety checker of the row's model and its image processor; None if the model has none, as `mini`, SDXL and
    single files. Raises ModelError if it names one that is not whole.
    """
    reference = table.model_reference(spec)
    if Path(reference).is_file():
        return None
    key = ("safety_checker", table.base_identity(spec), *_place(spec, device))
    return _cached(key, lambda: _load_safety_checker(reference, spec, device))


_CHECKER = "StableDiffusionSafetyChecker"


def _load_safety_checker(reference: str, spec: JobSpec, device: str) -> tuple[Any, Any] | None:
    from diffusers import DiffusionPipeline

    with _loading(reference):
        pinned, folder = _pinned(reference, spec.revision), table.resolve(reference)
        named = (DiffusionPipeline.load_config(folder, **pinned).get("safety_checker") or (None, None))[1]
        if named is None:
            return None
        if named != _CHECKER:
            raise ModelError(f"model {spec.model}: its safety checker is a {named}; only {_CHECKER} is known")
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        if not pinned:
            _require_safetensors(Path(folder) / "safety_checker")
        model, report = StableDiffusionSafetyChecker.from_pretrained(
            folder,
            subfolder="safety_checker",
            output_loading_info=True,
            use_safetensors=True,
            dtype=_dtype(spec),
            **pinned,
        )
        if report["missing_keys"]:  # without its concepts it would flag nothing, or everything
            raise _incomplete(model, f"model {spec.model}", sorted(report["missing_keys"]))
        extractor = CLIPImageProcessor.from_pretrained(folder, subfolder="feature_extractor", **pinned)
        return _ready(model, f"model {spec.model}", spec, device), extractor


def _dtype(spec: JobSpec) -> Any:
    import torch

    return getattr(torch, spec.dtype)


@contextmanager
def _loading(reference: str, column: str = "model") -> Iterator[None]:
    """`hub.loading`, with the libraries' progress bars off: the terminal is the command's."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with hub.loading(reference, column):
        yield
