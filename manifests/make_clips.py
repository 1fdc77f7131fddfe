"""Draws the example manifests' source clips: a rolling ball, a pan over a house, a walking skeleton.

    python manifests/make_clips.py [folder]

They are drawn here, so that the examples run without anything to download and nobody else's pictures are in them.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from t2vz.clip import AudioReference
from t2vz.conditions.skeleton import draw_skeleton
from t2vz.media.encode import Encoding, encode

Picture = NDArray[np.uint8]  # (H, W, 3), RGB
RATE_FPS = Fraction(8)
FRAMES = 12
DURATION_S = float(FRAMES / RATE_FPS)


def ball(size_px: int = 128) -> Iterator[Picture]:
    """A shaded ball rolls from left to right over textured ground."""
    horizon, radius = size_px * 0.45, size_px * 0.17
    y, x = np.mgrid[:size_px, :size_px].astype(np.float64)
    depth = np.clip((y - horizon) / (size_px - horizon), 0.02, 1)
    sky = np.stack([150 + 60 * y / horizon, 195 + 35 * y / horizon, np.full_like(y, 240)], axis=-1)
    tiles = np.sin((x - size_px / 2) / depth * 0.16) * np.sin(7 / depth)
    ground = np.array([118, 150, 84]) * (0.75 + 0.25 * depth + 0.1 * np.tanh(3 * tiles))[..., None]
    scene = np.where((y < horizon)[..., None], sky, ground)
    centre_y = size_px * 0.66
    for k in range(FRAMES):
        travelled = size_px * 0.58 * k / (FRAMES - 1)
        centre_x = size_px * 0.21 + travelled
        u, v = (x - centre_x) / radius, (y - centre_y) / radius
        shadow = np.exp(-(((u - 0.35) / 1.1) ** 2) - ((v - 0.95) / 0.22) ** 2)
        picture = scene * (1 - 0.6 * shadow * (y > horizon))[..., None]
        w = np.sqrt(np.clip(1 - u**2 - v**2, 0, 1))  # the sphere's surface, towards the eye
        light = np.clip(-0.45 * u - 0.6 * v + 0.65 * w, 0, 1)
        turn = travelled / radius  # rolling without slipping
        stripe = np.abs(np.cos(turn) * u + np.sin(turn) * v) < 0.24
        paint = np.where(stripe[..., None], [245, 235, 215], [205, 45, 40])
        shaded = paint * (0.3 + 0.75 * light)[..., None] + 150 * (light**30)[..., None]
        edge = np.clip((1 - np.hypot(u, v)) * radius, 0, 1)[..., None]  # antialiased
        yield _levels(picture * (1 - edge) + shaded * edge)


def house(width_px: int = 192, height_px: int = 108) -> Iterator[Picture]:
    """The camera pans to the right over a house, a tree and hills."""
    fine = 4  # drawn larger, then averaged: antialiasing, and a pan by parts of a pixel
    w, h = int(width_px * 1.35) * fine, height_px * fine
    sky = np.linspace((120, 170, 225), (225, 232, 235), h)[:, None].repeat(w, axis=1)
    scene = np.ascontiguousarray(sky.astype(np.uint8))

    def at(points: list[tuple[float, float]]) -> NDArray[np.int32]:
        return np.array([[(x * fine, y * fine) for x, y in points]], np.int32)

    hills = [(x, 66 + 8 * np.sin(x / 31) + 4 * np.sin(x / 13)) for x in range(0, w // fine + 2, 2)]
    cv2.fillPoly(scene, at([(0, 108), *hills, (w / fine, 108)]), (110, 150, 120))
    cv2.rectangle(scene, (0, 84 * fine), (w, h), (96, 132, 70), cv2.FILLED)
    cv2.circle(scene, (225 * fine, 20 * fine), 9 * fine, (250, 240, 190), cv2.FILLED)
    cv2.rectangle(scene, (36 * fine, 62 * fine), (41 * fine, 90 * fine), (92, 64, 44), cv2.FILLED)
    for x, y, r in ((38, 50, 15), (29, 57, 10), (48, 57, 10)):
        cv2.circle(scene, (x * fine, y * fine), r * fine, (58, 104, 52), cv2.FILLED)
    cv2.fillPoly(scene, at([(86, 50), (160, 50), (160, 92), (86, 92)]), (222, 205, 175))
    cv2.fillPoly(scene, at([(160, 50), (190, 45), (190, 86), (160, 92)]), (186, 168, 140))
    cv2.fillPoly(scene, at([(80, 52), (123, 22), (166, 52)]), (168, 72, 54))
    cv2.fillPoly(scene, at([(123, 22), (158, 19), (196, 46), (166, 52)]), (138, 58, 46))
    for x in (94, 138):
        cv2.fillPoly(scene, at([(x, 58), (x + 15, 58), (x + 15, 72), (x, 72)]), (84, 116, 150))
        cv2.line(scene, ((x + 7) * fine, 58 * fine), ((x + 7) * fine, 72 * fine), (240, 236, 226), fine)
    cv2.fillPoly(scene, at([(116, 66), (130, 66), (130, 92), (116, 92)]), (104, 62, 42))
    cv2.fillPoly(scene, at([(116, 92), (130, 92), (142, 108), (100, 108)]), (196, 184, 160))
    for k in range(FRAMES):
        left = round((w - width_px * fine) * k / (FRAMES - 1))
        view = scene[:, left : left + width_px * fine]
        yield cv2.resize(view, (width_px, height_px), interpolation=cv2.INTER_AREA)


def walker(size_px: int = 128) -> Iterator[Picture]:
    """One and a half strides of an OpenPose skeleton that walks to the right, seen from the side and a bit ahead."""
    for k in range(FRAMES):
        phase = 2 * np.pi * k / 8
        hip = np.array([0.3 + 0.4 * k / (FRAMES - 1), 0.54 + 0.012 * np.cos(2 * phase)])
        neck = hip + np.array([0.02, -0.25])
        points = np.zeros((18, 2))
        points[0] = neck + np.array([0.045, -0.07])
        points[1] = neck
        for side, shoulder, thigh in ((0, 2, 8), (1, 5, 11)):  # right, left: half a stride apart
            swing = np.sin(phase + np.pi * side)
            lift = max(0.0, np.cos(phase + np.pi * side))  # of the foot that goes forward
            across = np.array([0.035 * (1 if side else -1), 0.0])
            points[shoulder] = neck + across + np.array([0, 0.01])
            points[shoulder + 1] = points[shoulder] + _limb(0.13, -0.5 * swing)
            points[shoulder + 2] = points[shoulder + 1] + _limb(0.12, -0.5 * swing + 0.45)
            points[thigh] = hip + 0.6 * across
            points[thigh + 1] = points[thigh] + _limb(0.19, 0.5 * swing)
            points[thigh + 2] = points[thigh + 1] + _limb(0.19, 0.5 * swing - 0.15 - 0.7 * lift)
        points[14:18] = points[0] + [(-0.012, -0.018), (0.012, -0.018), (-0.04, -0.008), (-0.028, -0.008)]
        keypoints = np.concatenate([points * size_px, np.ones((18, 1))], axis=1)
        yield draw_skeleton(keypoints, size_px, size_px)


def _limb(length: float, angle: float) -> NDArray[np.float64]:
    """From a joint downwards; a positive angle swings it forward."""
    return length * np.array([np.sin(angle), np.cos(angle)])


def _levels(picture: NDArray[np.float64]) -> Picture:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def write_tone(path: Path, rate_hz: int = 44_100) -> None:
    """A soft tone that falls as the ball rolls away, as WAV."""
    time_s = np.arange(int(DURATION_S * rate_hz)) / rate_hz
    phase = 2 * np.pi * np.cumsum(330 - 80 * time_s / DURATION_S) / rate_hz
    fade = np.clip(np.minimum(time_s, DURATION_S - time_s) / 0.1, 0, 1)
    samples = (0.2 * fade * np.sin(phase) * 32767).astype(np.int16)[None]
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=rate_hz, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = rate_hz
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("clips")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as workspace:
        tone = Path(workspace) / "tone.wav"
        write_tone(tone)
        sound = AudioReference(str(tone), 0.0, DURATION_S)
        for name, pictures, audio in (
            ("ball.mp4", ball(), sound),
            ("house.mp4", house(), None),
            ("walker.mp4", walker(), None),
        ):
            frames = np.stack(list(pictures))
            path = folder / name
            path.unlink(missing_ok=True)
            made = encode(
                [frames],
                path,
                width=frames.shape[2],
                height=frames.shape[1],
                rate_fps=RATE_FPS,
                encoding=Encoding(),
                audio=audio,
                metadata={"made_by": "manifests/make_clips.py"},
            )
            print(f"{path}: {made.frames} frames, {made.width}x{made.height}, {made.size_bytes / 1000:.1f} kB")


if __name__ == "__main__":
    main()
