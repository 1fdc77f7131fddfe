"""Prompts, and the picture of an IP-Adapter, to embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from t2vz.models.components import Components


@dataclass(frozen=True)
class Conditioning:
    """What the prompts become.

    text: (B, m, c), one a guidance branch, on the execution device.
    added: for the UNet's added_cond_kwargs, without frames: "text_embeds" (B, p), "time_ids" (B, 6),
        "image_embeds" [(B, images, …)]; empty for SD 1.x.
    """

    text: Tensor
    added: dict[str, Any]
    warnings: list[str]


@torch.no_grad()
def encode(
    components: Components,
    prompts: list[str],
    *,
    width: int,
    height: int,
    image: NDArray[np.uint8] | None = None,
    image_branches: Sequence[bool] = (),
) -> Conditioning:
    """Embeddings of the prompts, one a guidance branch; with a warning for what of them has no effect.

    width, height: px, of the frames. image: uint8 (H, W, 3), RGB, the IP-Adapter's picture. image_branches: which
    branches see it; the others see none, as diffusers has it.
    """
    warnings = [
        f"textual inversion “{word}” has no effect: it stands in no prompt"
        for word in components.words
        if not any(word in prompt for prompt in prompts)
    ]
    text, added = (
        _xl_text(components, prompts, warnings) if components.is_sdxl else (_text(components, prompts, warnings), {})
    )
    if components.is_sdxl:
        # Original size, crop and target size: the frame's own.
        sizes = [height, width, 0, 0, height, width]
        added["time_ids"] = torch.tensor([sizes] * len(prompts), dtype=text.dtype, device=text.device)
    if image is not None:
        added["image_embeds"] = [_image(components, image, image_branches)]
    return Conditioning(text, added, warnings)


def _text(components: Components, prompts: list[str], warnings: list[str]) -> Tensor:
    ids = _ids(components.tokenizer, components.text_encoder, prompts, warnings)
    return components.text_encoder(ids.to(components.device))[0]


def _xl_text(components: Components, prompts: list[str], warnings: list[str]) -> tuple[Tensor, dict[str, Any]]:
    """SDXL reads the last layer but one of both encoders, side by side, and the second's summary of the prompt."""
    hidden, pooled = [], None
    for tokenizer, encoder in (
        (components.tokenizer, components.text_encoder),
        (components.tokenizer_2, components.text_encoder_2),
    ):
        ids = _ids(tokenizer, encoder, prompts, warnings)
        out = encoder(ids.to(components.device), output_hidden_states=True)
        pooled = out[0]
        hidden.append(out.hidden_states[-2])
    text = torch.cat(hidden, dim=-1)
    assert pooled is not None
    if components.zeros_for_empty_prompt:
        empty = [i for i, prompt in enumerate(prompts) if not prompt]
        text[empty], pooled[empty] = 0, 0
    return text, {"text_embeds": pooled}


def _ids(tokenizer: Any, text_encoder: Any, prompts: list[str], warnings: list[str]) -> Tensor:
    """Token ids (B, m). CLIP reads m = 77 tokens; what comes after has no effect on the picture."""
    from diffusers.loaders import TextualInversionLoaderMixin

    # A textual inversion of several vectors is several tokens.
    prompts = TextualInversionLoaderMixin().maybe_convert_prompt(prompts, tokenizer)
    # A tokenizer without a tokenizer_config.json states no limit (1e30).
    limit = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    for prompt in dict.fromkeys(prompts):  # edits give the negative prompt twice
        all_ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        if len(all_ids) > limit:
            lost = tokenizer.decode(all_ids[limit - 1 : -1]).strip()
            warning = f"prompt longer than {limit} tokens; without effect: “{lost}”"
            if warning not in warnings:  # SDXL's two tokenizers cut alike
                warnings.append(warning)
    padded = tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    return padded.input_ids


def _image(components: Components, image: NDArray[np.uint8], shown: Sequence[bool]) -> Tensor:
    """(B, 1, …): the picture's embedding for the branches that it is shown to, for the others that of no picture."""
    from diffusers.models.embeddings import ImageProjection
    from PIL import Image
    from transformers import CLIPImageProcessor

    encoder = components.image_encoder
    side = encoder.config.image_size
    processor = CLIPImageProcessor(size=side, crop_size=side)
    pixels = processor(Image.fromarray(image), return_tensors="pt").pixel_values.to(components.device, encoder.dtype)
    if isinstance(components.unet.encoder_hid_proj.image_projection_layers[0], ImageProjection):
        seen = encoder(pixels).image_embeds
        nothing = torch.zeros_like(seen)
    else:  # the adapters called Plus read the patches, and a black picture for none
        seen = encoder(pixels, output_hidden_states=True).hidden_states[-2]
        nothing = encoder(torch.zeros_like(pixels), output_hidden_states=True).hidden_states[-2]
    return torch.stack([seen if see else nothing for see in shown])
