"""Schedulers: right for the configuration of whatever class a model carries; noise levels in one unit."""

from __future__ import annotations

import diffusers
import pytest
import torch

from t2vz.engine import motion, schedule
from t2vz.errors import GenerationError

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
CLASSES = (
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)


def perfect(name: str, scheduler, step: int, x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """The noise in x, for a picture x0 that is known."""
    level = schedule.alpha_bar(scheduler, step)
    return (schedule.to_variance_preserving(name, x, level) - level**0.5 * x0) / (1 - level) ** 0.5


@pytest.mark.parametrize("saved_by", CLASSES)
@pytest.mark.parametrize("name", list(schedule.SCHEDULERS))
def test_a_known_picture_is_reached_beyond_the_range_of_pixels(name, saved_by):
    """Latents reach ±4: a scheduler that clips to ±1 (some do by default) would spoil every picture."""
    config = {k: v for k, v in getattr(diffusers, saved_by)(**STABLE_DIFFUSION).config.items() if k != "clip_sample"}
    steps = 20
    scheduler = schedule.make_scheduler(name, config, steps)
    x0 = torch.linspace(-4, 4, 64).view(1, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(x0.shape, generator=generator) * scheduler.init_noise_sigma
    takes_generator = name in ("ddim", "euler", "euler_a", "lcm")
    for step in range(steps):
        t = scheduler.timesteps[step]
        scheduler.scale_model_input(x, t)
        noise = perfect(name, scheduler, step, x, x0)
        x = scheduler.step(noise, t, x, return_dict=False, **({"generator": generator} if takes_generator else {}))[0]
    assert (x - x0).abs().max() < 0.25


@pytest.mark.parametrize("name", list(schedule.SCHEDULERS))
def test_renoised_latents_are_at_the_schedulers_own_level(name):
    """From T0 back to T1 in ᾱ, and into the scheduler's own parametrisation: x₀ is scaled and noised as it says."""
    scheduler = schedule.make_scheduler(name, STABLE_DIFFUSION, 50)
    low, high = schedule.alpha_bar(scheduler, 5), schedule.alpha_bar(scheduler, 2)
    assert high < low < 1
    generator = torch.Generator().manual_seed(1)
    x0 = 3.0
    noise, more = torch.randn(2, 200_000, generator=generator)
    at_t0 = schedule.from_variance_preserving(name, low**0.5 * x0 + (1 - low) ** 0.5 * noise, low)
    if schedule.SCHEDULERS[name][2]:  # what a σ scheduler means by a latent
        torch.testing.assert_close(at_t0, x0 + float(scheduler.sigmas[5]) * noise, atol=1e-3, rtol=1e-4)
    at_t1 = motion.renoise(schedule.to_variance_preserving(name, at_t0, low), more, low, high)
    at_t1 = schedule.from_variance_preserving(name, at_t1, high)
    if schedule.SCHEDULERS[name][2]:
        assert at_t1.mean() == pytest.approx(x0, abs=0.1)
        assert at_t1.std() == pytest.approx(float(scheduler.sigmas[2]), rel=0.01)
    else:
        assert at_t1.mean() == pytest.approx(high**0.5 * x0, abs=0.01)
        assert at_t1.std() == pytest.approx((1 - high) ** 0.5, rel=0.01)


def test_the_papers_timesteps():
    scheduler = schedule.make_scheduler("ddim", STABLE_DIFFUSION, 50)
    assert [int(scheduler.timesteps[step]) for step in (0, 2, 5, 49)] == [981, 941, 881, 1]


@pytest.mark.parametrize(("name", "steps"), [("ddim", 1000), ("lcm", 60)])
def test_too_many_steps_are_refused_in_plain_words(name, steps):
    with pytest.raises(GenerationError, match="num_inference_steps"):
        schedule.make_scheduler(name, STABLE_DIFFUSION, steps)
