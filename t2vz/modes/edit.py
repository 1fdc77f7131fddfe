"""Edits by instruction: InstructPix2Pix with cross-frame attention (Video Instruct-Pix2Pix, paper § 3.5)."""

from __future__ import annotations

import torch

from t2vz.engine import guidance, noise, schedule, vae
from t2vz.models.loading import Components
from t2vz.modes import Generated, Request
from t2vz.modes.common import conditioning, denoising, generated, indices, latent_shape, run


@torch.no_grad()
def generate(components: Components, request: Request) -> Generated:
    spec, steps, frames = request.spec, request.spec.num_inference_steps, list(indices(request))
    if request.source is None:
        raise ValueError("edit mode needs the source's frames")
    shown: tuple[float, ...]
    if spec.guidance_scale > 1 and spec.image_guidance_scale >= 1:
        # Nothing, image, image and text. The first two share the negative prompt (eq. 3 of InstructPix2Pix).
        prompts, shown = [spec.negative_prompt, spec.negative_prompt, spec.prompt], (0.0, 1.0, 1.0)
        guide = guidance.instruct_pix2pix(spec.guidance_scale, spec.image_guidance_scale)
    else:
        prompts, shown, guide = [spec.prompt], (1.0,), guidance.unguided
    with_picture = (False,) * (len(prompts) - 1) + (True,)
    branches = conditioning(components, request, prompts, with_picture)
    scheduler = schedule.make_scheduler(spec.scheduler_name, components.scheduler_config, steps)
    start = noise.draw(request.seed, "initial", [0], latent_shape(components, request)) * scheduler.init_noise_sigma
    source = request.source if len(frames) == request.frames else request.source[frames]
    image_latents = vae.encode(components.vae, source)
    parts = {"image_latents": image_latents, "image_branches": shown}
    with denoising(components, request, branches, guide, **parts) as unet:
        latents = run(unet, request, start.repeat(len(frames), 1, 1, 1), scheduler, range(steps))
    return generated(unet, request, latents, branches)
