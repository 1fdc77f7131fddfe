"""The lockstep loop: time outside, chunks of frames inside.

Each frame is evaluated exactly once a step, whatever the chunk size, and only one step's anchor keys and
values are alive. So memory does not grow with the clip, and the result does not depend on the chunks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from t2vz.engine import noise, schedule
from t2vz.engine.attention import AnchorState
from t2vz.engine.guidance import Guide
from t2vz.errors import InvalidFrames, OutOfDeviceMemory, is_out_of_memory

OnStep = Callable[[int], None]


@dataclass(frozen=True)
class Control:
    """One ControlNet with its condition.

    frames: uint8 (F, H, W, 3), RGB. scale: weight of its residuals.
    """

    model: nn.Module
    frames: NDArray[np.uint8]
    scale: float


@dataclass
class Denoiser:
    """A UNet, its ControlNets and what conditions them: predicts the noise in some frames of a clip.

    text: (B, m, c), one prompt embedding a guidance branch.
    guide: joins the branches' predictions.
    image_latents: (F, C, h, w), the source frames of an InstructPix2Pix UNet, and image_branches: for each
        branch, 1 to show it the source frame or 0 to show it zeros.
    evaluations: frames evaluated so far.
    """

    unet: Any
    state: AnchorState
    text: Tensor
    guide: Guide
    controls: tuple[Control, ...] = ()
    image_latents: Tensor | None = None
    image_branches: tuple[float, ...] = ()
    evaluations: int = field(default=0, init=False)

    def __call__(self, x: Tensor, t: Tensor, frames: slice) -> Tensor:
        """x: float32 (f, C, h, w), scaled as the scheduler asks. Returns the guided prediction, the same shape.

        The slice must hold the anchor (frame 0) exactly if it starts a new step.
        """
        self.state.write = frames.start == 0
        branches, dtype = len(self.text), self.text.dtype
        sample = x.to(dtype).repeat(branches, 1, 1, 1)
        residuals = self._control(sample, t, frames)
        if self.image_latents is not None:
            shown = torch.tensor(self.image_branches, dtype=dtype, device=x.device).view(-1, 1, 1, 1, 1)
            image = (shown * self.image_latents[frames].to(x.device, dtype)).flatten(0, 1)
            sample = torch.cat([sample, image], dim=1)
        prediction = self.unet(sample, t, encoder_hidden_states=self.text, return_dict=False, **residuals)[0]
        self.evaluations += len(x)
        return self.guide(prediction.to(torch.float32).unflatten(0, (branches, -1)))

    def _control(self, sample: Tensor, t: Tensor, frames: slice) -> dict[str, Any]:
        down: list[Tensor] = []
        mid: Tensor | None = None
        for control in self.controls:
            picture = torch.from_numpy(np.ascontiguousarray(control.frames[frames])).to(sample.device)
            picture = (picture.permute(0, 3, 1, 2).to(sample.dtype) / 255).repeat(len(self.text), 1, 1, 1)
            more_down, more_mid = control.model(
                sample,
                t,
                encoder_hidden_states=self.text,
                controlnet_cond=picture,
                conditioning_scale=control.scale,
                return_dict=False,
            )
            down = [a + b for a, b in zip(down, more_down, strict=True)] if down else list(more_down)
            mid = more_mid if mid is None else mid + more_mid
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid} if down else {}


@dataclass(frozen=True)
class Snapshot:
    """A denoising between two steps: all that it takes to go on, in the same bits.

    step: number of the next step. latents: float32 (F, C, h, w), on the CPU.
    scheduler: what a multistep sampler remembers of the steps before.
    """

    step: int
    latents: Tensor
    scheduler: dict[str, Any]


OnSnapshot = Callable[[Callable[[], Snapshot]], None]


def denoise(
    denoiser: Denoiser,
    latents: Tensor,
    scheduler: Any,
    steps: range,
    *,
    seed: int,
    chunk_size: int,
    on_step: OnStep,
    start: Snapshot | None = None,
    on_snapshot: OnSnapshot = lambda take: None,
) -> Tensor:
    """Take all frames through the scheduler's steps number steps[0] … steps[-1], in lockstep.

    latents: float32 (F, C, h, w) at the noise level before the first of the steps; frame 0 is the anchor.
    scheduler: fresh, at that step (`schedule.make_scheduler`).
    seed: keys the noise of stochastic samplers.
    on_step: called with the number of evaluations since its last call, after each chunk.
    start: a snapshot of this same denoising to go on from, instead of `latents`.
    on_snapshot: called after each step with a function that takes a snapshot.
    Returns the latents after the last step. When device memory runs out, the chunk is halved and done again.
    Raises OutOfDeviceMemory if one frame alone is too much, InvalidFrames on NaN or infinity.
    """
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    if start is not None:
        steps, latents = range(start.step, steps.stop), start.latents.to(latents.device)
        schedule.restore(scheduler, start.scheduler, latents.device)
    for step in steps:
        t = scheduler.timesteps[step].to(latents.device)
        prediction, chunk_size = _predict(denoiser, scheduler.scale_model_input(latents, t), t, chunk_size, on_step)
        noises = [noise.generator(seed, "step", frame, step) for frame in range(len(latents))]
        extra = {"generator": noises} if takes_generator else {}
        latents = scheduler.step(prediction, t, latents, return_dict=False, **extra)[0]
        # One look a step costs a synchronisation, and saves hours of denoising nothing.
        if not torch.isfinite(latents).all():
            raise InvalidFrames(f"NaN or infinite latents at step {step + 1}; try dtype=float32 or bfloat16")
        on_snapshot(partial(_snapshot, step + 1, latents, scheduler))
    return latents


def _snapshot(step: int, latents: Tensor, scheduler: Any) -> Snapshot:
    return Snapshot(step, latents.cpu(), schedule.memory(scheduler))


def _predict(denoiser: Denoiser, x: Tensor, t: Tensor, chunk_size: int, on_step: OnStep) -> tuple[Tensor, int]:
    """The prediction for all frames, chunk by chunk, and the chunk size that fitted into memory."""
    prediction = torch.empty_like(x)
    start = 0
    while start < len(x):
        frames = slice(start, min(start + chunk_size, len(x)))
        fits = True
        try:
            prediction[frames] = denoiser(x[frames], t, frames)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        if not fits:  # only here are the failed call's tensors gone: the exception held them
            if chunk_size == 1:
                raise OutOfDeviceMemory(
                    "one frame alone does not fit into device memory; lower width and height, or use dtype=float16"
                )
            chunk_size = max(1, min(chunk_size, len(x)) // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        on_step(frames.stop - frames.start)
        start = frames.stop
    return prediction, chunk_size
