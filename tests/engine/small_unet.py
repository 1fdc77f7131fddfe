"""A UNet of two levels, random weights of a fixed seed."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel


def make_unet(in_channels=4):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    ).requires_grad_(False)
