"""Prompts to embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def encode_prompts(tokenizer: Any, text_encoder: Any, prompts: list[str]) -> tuple[Tensor, list[str]]:
    """Embeddings (len(prompts), m, c) on the encoder's device, and a warning for each prompt that was cut.

    CLIP reads m = 77 tokens; what comes after has no effect on the picture.
    """
    # A tokenizer without a tokenizer_config.json states no limit (1e30).
    limit = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    tokens = tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt").input_ids
    warnings = []
    for prompt in dict.fromkeys(prompts):  # edits give the negative prompt twice
        all_ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        if len(all_ids) > limit:
            lost = tokenizer.decode(all_ids[limit - 1 : -1]).strip()
            warnings.append(f"prompt longer than {limit} tokens; without effect: “{lost}”")
    return text_encoder(tokens.to(text_encoder.device))[0], warnings
