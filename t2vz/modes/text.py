"""Text to video: motion dynamics in the latents of one picture, and cross-frame attention (paper § 3.3)."""

from __future__ import annotations

from typing import Any

import torch

from t2vz.engine import motion, noise, schedule
from t2vz.engine.attention import anchor_attention
from t2vz.engine.lockstep import Denoiser, denoise
from t2vz.models.loading import Components
from t2vz.modes import Generated, Request
from t2vz.modes.common import latent_shape, prompt_branches
from t2vz.spec import t0_t1


@torch.no_grad()
def generate(components: Components, request: Request) -> Generated:
    spec, name = request.spec, request.spec.scheduler_name
    steps, device = spec.num_inference_steps, components.unet.device
    text, guide, warnings = prompt_branches(components, spec)
    shape = latent_shape(components, request)

    def run(latents: torch.Tensor, first: int, end: int, **resumption: Any) -> torch.Tensor:
        scheduler = schedule.make_scheduler(name, components.scheduler_config, steps, first)
        return denoise(
            denoiser,
            latents,
            scheduler,
            range(first, end),
            seed=request.seed,
            chunk_size=spec.chunk_size,
            on_step=request.on_step,
            **resumption,
        )

    with anchor_attention([components.unet], branches=len(text)) as state:
        denoiser = Denoiser(components.unet, state, text, guide)
        levels = schedule.make_scheduler(name, components.scheduler_config, steps)
        # Only the lockstep of all frames is resumed: the anchor's few steps before are done again, in the same bits.
        resumption: dict[str, Any] = {"start": request.start, "on_snapshot": request.on_snapshot}
        start = noise.draw(request.seed, "initial", [0], shape) * levels.init_noise_sigma
        if request.frames == 1:
            latents = run(start.to(device), 0, steps, **resumption)
        else:
            # t0 and t1 count steps from the clean end, as in the paper's code.
            t0, t1 = t0_t1(spec)
            at_t1, at_t0 = steps - 1 - t1, steps - 1 - t0
            anchor_t1 = run(start.to(device), 0, at_t1)
            anchor_t0 = run(anchor_t1, at_t1, at_t0)
            later = range(1, request.frames)
            strength = (spec.motion_field_strength_x, spec.motion_field_strength_y)
            shifts = motion.shifts(strength, later, (shape[1], shape[2]))
            level_t0, level_t1 = schedule.alpha_bar(levels, at_t0), schedule.alpha_bar(levels, at_t1)
            moved = schedule.to_variance_preserving(name, motion.warp(anchor_t0[0], shifts, spec.warp), level_t0)
            eps = noise.draw(request.seed, "motion", later, shape).to(device)
            moved = motion.renoise(moved, eps, level_t0, level_t1)
            moved = schedule.from_variance_preserving(name, moved, level_t1)
            latents = run(torch.cat([anchor_t1, moved]), at_t1, steps, **resumption)
    return Generated(latents, denoiser.evaluations, tuple(warnings))
