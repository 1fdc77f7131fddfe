"""Schedulers by name, and their noise levels in the one unit that the engine computes in: ᾱ."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from t2vz.errors import GenerationError

# Clipping is for pixels; it would cut latents at ±1. These classes do it unless told not to.
_NO_CLIPPING = {"clip_sample": False, "thresholding": False}

# name → (diffusers class, settings beside the model's own, latents are kept as x₀ + σ·ε instead of √ᾱ·x₀ + √(1−ᾱ)·ε)
SCHEDULERS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "ddim": ("DDIMScheduler", _NO_CLIPPING, False),
    "euler": ("EulerDiscreteScheduler", {}, True),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}, True),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}, False),
    "unipc": ("UniPCMultistepScheduler", {}, False),
    "lcm": ("LCMScheduler", _NO_CLIPPING, False),
}


def make_scheduler(name: str, config: dict[str, Any], steps: int, first: int = 0) -> Any:
    """A fresh diffusers scheduler of `steps` steps, ready for step number `first`.

    config: the model's scheduler configuration, of whatever class (its noise schedule and prediction type are
        kept). Stable Diffusion's timesteps are offset by one, which configurations of some classes do not say.
    """
    import diffusers

    class_name, settings, _ = SCHEDULERS[name]
    scheduler = getattr(diffusers, class_name).from_config({"steps_offset": 1, **config}, **settings)
    trained = scheduler.config.num_train_timesteps
    # One spare: many configurations offset the timesteps by one, and the noisiest would not exist.
    if steps >= trained:
        raise GenerationError(f"num_inference_steps: {steps} is too many for the model's {trained} noise levels")
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise GenerationError(f"num_inference_steps: scheduler {name} can't make {steps} steps ({error})") from error
    if len(scheduler.timesteps) != steps:
        made = len(scheduler.timesteps)
        raise GenerationError(f"num_inference_steps: scheduler {name} makes {made} steps of the {steps} asked for")
    if first and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return scheduler


def alpha_bar(scheduler: Any, step: int) -> float:
    """ᾱ of the latents before step number `step`: their signal's share of the variance."""
    if hasattr(scheduler, "sigmas"):
        return 1 / (1 + float(scheduler.sigmas[step]) ** 2)
    return float(scheduler.alphas_cumprod[int(scheduler.timesteps[step])])


def to_variance_preserving(name: str, latents: Tensor, level: float) -> Tensor:
    """Latents as the scheduler keeps them at ᾱ = level → √ᾱ·x₀ + √(1−ᾱ)·ε."""
    return latents * level**0.5 if SCHEDULERS[name][2] else latents


def from_variance_preserving(name: str, latents: Tensor, level: float) -> Tensor:
    """The inverse of `to_variance_preserving`."""
    return latents / level**0.5 if SCHEDULERS[name][2] else latents


def memory(scheduler: Any) -> dict[str, Any]:
    """What a scheduler has learnt on its way (previous predictions, counters): CPU tensors, numbers, lists."""
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(len(scheduler.timesteps))
    state = {name: _to(value, "cpu") for name, value in vars(scheduler).items() if not name.startswith("_internal")}
    return {name: value for name, value in state.items() if not _same(value, vars(fresh).get(name))}


def restore(scheduler: Any, state: dict[str, Any], device: Any) -> None:
    """Give a fresh scheduler of the same kind and steps the memory of another."""
    vars(scheduler).update({name: _to(value, device) for name, value in state.items()})


def _to(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return [_to(item, device) for item in value] if isinstance(value, list) else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(np.all(a == b))
