"""Text to video under conditions: ControlNets with cross-frame attention, one initial noise for all frames
(paper § 3.4)."""

from __future__ import annotations

from functools import partial

import torch

from t2vz.engine import noise, schedule
from t2vz.engine.lockstep import Control
from t2vz.models.loading import Components
from t2vz.modes import Generated, Request
from t2vz.modes.common import denoising, generated, indices, latent_shape, prompt_branches, run
from t2vz.spec import acts


@torch.no_grad()
def generate(components: Components, request: Request) -> Generated:
    spec, steps, frames = request.spec, request.spec.num_inference_steps, list(indices(request))
    branches, guide = prompt_branches(components, request)
    controls = tuple(
        Control(model, pictures if len(frames) == request.frames else pictures[frames], scale, partial(acts, span))
        for model, pictures, scale, span in zip(
            components.controlnets, request.conditions, spec.scales, spec.control_spans, strict=True
        )
    )
    scheduler = schedule.make_scheduler(spec.scheduler_name, components.scheduler_config, steps)
    start = noise.draw(request.seed, "initial", [0], latent_shape(components, request)) * scheduler.init_noise_sigma
    with denoising(components, request, branches, guide, controls=controls) as unet:
        latents = run(unet, request, start.repeat(len(frames), 1, 1, 1), scheduler, range(steps))
    return generated(unet, request, latents, branches)
