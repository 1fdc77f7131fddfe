"""Motion dynamics: moving the anchor's latent for each later frame and noising it (paper § 3.3.1)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# The paper gives δ in pixels of 512×512 frames.
REFERENCE_PX = 512
# The paper's code maps pixel x of its field to x / 512 instead of (x + ½) / 512: half a reference pixel to the left.
# It decides which way δ = 12 rounds, so `nearest` keeps it; `subpixel` does not need it.
_PAPER_OFFSET_PX = -0.5

Warp = Literal["nearest", "subpixel"]


def shifts(strength: tuple[float, float], frames: range, latent_size: tuple[int, int]) -> Tensor:
    """Shift of each frame in latent cells: float64 (len(frames), 2), (x, y); frame k moves by k · strength.

    strength: (x, y) in pixels a frame, for a picture whose shorter side is 512 pixels. One factor serves both
    axes, so a direction stays the same at every aspect; the references scale each axis by its own length.
    latent_size: (h, w) in cells.
    """
    cells_a_pixel = min(latent_size) / REFERENCE_PX
    k = torch.tensor(list(frames), dtype=torch.float64)
    return k[:, None] * torch.tensor(strength, dtype=torch.float64) * cells_a_pixel


def warp(latent: Tensor, shift: Tensor, how: Warp) -> Tensor:
    """Sample `latent` at p + shift for every cell p: the content moves by −shift. Borders reflect.

    latent: (C, h, w). shift: (N, 2), (x, y) in cells. Returns (N, C, h, w).
    nearest moves whole cells, as the paper does. subpixel moves by fractions without changing the variance
    of the noise or the strength of the picture, which bilinear sampling would.
    """
    return _warp_nearest(latent, shift) if how == "nearest" else _warp_fourier(latent, shift)


def _warp_nearest(latent: Tensor, shift: Tensor) -> Tensor:
    _, h, w = latent.shape
    offset = _PAPER_OFFSET_PX * min(h, w) / REFERENCE_PX
    moved = (shift + offset).to(latent.device, torch.float32)
    x = torch.arange(w, device=latent.device) + moved[:, 0, None]
    y = torch.arange(h, device=latent.device) + moved[:, 1, None]
    # grid_sample's coordinates: cell i of n is at (2 i + 1) / n − 1.
    grid_x = ((2 * x + 1) / w - 1)[:, None, :].expand(-1, h, w)
    grid_y = ((2 * y + 1) / h - 1)[:, :, None].expand(-1, h, w)
    grid = torch.stack([grid_x, grid_y], dim=-1)
    many = latent.expand(len(shift), *latent.shape)
    return F.grid_sample(many, grid.to(latent.dtype), mode="nearest", padding_mode="reflection", align_corners=False)


def _warp_fourier(latent: Tensor, shift: Tensor) -> Tensor:
    """A translation is a phase in the spectrum, which changes no amplitude. Mirroring the latent first makes it
    periodic, with the same reflecting borders as `nearest`."""
    _, h, w = latent.shape
    mirrored = torch.cat([latent, latent.flip(-1)], dim=-1)
    mirrored = torch.cat([mirrored, mirrored.flip(-2)], dim=-2).to(torch.float32)
    spectrum = torch.fft.fft2(mirrored)
    fx = torch.fft.fftfreq(2 * w, device=latent.device)
    fy = torch.fft.fftfreq(2 * h, device=latent.device)
    moved = shift.to(latent.device, torch.float32)
    phase = 2j * torch.pi * (moved[:, 0, None, None] * fx + moved[:, 1, None, None] * fy[:, None])
    # Real but for the Nyquist frequency, whose imaginary part is dropped.
    shifted = torch.fft.ifft2(spectrum * torch.exp(phase)[:, None]).real
    return shifted[..., :h, :w].to(latent.dtype)


def renoise(latents: Tensor, noise: Tensor, alpha_bar_from: float, alpha_bar_to: float) -> Tensor:
    """DDPM's forward process between two noise levels, of variance-preserving latents (paper, eq. 8).

    alpha_bar_from, alpha_bar_to: ᾱ of the present, cleaner level and of the noisier one to reach.
    """
    ratio = alpha_bar_to / alpha_bar_from
    return ratio**0.5 * latents + (1 - ratio) ** 0.5 * noise
