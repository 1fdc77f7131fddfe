"""Edits by instruction: InstructPix2Pix with cross-frame attention (Video Instruct-Pix2Pix, paper § 3.5)."""

from __future__ import annotations

import torch

from t2vz.engine import guidance, noise, schedule, vae
from t2vz.engine.attention import anchor_attention
from t2vz.engine.lockstep import Denoiser
from t2vz.models.loading import Components
from t2vz.models.prompt import encode_prompts
from t2vz.modes import Generated, Request
from t2vz.modes.common import latent_shape, run


@torch.no_grad()
def generate(components: Components, request: Request) -> Generated:
    spec, steps = request.spec, request.spec.num_inference_steps
    if request.source is None:
        raise ValueError("edit mode needs the source's frames")
    guided = spec.guidance_scale > 1 and spec.image_guidance_scale >= 1
    # Branches: nothing, image, image and text. The first two share the negative prompt (eq. 3 of InstructPix2Pix).
    prompts = [spec.negative_prompt, spec.negative_prompt, spec.prompt] if guided else [spec.prompt]
    text, warnings = encode_prompts(components.tokenizer, components.text_encoder, prompts)
    guide = guidance.instruct_pix2pix(spec.guidance_scale, spec.image_guidance_scale) if guided else guidance.unguided
    scheduler = schedule.make_scheduler(spec.scheduler_name, components.scheduler_config, steps)
    start = noise.draw(request.seed, "initial", [0], latent_shape(components, request)) * scheduler.init_noise_sigma
    with anchor_attention([components.unet], branches=len(text)) as state:
        denoiser = Denoiser(
            components.unet,
            state,
            text,
            guide,
            image_latents=vae.encode(components.vae, request.source),
            image_branches=(0.0, 1.0, 1.0) if guided else (1.0,),
        )
        latents = run(denoiser, request, start.repeat(request.frames, 1, 1, 1), scheduler, range(steps))
    return Generated(latents, denoiser.evaluations, tuple(warnings))
