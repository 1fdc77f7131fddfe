"""The parts of a loaded model, and how one model's weights serve several sets of parts."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Components:
    """The parts of a Stable Diffusion model, in evaluation mode.

    device: where everything is computed, a torch.device; a part that is offloaded lies elsewhere between calls.
    scheduler_config: the model's own: noise schedule and prediction type.
    tokenizer_2, text_encoder_2: SDXL's second ones. zeros_for_empty_prompt: its empty prompt is all zeros.
    image_encoder: of the row's IP-Adapter. words: the row's textual inversions, as prompts name them.
    controlnets: one for each condition of the row.
    hooks: accelerate's, of the parts that are offloaded.
    """

    device: Any
    tokenizer: Any
    text_encoder: Any
    vae: Any
    unet: Any
    scheduler_config: dict[str, Any]
    tokenizer_2: Any = None
    text_encoder_2: Any = None
    zeros_for_empty_prompt: bool = False
    image_encoder: Any = None
    words: tuple[str, ...] = ()
    controlnets: tuple[Any, ...] = ()
    hooks: tuple[Any, ...] = ()

    @property
    def cell_px(self) -> int:
        """Side of the square of pixels that a latent cell stands for."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def is_sdxl(self) -> bool:
        return self.text_encoder_2 is not None

    def release(self) -> None:
        """Send home what offloading brought to the device; the VAE comes and goes by itself (`engine.vae`)."""
        for hook in self.hooks:
            hook.offload()


def twin(module: Any) -> Any:
    """A module of its own on the same weights: what is put onto it (adapters, hooks) leaves the other as it is."""
    if module is None:
        return None
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
