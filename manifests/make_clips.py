"""Draws the example manifests' source clips: a rolling ball, a pan along a house, a cat, a dancer and her skeleton.

    python manifests/make_clips.py [folder]

They are drawn here, so that the examples run without anything to download and nobody else's pictures are in them; and
in the world that the embedded models know (`t2vz.mini.world`).
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from t2vz.clip import AudioReference
from t2vz.conditions.skeleton import draw_skeleton
from t2vz.media.encode import Encoding, encode
from t2vz.mini import world

Clip = NDArray[np.uint8]  # (F, H, W, 3), RGB
RATE_FPS = Fraction(8)
FRAMES = 12
DURATION_S = float(FRAMES / RATE_FPS)


def ball() -> Clip:
    """A red ball goes from left to right over the grass."""
    scene = world.sample(
        np.random.default_rng(3), subject="ball", colour="red", pattern="plain", background="grass", time="day", count=1
    )
    return _moving(scene, x=0.28, y=0.66, size=0.4, velocity_px=(4.8, 0.0))


def cat() -> Clip:
    """A blue cat on the sand comes nearer."""
    scene = world.sample(
        np.random.default_rng(5), subject="cat", colour="blue", pattern="plain", background="sand", time="day", count=1
    )
    return _moving(scene, x=0.45, y=0.62, size=0.46, growth=1.02, velocity_px=(0.6, 0.0))


def house() -> Clip:
    """The camera pans to the right along a green house."""
    scene = world.sample(
        np.random.default_rng(8), subject="house", colour="green", pattern="plain", background="grass", time="day",
        count=1,
    )  # fmt: skip
    return _moving(scene, x=0.62, y=0.6, size=0.56, pan_px=(2.5, 0.0))


def _moving(scene: world.Scene, *, x: float, y: float, size: float, **motion: object) -> Clip:
    """The scene's one thing, put to a place and set in motion."""
    placed = replace(scene, things=(replace(scene.things[0], x=x, y=y, size=size),))
    still = {"velocity_px": (0.0, 0.0), "pan_px": (0.0, 0.0), "growth": 1.0}
    return world.moving(np.random.default_rng(0), FRAMES, scene=placed, **(still | motion)).frames


def dancer() -> tuple[Clip, Clip]:
    """A person in purple dances in the city, to and fro between two poses; and the skeleton alone."""
    scene, other = (
        world.sample(
            np.random.default_rng(seed), subject="person", colour="purple", pattern="plain", background="city",
            time="day", pose=pose, count=1,
        )
        for seed, pose in ((2, "waving"), (9, "dancing"))
    )  # fmt: skip
    person = replace(scene.things[0], x=0.5, y=0.55, size=0.8)
    ends = np.array(person.joints), np.array(other.things[0].joints)
    pictures, skeletons = [], []
    for k in range(FRAMES):
        share = 0.5 - 0.5 * np.cos(2 * np.pi * k / FRAMES)
        joints = (1 - share) * ends[0] + share * ends[1]
        danced = replace(scene, things=(replace(person, joints=tuple(map(tuple, joints.tolist()))),))
        pictures.append(world.draw(danced))
        keypoints = np.concatenate([world.joints(danced), np.ones((18, 1), np.float32)], 1)
        skeletons.append(draw_skeleton(keypoints, world.SIZE_PX, world.SIZE_PX))
    return np.stack(pictures), np.stack(skeletons)


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
        person, skeleton = dancer()
        for name, frames, audio in (
            ("ball.mp4", ball(), sound),
            ("cat.mp4", cat(), None),
            ("house.mp4", house(), None),
            ("dancer.mp4", person, None),
            ("skeleton.mp4", skeleton, None),
        ):
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
