"""The miniature world: drawn scenes whose captions, depth, joints, edits and motion are known exactly.

Places and sizes are in frame heights: (0, 0) is the top left of a square frame, (1, 1) its bottom right; a wider
frame sees more to both sides. What is drawn depends on the `Scene` alone, so equal scenes give equal pixels.
Everything is made to pass through a very small VAE: things are large, textures soft, lines at least 2 px wide.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SIZE_PX = 128

Frame = NDArray[np.uint8]
Rgb = tuple[int, int, int]
Polygon = NDArray[np.float64]

# Caption words → RGB by day.
COLOURS: dict[str, Rgb] = {
    "red": (222, 32, 38),
    "orange": (250, 136, 24),
    "yellow": (250, 218, 40),
    "green": (24, 160, 52),
    "blue": (36, 78, 226),
    "purple": (140, 56, 186),
    "pink": (250, 138, 190),
    "white": (248, 248, 248),
}
SKIN: Rgb = (222, 168, 128)
OUTLINE: Rgb = (26, 22, 30)
CREAM: Rgb = (250, 244, 226)  # stripes and dots on coloured things
SLATE: Rgb = (84, 90, 108)  # stripes and dots on white ones
WINDOW: dict[str, Rgb] = {"day": (168, 208, 232), "night": (255, 214, 110)}
DOOR: Rgb = (112, 70, 44)


@dataclass(frozen=True)
class Background:
    """How a background looks. ground, far: RGB by time; texture: levels of the ground's relief.

    preposition: how captions place things there; names: the words for it, the first one its own.
    """

    ground: dict[str, Rgb]
    far: dict[str, Rgb]
    texture: float
    preposition: str
    names: tuple[str, ...]


BACKGROUNDS: dict[str, Background] = {
    "grass": Background(
        {"day": (124, 164, 84), "night": (34, 70, 44)},
        {"day": (86, 132, 92), "night": (24, 50, 46)},
        9,
        "on",
        ("grass",),
    ),
    "sand": Background(
        {"day": (222, 196, 148), "night": (104, 86, 66)},
        {"day": (200, 168, 120), "night": (80, 66, 60)},
        8,
        "on",
        ("sand",),
    ),
    "sea": Background(
        {"day": (66, 140, 172), "night": (16, 52, 96)},
        {"day": (66, 140, 172), "night": (16, 52, 96)},
        13,
        "on",
        ("sea", "water"),
    ),
    "snow": Background(
        {"day": (192, 206, 226), "night": (104, 122, 160)},
        {"day": (142, 162, 196), "night": (66, 80, 118)},
        6,
        "in",
        ("snow",),
    ),
    "city": Background(
        {"day": (164, 152, 172), "night": (72, 60, 92)},
        {"day": (120, 118, 142), "night": (46, 42, 72)},
        12,
        "in",
        ("city",),
    ),
    "road": Background(
        {"day": (102, 102, 112), "night": (46, 46, 54)},
        {"day": (164, 134, 104), "night": (62, 52, 58)},
        5,
        "on",
        ("road",),
    ),
}

# Sky RGB at the top of the frame and at the horizon.
TIMES: dict[str, tuple[Rgb, Rgb]] = {
    "day": ((122, 178, 234), (180, 212, 240)),
    "night": ((14, 18, 48), (34, 38, 78)),
}
MOON: Rgb = (236, 232, 204)
LIT: dict[str, Rgb] = {"day": (160, 166, 186), "night": (236, 196, 104)}  # the city's windows
DASH: dict[str, Rgb] = {"day": (214, 210, 200), "night": (108, 108, 112)}  # the road's line
DASH_Y = 0.2  # below the horizon
NIGHT_LIGHT = (0.9, 0.9, 0.94)  # things stay nearly as bright at night as by day

PATTERNS: dict[str, str] = {"plain": "", "striped": "with stripes", "dotted": "with dots"}
POSES = ("standing", "walking", "dancing", "waving")

_LINE = 0.02  # outline: 2.6 px of 128, half of it outside the shape
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One thing in a scene.

    x, y: centre of its box; size: the box's larger side; all in frame heights.
    facing: 1 or -1 (mirrored). pose: for a person one of `POSES`, else "".
    joints: for a person OpenPose's 18 points as (x, y) relative to the centre in units of `size`, else ().
    """

    subject: str
    colour: str
    pattern: str
    x: float
    y: float
    size: float
    facing: int = 1
    pose: str = ""
    joints: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Scene:
    """All that decides a picture. things: far to near. camera: where the frame's top left is in the world."""

    background: str
    time: str
    horizon: float
    things: tuple[Thing, ...]
    texture_seed: int
    camera: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Edit:
    """kind: what the instruction changes: colour, pattern, subject, background or time."""

    source: Scene
    target: Scene
    instruction: str
    kind: str


@dataclass(frozen=True)
class Motion:
    """A clip with known motion.

    frames: uint8 (F, H, W, 3), RGB. flow: float32 (F-1, H, W, 2), where each pixel (x, y) of frame t is in
    frame t+1, as a displacement in px. valid: bool (F-1, H, W), False where that place is covered, outside
    the frame, or on the border of a thing, whose pixels mix two motions.
    """

    scenes: tuple[Scene, ...]
    frames: Frame
    flow: NDArray[np.float32]
    valid: NDArray[np.bool_]


# --- shapes: polygons in units of the thing's size, centred, y down -------------------------------------------------

# A group's outlines are drawn before its fills, so that its parts melt into one; groups cover each other in turn.
# A part: what it is painted with, and its polygon.
Part = tuple[Literal["body", "second", "skin", "window", "door", "line"], Polygon]
Group = Sequence[Part]


def _points(*xy: float) -> Polygon:
    return np.array(xy, np.float64).reshape(-1, 2)


def _ellipse(x: float, y: float, rx: float, ry: float | None = None, sides: int = 32) -> Polygon:
    angle = np.linspace(0, 2 * np.pi, sides, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + (rx if ry is None else ry) * np.sin(angle)], 1)


def _rectangle(left: float, top: float, right: float, bottom: float) -> Polygon:
    return _points(left, top, right, top, right, bottom, left, bottom)


def _capsule(a: Sequence[float], b: Sequence[float], radius: float) -> Polygon:
    direction = math.atan2(b[1] - a[1], b[0] - a[0])
    turn = np.linspace(np.pi / 2, 3 * np.pi / 2, 9) + direction
    cap = radius * np.stack([np.cos(turn), np.sin(turn)], 1)
    return np.concatenate([np.asarray(a) + cap, np.asarray(b) - cap])


def _ball(thing: Thing) -> list[Group]:
    return [[("body", _ellipse(0, 0, 0.5))]]


def _box(thing: Thing) -> list[Group]:
    return [[("body", _rectangle(-0.45, -0.45, 0.45, 0.45))]]


def _triangle(thing: Thing) -> list[Group]:
    return [[("body", _points(0, -0.45, 0.5, 0.45, -0.5, 0.45))]]


def _star(thing: Thing) -> list[Group]:
    angle = np.arange(10) * np.pi / 5 - np.pi / 2
    radius = np.where(np.arange(10) % 2, 0.24, 0.54)
    return [[("body", np.stack([radius * np.cos(angle), radius * np.sin(angle) + 0.03], 1))]]


def _heart(thing: Thing) -> list[Group]:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [[("body", np.stack([x / 33, (-y - 2.5) / 32], 1))]]


def _house(thing: Thing) -> list[Group]:
    return [
        [("body", _rectangle(0.2, -0.46, 0.34, -0.1))],
        [("body", _rectangle(-0.4, -0.05, 0.4, 0.5))],
        [("body", _points(-0.5, -0.02, 0, -0.5, 0.5, -0.02))],
        [("window", _rectangle(-0.29, 0.1, -0.07, 0.3)), ("door", _rectangle(0.09, 0.12, 0.29, 0.5))],
    ]


def _car(thing: Thing) -> list[Group]:
    cabin = _points(-0.3, 0.0, -0.2, -0.26, 0.12, -0.26, 0.26, 0.0)
    body = _points(-0.5, -0.02, 0.36, -0.02, 0.5, 0.06, 0.5, 0.18, -0.5, 0.18)
    wheels: Group = [("second", _ellipse(side * 0.28, 0.17, 0.11, sides=20)) for side in (-1, 1)]
    hubs: Group = [("line", _ellipse(side * 0.28, 0.17, 0.03, sides=12)) for side in (-1, 1)]
    glass = _points(-0.2, -0.03, -0.14, -0.19, 0.08, -0.19, 0.15, -0.03)
    return [[("body", cabin), ("body", body)], [("window", glass)], wheels, hubs]


def _cat(thing: Thing) -> list[Group]:
    tail = [(0.16, 0.42), (0.36, 0.36), (0.38, 0.14)]
    face: list[Part] = [("line", _ellipse(side * 0.09, -0.23, 0.042, 0.055, 12)) for side in (-1, 1)]
    face.append(("line", _points(-0.055, -0.15, 0.055, -0.15, 0, -0.09)))
    ears: list[Part] = [
        ("body", _points(side * 0.24, -0.24, side * 0.22, -0.5, side * 0.04, -0.38)) for side in (-1, 1)
    ]
    return [
        [("body", _capsule(a, b, 0.055)) for a, b in itertools.pairwise(tail)],
        [("body", _ellipse(0, 0.24, 0.25, 0.26))],
        [("body", _ellipse(0, -0.2, 0.25, 0.21)), *ears],
        face,
    ]


def _person(thing: Thing) -> list[Group]:
    j = thing.joints
    legs: list[Part] = [("body", _capsule(j[a], j[b], 0.056)) for a, b in ((8, 9), (9, 10), (11, 12), (12, 13))]
    (neck_x, neck_y), shoulders, hips = j[1], (j[2], j[5]), (j[11], j[8])
    torso = np.array([*shoulders, *hips]) + _points(-0.035, -0.035, 0.035, -0.035, 0.05, 0.02, -0.05, 0.02)
    arms: list[list[Part]] = [
        [("body", _capsule(j[a], j[b], 0.043)), ("body", _capsule(j[b], j[c], 0.043))]
        for a, b, c in ((2, 3, 4), (5, 6, 7))
    ]
    hands: list[Part] = [("skin", _ellipse(*j[wrist], 0.05, sides=16)) for wrist in (4, 7)]
    head: list[Part] = [("skin", _ellipse(neck_x, neck_y - 0.12, 0.105))]
    eyes: list[Part] = [("line", _ellipse(*j[eye], 0.021, sides=10)) for eye in (14, 15)]
    return [[*legs, ("body", torso)], *arms, hands, head, eyes]


@dataclass(frozen=True)
class Subject:
    """groups: its parts, in the order they are drawn; height: of its box, in units of its size; sizes: range."""

    groups: Callable[[Thing], list[Group]]
    height: float
    sizes: tuple[float, float]


SUBJECTS: dict[str, Subject] = {
    "ball": Subject(_ball, 1.0, (0.3, 0.56)),
    "box": Subject(_box, 0.9, (0.32, 0.58)),
    "triangle": Subject(_triangle, 0.9, (0.36, 0.6)),
    "star": Subject(_star, 1.0, (0.38, 0.6)),
    "heart": Subject(_heart, 0.94, (0.34, 0.58)),
    "house": Subject(_house, 1.0, (0.4, 0.6)),
    "car": Subject(_car, 0.56, (0.46, 0.66)),
    "cat": Subject(_cat, 1.0, (0.4, 0.6)),
    "person": Subject(_person, 1.0, (0.55, 0.85)),
}

# Period of stripes and dots in units of the size: finer where the painted parts are slender.
_PERIODS = {"person": 0.13, "car": 0.14, "cat": 0.19}
_PERIOD = 0.25


# --- sampling --------------------------------------------------------------------------------------------------------


def sample(
    rng: np.random.Generator,
    *,
    subject: str | None = None,
    colour: str | None = None,
    pattern: str | None = None,
    background: str | None = None,
    time: str | None = None,
    pose: str | None = None,
    count: int | None = None,
) -> Scene:
    """A scene with what is given; the rest is drawn from `rng`. subject, colour, pattern, pose: of the main thing.

    count: 1 or 2 things; if not given, 2 in a quarter of the scenes, but a person is mostly alone. The second
    thing differs from the main one in subject and colour, and they do not touch.
    """
    background = background or _choice(rng, BACKGROUNDS)
    time = time or _choice(rng, TIMES)
    subject = subject or _choice(rng, SUBJECTS)
    colour = colour or _choice(rng, COLOURS)
    pattern = pattern or _pattern(rng)
    horizon = float(rng.uniform(0.36, 0.52))
    if count is None:
        count = 2 if subject != "person" and rng.random() < 0.28 else 1
    if count not in (1, 2):
        raise ValueError(f"count must be 1 or 2, not {count}")
    if count == 1:
        things = [_thing(rng, subject, colour, pattern, pose, horizon, None)]
    else:
        slots = [(0.02, 0.47), (0.53, 0.98)]
        rng.shuffle(slots)
        other = _choice(rng, [s for s in SUBJECTS if s not in (subject, "person")])
        other_colour = _choice(rng, [c for c in COLOURS if c != colour])
        things = [
            _thing(rng, subject, colour, pattern, pose, horizon, slots[0]),
            _thing(rng, other, other_colour, _pattern(rng), None, horizon, slots[1]),
        ]
    things.sort(key=bottom)
    return Scene(background, time, horizon, tuple(things), int(rng.integers(2**31)))


def _choice(rng: np.random.Generator, names: Sequence[str] | dict) -> str:
    return list(names)[int(rng.integers(len(names)))]


def _pattern(rng: np.random.Generator) -> str:
    return str(rng.choice(list(PATTERNS), p=[0.5, 0.25, 0.25]))


def _thing(
    rng: np.random.Generator,
    subject: str,
    colour: str,
    pattern: str,
    pose: str | None,
    horizon: float,
    slot: tuple[float, float] | None,
) -> Thing:
    kind = SUBJECTS[subject]
    low, high = kind.sizes
    if slot:
        high = min(high, slot[1] - slot[0])
        low = min(low, high * 0.85)
    size = float(rng.uniform(low, high))
    half = size / 2
    if subject == "person":
        half = size * 0.34  # arms
    left, right = slot or (0.02, 0.98)
    x = float(rng.uniform(left + half, right - half)) if right - left > 2 * half else (left + right) / 2
    height = kind.height * size
    foot = float(rng.uniform(max(horizon + 0.16, height + 0.03), max(0.96, height + 0.03)))
    facing = 1 if rng.random() < 0.5 else -1
    pose, joints = ("", ()) if subject != "person" else _pose(rng, pose or _choice(rng, POSES))
    return Thing(subject, colour, pattern, x, foot - height / 2, size, facing, pose, joints)


# Angles in degrees from straight down, outwards: upper arm, forearm, thigh, shin, of the side that leads and of
# the other one.
_ANGLES: dict[str, tuple[tuple[float, float, float, float], tuple[float, float, float, float]]] = {
    "standing": ((22, 14, 7, 4), (22, 14, 7, 4)),
    "walking": ((38, 62, 30, 14), (30, 10, 18, 26)),
    "dancing": ((142, 168, 38, -8), (84, 128, 12, 10)),
    "waving": ((132, 172, 8, 5), (24, 14, 8, 5)),
}


def _pose(rng: np.random.Generator, pose: str) -> tuple[str, tuple[tuple[float, float], ...]]:
    sides = _ANGLES[pose]
    if rng.random() < 0.5:
        sides = sides[::-1]
    points = {0: (0, -0.38), 1: (0, -0.265), 14: (-0.04, -0.41), 15: (0.04, -0.41), 16: (-0.1, -0.39), 17: (0.1, -0.39)}
    for sign, (upper, fore, thigh, shin), first in ((-1, sides[0], 2), (1, sides[1], 5)):
        jitter = rng.uniform(-1, 1, 4) * (10, 12, 4, 4)
        upper, fore, thigh, shin = np.radians(np.array([upper, fore, thigh, shin]) + jitter)
        arm = [(sign * 0.115, -0.235)]
        leg = [(sign * 0.068, 0.06)]
        for chain, angle, length in ((arm, upper, 0.16), (arm, fore, 0.15), (leg, thigh, 0.19), (leg, shin, 0.19)):
            x, y = chain[-1]
            chain.append((x + sign * length * math.sin(angle), y + length * math.cos(angle)))
        points |= dict(zip(range(first, first + 3), arm, strict=True))
        points |= dict(zip(range(first + 6, first + 9), leg, strict=True))
    # Stand on the ground whatever the legs do.
    sink = 0.5 - 0.056 - max(points[10][1], points[13][1])
    return pose, tuple((float(points[i][0]), float(points[i][1] + sink)) for i in range(18))


def bottom(thing: Thing) -> float:
    """Where it stands: y of its lowest point, in frame heights."""
    return thing.y + SUBJECTS[thing.subject].height * thing.size / 2


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw(scene: Scene, size_px: int = SIZE_PX, width_px: int | None = None) -> Frame:
    """The picture: uint8 (size_px, width_px, 3), RGB. width_px: as size_px if not given."""
    import cv2

    picture = _backdrop(scene, size_px, width_px or size_px)
    for thing in scene.things:
        place, paint, alpha = _layer(thing, scene, size_px, width_px or size_px)
        picture[place] *= 1 - alpha[..., None]
        picture[place] += paint
    return cv2.convertScaleAbs(np.maximum(picture, 0))


@functools.lru_cache(maxsize=8)
def _grid(size_px: int, width_px: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """World places of the pixels' centres for a camera at (0, 0): x (1, W), y (H, 1)."""
    x = (np.arange(width_px) + 0.5 - width_px / 2) / size_px + 0.5
    y = (np.arange(size_px) + 0.5) / size_px
    return x.astype(np.float32)[None], y.astype(np.float32)[:, None]


def _wave(turns: NDArray) -> NDArray:
    return np.sin(np.float32(2 * np.pi) * turns)


def _mix(under: NDArray, over: NDArray, share: NDArray) -> NDArray:
    """`under` where share (H, W) is 0, `over` where it is 1."""
    import cv2

    over = np.broadcast_to(over, under.shape)
    share = np.broadcast_to(share, under.shape[:2])
    arrays = [np.ascontiguousarray(array, np.float32) for array in (over, under, share, 1 - share)]
    return cv2.blendLinear(*arrays)


def _rgb(colour: Rgb) -> NDArray[np.float32]:
    return np.array(colour, np.float32)


def _backdrop(scene: Scene, size_px: int, width_px: int) -> NDArray[np.float32]:
    """Sky, far silhouettes and ground, without things: float32 (H, W, 3)."""
    import cv2

    look = BACKGROUNDS[scene.background]
    night = scene.time == "night"
    x, y = _grid(size_px, width_px)
    x, y = x + np.float32(scene.camera[0]), y + np.float32(scene.camera[1])
    rng = np.random.default_rng(scene.texture_seed)
    p = rng.random(8).astype(np.float32)
    below = np.clip((y - scene.horizon) * size_px + 0.5, 0, 1)

    top, low = (_rgb(c) for c in TIMES[scene.time])
    sky = top + np.clip(y / scene.horizon, -0.5, 1)[..., None] * (low - top)
    clouds = np.clip(_wave(1.3 * x + p[0]) * _wave(3.1 * y + 0.4 * x + p[1]) - 0.25, 0, 1)
    sky = sky + clouds[..., None] * (np.float32(8) if night else _rgb((34, 22, 6)))

    far, lit = _far(scene, size_px, width_px, x, y, p)
    picture = _mix(sky, _rgb(look.far[scene.time]), far)
    if lit is not None:
        picture = _mix(picture, _rgb(LIT[scene.time]), lit * far)

    relief = (0.5 if night else 1.0) * look.texture * _relief(scene.background, x, y - np.float32(scene.horizon), p)
    ground = _rgb(look.ground[scene.time]) + relief[..., None]
    if scene.background == "road":
        band = np.clip(2 - np.abs(y - scene.horizon - DASH_Y) * size_px, 0, 1)
        ground = _mix(ground, _rgb(DASH[scene.time]), band * np.clip(6 * _wave(4 * x + p[2]), 0, 1))
    picture = _mix(picture, ground, np.broadcast_to(below, picture.shape[:2]))
    picture = np.ascontiguousarray(picture, np.float32)

    if night:
        # The moon in a corner of the sky of a square frame, and stars; cv2's circles have 1/16 px here.
        def disc(at_x: float, at_y: float, radius: float, colour: Rgb) -> None:
            column = (at_x - scene.camera[0] - 0.5) * size_px + width_px / 2 - 0.5
            row = (at_y - scene.camera[1]) * size_px - 0.5
            limit = 4 * max(size_px, width_px)
            if abs(column) < limit and abs(row) < limit:
                cv2.circle(
                    sky_layer,
                    (round(column * 16), round(row * 16)),
                    round(radius * size_px * 16),
                    colour,
                    -1,
                    cv2.LINE_AA,
                    4,
                )

        sky_layer = picture.astype(np.uint8)
        for star_x, star_y in rng.random((14, 2)) * (2.4, 0.34) - (0.7, 0):
            disc(star_x, star_y, 0.009, (204, 204, 190))
        disc(0.1 + 0.08 * p[3] if p[4] < 0.5 else 0.9 - 0.08 * p[3], 0.1 + 0.03 * p[5], 0.055, MOON)
        picture = _mix(sky_layer.astype(np.float32), picture, np.maximum(far, below))
    return picture


def _far(
    scene: Scene, size_px: int, width_px: int, x: NDArray, y: NDArray, p: NDArray
) -> tuple[NDArray, NDArray | None]:
    """Share of each pixel that the silhouettes at the horizon cover, and of their lit windows: float32 (H, W)."""
    # Four samples a column, averaged: steep sides stay antialiased.
    fine = x + (np.arange(4, dtype=np.float32)[:, None, None] - 1.5) / (4 * size_px)
    lit = None
    match scene.background:
        case "sea":
            return np.zeros((size_px, width_px), np.float32), None
        case "city":
            cell = np.floor(fine / 0.16 + p[0])
            rise = 0.1 + 0.17 * np.modf(np.abs(np.sin(cell * 12.9898 + p[1] * 50) * 437.585))[0]
            columns = np.clip(4 * _wave(x / 0.08 + 2 * p[0] - 0.25) - 1, 0, 1)
            rows = np.clip(4 * _wave((scene.horizon - y) / 0.075 - 0.35) - 1, 0, 1)
            lit = columns * rows * (y < scene.horizon)
        case "snow":
            tooth = np.abs(2 * np.modf(np.abs(1.7 * fine + 40 + p[0]))[0] - 1)
            small = np.abs(2 * np.modf(np.abs(3.9 * fine + 40 + p[1]))[0] - 1)
            rise = 0.03 + 0.1 * tooth + 0.05 * small
        case _:
            rise = 0.055 + 0.028 * _wave(0.9 * fine + p[0]) + 0.014 * _wave(2.3 * fine + p[1])
    cover = np.clip((y - np.float32(scene.horizon) + rise.astype(np.float32)) * size_px + 0.5, 0, 1)
    return cover.mean(0), lit


def _relief(background: str, x: NDArray, y: NDArray, p: NDArray) -> NDArray:
    """The ground's texture, about -1 to 1: float32 (H, W). y: below the horizon."""
    blots = _wave(2.1 * x + p[2]) * _wave(2.7 * y + p[3] + 0.3 * x)
    match background:
        case "grass":
            return 0.6 * blots + 0.7 * _wave(9 * x + p[4]) * _wave(7 * y + p[5])
        case "sand":
            return 0.5 * blots + 0.8 * _wave(7 * y + 1.5 * x + 0.15 * _wave(3 * x + p[4]) + p[5])
        case "sea":
            return 0.9 * _wave(9 * y + 0.22 * _wave(4 * x + p[4]) + p[5]) + 0.3 * blots
        case "city":
            lines = np.minimum(np.abs(_wave(3 * x + p[4])), np.abs(_wave(5 * y)))
            return 0.3 - 1.4 * np.clip(1 - 2.2 * lines, 0, 1) + 0.2 * blots
        case _:
            return blots


def _polygons_px(thing: Thing, scale: float, x_px: float, y_px: float) -> list[list[tuple[str, Polygon]]]:
    mirror = np.array([thing.facing if thing.subject != "person" else 1, 1])
    centre = np.array([x_px, y_px])
    return [
        [(role, polygon * mirror * scale + centre) for role, polygon in group]
        for group in SUBJECTS[thing.subject].groups(thing)
    ]


_ROLES = ("nothing", "line", "body", "second", "skin", "window", "door")


def _layer(
    thing: Thing, scene: Scene, size_px: int, width_px: int
) -> tuple[tuple[slice, slice], NDArray[np.float32], NDArray[np.float32]]:
    """A thing by itself: the frame's part it is in, its colours times its cover (h, w, 3), and its cover (h, w)."""
    import cv2

    s = _SUPERSAMPLING
    centre_x = (thing.x - scene.camera[0] - 0.5) * size_px + width_px / 2
    centre_y = (thing.y - scene.camera[1]) * size_px
    reach = 0.62 * thing.size * size_px + 0.02 * size_px + 1
    left, right = (int(np.clip(v, 0, width_px)) for v in (centre_x - reach, centre_x + reach + 1))
    upper, lower = (int(np.clip(v, 0, size_px)) for v in (centre_y - reach, centre_y + reach + 1))
    place = (slice(upper, lower), slice(left, right))
    height, width = lower - upper, right - left
    if not height or not width:
        return place, np.zeros((height, width, 3), np.float32), np.zeros((height, width), np.float32)

    labels = np.zeros((height * s, width * s), np.uint8)
    line_px = max(1, round(_LINE * size_px * s))
    # fillPoly's integer places are pixel centres: half a fine pixel to the left of ours.
    scale, origin = thing.size * size_px * s, ((centre_x - left) * s - 0.5, (centre_y - upper) * s - 0.5)
    for group in _polygons_px(thing, scale, *origin):
        outlines = [np.round(polygon * 16).astype(np.int32) for _, polygon in group]
        if group[0][0] != "line":
            cv2.polylines(labels, outlines, True, _ROLES.index("line"), line_px, cv2.LINE_8, 4)
        for (role, _), outline in zip(group, outlines, strict=True):
            cv2.fillPoly(labels, [outline], _ROLES.index(role), cv2.LINE_8, 4)
    if thing.pattern != "plain":
        second = _second(thing, labels.shape, scale, *origin)
        labels += second & (labels == _ROLES.index("body"))  # the next role

    fine = _palette(thing.colour, scene.time).view(np.uint32).ravel()[labels]
    layer = fine.view(np.uint8).reshape(*labels.shape, 4)
    for halved in (2, 1):  # twice by 2 is much faster than once by 4
        layer = cv2.resize(layer, (width * halved, height * halved), interpolation=cv2.INTER_AREA)
    paint = layer.astype(np.float32)
    return place, paint[..., :3], paint[..., 3] / np.float32(255)


@functools.lru_cache(maxsize=64)
def _palette(colour: str, time: str) -> NDArray[np.uint8]:
    second = SLATE if colour == "white" else CREAM
    light = np.array(NIGHT_LIGHT if time == "night" else (1, 1, 1))
    colours = np.array([(0, 0, 0), OUTLINE, COLOURS[colour], second, SKIN, WINDOW["day"], DOOR]) * light
    colours[_ROLES.index("window")] = WINDOW[time]
    return np.concatenate([colours.round(), [[0]] + [[255]] * 6], 1).astype(np.uint8)


def _second(thing: Thing, shape: tuple[int, int], scale: float, x_px: float, y_px: float) -> NDArray[np.bool_]:
    """Where the pattern's second colour is, on the supersampled grid: bool `shape`."""
    period = _PERIODS.get(thing.subject, _PERIOD) * scale
    row = (np.arange(shape[0], dtype=np.float32)[:, None] - np.float32(y_px)) / np.float32(period)
    if thing.pattern == "striped":
        return np.broadcast_to(np.modf(row + 100.25)[0] < 0.45, shape)
    column = (np.arange(shape[1], dtype=np.float32)[None] - np.float32(x_px)) / np.float32(period)
    row_cell = np.floor(row + 0.5)
    column = column + 0.5 * (row_cell % 2)
    return (row - row_cell) ** 2 + (column - np.floor(column + 0.5)) ** 2 < 0.3**2


# --- ground truth ----------------------------------------------------------------------------------------------------


def masks(scene: Scene, size_px: int = SIZE_PX, width_px: int | None = None) -> tuple[NDArray[np.bool_], ...]:
    """The pixels that each thing shows, outline included, in the order of `things`: bool (H, W) each."""
    owner = _owner(scene, size_px, width_px or size_px)
    return tuple(owner == i for i in range(len(scene.things)))


def _owner(scene: Scene, size_px: int, width_px: int) -> NDArray[np.int8]:
    """Index of the thing that covers at least half of a pixel, -1 for the background: int8 (H, W)."""
    owner = np.full((size_px, width_px), -1, np.int8)
    for i, thing in enumerate(scene.things):
        place, _, alpha = _layer(thing, scene, size_px, width_px)
        owner[place][alpha >= 0.5] = i
    return owner


def depth(scene: Scene, size_px: int = SIZE_PX, width_px: int | None = None) -> Frame:
    """Inverse depth, brighter is nearer: uint8 (H, W).

    Sky 0; silhouettes at the horizon 16; the ground rises evenly from 30 at the horizon to 255 at 1 below the
    frame's top; a thing has the depth of the ground it stands on.
    """
    width_px = width_px or size_px
    x, y = _grid(size_px, width_px)
    x, y = x + np.float32(scene.camera[0]), y + np.float32(scene.camera[1])
    p = np.random.default_rng(scene.texture_seed).random(8).astype(np.float32)
    far, _ = _far(scene, size_px, width_px, x, y, p)

    def ramp(at_y: NDArray | float) -> NDArray:
        return 30 + 225 * np.clip((np.asarray(at_y) - scene.horizon) / (1 - scene.horizon), 0, 1)

    inverse = np.where(y >= scene.horizon, ramp(y), np.where(far >= 0.5, 16, 0))
    for thing, mask in zip(scene.things, masks(scene, size_px, width_px), strict=True):
        inverse[mask] = ramp(bottom(thing))
    return inverse.round().astype(np.uint8)


def joints(scene: Scene, size_px: int = SIZE_PX, width_px: int | None = None) -> NDArray[np.float32] | None:
    """OpenPose's 18 points of the (nearest) person: float32 (18, 2) as x_px, y_px; None without one."""
    for thing in reversed(scene.things):
        if thing.joints:
            x, y = (np.array(thing.joints) * thing.size + (thing.x, thing.y) - scene.camera).T
            x_px = (x - 0.5) * size_px + (width_px or size_px) / 2 - 0.5
            return np.stack([x_px, y * size_px - 0.5], 1).astype(np.float32)
    return None


# --- words -----------------------------------------------------------------------------------------------------------

_OPENINGS = ("", "", "", "a picture of ", "a drawing of ", "there is ")
_TIME_WORDS = {"day": ("by day", "during the day", "in daylight"), "night": ("at night", "at night", "in the night")}
_ARTICLES = {"sea": "the ", "city": "a ", "road": "a "}
_BIG, _SMALL = 0.72, 0.28  # of a subject's range of sizes

_OTHER_WORDS = (
    "a", "an", "and", "with", "in", "on", "the", "to", "into", "of", "it", "big", "small", "left", "right",
    "make", "turn", "paint", "change", "replace", "colour",
)  # fmt: skip
_PHRASES = (*_OPENINGS, *PATTERNS.values(), *itertools.chain(*_TIME_WORDS.values()))
WORDS: tuple[str, ...] = tuple(
    sorted(
        {
            *COLOURS, *SUBJECTS, *TIMES, *PATTERNS, *POSES, *_OTHER_WORDS,
            *(name for background in BACKGROUNDS.values() for name in background.names),
            *" ".join(_PHRASES).split(),
        }
    )
)  # fmt: skip
"""Every word that captions and instructions may use, in lower case; a tokenizer's vocabulary."""


def is_big(thing: Thing) -> bool:
    return _rank(thing) > _BIG


def is_small(thing: Thing) -> bool:
    return _rank(thing) < _SMALL


def _rank(thing: Thing) -> float:
    low, high = SUBJECTS[thing.subject].sizes
    return (thing.size - low) / (high - low)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """What a caption of the scene may say: lower-case English, true, and never all of it.

    It leaves the colour open in 40 % of the captions and pattern and size in about 88 % each: a model trained on
    them has to make these up, and to keep to what it made up is what identity drift measures.
    """
    names = [_describe(thing, rng) for thing in (scene.things if rng.random() < 0.5 else scene.things[::-1])]
    text = str(rng.choice(_OPENINGS)) + " and ".join(names)
    if len(scene.things) == 1 and abs(side := scene.things[0].x - scene.camera[0] - 0.5) > 0.12 and rng.random() < 0.1:
        text += " on the left" if side < 0 else " on the right"
    background = BACKGROUNDS[scene.background]
    if rng.random() < 0.78:
        text += f" {background.preposition} the {rng.choice(background.names)}"
    if rng.random() < 0.6:
        text += f" {rng.choice(_TIME_WORDS[scene.time])}"
    return text


def _describe(thing: Thing, rng: np.random.Generator) -> str:
    says_colour, says_pattern, says_size = rng.random() < 0.6, rng.random() < 0.12, rng.random() < 0.12
    before, after = [], ""
    if says_size and (is_big(thing) or is_small(thing)):
        before.append("big" if is_big(thing) else "small")
    if says_pattern and (thing.pattern == "plain" or rng.random() < 0.6):
        before.append(thing.pattern)
    elif says_pattern:
        after = f" {PATTERNS[thing.pattern]}"
    if thing.pose and rng.random() < 0.5:
        before.append(thing.pose)
    if says_colour and thing.subject == "person":
        after = f" in {thing.colour}{after}"
    elif says_colour:
        before.append(thing.colour)
    words = " ".join([*before, thing.subject])
    return f"{_article(words)} {words}{after}"


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def edit_pair(rng: np.random.Generator, kind: str | None = None, source: Scene | None = None) -> Edit:
    """A scene, the same scene with one change, and the instruction that asks for it.

    kind: colour, pattern, subject, background or time; drawn if not given. A change of colour, pattern or subject
    is of one thing; the subject never changes to or from a person, whose size and place are of another kind.
    """
    kind = kind or str(
        rng.choice(["colour", "pattern", "subject", "background", "time"], p=[0.3, 0.15, 0.2, 0.2, 0.15])
    )
    if source is None:
        subjects = [name for name in SUBJECTS if name != "person"] if kind == "subject" else list(SUBJECTS)
        source = sample(rng, subject=_choice(rng, subjects))
    index = int(rng.integers(len(source.things)))
    thing = source.things[index]
    name = thing.subject
    match kind:
        case "colour":
            new = _choice(rng, [c for c in COLOURS if c != thing.colour])
            texts = [f"make the {name} {new}", f"turn the {name} {new}", f"paint the {name} {new}"]
            texts.append(f"change the colour of the {name} to {new}")
            changed = replace(thing, colour=new)
        case "pattern":
            new = _choice(rng, [p for p in PATTERNS if p != thing.pattern])
            texts = [f"make the {name} {new}", f"turn the {name} {new}"]
            changed = replace(thing, pattern=new)
        case "subject":
            if name == "person":
                raise ValueError("a person can't be turned into something else: give a scene of things")
            taken = {t.subject for t in source.things} | {"person"}
            new = _choice(rng, [s for s in SUBJECTS if s not in taken])
            texts = [f"turn the {name} into a {new}", f"replace the {name} with a {new}", f"make the {name} a {new}"]
            foot = bottom(thing)
            changed = replace(thing, subject=new, y=foot - SUBJECTS[new].height * thing.size / 2)
        case "background":
            new = _choice(rng, [b for b in BACKGROUNDS if b != source.background])
            old, to = source.background, _ARTICLES.get(new, "") + new
            texts = [f"turn the {old} into {to}", f"replace the {old} with {to}", f"change the {old} to {to}"]
            return Edit(source, replace(source, background=new), str(rng.choice(texts)), kind)
        case "time":
            new = "day" if source.time == "night" else "night"
            texts = [f"make it {new}", f"turn {source.time} into {new}", f"change it to {new}"]
            return Edit(source, replace(source, time=new), str(rng.choice(texts)), kind)
        case _:
            raise ValueError(f"no kind of edit '{kind}'")
    things = (*source.things[:index], changed, *source.things[index + 1 :])
    return Edit(source, replace(source, things=things), str(rng.choice(texts)), kind)


# --- motion ----------------------------------------------------------------------------------------------------------


def moving(
    rng: np.random.Generator,
    frames: int,
    *,
    scene: Scene | None = None,
    velocity_px: tuple[float, float] | None = None,
    pan_px: tuple[float, float] | None = None,
    growth: float | None = None,
    size_px: int = SIZE_PX,
    width_px: int | None = None,
) -> Motion:
    """A clip of `frames` frames in which the nearest thing moves and grows steadily and the camera pans.

    velocity_px: the thing's motion in the world, px a frame (x, y). pan_px: the camera's; what stands still moves
    the other way in the frame. growth: factor of its size a frame, about its centre. Drawn where not given.
    """
    start = scene or sample(rng)
    if velocity_px is None:
        velocity_px = (float(rng.uniform(-2, 2)), float(rng.uniform(-0.4, 0.4)))
    if pan_px is None:
        pan_px = (float(rng.uniform(-1.5, 1.5)), 0.0) if rng.random() < 0.5 else (0.0, 0.0)
    if growth is None:
        growth = float(rng.uniform(0.99, 1.01))
    width_px = width_px or size_px
    scenes = []
    for t in range(frames):
        *still, thing = start.things
        thing = replace(
            thing,
            x=thing.x + t * velocity_px[0] / size_px,
            y=thing.y + t * velocity_px[1] / size_px,
            size=thing.size * growth**t,
        )
        camera = (start.camera[0] + t * pan_px[0] / size_px, start.camera[1] + t * pan_px[1] / size_px)
        scenes.append(replace(start, things=(*still, thing), camera=camera))
    pictures = np.stack([draw(scene, size_px, width_px) for scene in scenes])
    pairs = [flow(a, b, size_px, width_px) for a, b in itertools.pairwise(scenes)]
    shape = (size_px, width_px)
    displacements = np.stack([pair[0] for pair in pairs]) if pairs else np.zeros((0, *shape, 2), np.float32)
    valid = np.stack([pair[1] for pair in pairs]) if pairs else np.zeros((0, *shape), np.bool_)
    return Motion(tuple(scenes), pictures, displacements, valid)


def flow(
    first: Scene, second: Scene, size_px: int = SIZE_PX, width_px: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Displacement in px of each pixel from one scene to the next, and where it holds: see `Motion`.

    Both scenes have the same things, which may differ in place and size only, and the same background.
    """
    import cv2

    width_px = width_px or size_px
    columns, rows = np.meshgrid(np.arange(width_px, dtype=np.float32), np.arange(size_px, dtype=np.float32))
    shift = (np.array(first.camera) - second.camera) * size_px
    displacement = np.empty((size_px, width_px, 2), np.float32)
    displacement[:] = shift
    owner, after = _owner(first, size_px, width_px), _owner(second, size_px, width_px)
    for i, (a, b) in enumerate(zip(first.things, second.things, strict=True)):
        mask = owner == i
        ratio = b.size / a.size
        centre_x = (a.x - first.camera[0] - 0.5) * size_px + width_px / 2 - 0.5
        centre_y = (a.y - first.camera[1]) * size_px - 0.5
        move_x, move_y = (b.x - a.x) * size_px + shift[0], (b.y - a.y) * size_px + shift[1]
        displacement[mask, 0] = ((ratio - 1) * (columns - centre_x) + move_x)[mask]
        displacement[mask, 1] = ((ratio - 1) * (rows - centre_y) + move_y)[mask]
    valid = np.zeros(owner.shape, np.bool_)
    to_x, to_y = columns + displacement[..., 0], rows + displacement[..., 1]
    inside = (to_x >= 0) & (to_x <= width_px - 1) & (to_y >= 0) & (to_y <= size_px - 1)
    for i in range(-1, len(first.things)):
        pure, pure_after = (cv2.erode((o == i).astype(np.uint8), np.ones((5, 5), np.uint8)) for o in (owner, after))
        arrives = cv2.remap(pure_after.astype(np.float32), to_x, to_y, cv2.INTER_LINEAR, borderValue=0)
        valid |= (pure > 0) & (arrives > 0.999)
    return displacement, valid & inside
