"""What several modes need."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from t2vz.engine import guidance
from t2vz.engine.lockstep import Denoiser, denoise
from t2vz.models.loading import Components
from t2vz.models.prompt import encode_prompts
from t2vz.modes import Request
from t2vz.spec import JobSpec


def latent_shape(components: Components, request: Request) -> tuple[int, int, int]:
    """(C, h, w) of one frame's latent."""
    cell = components.cell_px
    return components.vae.config.latent_channels, request.height // cell, request.width // cell


def prompt_branches(components: Components, spec: JobSpec) -> tuple[Tensor, guidance.Guide, list[str]]:
    """Embeddings of the guidance branches (B, m, c), what joins their predictions, and warnings.

    At a guidance scale of 1 or less the prompt stands alone, as in diffusers.
    """
    prompts = [spec.negative_prompt, spec.prompt] if spec.guidance_scale > 1 else [spec.prompt]
    text, warnings = encode_prompts(components.tokenizer, components.text_encoder, prompts)
    guide = guidance.classifier_free(spec.guidance_scale) if len(prompts) == 2 else guidance.unguided
    return text, guide, warnings


def run(
    denoiser: Denoiser, request: Request, latents: Tensor, scheduler: Any, steps: range, *, resumable: bool = True
) -> Tensor:
    """`denoise` as the request has it. resumable: this is the part that snapshots are taken of, one a mode."""
    resumption: dict[str, Any] = {"start": request.start, "on_snapshot": request.on_snapshot} if resumable else {}
    return denoise(
        denoiser,
        latents.to(denoiser.unet.device),
        scheduler,
        steps,
        seed=request.seed,
        chunk_size=request.spec.chunk_size,
        on_step=request.on_step,
        **resumption,
    )
