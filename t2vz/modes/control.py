"""Text to video under conditions: ControlNets with cross-frame attention, one initial noise for all frames
(paper § 3.4)."""

from __future__ import annotations

import torch

from t2vz.engine import noise, schedule
from t2vz.engine.attention import anchor_attention
from t2vz.engine.lockstep import Control, Denoiser
from t2vz.models.loading import Components
from t2vz.modes import Generated, Request
from t2vz.modes.common import latent_shape, prompt_branches, run


@torch.no_grad()
def generate(components: Components, request: Request) -> Generated:
    spec, steps = request.spec, request.spec.num_inference_steps
    text, guide, warnings = prompt_branches(components, spec)
    controls = tuple(
        Control(model, frames, scale)
        for model, frames, scale in zip(components.controlnets, request.conditions, spec.scales, strict=True)
    )
    scheduler = schedule.make_scheduler(spec.scheduler_name, components.scheduler_config, steps)
    start = noise.draw(request.seed, "initial", [0], latent_shape(components, request)) * scheduler.init_noise_sigma
    with anchor_attention([components.unet, *components.controlnets], branches=len(text)) as state:
        denoiser = Denoiser(components.unet, state, text, guide, controls)
        latents = run(denoiser, request, start.repeat(request.frames, 1, 1, 1), scheduler, range(steps))
    return Generated(latents, denoiser.evaluations, tuple(warnings))
