"""Tiny models of random weights, from torch's present seed: for what does not depend on what a model has learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from t2vz.mini import family

CHANNELS = (32, 64, 64)
WIDTH = 64  # of text embeddings


def write_pipeline(folder: Path, *, in_channels: int, **unet_settings: Any) -> None:
    """A Stable Diffusion pipeline, or InstructPix2Pix's with 8 channels. unet_settings: of UNet2DConditionModel."""
    tokenizer = family.tokenizer()
    text_encoder = family.text_encoder(tokenizer, WIDTH)
    settings: dict[str, Any] = dict(family.unet(CHANNELS).config) | {
        "in_channels": in_channels,
        "cross_attention_dim": WIDTH,
    }
    unet = UNet2DConditionModel.from_config(settings | unet_settings)
    parts = {"vae": family.vae((16, 32, 32, 32), 8), "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet}
    family.pipeline(parts).save_pretrained(folder)


def write_controlnet(folder: Path, *, base: Path) -> None:
    """A ControlNet of the UNet in `base`, its new layers random."""
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
