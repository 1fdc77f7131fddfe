"""The training loop that all stages share: AdamW, warm-up and cosine decay, averaged weights, exact resumption.

Everything random in a step is drawn from (seed, step), so a run that was killed goes on from its last checkpoint to
the same weights, and nothing of random generators has to be saved.
"""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

CHECKPOINT_EVERY_S = 120.0
_LINE_EVERY = 20  # steps: a line of the curve, a line on the terminal


@dataclass(frozen=True)
class Recipe:
    """steps, batch, lr: of the whole run. warmup: steps. ema: decay of the averaged weights. bf16: autocast.

    muon: if above 0, the learning rate of Muon, which then trains the matrices and kernels, and AdamW the rest.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    ema: float = 0.998
    weight_decay: float = 0.01
    seed: int = 0
    bf16: bool = True
    muon: float = 0.0


@dataclass(frozen=True)
class Draw:
    """The random sources of one step, the same whenever the step is run."""

    step: int
    numpy: np.random.Generator
    torch: Any

    @classmethod
    def of(cls, seed: int, step: int) -> Draw:
        import torch

        rng = np.random.default_rng((seed, step))
        return cls(step, rng, torch.Generator().manual_seed(int(rng.integers(2**62))))


Losses = dict[str, Any]  # name → scalar tensor; what is minimised is their sum


def fit(
    name: str,
    model: Any,
    losses_of: Callable[[Draw], Losses],
    recipe: Recipe,
    out: Path,
    device: str,
    look: Callable[[int], None] | None = None,
    look_every: int = 500,
) -> None:
    """Train `model`'s parameters that require gradients; leave the averaged weights in it.

    Writes out/checkpoints/`name`.pt and out/curves/`name`.csv, and goes on from the checkpoint if there is one.
    look(step) is called with the averaged weights in place, to draw samples.
    """
    import torch

    weights = {key: value for key, value in model.named_parameters() if value.requires_grad}
    average = {key: value.detach().clone() for key, value in weights.items()}
    optimizers = _optimizers(weights, recipe)
    rates = [optimizer.defaults["lr"] for optimizer in optimizers]
    checkpoint = out / "checkpoints" / f"{name}.pt"
    start, curve, spent_s = 0, [], 0.0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        average = saved["average"]
        start, curve, spent_s = saved["step"], saved["curve"], saved["spent_s"]

    began = saved_at = time.monotonic()
    sums: dict[str, float] = {}
    model.train()
    for step in range(start, recipe.steps):
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * _schedule(step, recipe)
        with torch.autocast(torch.device(device).type, torch.bfloat16) if recipe.bf16 else nullcontext():
            losses = losses_of(Draw.of(recipe.seed, step))
        model.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(recipe.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), [w.detach() for w in weights.values()], 1 - decay)

        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        done = step + 1
        if done % _LINE_EVERY == 0 or done == recipe.steps:
            count = (done - 1) % _LINE_EVERY + 1
            means = {key: value / count for key, value in sums.items()}
            sums = {}
            curve.append({"step": done, **means})
            elapsed_s = time.monotonic() - began
            rate = (done - start) / elapsed_s
            parts = "  ".join(f"{key} {value:.4f}" for key, value in means.items())
            left_min = (recipe.steps - done) / rate / 60
            click.echo(f"{name} {done}/{recipe.steps}  {parts}  {rate:.2f} steps/s  {left_min:.1f} min left")
        # At the curve's lines only, so that no sum of losses has to be saved.
        if done % _LINE_EVERY == 0 and time.monotonic() - saved_at > CHECKPOINT_EVERY_S:
            _save(checkpoint, model, optimizers, average, done, curve, spent_s + time.monotonic() - began)
            _write_curve(out, name, curve)
            saved_at = time.monotonic()
        if look and done % look_every == 0 and done < recipe.steps:
            _swap(weights, average)
            model.eval()
            look(done)
            model.train()
            _swap(weights, average)

    if start < recipe.steps:
        _save(checkpoint, model, optimizers, average, recipe.steps, curve, spent_s + time.monotonic() - began)
    _write_curve(out, name, curve)
    with torch.no_grad():
        for key, value in weights.items():
            value.copy_(average[key])
    model.eval()
    if look:
        look(recipe.steps)


def _optimizers(weights: dict[str, Any], recipe: Recipe) -> list[Any]:
    import torch

    adam: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "betas": (0.9, 0.99)}
    if not recipe.muon:
        return [torch.optim.AdamW(weights.values(), **adam)]
    # Embeddings are tables, not maps: their rows have nothing to do with each other.
    matrices = {name: weight for name, weight in weights.items() if weight.ndim >= 2 and "embed" not in name}
    rest = [weight for name, weight in weights.items() if name not in matrices]
    return [_muon(list(matrices.values()), recipe.muon), torch.optim.AdamW(rest, **adam)]


def _muon(weights: list[Any], lr: float) -> Any:
    """Muon (Jordan, 2024) for matrices and convolution kernels; torch.optim.Muon takes matrices alone.

    A step's matrix has all its singular values near 1: no direction that all pictures share, such as brightness,
    can crowd out the many small ones.
    """
    import torch

    class Muon(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for weight in [w for w in group["params"] if w.grad is not None]:
                    momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                    momentum.lerp_(weight.grad, 0.05)
                    update = weight.grad.lerp(momentum, 0.95).flatten(1)
                    gain = max(1, update.shape[0] / update.shape[1]) ** 0.5
                    weight.add_(_orthogonal(update).view_as(weight), alpha=-group["lr"] * gain)

    return Muon(weights, {"lr": lr})


def _orthogonal(matrix: Any) -> Any:
    """The nearest orthogonal matrix, roughly, by five steps of Newton and Schulz."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def _schedule(step: int, recipe: Recipe) -> float:
    """Factor of the learning rate: up evenly, then down a half cosine to 2 %."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def _swap(weights: dict[str, Any], average: dict[str, Any]) -> None:
    for key, value in weights.items():
        value.data, average[key] = average[key], value.data


def _save(
    path: Path, model: Any, optimizers: list[Any], average: dict[str, Any], step: int, curve: list[Any], spent_s: float
) -> None:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "average": average,
        "step": step,
        "curve": curve,
        "spent_s": spent_s,
    }
    torch.save(state, draft)
    os.replace(draft, path)


def _write_curve(out: Path, name: str, curve: list[dict[str, float]]) -> None:
    if not curve:
        return
    folder = out / "curves"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(curve[0]))
        writer.writeheader()
        writer.writerows(curve)


def plot_curves(out: Path) -> None:
    """out/curves.png from all the curves there are; nothing without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    files = sorted((out / "curves").glob("*.csv"))
    if not files:
        return
    columns = 4
    rows = math.ceil(len(files) / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(files) :]:
        axis.axis("off")
    for file, axis in zip(files, axes.flat, strict=False):
        with open(file, newline="") as opened:
            table = list(csv.DictReader(opened))
        for key in [k for k in table[0] if k != "step"]:
            axis.plot([int(row["step"]) for row in table], [float(row[key]) for row in table], label=key, lw=0.8)
        axis.set_yscale("log")
        axis.set_title(file.stem, fontsize=9)
        axis.legend(fontsize=7)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=80)
    pyplot.close(figure)
