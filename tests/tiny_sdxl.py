"""A tiny SDXL with random weights, as `tiny.write_pipeline` writes a tiny Stable Diffusion."""

from __future__ import annotations

from pathlib import Path

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from t2vz.mini.family import tokenizer

# All different, so that nothing fits by accident.
WIDTHS = (32, 64)  # of the text encoders
POOLED = 48
TIME = 8


def write_sdxl(folder: Path, *, in_channels: int = 4, **pipeline_settings: bool) -> None:
    """in_channels: 4 for text to image, 8 for InstructPix2Pix. From torch's present seed."""
    tokenizers = (tokenizer(), tokenizer())
    tokenizers[1].pad_token = "!"  # as in SDXL

    def text_config(width: int, words, **settings) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            **settings,
        )

    parts = {
        "tokenizer": tokenizers[0],
        "tokenizer_2": tokenizers[1],
        "text_encoder": CLIPTextModel(text_config(WIDTHS[0], tokenizers[0])),
        "text_encoder_2": CLIPTextModelWithProjection(
            text_config(WIDTHS[1], tokenizers[1], projection_dim=POOLED, hidden_act="gelu")
        ),
        "unet": UNet2DConditionModel(
            sample_size=16,
            in_channels=in_channels,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            cross_attention_dim=sum(WIDTHS),
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME,
            projection_class_embeddings_input_dim=POOLED + 6 * TIME,
            norm_num_groups=16,
        ),
        "vae": AutoencoderKL(
            block_out_channels=(16, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=128,
            scaling_factor=0.13025,
            force_upcast=True,
        ),
    }
    noise_schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if in_channels == 8:
        scheduler = EulerAncestralDiscreteScheduler(**noise_schedule)
        pipeline = StableDiffusionXLInstructPix2PixPipeline(scheduler=scheduler, **parts, **pipeline_settings)
    else:
        scheduler = DDIMScheduler(**noise_schedule, clip_sample=False, set_alpha_to_one=False)
        pipeline = StableDiffusionXLPipeline(scheduler=scheduler, **parts, **pipeline_settings)
    pipeline.save_pretrained(folder, safe_serialization=True)
