"""Text to video: motion dynamics in the latents of one picture, and cross-frame attention (paper § 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from t2vz.engine import foreground, motion, noise, schedule, vae
from t2vz.engine.lockstep import Denoiser
from t2vz.errors import GenerationError
from t2vz.models.loading import Components
from t2vz.modes import Generated, Request
from t2vz.modes.common import denoising, generated, indices, latent_shape, prompt_branches, run
from t2vz.spec import keyframes, t0_t1

Through = Callable[[Tensor, int, int], Tensor]


@torch.no_grad()
def generate(components: Components, request: Request) -> Generated:
    spec, name = request.spec, request.spec.scheduler_name
    steps = spec.num_inference_steps
    frames = indices(request)
    branches, guide = prompt_branches(components, request)
    shape = latent_shape(components, request)
    warnings: tuple[str, ...] = ()

    def through(latents: Tensor, first: int, end: int, *, resumable: bool = False) -> Tensor:
        scheduler = schedule.make_scheduler(name, components.scheduler_config, steps, first)
        return run(unet, request, latents, scheduler, range(first, end), resumable=resumable)

    with denoising(components, request, branches, guide) as unet:
        levels = schedule.make_scheduler(name, components.scheduler_config, steps)
        moving = spec.motion_dynamics and request.frames > 1
        start = noise.draw(request.seed, "initial", [0] if moving else frames, shape) * levels.init_noise_sigma
        if not moving:
            latents = through(start, 0, steps, resumable=True)
        else:
            # t0 and t1 count steps from the clean end, as in the paper's code.
            t0, t1 = t0_t1(spec)
            at_t1, at_t0 = steps - 1 - t1, steps - 1 - t0
            # Only the lockstep of all frames is resumed: these few steps are done again then, in the same bits.
            anchor_t1 = through(start, 0, at_t1)
            anchor_t0 = through(anchor_t1, at_t1, at_t0)
            latents = anchor_t1
            if later := frames[1:]:
                poses = camera_path(request, later, shape[1:])
                level_t0, level_t1 = schedule.alpha_bar(levels, at_t0), schedule.alpha_bar(levels, at_t1)
                moved = schedule.to_variance_preserving(name, motion.warp(anchor_t0[0], poses, spec.warp), level_t0)
                eps = noise.draw(request.seed, "motion", later, shape).to(anchor_t0.device)
                moved = motion.renoise(moved, eps, level_t0, level_t1)
                moved = schedule.from_variance_preserving(name, moved, level_t1)
                # A snapshot's latents are smoothed already.
                if spec.background_smoothing is not None and request.start is None:
                    masks = _masks(components, request, torch.cat([anchor_t1, moved]), poses, through, unet)
                    background = motion.warp(anchor_t1[0], poses, spec.warp)
                    moved = foreground.smooth(moved, background, masks.to(moved.device), spec.background_smoothing)
                    warnings = _odd(masks)
                latents = torch.cat([anchor_t1, moved])
            latents = through(latents, at_t1, steps, resumable=True)
    made = generated(unet, request, latents, branches)
    return replace(made, warnings=(*made.warnings, *warnings))


def camera_path(request: Request, frames: Sequence[int], latent_size: tuple[int, int]) -> Tensor:
    """The row's motion: the poses of these frames (see `engine.motion`)."""
    spec = request.spec
    times_s = [float(frame / request.fps) for frame in frames]
    if spec.camera_path is not None:
        poses = motion.keyframe_path(keyframes(spec.camera_path), times_s, latent_size)
    elif spec.moves_camera:
        pan = (spec.pan_x_per_s, spec.pan_y_per_s)
        poses = motion.steady_path(pan, spec.zoom_per_s, spec.rotation_deg_per_s, times_s, latent_size)
    else:
        strength = (spec.motion_field_strength_x, spec.motion_field_strength_y)
        poses = motion.paper_path(strength, frames, latent_size)
    return poses if spec.motion_bound is None else motion.bounded(poses, spec.motion_bound, latent_size)


def _masks(
    components: Components, request: Request, latents: Tensor, poses: Tensor, through: Through, unet: Denoiser
) -> Tensor:
    """The foreground of all frames but the anchor, as the row has it told: bool (F - 1, h, w).

    latents: (F, C, h, w) at T1. A first pass from there to the end shows what is in the picture, where the row
    does not bring its masks.
    """
    spec, steps, size = request.spec, request.spec.num_inference_steps, (latents.shape[-2], latents.shape[-1])
    if request.masks is not None:
        return foreground.to_cells(request.masks[list(indices(request)[1:])], size)
    at_t1 = steps - 1 - t0_t1(spec)[1]
    if spec.foreground_mask == "attention":
        tokens = _foreground_tokens(components, request, unet.text.shape[1])
        # The second half of the steps: in the first the picture has no outlines yet.
        middle = (at_t1 + steps) // 2
        anchor = through(latents[:1], at_t1, middle)
        with foreground.watching(unet.state, tokens) as seen:
            through(anchor, middle, steps)
        # What moves the picture moves its foreground.
        return motion.warp(seen.mask(size)[None].float(), poses, "nearest")[:, 0] > 0.5
    if request.segment is None:
        raise ValueError("smoothing needs the request's masks, or a function that segments")
    clean = through(latents, at_t1, steps)[1:]
    return torch.cat([foreground.to_cells(request.segment(batch), size) for batch in vae.decode(components.vae, clean)])


def _foreground_tokens(components: Components, request: Request, limit: int) -> list[int]:
    """Positions of the foreground's words among the prompt's tokens, of which the model reads `limit`."""
    from diffusers.loaders import TextualInversionLoaderMixin

    spec, tokenizer = request.spec, components.tokenizer
    as_read = partial(TextualInversionLoaderMixin().maybe_convert_prompt, tokenizer=tokenizer)
    ids = tokenizer(as_read(spec.prompt), truncation=False, verbose=False).input_ids
    if spec.foreground is None:
        return list(range(1, min(len(ids), limit) - 1))  # between the marks of beginning and end
    words = tokenizer(as_read(spec.foreground), add_special_tokens=False).input_ids
    found = [position for position in foreground.positions(ids, words) if position < limit - 1]
    if not found:
        raise GenerationError(
            f"foreground: “{spec.foreground}” must be whole words among the first {limit - 2} tokens of the prompt"
        )
    return found


def _odd(masks: Tensor) -> tuple[str, ...]:
    if masks.all():
        return ("the foreground mask covers all of every frame: background smoothing had no effect",)
    if not masks.any():
        return ("the foreground mask is empty in every frame: background smoothing took all for background",)
    return ()
