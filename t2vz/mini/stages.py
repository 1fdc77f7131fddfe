"""What the stages of the training share: the run's folder and scale, the recipes, keeping results, the VAE."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t2vz.mini.fit import Draw, Losses, Recipe, fit


@dataclass(frozen=True)
class Run:
    """Where and how the stages run.

    out: folder of all that is written. scale: of all steps and pools, 1 for the real run. device: torch's.
    """

    out: Path
    scale: float = 1.0
    device: str = "cpu"

    def count(self, full: int) -> int:
        return max(2, round(full * self.scale))

    def recipe(self, full: Recipe) -> Recipe:
        steps = self.count(full.steps)
        return replace(full, steps=steps, warmup=min(full.warmup, steps))


RECIPES: dict[str, Recipe] = {
    "vae": Recipe(steps=2000, batch=4, lr=3e-4, ema=0.995, muon=2.5e-3),
    "base": Recipe(steps=5800, batch=32, lr=1e-3, muon=5e-3),
    "edit": Recipe(steps=6200, batch=32, lr=6e-4, ema=0.99, muon=4e-3),
    "controlnet-edge": Recipe(steps=2000, batch=16, lr=1e-3, warmup=50, ema=0.99, muon=3e-3),
    "controlnet-depth": Recipe(steps=2000, batch=16, lr=1e-3, warmup=50, ema=0.99, muon=3e-3),
    "controlnet-pose": Recipe(steps=2000, batch=16, lr=1e-3, warmup=50, ema=0.99, muon=3e-3),
    "dreambooth": Recipe(steps=640, batch=16, lr=1e-3, ema=0.98, warmup=20, muon=4e-3),
    "lora": Recipe(steps=500, batch=16, lr=1e-3, ema=0.98, warmup=20),
    "depth": Recipe(steps=1300, batch=8, lr=1e-3, bf16=False, muon=5e-3),
    "detector": Recipe(steps=2400, batch=16, lr=1e-3, bf16=False),
    "pose": Recipe(steps=1200, batch=16, lr=1e-3, bf16=False, muon=5e-3),
}


def fit_stage(
    run: Run, name: str, model: Any, losses: Callable[[Draw], Losses], look: Callable[[int], None] | None
) -> None:
    fit(name, model, losses, run.recipe(RECIPES[name]), run.out, run.device, look)


def keep(run: Run, name: str, save: Callable[[Path], Any]) -> None:
    """Save a finished stage's result to out/`name`, whole or not at all; its checkpoint is not needed any more."""
    draft = run.out / f".{name}"
    shutil.rmtree(draft, ignore_errors=True)
    save(draft)
    os.replace(draft, run.out / name)
    (run.out / "checkpoints" / f"{name}.pt").unlink(missing_ok=True)


def load_vae(run: Run) -> Any:
    """The trained VAE, frozen."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(run.out / "vae").to(run.device).requires_grad_(False)


def normal(like: Any, seed: int) -> Any:
    import torch

    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)


def no_grad() -> Any:
    import torch

    return torch.no_grad()
