"""Motion dynamics: moving the anchor's latent for each later frame and noising it (paper § 3.3.1).

A motion is a camera over the anchor's picture. Poses are float64 (N, 4), a row a frame, relative to the anchor:
x and y of the camera in latent cells (right and down are positive: the content moves left and up), log zoom
(positive: the content grows) and rotation in radians (positive: the picture turns counter-clockwise). The
camera zooms and turns about the middle of what it sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# The paper gives δ in pixels of 512×512 frames.
REFERENCE_PX = 512
# The paper's code maps pixel x of its field to x / 512 instead of (x + ½) / 512: half a reference pixel to the left.
# It decides which way δ = 12 rounds, so `nearest` keeps it; `subpixel` does not need it.
_PAPER_OFFSET_PX = -0.5

Warp = Literal["nearest", "subpixel"]


def paper_path(strength: tuple[float, float], frames: Sequence[int], latent_size: tuple[int, int]) -> Tensor:
    """Poses of the paper's motion: frame k moves by k · strength.

    strength: (x, y) in pixels a frame, for a picture whose shorter side is 512 pixels. One factor serves both
    axes, so a direction stays the same at every aspect; the references scale each axis by its own length.
    frames: numbers k. latent_size: (h, w) in cells.
    """
    cells_a_pixel = min(latent_size) / REFERENCE_PX
    k = torch.tensor(list(frames), dtype=torch.float64)
    return F.pad(k[:, None] * torch.tensor(strength, dtype=torch.float64) * cells_a_pixel, (0, 2))


def steady_path(
    pan: tuple[float, float], zoom: float, degrees: float, times_s: Sequence[float], latent_size: tuple[int, int]
) -> Tensor:
    """Poses of a camera that pans, zooms and turns steadily, at `times_s` after the anchor.

    A second long it moves by `pan` (x, y) in shorter sides of the anchor's picture, scales the picture by `zoom`
    and turns it by `degrees`.
    """
    return _poses([[t * pan[0], t * pan[1], t * math.log(zoom), t * degrees] for t in times_s], latent_size)


def keyframe_path(
    keyframes: Sequence[tuple[float, float, float, float, float]],
    times_s: Sequence[float],
    latent_size: tuple[int, int],
) -> Tensor:
    """Poses of a camera that goes from keyframe to keyframe, at `times_s` after the anchor.

    keyframes: (seconds, x, y, zoom, degrees) with rising seconds, x and y in shorter sides. Between them x, y, log
    zoom and degrees go linearly; the last one is held. The camera starts at (0, 0, 1, 0), unless a keyframe at
    0 s says otherwise: then that one is what the anchor shows, and the others are seen from there.
    """
    if keyframes[0][0] > 0:
        keyframes = [(0, 0, 0, 1, 0), *keyframes]
    seconds, x, y, zoom, degrees = np.array(keyframes, dtype=np.float64).T
    tracks = [np.interp([0, *times_s], seconds, track) for track in (x, y, np.log(zoom), degrees)]
    anchor, *poses = _poses(np.stack(tracks, axis=1), latent_size)
    return _seen_from(anchor, torch.stack(poses)) if poses else anchor.new_empty(0, 4)


def _poses(rows: Sequence[Sequence[float]] | np.ndarray, latent_size: tuple[int, int]) -> Tensor:
    """Rows of (x, y, log zoom, degrees), x and y in shorter sides → poses."""
    units = torch.tensor([min(latent_size), min(latent_size), 1, math.pi / 180], dtype=torch.float64)
    return torch.as_tensor(np.asarray(rows, dtype=np.float64).reshape(-1, 4)) * units


def _seen_from(anchor: Tensor, poses: Tensor) -> Tensor:
    """Poses in the picture's plane → relative to the pose `anchor` (4,)."""
    x, y, log_zoom, radians = (poses - anchor).unbind(1)
    scale, cos, sin = anchor[2].exp(), anchor[3].cos(), anchor[3].sin()
    return torch.stack([scale * (cos * x + sin * y), scale * (cos * y - sin * x), log_zoom, radians], dim=1)


def bounded(poses: Tensor, bound: float, latent_size: tuple[int, int]) -> Tensor:
    """The same motion, but each of x, y, zoom and rotation turns back, at the same speed, where it alone would
    carry a cell farther than `bound` shorter sides. Zoom and rotation carry the corners farthest."""
    far = bound * min(latent_size)
    corner = math.hypot(*latent_size) / 2
    limit = torch.tensor([far, far, math.log1p(far / corner), far / corner], dtype=torch.float64)
    # A triangle wave: 0 at 0, slope 1 up to the limit, then down to −limit, and so on.
    return limit - ((poses + limit) % (4 * limit) - 2 * limit).abs()


def warp(latent: Tensor, poses: Tensor, how: Warp) -> Tensor:
    """`latent` as the camera sees it from each pose. Borders reflect.

    latent: (C, h, w). Returns (N, C, h, w).
    nearest takes whole cells, as the paper does. subpixel moves by fractions, and changes neither the variance of
    white noise nor the mean of the picture, which bilinear sampling would; at a reflecting border a cell's mirror
    image adds to it. Zooming in makes neighbouring cells of the noise alike in both.
    """
    if not len(poses):
        return latent.new_empty(0, *latent.shape)
    if how == "nearest":
        return torch.stack([_warp_nearest(latent, pose) for pose in poses])
    return torch.stack([(_warp_cosine if pose[2:].any() else _warp_fourier)(latent, pose) for pose in poses])


def _displacement(pose: Tensor, h: int, w: int) -> Tensor:
    """How far from each cell the one is that the camera shows there: float64 (2, h, w), x and y in cells."""
    x, y, log_zoom, radians = pose
    # (R − 1)(p − centre) + shift, so that a pure shift is that very number everywhere.
    from_centre_y = torch.arange(h, dtype=torch.float64)[:, None] - (h - 1) / 2
    from_centre_x = torch.arange(w, dtype=torch.float64)[None, :] - (w - 1) / 2
    cos, sin = radians.cos() / log_zoom.exp(), radians.sin() / log_zoom.exp()
    return torch.stack(
        [
            x + (cos - 1) * from_centre_x - sin * from_centre_y,
            y + sin * from_centre_x + (cos - 1) * from_centre_y,
        ]
    )


def _warp_nearest(latent: Tensor, pose: Tensor) -> Tensor:
    _, h, w = latent.shape
    offset = _PAPER_OFFSET_PX * min(h, w) / REFERENCE_PX
    moved_x, moved_y = (_displacement(pose, h, w) + offset).to(latent.device, torch.float32)
    x = torch.arange(w, device=latent.device) + moved_x
    y = torch.arange(h, device=latent.device)[:, None] + moved_y
    # grid_sample's coordinates: cell i of n is at (2 i + 1) / n − 1.
    grid = torch.stack([(2 * x + 1) / w - 1, (2 * y + 1) / h - 1], dim=-1)[None].to(latent.dtype)
    return F.grid_sample(latent[None], grid, mode="nearest", padding_mode="reflection", align_corners=False)[0]


def _warp_fourier(latent: Tensor, pose: Tensor) -> Tensor:
    """A translation is a phase in the spectrum, which changes no amplitude. Mirroring the latent first makes it
    periodic, with the same reflecting borders as `nearest`."""
    _, h, w = latent.shape
    mirrored = torch.cat([latent, latent.flip(-1)], dim=-1)
    mirrored = torch.cat([mirrored, mirrored.flip(-2)], dim=-2).to(torch.float32)
    spectrum = torch.fft.fft2(mirrored)
    fx = torch.fft.fftfreq(2 * w, device=latent.device)
    fy = torch.fft.fftfreq(2 * h, device=latent.device)
    x, y = pose[:2].to(latent.device, torch.float32)
    phase = 2j * torch.pi * (x * fx + y * fy[:, None])
    # Real but for the Nyquist frequency, whose imaginary part is dropped.
    shifted = torch.fft.ifft2(spectrum * torch.exp(phase)).real
    return shifted[..., :h, :w].to(latent.dtype)


def _warp_cosine(latent: Tensor, pose: Tensor) -> Tensor:
    """The mirrored latent's Fourier series (its discrete cosine transform), read at any place. Where the motion is
    a translation it is `_warp_fourier`; like there, the weights that make a cell have a square sum of 1."""
    _, h, w = latent.shape
    device = latent.device
    grid_x, grid_y = torch.arange(w, dtype=torch.float64), torch.arange(h, dtype=torch.float64)
    spectrum = _cosines(grid_y, h, device).T @ latent.to(torch.float32) @ _cosines(grid_x, w, device)
    moved_x, moved_y = _displacement(pose, h, w)
    # Row by row, as the weights of all cells at once would not fit into memory for large pictures.
    rows = [
        ((_cosines(y, h, device) @ spectrum) * _cosines(x, w, device)).sum(-1)
        for x, y in zip(grid_x + moved_x, grid_y[:, None] + moved_y, strict=True)
    ]
    return torch.stack(rows, dim=1).to(latent.dtype)


def _cosines(at: Tensor, n: int, device: torch.device) -> Tensor:
    """The n basis functions of the orthonormal DCT-II at float64 positions (p,) in cells: float32 (p, n)."""
    k = torch.arange(n, dtype=torch.float64)
    basis = torch.cos(torch.pi / n * (at[:, None] + 0.5) * k) * (2 / n) ** 0.5
    basis[:, 0] *= 0.5**0.5
    return basis.to(device, torch.float32)


def renoise(latents: Tensor, noise: Tensor, alpha_bar_from: float, alpha_bar_to: float) -> Tensor:
    """DDPM's forward process between two noise levels, of variance-preserving latents (paper, eq. 8).

    alpha_bar_from, alpha_bar_to: ᾱ of the present, cleaner level and of the noisier one to reach.
    """
    ratio = alpha_bar_to / alpha_bar_from
    return ratio**0.5 * latents + (1 - ratio) ** 0.5 * noise
