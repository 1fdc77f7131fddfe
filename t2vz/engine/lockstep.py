"""The lockstep loop: time outside, chunks of frames inside.

Each frame is evaluated exactly once a step, whatever the chunk size, and only one step's anchor keys and
values are alive. So memory does not grow with the clip, and the result does not depend on the chunks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from t2vz.engine import graphs, noise, schedule
from t2vz.engine.attention import AnchorState
from t2vz.engine.guidance import Guide, unguided
from t2vz.errors import InvalidFrames, OutOfDeviceMemory, is_out_of_memory

OnStep = Callable[[int], None]


# Against NaN and infinity, by the models' dtype.
_ADVICE = {
    torch.float16: "try dtype=float32 or bfloat16",
    torch.bfloat16: "try dtype=float32",
    torch.float32: "check the weights of the model and of what is put onto it, and lower the scales",
}


@dataclass(frozen=True)
class Control:
    """One ControlNet with its condition.

    frames: uint8 (F, H, W, 3), RGB. scale: weight of its residuals.
    acts: whether it does at a step number of so many.
    """

    model: nn.Module
    frames: NDArray[np.uint8]
    scale: float
    acts: Callable[[int, int], bool] = lambda step, steps: True


@dataclass
class Denoiser:
    """A UNet, its ControlNets and what conditions them: predicts the noise in some frames of a clip.

    text: (B, m, c), one prompt embedding a guidance branch, the prompt's own last.
    guide: joins the branches' predictions.
    steps: S, of the whole denoising.
    added: what the family conditions on beside: "text_embeds" (B, p) and "time_ids" (B, 6) of SDXL, "image_embeds",
        a list of (B, images, …), of IP-Adapters.
    guided_part: the part of the steps after which the prompt's branch goes on alone.
    anchors: frames whose keys and values all those up to the next of them attend to.
    image_latents: (F, C, h, w), the source frames of an InstructPix2Pix UNet, and image_branches: for each
        branch, 1 to show it the source frame or 0 to show it zeros.
    run: runs what of a call happens on the device: `graphs.eager`, or a `Graphs` where `state.in_place` is set.
    evaluations: frames evaluated so far.
    """

    unet: Any
    state: AnchorState
    text: Tensor
    guide: Guide
    steps: int
    added: dict[str, Any] = field(default_factory=dict)
    guided_part: float = 1.0
    anchors: tuple[int, ...] = (0,)
    controls: tuple[Control, ...] = ()
    image_latents: Tensor | None = None
    image_branches: tuple[float, ...] = ()
    run: Callable[[Hashable, graphs.Compute, Sequence[Tensor]], Tensor] = graphs.eager
    evaluations: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        shown = torch.tensor(self.image_branches, dtype=self.text.dtype, device=self.text.device)
        self._shown = shown.view(-1, 1, 1, 1, 1)

    def chunk(self, start: int, size: int, count: int) -> slice:
        """The frames to evaluate together from `start` on: at most `size` of `count`, and of one anchor."""
        later = [anchor for anchor in self.anchors if anchor > start]
        return slice(start, min([start + size, count, *later]))

    def __call__(self, x: Tensor, t: Tensor, frames: slice, step: int) -> Tensor:
        """x: float32 (f, C, h, w), scaled as the scheduler asks, at step number `step`. Returns the guided
        prediction, the same shape; the next call may overwrite it. Within a step the slices come in order, each
        from `chunk`.
        """
        guided = step / self.steps < self.guided_part
        branches = len(self.text) if guided else 1
        self.state.select(branches)
        self.state.write = frames.start in self.anchors
        acting = tuple(control for control in self.controls if control.acts(step, self.steps))
        inputs = [x.to(self.text.dtype), t]
        if self.image_latents is not None:
            inputs.append(self.image_latents[frames].to(x.device, self.text.dtype))
        inputs += [torch.from_numpy(np.ascontiguousarray(control.frames[frames])).to(x.device) for control in acting]
        run = self.run if self.state.on_text is None else graphs.eager  # a listener wants to be called
        key = branches, self.state.write, tuple(map(id, acting))
        prediction = run(key, partial(self._predict, guided, acting), inputs)
        self.state.commit()
        self.evaluations += len(x)
        return prediction

    def _predict(self, guided: bool, acting: Sequence[Control], inputs: Sequence[Tensor]) -> Tensor:
        """What of a call happens on the device alone: nothing here may wait for it, or bring it something."""
        x, t, *rest = inputs
        first = 0 if guided else len(self.text) - 1
        text, branches = self.text[first:], len(self.text) - first
        sample = x.repeat(branches, 1, 1, 1)
        # `text` stays one a branch: the attention layers share it among the frames. The rest goes to each frame.
        given: dict[str, Any] = {
            name: value[first:].repeat_interleave(len(x), 0)
            for name, value in self.added.items()
            if name != "image_embeds"
        }
        pictures = rest if self.image_latents is None else rest[1:]
        residuals = self._control(acting, pictures, sample, t, text, given)
        if "image_embeds" in self.added:
            given["image_embeds"] = [embeds[first:] for embeds in self.added["image_embeds"]]
        if self.image_latents is not None:
            image = (self._shown[first:] * rest[0]).flatten(0, 1)
            sample = torch.cat([sample, image], dim=1)
        prediction = self.unet(
            sample, t, encoder_hidden_states=text, added_cond_kwargs=given, return_dict=False, **residuals
        )[0]
        return (self.guide if guided else unguided)(prediction.to(torch.float32).unflatten(0, (branches, -1)))

    def _control(
        self,
        acting: Sequence[Control],
        pictures: Sequence[Tensor],
        sample: Tensor,
        t: Tensor,
        text: Tensor,
        given: dict[str, Any],
    ) -> dict[str, Any]:
        down: list[Tensor] = []
        mid: Tensor | None = None
        for control, frames in zip(acting, pictures, strict=True):
            picture = (frames.permute(0, 3, 1, 2).to(sample.dtype) / 255).repeat(len(text), 1, 1, 1)
            more_down, more_mid = control.model(
                sample,
                t,
                encoder_hidden_states=text,
                controlnet_cond=picture,
                conditioning_scale=control.scale,
                added_cond_kwargs=given,
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
    indices: Sequence[int] | None = None,
    start: Snapshot | None = None,
    on_snapshot: OnSnapshot = lambda take: None,
) -> Tensor:
    """Take all frames through the scheduler's steps number steps[0] … steps[-1], in lockstep.

    latents: float32 (F, C, h, w) at the noise level before the first of the steps; frame 0 is an anchor.
    scheduler: fresh, at that step (`schedule.make_scheduler`).
    seed: keys the noise of stochastic samplers.
    on_step: called with the number of evaluations since its last call, after each chunk.
    indices: number of each frame in its clip, where these are some of a clip's: it keys the noise.
    start: a snapshot of this same denoising to go on from, instead of `latents`.
    on_snapshot: called after each step with a function that takes a snapshot.
    Returns the latents after the last step. When device memory runs out, the chunk is halved and done again.
    Raises OutOfDeviceMemory if one frame alone is too much, InvalidFrames on NaN or infinity.
    """
    indices = range(len(latents)) if indices is None else indices
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    if start is not None:
        steps, latents = range(start.step, steps.stop), start.latents.to(latents.device)
        schedule.restore(scheduler, start.scheduler, latents.device)
    for step in steps:
        t = scheduler.timesteps[step].to(latents.device)
        scaled = scheduler.scale_model_input(latents, t)
        prediction, chunk_size = _predict(denoiser, scaled, t, step, chunk_size, on_step)
        noises = [noise.generator(seed, "step", frame, step) for frame in indices] if takes_generator else []
        extra = {"generator": noises} if takes_generator else {}
        latents = scheduler.step(prediction, t, latents, return_dict=False, **extra)[0]
        # One look a step costs a synchronisation, and saves hours of denoising nothing.
        if not torch.isfinite(latents).all():
            raise InvalidFrames(f"NaN or infinite latents at step {step + 1}; {_ADVICE[denoiser.text.dtype]}")
        on_snapshot(partial(_snapshot, step + 1, latents, scheduler))
    return latents


def _snapshot(step: int, latents: Tensor, scheduler: Any) -> Snapshot:
    return Snapshot(step, latents.cpu(), schedule.memory(scheduler))


def _predict(
    denoiser: Denoiser, x: Tensor, t: Tensor, step: int, chunk_size: int, on_step: OnStep
) -> tuple[Tensor, int]:
    """The prediction for all frames, chunk by chunk, and the chunk size that fitted into memory."""
    prediction = torch.empty_like(x)
    start = 0
    while start < len(x):
        frames = denoiser.chunk(start, chunk_size, len(x))
        fits = True
        try:
            prediction[frames] = denoiser(x[frames], t, frames, step)
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
            if isinstance(denoiser.run, graphs.Graphs):
                denoiser.run.forget()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        on_step(frames.stop - frames.start)
        start = frames.stop
    return prediction, chunk_size
