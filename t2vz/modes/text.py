"""Text to video: motion dynamics in the latents of one picture, and cross-frame attention (paper § 3.3)."""

from __future__ import annotations

import torch

from t2vz.engine import motion, noise, schedule
from t2vz.engine.attention import anchor_attention
from t2vz.engine.lockstep import Denoiser
from t2vz.models.loading import Components
from t2vz.modes import Generated, Request
from t2vz.modes.common import latent_shape, prompt_branches, run
from t2vz.spec import t0_t1


@torch.no_grad()
def generate(components: Components, request: Request) -> Generated:
    spec, name = request.spec, request.spec.scheduler_name
    steps = spec.num_inference_steps
    text, guide, warnings = prompt_branches(components, spec)
    shape = latent_shape(components, request)

    def through(latents: torch.Tensor, first: int, end: int, *, resumable: bool = False) -> torch.Tensor:
        scheduler = schedule.make_scheduler(name, components.scheduler_config, steps, first)
        return run(denoiser, request, latents, scheduler, range(first, end), resumable=resumable)

    with anchor_attention([components.unet], branches=len(text)) as state:
        denoiser = Denoiser(components.unet, state, text, guide)
        levels = schedule.make_scheduler(name, components.scheduler_config, steps)
        start = noise.draw(request.seed, "initial", [0], shape) * levels.init_noise_sigma
        if request.frames == 1:
            latents = through(start, 0, steps, resumable=True)
        else:
            # t0 and t1 count steps from the clean end, as in the paper's code.
            t0, t1 = t0_t1(spec)
            at_t1, at_t0 = steps - 1 - t1, steps - 1 - t0
            # Only the lockstep of all frames is resumed: these few steps are done again then, in the same bits.
            anchor_t1 = through(start, 0, at_t1)
            anchor_t0 = through(anchor_t1, at_t1, at_t0)
            later = range(1, request.frames)
            strength = (spec.motion_field_strength_x, spec.motion_field_strength_y)
            shifts = motion.shifts(strength, later, (shape[1], shape[2]))
            level_t0, level_t1 = schedule.alpha_bar(levels, at_t0), schedule.alpha_bar(levels, at_t1)
            moved = schedule.to_variance_preserving(name, motion.warp(anchor_t0[0], shifts, spec.warp), level_t0)
            eps = noise.draw(request.seed, "motion", later, shape).to(anchor_t0.device)
            moved = motion.renoise(moved, eps, level_t0, level_t1)
            moved = schedule.from_variance_preserving(name, moved, level_t1)
            latents = through(torch.cat([anchor_t1, moved]), at_t1, steps, resumable=True)
    return Generated(latents, denoiser.evaluations, tuple(warnings))
