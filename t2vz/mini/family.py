"""The architectures of the `mini` family, its tokenizer and noise schedule, and how its members are saved.

All are ordinary classes of diffusers and transformers in the ordinary folder layout, so that the code that loads
Stable Diffusion loads them.
"""

from __future__ import annotations

import graphlib
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t2vz.mini import world

SIZE_PX = world.SIZE_PX
CELL_PX = 8
LATENT_CHANNELS = 4

# The subject of the DreamBooth-like variant: no caption of the world has it.
ZORP = "zorp"
# Words of the world are one token each; these too, as prompts use them. All other text is read byte by byte.
_MORE_WORDS = (
    f"{ZORP} , . black brown grey dark bright man woman dog panda street sky moon beach water winter summer "
    "photo painting style dance walk wave stand run running rolling moving from for no not two looks like"
)

TEXT_WIDTH = 96
# SD's numbers, so that its timesteps, and with them the paper's t0 and t1, mean the same noise levels.
NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}


def tokenizer() -> Any:
    """CLIP's tokenizer over bytes, with merges that make each of the family's words one token."""
    from transformers import CLIPTokenizer

    letters = list(_byte_letters())
    merges = _merges([*dict.fromkeys([*world.WORDS, *_MORE_WORDS.split()])])
    vocabulary = letters + [f"{letter}</w>" for letter in letters] + ["".join(merge) for merge in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as scratch:
        where = Path(scratch)
        (where / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        (where / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
        return CLIPTokenizer.from_pretrained(where, model_max_length=77)


def _byte_letters() -> Iterator[str]:
    """The 256 printable letters that byte-level BPE writes the bytes as."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    yield from (chr(byte) for byte in printable)
    yield from (chr(256 + i) for i in range(256 - len(printable)))


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """BPE's merges, in an order in which every word grows from its first letter to the last.

    BPE takes the first merge in the list that fits anywhere in a word. So `i n` (from `into`) has to come after
    `p i`, or `pink` would become p, in, k.
    """
    before: dict[tuple[str, str], list[tuple[str, str]]] = {}
    chains = []
    for word in words:
        letters = [*word[:-1], f"{word[-1]}</w>"]
        chain = [("".join(letters[:i]), letters[i]) for i in range(1, len(letters))]
        for i, merge in enumerate(chain):
            before.setdefault(merge, []).extend(chain[:i])
        chains.append((letters, chain))
    for letters, chain in chains:
        for i, pair in enumerate(itertools.pairwise(letters[1:])):
            if pair in before and pair != chain[i]:
                before[pair].append(chain[i])
    return list(graphlib.TopologicalSorter(before).static_order())


def text_encoder(words: Any, width: int = TEXT_WIDTH) -> Any:
    """A new CLIPTextModel for the tokenizer `words`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def vae(channels: tuple[int, ...] = (16, 32, 64, 64), groups: int = 2) -> Any:
    """A new AutoencoderKL: 8 px a cell, 4 channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=groups,
        sample_size=SIZE_PX,
    )


def start_as_average(model: Any) -> None:
    """Set a new VAE's weights so that its first three latents are the cells' mean colours, and it decodes them.

    From random weights the first thousands of steps go into finding colours. Residual branches start at zero; the
    path around them carries +colour in channels 0–2, -colour in 3–5 (silu(a) - silu(-a) = a) and constants in
    6 and 7, which keep group normalisation nearly linear. Everything else stays random, and all of it is trained.
    """
    import torch
    from diffusers.models.attention_processor import Attention
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    carried, constant = 8, 1.0

    def carry(convolution: Any, taps: slice) -> None:
        weight, bias = convolution.weight, convolution.bias
        count = min(*weight.shape[:2]) if weight.shape[2] == 1 else carried
        weight[:count] = 0
        bias[:count] = 0
        size = len(range(*taps.indices(weight.shape[2]))) ** 2
        for channel in range(count):
            weight[channel, channel, taps, taps] = 1 / size

    def spread(convolution: Any, gain: float) -> None:
        weight, bias = convolution.weight, convolution.bias
        weight[:carried] = 0
        for colour in range(3):
            weight[colour, colour, 1, 1] = gain
            weight[colour + 3, colour, 1, 1] = -gain
        bias[:carried] = torch.tensor([0.0] * 6 + [constant, -constant])

    def gather(convolution: Any, gain: float) -> None:
        weight, bias = convolution.weight, convolution.bias
        weight[:3] = 0
        bias[:3] = 0
        for colour in range(3):
            weight[colour, colour, 1, 1] = gain
            weight[colour, colour + 3, 1, 1] = -gain

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.zero_()
                module.conv2.bias.zero_()
                if module.conv_shortcut is not None:
                    carry(module.conv_shortcut, slice(0, 1))
            elif isinstance(module, Attention):
                module.to_out[0].weight.zero_()
                module.to_out[0].bias.zero_()
            elif isinstance(module, Downsample2D):
                carry(module.conv, slice(0, 2))
            elif isinstance(module, Upsample2D):
                carry(module.conv, slice(1, 2))
        spread(model.encoder.conv_in, 1.0)
        gather(model.encoder.conv_out, 0.9)
        model.encoder.conv_out.weight[LATENT_CHANNELS:] *= 0.1
        model.encoder.conv_out.bias[LATENT_CHANNELS:] = -6.0  # log variance: next to no noise at first
        spread(model.decoder.conv_in, 0.5)
        gather(model.decoder.conv_out, 0.64)
        for convolution in (model.quant_conv, model.post_quant_conv):
            torch.nn.init.dirac_(convolution.weight)
            convolution.bias.zero_()


def unet(channels: tuple[int, ...] = (48, 80, 96)) -> Any:
    """A new UNet for 16×16 latents, with attention where identity lives: at 16², 8² and, in the middle, 4²."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE_PX // CELL_PX,
        in_channels=LATENT_CHANNELS,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


def edit_unet(base: Any) -> Any:
    """InstructPix2Pix's UNet from a text-to-image one: four more input channels, whose weights start at zero."""
    import torch
    from diffusers import UNet2DConditionModel

    wider = UNet2DConditionModel.from_config({**base.config, "in_channels": 2 * LATENT_CHANNELS})
    weights = dict(base.state_dict())
    first = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([first, torch.zeros_like(first)], 1)
    wider.load_state_dict(weights)
    return wider


def controlnet(base: Any) -> Any:
    """A ControlNet of the UNet `base`, from its weights.

    Its outputs start at zero, as usual. The layers of its condition embedding start at weights that keep the signal's
    size, and the last not at zero: else next to nothing of the condition comes through, and nothing is learned of it.
    """
    import torch
    from diffusers import ControlNetModel

    model = ControlNetModel.from_unet(base, conditioning_embedding_out_channels=(8, 16, 32, 32))
    for layer in model.controlnet_cond_embedding.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    return model


def pipeline(parts: dict[str, Any]) -> Any:
    """A Stable Diffusion pipeline, or InstructPix2Pix's if its UNet has 8 channels.

    parts: vae, text_encoder, tokenizer, unet.
    """
    from diffusers import (
        DDIMScheduler,
        EulerAncestralDiscreteScheduler,
        StableDiffusionInstructPix2PixPipeline,
        StableDiffusionPipeline,
    )

    kind: Any
    if parts["unet"].config.in_channels == 2 * LATENT_CHANNELS:
        kind, scheduler = StableDiffusionInstructPix2PixPipeline, EulerAncestralDiscreteScheduler(**NOISE_SCHEDULE)
    else:
        kind = StableDiffusionPipeline
        scheduler = DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    return kind(
        **parts, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
