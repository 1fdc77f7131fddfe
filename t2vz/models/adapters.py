"""What a row puts onto its model: LoRAs, textual inversions, an IP-Adapter. The model itself stays as it was loaded.

diffusers' own loaders do the work, on twins of the parts concerned: modules of their own on the same weights.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from t2vz.errors import ModelError, UnsupportedModel
from t2vz.media.local import shown
from t2vz.models import hub, table
from t2vz.models.components import Components, twin
from t2vz.spec import JobSpec

# What trainers call their files.
_LORA_FILE = "pytorch_lora_weights.safetensors"
_EMBEDDING_FILE = "learned_embeds.safetensors"
_IP_ADAPTER_FILE = "ip-adapter.safetensors"
# Of the errors that diffusers and peft raise over LoRAs for something else.
_DOES_NOT_FIT = ("size mismatch", "arget modules", "must contain", "LoRA param", "infer state dict type")
# A layer of a LoRA's file, and which of its two matrices, in diffusers' layouts and kohya's.
_HALF = re.compile(r"(.+?)[._](?:lora|lora_linear_layer)[._](A|B|down|up)[._]")
# Keys of embeddings' files that are no words: prompts go by the file's name then.
_UNNAMED = ("emb_params", "*", "")


def put_on(base: Components, spec: JobSpec, image_encoder: Any) -> Components:
    """The base's parts with the row's adapters on twins of them. Raises ModelError, UnsupportedModel, UnknownModel.

    image_encoder: the IP-Adapter's, on the base's device; None without one.
    """
    import torch

    parts = base
    if spec.lora or spec.ip_adapter:
        parts = replace(parts, unet=twin(parts.unet), image_encoder=image_encoder)
    if spec.lora or spec.textual_inversion:
        parts = replace(parts, text_encoder=twin(parts.text_encoder), text_encoder_2=twin(parts.text_encoder_2))
    with _quiet(), torch.random.fork_rng(devices=[]):
        # First what changes attention layers and embeddings, then the LoRAs, which wrap layers.
        if spec.ip_adapter is not None:
            _put_on_ip_adapter(parts, spec, spec.ip_adapter)
        if spec.textual_inversion:
            parts = _with_textual_inversions(parts, spec.textual_inversion)
        if spec.lora:
            _put_on_loras(parts, spec)
    for module in (parts.unet, parts.text_encoder, parts.text_encoder_2):
        if module is not None:
            module.eval().requires_grad_(False)
    return parts


def _put_on_loras(parts: Components, spec: JobSpec) -> None:
    pipeline = _pipeline(parts)
    names = []
    for i, reference in enumerate(spec.lora):
        with hub.loading(reference, "lora"):
            names.append(f"lora_{i}")
            _put_on_lora(pipeline, parts, spec, reference, names[-1])
    with hub.loading("+".join(spec.lora), "lora"):
        pipeline.set_adapters(names, list(spec.lora_scales))


def _put_on_lora(pipeline: Any, parts: Components, spec: JobSpec, reference: str, name: str) -> None:
    from safetensors import safe_open

    file = weight_file(reference, _LORA_FILE, "lora")
    with safe_open(file, framework="pt") as header:
        keys = list(header.keys())
    if any("dora_scale" in key for key in keys):
        # diffusers leaves the magnitudes out, and the rest alone means something else.
        raise UnsupportedModel(f"lora {shown(reference)}: a DoRA, which isn't covered; name a LoRA")
    _check_halves(keys, reference)
    layout = {"unet_config": parts.unet.config} if parts.is_sdxl else {}
    weights, *_ = pipeline.lora_state_dict(file, use_safetensors=True, **layout)
    put: list[Any] = []
    try:
        pipeline.load_lora_weights(file, adapter_name=name, use_safetensors=True)
    except (RuntimeError, ValueError) as error:  # of other sizes, or not one of its layers is there
        if not any(words in str(error) for words in _DOES_NOT_FIT):
            raise
    else:
        # What fits no layer is left out with no more than a warning in the log.
        modules = [getattr(parts, part) for part in ("unet", "text_encoder", "text_encoder_2")]
        states = [module.state_dict() for module in modules if module is not None]
        put = [weight for state in states for key, weight in state.items() if f".{name}." in key]
    fitting = sum(not weight.is_meta for weight in put)  # on the meta device is what the file has no values for
    if fitting < len(weights) or not weights:
        raise UnsupportedModel(
            f"lora {shown(reference)}: only {fitting} of its {len(weights)} weights fit model {spec.model}: made for "
            "another family, or in a layout that diffusers doesn't read; name a fitting one"
        )


def _check_halves(keys: list[str], reference: str) -> None:
    """Raise UnsupportedModel if a layer has but one of its two matrices: the other would be made up."""
    found: dict[str, set[str]] = {}
    for key in keys:
        if half := _HALF.match(key):
            found.setdefault(half[1], set()).add("A" if half[2] in ("A", "down") else "B")
    lacking = sorted(layer for layer, halves in found.items() if len(halves) == 1)
    if lacking:
        raise UnsupportedModel(
            f"lora {shown(reference)}: {len(lacking)} of its {len(found)} layers lack one of their two matrices "
            f"({lacking[0]}, …): the file is incomplete; get it anew or name another"
        )


def _with_textual_inversions(parts: Components, references: tuple[str, ...]) -> Components:
    parts = replace(parts, tokenizer=copy.deepcopy(parts.tokenizer), tokenizer_2=copy.deepcopy(parts.tokenizer_2))
    pairs = [(parts.tokenizer, parts.text_encoder), (parts.tokenizer_2, parts.text_encoder_2)][: 1 + parts.is_sdxl]
    for _, encoder in pairs:
        # transformers enlarges the matrix in place, so the twin needs one of its own.
        encoder.set_input_embeddings(copy.deepcopy(encoder.get_input_embeddings()))
    pipeline, words = _pipeline(parts), []
    for reference in references:
        with hub.loading(reference, "textual_inversion"):
            word, vectors = _embeddings(reference, parts)
            if word in words or word in parts.tokenizer.get_vocab():
                other = "of another of the row's" if word in words else "that the model has already"
                raise UnsupportedModel(
                    f"textual_inversion {shown(reference)}: its word “{word}” is one {other}; leave one of them out"
                )
            for vector, (tokenizer, encoder) in zip(vectors, pairs, strict=True):
                pipeline.load_textual_inversion(vector, token=word, tokenizer=tokenizer, text_encoder=encoder)
            words.append(word)
    return replace(parts, words=tuple(words))


def _embeddings(reference: str, parts: Components) -> tuple[str, list[Any]]:
    """The new word and its vectors, (n, c) for each text encoder."""
    from safetensors.torch import load_file

    file = weight_file(reference, _EMBEDDING_FILE, "textual_inversion")
    found = load_file(file)
    if parts.is_sdxl and found.keys() == {"clip_l", "clip_g"}:
        word, vectors = Path(file).stem, [found["clip_l"], found["clip_g"]]
    elif not parts.is_sdxl and len(found) == 1:
        (word,), vectors = found, list(found.values())
        word = Path(file).stem if word.strip() in _UNNAMED else word
    else:
        wanted = "the vectors clip_l and clip_g" if parts.is_sdxl else "one word's vectors"
        raise UnsupportedModel(
            f"textual_inversion {shown(reference)}: it holds {', '.join(sorted(found)[:4])}; this model takes {wanted}"
        )
    for each in vectors:
        if each.ndim not in (1, 2) or 0 in each.shape or not each.is_floating_point():
            raise UnsupportedModel(
                f"textual_inversion {shown(reference)}: {str(each.dtype).removeprefix('torch.')} {tuple(each.shape)}, "
                "where one vector or rows of them in floating point are needed; name another"
            )
    encoders = [encoder for encoder in (parts.text_encoder, parts.text_encoder_2) if encoder is not None]
    given, taken = (
        [vectors.shape[-1] for vectors in each]
        for each in (vectors, [encoder.get_input_embeddings().weight for encoder in encoders])
    )
    if given != taken:
        raise UnsupportedModel(
            f"textual_inversion {shown(reference)}: made for another family (vectors of {given[0]} numbers, "
            f"not {taken[0]}); name a fitting one"
        )
    return word, vectors


def _put_on_ip_adapter(parts: Components, spec: JobSpec, reference: str) -> None:
    from diffusers.models.embeddings import ImageProjection, IPAdapterFullImageProjection, IPAdapterPlusImageProjection
    from torch import nn

    with hub.loading(reference, "ip_adapter"):
        path, pipeline = Path(weight_file(reference, _IP_ADAPTER_FILE, "ip_adapter")), _pipeline(parts)
        try:
            pipeline.load_ip_adapter(str(path.parent), subfolder="", weight_name=path.name, image_encoder_folder=None)
        except (KeyError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
                raise
            raise UnsupportedModel(
                f"ip_adapter {shown(reference)}: no IP-Adapter for the family of model {spec.model} "
                f"({hub.one_line(error)}); name a fitting one"
            ) from error
        pipeline.set_ip_adapter_scale(spec.ip_adapter_scale)
        projection = parts.unet.encoder_hid_proj.image_projection_layers[0]
        if not isinstance(projection, (ImageProjection, IPAdapterFullImageProjection, IPAdapterPlusImageProjection)):
            raise UnsupportedModel(
                f"ip_adapter {shown(reference)}: it reads face embeddings, which aren't covered; "
                "name one that reads pictures"
            )
        # Cross-frame attention takes the processors out of the UNet while it runs; they shall go with it all the same
        # when it is moved to another device.
        processors = [each for each in parts.unet.attn_processors.values() if isinstance(each, nn.Module)]
        parts.unet.ip_adapter_processors = nn.ModuleList(processors)
        config = parts.image_encoder.config
        given = config.projection_dim if isinstance(projection, ImageProjection) else config.hidden_size
        read = next(layer for layer in projection.modules() if isinstance(layer, nn.Linear)).in_features
        if given != read:
            raise UnsupportedModel(
                f"image_encoder {shown(table.image_encoder_reference(spec))}: it gives {given} numbers, "
                f"the IP-Adapter reads {read}; name the one that it was trained with"
            )


def _pipeline(parts: Components) -> Any:
    """diffusers' pipeline around the parts, for its loaders: it adds nothing of its own to them."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    shared: dict[str, Any] = {
        "vae": parts.vae,
        "text_encoder": parts.text_encoder,
        "tokenizer": parts.tokenizer,
        "unet": parts.unet,
        "scheduler": DDIMScheduler(),
        "image_encoder": parts.image_encoder,
        "feature_extractor": None,
    }
    if parts.is_sdxl:
        second = {"text_encoder_2": parts.text_encoder_2, "tokenizer_2": parts.tokenizer_2}
        return StableDiffusionXLPipeline(**shared, **second, add_watermarker=False)
    return StableDiffusionPipeline(**shared, safety_checker=None, requires_safety_checker=False)


def weight_file(reference: str, usual: str, column: str) -> str:
    """The one .safetensors file of a reference: the file itself, or that in a folder or of a hub model."""
    folder = Path(table.resolve(reference))
    if folder.is_file():
        return reference
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        pinned = hub.commit(reference)
        # Of the top folder only: below lie whole models.
        folder = Path(
            snapshot_download(reference, revision=pinned, allow_patterns="*.safetensors", ignore_patterns="*/*")
        )
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if usual in files:
        files = [usual]
    if len(files) != 1:
        raise ModelError(
            f"{column} {shown(reference)}: {'several' if files else 'no'} .safetensors files there "
            f"({', '.join(files[:3]) or 'others can run code'}); name one file"
        )
    return str(folder / files[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' warnings off: they warn of each part that an adapter leaves alone; what fits is checked here."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [logging.get_verbosity() for logging in libraries]
    for logging in libraries:
        logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, of a second adapter
            yield
    finally:
        for logging, level in zip(libraries, before, strict=True):
            logging.set_verbosity(level)
