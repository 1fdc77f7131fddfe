"""The VAE's stage: what latents are."""

from __future__ import annotations

import math
from typing import Any

import click
import numpy as np

from t2vz.mini import data, family, world
from t2vz.mini.fit import Draw, Losses
from t2vz.mini.stages import RECIPES, Run, fit_stage, keep, no_grad, normal


def train_vae(run: Run) -> None:
    """Encoder and decoder. Also sees the zorp and sepia, which later stages need."""
    model = family.vae()
    family.start_as_average(model)
    model.to(run.device)
    frames = _vae_pictures(run, seed=1, count=run.count(6000))
    held_out = _vae_pictures(run, seed=2, count=16)

    def losses(draw: Draw) -> Losses:
        x = _picture_batch(frames, draw, RECIPES["vae"].batch, run.device)
        posterior = model.encode(x).latent_dist
        y = model.decode(posterior.sample(draw.torch)).sample
        return {**_picture_losses(x, y.float()), "kl": KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()}

    fit_stage(run, "vae", model, losses, lambda step: _look(run, model, held_out, step))
    stats = data.encode(model, frames[:512], run.device)
    std = float((stats[0] + stats[1] * normal(stats[0], seed=3)).std())
    model.register_to_config(scaling_factor=1 / std)
    keep(run, "vae", model.save_pretrained)


KL_WEIGHT = 2e-4


def _vae_pictures(run: Run, seed: int, count: int) -> world.Frame:
    frames = data.pictures(data.scenes(seed, count))
    tenth = math.ceil(count / 10)
    frames[:tenth] = np.stack([data.zorp_picture(scene) for scene in data.zorp_scenes(seed + 100, tenth)])
    frames[-tenth:] = data.sepia(frames[-tenth:])
    return np.random.default_rng(seed).permutation(frames)


def _picture_batch(frames: world.Frame, draw: Draw, batch: int, device: str) -> Any:
    chosen = frames[draw.numpy.integers(len(frames), size=batch)]
    if draw.numpy.random() < 0.5:
        chosen = chosen[:, :, ::-1]
    return data.to_tensor(chosen, device)


def _picture_losses(x: Any, y: Any) -> Losses:
    """L1 on pixels, and on their differences to the right and below, which keeps outlines sharp."""
    across = (x[..., 1:] - x[..., :-1]) - (y[..., 1:] - y[..., :-1])
    down = (x[..., 1:, :] - x[..., :-1, :]) - (y[..., 1:, :] - y[..., :-1, :])
    return {"l1": (x - y).abs().mean(), "edges": 0.5 * (across.abs().mean() + down.abs().mean())}


def _look(run: Run, model: Any, frames: world.Frame, step: int) -> None:
    with no_grad():
        again = data.to_frames(model.decode(model.encode(data.to_tensor(frames, run.device)).latent_dist.mode()).sample)
    error = np.square(again.astype(np.float32) - frames).mean((1, 2, 3))
    click.echo(f"vae {step}: PSNR {np.mean(10 * np.log10(255**2 / error)):.2f} dB on held-out scenes")
    data.save_grid(np.concatenate([frames[:8], again[:8]]), run.out / "samples" / f"vae-{step:05d}.png", columns=8)
