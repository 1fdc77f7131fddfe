"""Between frames and latents, a few frames at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from t2vz.errors import InvalidFrames, is_out_of_memory

# Frames that the VAE takes at once. Not the row's chunk size: batches of another size round differently.
BATCH = 2

# The weights of a VAE may be shared by a row that is being generated and one that is being encoded, and
# `_finite` and offloading change them for a moment.
_in_use = threading.Lock()


@torch.no_grad()
def encode(vae: Any, frames: NDArray[np.uint8]) -> Tensor:
    """uint8 (F, H, W, 3) → the mode of the posterior, float32 (F, C, h, w) on the VAE's device, not scaled."""
    out = []
    with _at_work(vae) as device:
        for start in range(0, len(frames), BATCH):
            batch = torch.from_numpy(np.ascontiguousarray(frames[start : start + BATCH])).to(device)
            picture = batch.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
            out.append(_computed(vae, picture, lambda x: vae.encode(x).latent_dist.mode()))
    return torch.cat(out)


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Iterator[NDArray[np.uint8]]:
    """Latents as the UNet makes them, float32 (F, C, h, w) → batches of uint8 (f, H, W, 3), RGB, in order."""
    with _at_work(vae) as device:
        for batch in latents.split(BATCH):
            z = batch.to(device) / vae.config.scaling_factor
            picture = _computed(vae, z, lambda x: vae.decode(x, return_dict=False)[0])
            levels = (picture * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
            yield levels.permute(0, 2, 3, 1).cpu().numpy()


def offloaded(vae: Any, device: torch.device) -> Any:
    """The VAE, from now on in the host's memory; `encode` and `decode` bring it to the device and send it home."""
    from accelerate import cpu_offload_with_hook

    with _in_use:
        return cpu_offload_with_hook(vae, device)[0]


@contextmanager
def _at_work(vae: Any) -> Iterator[torch.device]:
    """The device that it computes on. An offloaded one comes there by itself, with the call, and is sent home here."""
    hook = getattr(vae, "_hf_hook", None)
    try:
        yield vae.device if hook is None else torch.device(hook.execution_device)
    finally:
        if hook is not None:
            with _in_use:
                hook.init_hook(vae)


def _computed(vae: Any, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """`_finite` for all of x, or frame by frame if that does not fit into device memory."""
    try:
        return _finite(vae, x, compute)
    except RuntimeError as error:
        if len(x) == 1 or not is_out_of_memory(error):
            raise
    return torch.cat([_finite(vae, frame, compute) for frame in x.split(1)])


def _finite(vae: Any, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """compute(x) in the VAE's dtype, as float32. Where a half-precision VAE overflows (the original's black frames),
    it is done again in float32. Raises InvalidFrames if that does not help."""
    with _in_use:
        dtype = vae.dtype
        out = compute(x.to(dtype)).float()
        if dtype != torch.float32 and _suspicious(out):
            vae.to(torch.float32)
            try:
                out = compute(x.float())
            finally:
                vae.to(dtype)
    if not torch.isfinite(out).all():
        raise InvalidFrames("the VAE gives NaN or infinite values, in float32 too: its weights may be damaged")
    return out


def _suspicious(out: Tensor) -> bool:
    """NaN, infinity, or a frame that is black throughout. That may be meant: float32 will show the same then."""
    black = (out <= -1).flatten(1).all(1).any()
    return bool(black | ~torch.isfinite(out).all())
