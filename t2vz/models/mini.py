"""`mini`: the embedded model family. Random weights of a fixed seed so far: it proves the path, its pictures are noise.

Written once into the user's cache, in the ordinary diffusers layout, so that the code that loads
Stable Diffusion loads it too.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t2vz.errors import ModelError
from t2vz.models import LOADING
from t2vz.models.table import MINI_VERSION

SIZE_PX = 128
_CELL_PX = 8
_SEED = 0
_WIDTH = 64  # of text embeddings
_CHANNELS = (32, 64, 64)
# Words that are one token each, so that prompts of ordinary length fit into CLIP's 77.
_WORDS = (
    "a an the of on in at with and is it make turn into night day red green blue yellow white black orange purple ball "
    "house car cat dog person panda man woman dancing running walking rolling street grass sand sea snow city sky "
    "photo painting picture style watercolour oil pencil drawing looks like winter summer"
)


def folder() -> Path:
    """Where the family lies; written at the first call. T2VZ_CACHE names the cache folder if set."""
    cache = Path(
        os.environ.get("T2VZ_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "t2vz"
    )
    target = cache / f"mini-{MINI_VERSION}"
    with LOADING:
        if target.is_dir():
            return target
        try:
            cache.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix="mini-", dir=cache))
        except OSError as error:
            raise ModelError(
                f"model mini: {cache} can't be written ({error.strerror}); let T2VZ_CACHE name a folder that can"
            ) from error
        try:
            write(draft)
            draft.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first; both wrote the same
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return target


def write(folder: Path) -> None:
    """Write base, edit, the ControlNets and the annotators into `folder`."""
    import torch

    from t2vz.models.mini_annotators import write_annotators

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        write_pipeline(folder / "base", in_channels=4)
        write_pipeline(folder / "edit", in_channels=8)
        for condition in ("edge", "depth", "pose"):
            write_controlnet(folder / f"controlnet-{condition}", base=folder / "base")
    write_annotators(folder)


def write_pipeline(folder: Path, *, in_channels: int, **unet_settings: Any) -> None:
    """A tiny Stable Diffusion pipeline of random weights, from torch's present seed.

    in_channels: 4 for text to image, 8 for InstructPix2Pix. unet_settings: further UNet2DConditionModel arguments.
    """
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        EulerAncestralDiscreteScheduler,
        StableDiffusionInstructPix2PixPipeline,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = _tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    settings: dict[str, Any] = {
        "sample_size": SIZE_PX // _CELL_PX,
        "in_channels": in_channels,
        "block_out_channels": _CHANNELS,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": _WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 16,
    }
    unet = UNet2DConditionModel(**(settings | unet_settings))
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE_PX,
    )
    noise_schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    pipeline: Any
    if in_channels == 8:
        kind, scheduler = (
            StableDiffusionInstructPix2PixPipeline,
            EulerAncestralDiscreteScheduler(**noise_schedule),
        )
    else:
        kind = StableDiffusionPipeline
        scheduler = DDIMScheduler(**noise_schedule, clip_sample=False, set_alpha_to_one=False)
    pipeline = kind(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


def write_controlnet(folder: Path, *, base: Path) -> None:
    """A ControlNet of the UNet in `base`, its new layers random, from torch's present seed."""
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 32, 32))
    # A fresh ControlNet ends in zeros and would have no effect, and its embedding would let next to nothing
    # of the condition through.
    for layer in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
        torch.nn.init.normal_(layer.weight, std=0.05)
    for layer in controlnet.controlnet_cond_embedding.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    controlnet.save_pretrained(folder)


def _tokenizer() -> Any:
    """A CLIP tokenizer over bytes, with merges that make each word of `_WORDS` one token."""
    from transformers import CLIPTokenizer

    letters = list(byte_letters())
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    merges: list[str] = []
    for word in dict.fromkeys(_WORDS.split()):
        whole = word[0]
        for i, letter in enumerate(word[1:], start=1):
            part = f"{letter}</w>" if i == len(word) - 1 else letter
            merge = f"{whole} {part}"
            whole += part
            if merge not in merges:
                merges.append(merge)
                vocabulary.append(whole)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as scratch:
        where = Path(scratch)
        (where / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        (where / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        return CLIPTokenizer.from_pretrained(where, model_max_length=77)


def byte_letters() -> Iterator[str]:
    """The 256 printable letters that byte-level BPE writes the bytes as."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    yield from (chr(byte) for byte in printable)
    yield from (chr(256 + i) for i in range(256 - len(printable)))
