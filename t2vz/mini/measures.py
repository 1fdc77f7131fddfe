"""What the evaluation measures on frames of the miniature world, and how sure a figure is. No network but the pose
estimator, which is the family's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2vz.mini import read, world
from t2vz.mini.read import ThingReading
from t2vz.mini.world import Edit, Frame, Scene
from t2vz.quality import warp_error

_Z95 = 1.959964
_ROUNDS = 2000  # of the bootstrap

# Points whose depths differ by less, in levels, have no order; nor have points this near, in px, to a jump of more
# than the second (the ground's own slope makes up to 29 within that reach).
_DEPTH_STEP = 24
_DEPTH_BORDER_PX = 4
_DEPTH_JUMP = 40
# Around what an edit changes, where the VAE mixes old and new.
_EDIT_BORDER_PX = 4
# Farther from its place, in frame heights, a thing isn't the one that the instruction names.
_SAME_PLACE = 0.2


@dataclass(frozen=True)
class Figure:
    """One number of the report. low, high: its 95 % interval. n, of: how many units of what it is made of.

    meaning: how it is defined, in a line. bar: what it should reach, if anything.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    of: str
    meaning: str
    bar: str = ""


def share(parts: Sequence[float], of: str, meaning: str, bar: str = "") -> Figure:
    """Mean of shares (0–1), one a unit, with Wilson's interval for n units.

    A unit's frames are alike, so they don't count as independent: each unit counts as one trial.
    """
    n = len(parts)
    if n == 0:
        return Figure(None, None, None, 0, of, meaning, bar)
    p, z2 = float(np.mean(parts)), _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Figure(p, float(max(0, centre - half)), float(min(1, centre + half)), n, of, meaning, bar)


def statistic(units: Sequence[Sequence[float]], of: str, meaning: str, bar: str = "", of_sums: bool = False) -> Figure:
    """Mean of the units' values (n, 1); of_sums: Σ of the first ÷ Σ of the second of the units' two (n, 2).

    The interval is the percentile bootstrap's, over units.
    """
    if not len(units):
        return Figure(None, None, None, 0, of, meaning, bar)
    table = np.asarray(units, np.float64).reshape(len(units), -1)

    def of_rows(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = rows.sum(axis=-2)
        with np.errstate(divide="ignore", invalid="ignore"):
            return sums[..., 0] / (sums[..., 1] if of_sums else rows.shape[-2])

    value = float(of_rows(table))
    if not np.isfinite(value):
        return Figure(None, None, None, len(table), of, meaning, bar)
    again = np.random.default_rng(0).integers(len(table), size=(_ROUNDS, len(table)))
    low, high = np.nanpercentile(of_rows(table[again]), [2.5, 97.5])
    return Figure(value, float(low), float(high), len(table), of, meaning, bar)


# --- text ------------------------------------------------------------------------------------------------------------


def shows(frame: Frame, subject: str, colour: str, background: str) -> tuple[bool, bool, bool]:
    """Whether the frame's largest thing is of that subject and of that colour, and whether the background is that."""
    thing, place = read.thing(frame), read.background(frame)
    return (
        thing is not None and thing.subject is not None and thing.subject.value == subject,
        thing is not None and thing.colour is not None and thing.colour.value == colour,
        place is not None and place.value == background,
    )


# --- identity and motion ---------------------------------------------------------------------------------------------


def identity_drift(frames: NDArray[np.uint8]) -> tuple[float | None, float]:
    """D = √(mean_k ‖v_k − v̄‖²) over the frames whose identity vector v_k (`read.identity`) can be read, v̄ being
    their mean; None if fewer than half can. And the share of those that can't."""
    found = [vector for vector in map(read.identity, frames) if vector is not None]
    lost = 1 - len(found) / len(frames)
    if len(found) < max(2, len(frames) / 2):
        return None, lost
    vectors = np.stack(found)
    return float(np.sqrt(((vectors - vectors.mean(0)) ** 2).sum(1).mean())), lost


def displacement(first: Frame, other: Frame, reach_px: int) -> tuple[float, float]:
    """How far the picture has moved from one frame to another, as (x, y) in px, at most `reach_px` each.

    Where in `other` the middle of `first` fits best, by least squares, with a parabola between the pixels.
    """
    import cv2

    height, width = first.shape[:2]
    # Lightly blurred: the parabola is right for smooth minima.
    soft_first, soft_other = (cv2.GaussianBlur(frame.astype(np.float32), (0, 0), 1.0) for frame in (first, other))
    template = soft_first[reach_px : height - reach_px, reach_px : width - reach_px]
    cost = cv2.matchTemplate(soft_other, template, cv2.TM_SQDIFF)
    row, column = np.unravel_index(int(cost.argmin()), cost.shape)

    def between(line: NDArray[np.float32], at: int) -> float:
        if not 0 < at < len(line) - 1:
            return float(at)
        below, here, above = (float(value) for value in line[at - 1 : at + 2])
        bend = below - 2 * here + above
        return at + ((below - above) / (2 * bend) if bend > 0 else 0.0)

    return between(cost[row], int(column)) - reach_px, between(cost[:, column], int(row)) - reach_px


def motion(frames: NDArray[np.uint8], requested_px: tuple[float, float]) -> NDArray[np.float64]:
    """Requested and measured displacement of each frame since the first: float64 (F − 1, 2 axes, 2), in px.

    requested_px: how far the content shall move a frame.
    """
    last = len(frames) - 1
    reach = int(np.ceil(max(map(abs, requested_px)) * last)) + 6
    reach = min(reach, min(frames.shape[1:3]) // 2 - 8)
    measured = [displacement(frames[0], frame, reach) for frame in frames[1:]]
    wanted = np.arange(1, last + 1)[:, None] * np.asarray(requested_px, np.float64)
    return np.stack([wanted, np.asarray(measured)], -1)


def jitter(found: NDArray[np.float64]) -> float:
    """RMS distance, in px, of a clip's measured places from the line through the first that fits them best: `motion`'s
    result → px."""
    k = np.arange(1, len(found) + 1)[:, None]
    places = found[..., 1]
    slope = (k * places).sum(0) / (k**2).sum()
    return float(np.sqrt(((places - k * slope) ** 2).sum(1).mean()))


# --- control ---------------------------------------------------------------------------------------------------------


def depth_order(frame: Frame, depth: NDArray[np.uint8], rng: np.random.Generator) -> float | None:
    """Share of 500 random pairs of points on a row whose order in depth is right in the frame; None without any.

    depth: uint8 (H, W), 255 nearest, the truth: it says which pairs have an order. On one row, as every picture has
    the sky above and the near ground below, and that would be right by itself. The frame's depth is read by rule: a
    thing stands where its lowest row is, the ground is at its own row. A pair that reads as equal is wrong.
    """
    import cv2

    kernel = np.ones((2 * _DEPTH_BORDER_PX + 1,) * 2, np.uint8)
    flat = cv2.subtract(cv2.dilate(depth, kernel), cv2.erode(depth, kernel)) < _DEPTH_JUMP
    height, width = depth.shape
    rows = rng.integers(height, size=20_000)
    a, b = rng.integers(width, size=(2, 20_000))
    step = depth[rows, a].astype(int) - depth[rows, b]
    pairs = np.flatnonzero((np.abs(step) >= _DEPTH_STEP) & flat[rows, a] & flat[rows, b])[:500]
    if not len(pairs):
        return None
    stands = np.repeat(np.arange(height)[:, None], width, 1)
    for thing in read.things(frame):
        stands[thing.mask] = np.flatnonzero(thing.mask.any(1))[-1]
    found = stands[rows, a][pairs] - stands[rows, b][pairs]
    return float((np.sign(found) == np.sign(step[pairs])).mean())


def pck(found: NDArray[np.floating] | None, true: NDArray[np.floating]) -> float:
    """Share of the 18 joints that are within 10 % of the body's size of their true place; 0 where nobody was found.

    found, true: (18, 2), in px. The body's size is the longer side of the box around the true joints.
    """
    if found is None:
        return 0.0
    size = float((true.max(0) - true.min(0)).max())
    return float((np.linalg.norm(found - true, axis=1) <= 0.1 * size).mean())


# --- edits -----------------------------------------------------------------------------------------------------------


def carried_out(frame: Frame, edit: Edit, target: Scene) -> bool:
    """Whether the frame shows what the instruction asks for. target: the edited scene at this frame's time."""
    match edit.kind:
        case "background":
            found = read.background(frame)
            return found is not None and found.value == target.background
        case "time":
            found = read.time(frame)
            return found is not None and found.value == target.time
    pairs = zip(edit.source.things, edit.target.things, target.things, strict=True)
    thing = next(now for before, after, now in pairs if before != after)
    named = _at(frame, thing.x - target.camera[0], thing.y - target.camera[1])
    reading = None if named is None else getattr(named, edit.kind)
    return reading is not None and reading.value == getattr(thing, edit.kind)


def _at(frame: Frame, x: float, y: float) -> ThingReading | None:
    """The thing that is nearest to a place, if any is near."""
    near = [(np.hypot(thing.x - x, thing.y - y), i, thing) for i, thing in enumerate(read.things(frame))]
    return min(near)[2] if near and min(near)[0] < _SAME_PLACE else None


def kept_psnr(frame: Frame, source: Frame, target: Frame) -> float | None:
    """PSNR, in dB, of the edited frame against the source where the drawn target is like the source (within 2 levels),
    4 px away from what changes; None if that is less than 5 % of the frame."""
    import cv2

    changed = (np.abs(source.astype(int) - target).max(-1) > 2).astype(np.uint8)
    kept = cv2.dilate(changed, np.ones((2 * _EDIT_BORDER_PX + 1,) * 2, np.uint8)) == 0
    if kept.mean() < 0.05:
        return None
    error = np.square(frame.astype(np.float64) - source)[kept].mean()
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def flow_error(frames: NDArray[np.uint8], clip: world.Motion) -> float | None:
    """`quality.warp_error` by the clip's known flow, mean over neighbouring frames."""
    pairs = zip(frames[:-1], frames[1:], clip.flow, clip.valid, strict=True)
    errors = [error for error in (warp_error(*pair) for pair in pairs) if error is not None]
    return float(np.mean(errors)) if errors else None


def mean_over(measure: Callable[..., float | None], *arguments: Iterable[Any]) -> float | None:
    """Mean of a measure over frames, which get an item of each of `arguments`; what is None is left out."""
    found = [measure(*each) for each in zip(*arguments, strict=True)]
    known = [float(value) for value in found if value is not None]
    return float(np.mean(known)) if known else None
