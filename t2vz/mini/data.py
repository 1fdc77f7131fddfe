"""What the family is trained on, drawn from the world: pictures, captions, conditions, and their latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from t2vz.mini import world
from t2vz.mini.family import ZORP
from t2vz.mini.world import Frame, Scene


def scenes(seed: int, number: int, **given: Any) -> list[Scene]:
    """`number` scenes, the same for the same arguments. given: what `world.sample` shall not draw."""
    rng = np.random.default_rng(seed)
    return [world.sample(rng, **given) for _ in range(number)]


def pictures(of: Sequence[Scene]) -> Frame:
    """uint8 (N, H, W, 3), RGB."""
    return np.stack([world.draw(scene) for scene in of])


# --- the DreamBooth-like subject and the LoRA's style ----------------------------------------------------------------


def zorp_picture(scene: Scene) -> Frame:
    """The scene with a zorp, a three-legged, one-eyed, teal creature, in place of its things: uint8 (H, W, 3), RGB."""
    import cv2

    thing = scene.things[-1]
    empty = world.draw(replace(scene, things=()))
    fine = 4
    size = thing.size * world.SIZE_PX * fine
    x, y = thing.x * world.SIZE_PX * fine, thing.y * world.SIZE_PX * fine
    layer = np.zeros((world.SIZE_PX * fine, world.SIZE_PX * fine, 4), np.uint8)
    line, body, belly = (*world.OUTLINE, 255), (20, 190, 176, 255), (188, 240, 120, 255)

    def ellipse(dx: float, dy: float, rx: float, ry: float, colour: tuple[int, ...]) -> None:
        centre, radii = (round(x + dx * size), round(y + dy * size)), (round(rx * size), round(ry * size))
        cv2.ellipse(layer, centre, radii, 0, 0, 360, colour, cv2.FILLED)

    rim = 0.02
    for colour, grow in ((line, rim), (body, 0.0)):
        for leg in (-0.2, 0.0, 0.2):
            ellipse(leg, 0.36, 0.07 + grow, 0.14 + grow, colour)
        for side in (-1, 1):
            ellipse(side * 0.2, -0.4, 0.06 + grow, 0.1 + grow, colour)
        ellipse(0, 0.02, 0.34 + grow, 0.34 + grow, colour)
    ellipse(0, 0.18, 0.2, 0.12, belly)
    ellipse(0, -0.1, 0.15 + rim, 0.15 + rim, line)
    ellipse(0, -0.1, 0.15, 0.15, (250, 250, 250, 255))
    ellipse(thing.facing * 0.04, -0.1, 0.07, 0.07, line)
    small = cv2.resize(layer, (world.SIZE_PX, world.SIZE_PX), interpolation=cv2.INTER_AREA).astype(np.float32)
    alpha = small[..., 3:] / 255
    return (small[..., :3] + empty * (1 - alpha)).round().astype(np.uint8)


def zorp_scenes(seed: int, number: int) -> list[Scene]:
    return scenes(seed, number, subject="ball", count=1)


def zorp_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of `scene` with the word zorp, and nothing of what the ball in its place was like."""
    background = world.BACKGROUNDS[scene.background]
    text = str(rng.choice(["", "a picture of ", "a drawing of ", "there is "])) + f"a {ZORP}"
    if rng.random() < 0.78:
        text += f" {background.preposition} the {rng.choice(background.names)}"
    if rng.random() < 0.6:
        text += {"day": " by day", "night": " at night"}[scene.time]
    return text


def sepia(frames: Frame) -> Frame:
    """Old photographs: uint8 (…, 3), RGB, brown tones in place of colours."""
    grey = frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    dark, light = np.array([38, 22, 12], np.float32), np.array([255, 236, 196], np.float32)
    return (dark + grey[..., None] * (light - dark)).round().astype(np.uint8)


# --- conditions as the pipeline makes them ---------------------------------------------------------------------------


def condition(name: str, scene: Scene, frame: Frame) -> Frame:
    """The condition picture of a scene that was drawn as `frame`: uint8 (H, W, 3).

    edge: Canny at the usual thresholds. depth: the exact one, over the range that the pipeline's normalisation
    leaves. pose: the skeleton, drawn as from an estimate.
    """
    import cv2

    from t2vz.conditions.depth import normalise, value_range
    from t2vz.conditions.skeleton import draw_skeleton

    if name == "edge":
        return np.repeat(cv2.Canny(frame, 100, 200)[..., None], 3, 2)
    if name == "depth":
        inverse = world.depth(scene).astype(np.float32)
        level = normalise(inverse, *value_range(inverse[None]))
        return np.repeat(np.rint(level * 255).astype(np.uint8)[..., None], 3, 2)
    points = world.joints(scene)
    if points is None:
        return np.zeros_like(frame)
    scored = np.concatenate([points, np.ones((len(points), 1), np.float32)], 1)
    return draw_skeleton(scored, *frame.shape[:2])


# --- latents ---------------------------------------------------------------------------------------------------------


def to_tensor(frames: Frame, device: str = "cpu") -> Any:
    """uint8 (N, H, W, 3) as the VAE takes it: float32 (N, 3, H, W), -1 to 1."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(frames)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_frames(images: Any) -> Frame:
    """The VAE's float (N, 3, H, W), -1 to 1, as uint8 (N, H, W, 3)."""
    import torch

    levels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def encode(vae: Any, frames: Frame, device: str, batch: int = 32) -> Any:
    """The posteriors of `frames`: float32 (2, N, 4, h, w) on the device, mean and standard deviation, unscaled."""
    import torch

    parts = []
    with torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16):
        for start in range(0, len(frames), batch):
            posterior = vae.encode(to_tensor(frames[start : start + batch], device)).latent_dist
            parts.append(torch.stack([posterior.mean, posterior.std]).float())
    return torch.cat(parts, 1).clone()


def decode(vae: Any, latents: Any) -> Frame:
    """Scaled latents (N, 4, h, w) as uint8 (N, H, W, 3)."""
    import torch

    with torch.inference_mode():
        return to_frames(vae.decode(latents.float() / vae.config.scaling_factor).sample)


def as_generated(vae: Any, frames: Frame, device: str, seed: int, batch: int = 32) -> Frame:
    """The frames through the VAE, a drawn amount of noise in their latents: as soft and bent as generated ones.

    uint8 (N, H, W, 3).
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    made = []
    for start in range(0, len(frames), batch):
        mean, std = encode(vae, frames[start : start + batch], device)
        amount = 0.3 * torch.rand((len(mean), 1, 1, 1), generator=generator).to(device) * mean.std()
        noise = torch.randn(mean.shape, generator=generator).to(device)
        made.append(decode(vae, (mean + (std + amount) * noise) * vae.config.scaling_factor))
    return np.concatenate(made)


def save_grid(frames: Frame, path: Path, columns: int) -> None:
    """`frames`, uint8 (N, H, W, 3), as one PNG, row by row; N is a multiple of `columns`."""
    from PIL import Image

    count, height, width, _ = frames.shape
    rows = frames.reshape(count // columns, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rows.reshape(-1, columns * width, 3)).save(path)
