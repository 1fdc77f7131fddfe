"""Example sources, drawn in the world that the embedded models know: a rolling ball, a pan along a house, a cat, a
dancer and her skeleton. The example manifests' clips and the playground's are these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2vz.conditions.skeleton import draw_skeleton
from t2vz.mini import world

Clip = NDArray[np.uint8]  # (F, H, W, 3), RGB
RATE_FPS = Fraction(8)
FRAMES = 12


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


def _moving(scene: world.Scene, *, x: float, y: float, size: float, **motion: Any) -> Clip:
    """The scene's one thing, put to a place and set in motion."""
    placed = replace(scene, things=(replace(scene.things[0], x=x, y=y, size=size),))
    still: dict[str, Any] = {"velocity_px": (0.0, 0.0), "pan_px": (0.0, 0.0), "growth": 1.0}
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


CLIPS: dict[str, Callable[[], Clip]] = {
    "ball": ball,
    "cat": cat,
    "house": house,
    "dancer": lambda: dancer()[0],
    "skeleton": lambda: dancer()[1],
}
