"""Reads the miniature world back from pixels: background, time, and each thing's subject, colour, pattern and place.

By rules alone, no network: pixels are sorted by the world's own colours, silhouettes compared with drawn ones. So it
can judge what a network has painted. A reading that is too uncertain is None: an empty, grey or noisy frame shows
nothing. Frames are uint8 (H, W, 3), RGB, of any size; they are read at 128 px height, as the world is drawn.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from t2vz.mini import world
from t2vz.mini.world import BACKGROUNDS, COLOURS, SIZE_PX, SUBJECTS, TIMES, Frame, Rgb

# Distances are Euclidean, in levels of RGB. How far a pixel may be from the sky's and the ground's colours to tell
# time and background; and from the scenery's as found in the frame, mixes of two of them and the moon's to be no thing.
_SKY_RADIUS, _GROUND_RADIUS = 32.0, 42.0
_SCENERY_RADIUS, _MIXED_RADIUS, _MOON_RADIUS = 34.0, 26.0, 20.0
# Least shares of sky and ground pixels for an answer: a person or two things hide up to about half of either.
_LEAST_SKY = 0.4
_LEAST_GROUND = 0.3
# Areas of things, in shares of the frame's (the smallest of two has 0.03, a large box 0.3, the moon 0.01).
_LEAST_AREA, _MOST_AREA = 0.025, 0.5
# How near a pixel is to a colour to vote for it, and to a pattern's two colours or a mix of them to be its paint.
_VOTE_RADIUS = 40.0
_PAINT_RADIUS = 45.0
# Least share of paint inside a thing (windows, lines and blurred borders are the rest) to name colour and pattern.
_LEAST_PAINT = 0.2
# Least overlap of a silhouette with a drawn one for a subject's name.
_LEAST_IOU = 0.72
# Silhouettes are compared in a square whose side is this many times the root of their area.
_TEMPLATE_PX, _WINDOW = 48, 2.6


class Reading(NamedTuple):
    """A word of the world's, and how sure it is: 0–1."""

    value: str
    confidence: float


@dataclass(frozen=True)
class ThingReading:
    """What the pixels of one thing say.

    mask: bool (H, W), outline included. x, y: centre of its box; size: the box's larger side; all in frame heights,
    x from the frame's left. aspect: the box's width over its height. subject, colour, pattern: None if unsure.
    rgb: mean colour of its inside, 0–255. second: share of its paint that is of the pattern's second colour.
    rows: 0–1, how far that share depends on the row alone: near 1 for stripes.
    """

    mask: NDArray[np.bool_]
    x: float
    y: float
    size: float
    aspect: float
    subject: Reading | None
    colour: Reading | None
    pattern: Reading | None
    rgb: tuple[float, float, float]
    second: float
    rows: float


def time(frame: Frame) -> Reading | None:
    """ "day" or "night", by the sky."""
    return _time(_soft(frame))


def background(frame: Frame) -> Reading | None:
    """The background, by the ground's colour at the time of day that the sky shows."""
    soft = _soft(frame)
    hour = _time(soft)
    return _background(soft, hour.value) if hour else None


def things(frame: Frame) -> tuple[ThingReading, ...]:
    """The things in the frame, the largest first; none where the time can't be read."""
    soft = _soft(frame)
    hour = _time(soft)
    if hour is None:
        return ()
    place = _background(soft, hour.value)
    masks = _foreground(soft, hour.value, place.value if place else None)
    return tuple(_read_thing(soft, mask, hour.value, frame.shape) for mask in masks)


def thing(frame: Frame) -> ThingReading | None:
    """The largest thing in the frame."""
    found = things(frame)
    return found[0] if found else None


IDENTITY = ("red", "green", "blue", "second", "stripes", "size", "aspect")


def identity(frame: Frame) -> NDArray[np.float32] | None:
    """What makes the largest thing the one it is, for drift across frames: float32 (7,), each about 0–1.

    Mean colour (RGB / 255), share of the pattern's second colour, the part of that share that lies in stripes, the
    root of the area in frame heights (a box would jump with a single stray pixel) and the box's width over its height,
    halved. None where nothing is found.
    """
    found = thing(frame)
    if found is None:
        return None
    red, green, blue = (level / 255 for level in found.rgb)
    stripes = found.second * found.rows
    size = math.sqrt(found.mask.sum()) / frame.shape[0]
    return np.array([red, green, blue, found.second, stripes, size, found.aspect / 2], np.float32)


def _soft(frame: Frame) -> NDArray[np.float32]:
    """The frame at 128 px height, its noise smoothed: float32 (128, W, 3)."""
    import cv2

    height, width = frame.shape[:2]
    if height != SIZE_PX:
        frame = cv2.resize(frame, (round(width * SIZE_PX / height), SIZE_PX), interpolation=cv2.INTER_AREA)
    return cv2.GaussianBlur(frame.astype(np.float32), (0, 0), 0.8)


def _distance(pixels: NDArray[np.float32], palette: NDArray[np.float32]) -> NDArray[np.float32]:
    """From each pixel to each colour, in levels: (H, W, 3) and (N, 3) → (H, W, N)."""
    squared = (pixels**2).sum(-1)[..., None] - 2 * pixels @ palette.T + (palette**2).sum(-1)
    return np.sqrt(np.maximum(squared, 0))


@functools.cache
def _sky(hour: str) -> NDArray[np.float32]:
    top, low = (np.array(colour, np.float32) for colour in TIMES[hour])
    cloud = np.array((34, 22, 6) if hour == "day" else (8, 8, 8), np.float32)
    return np.array([top + t * (low - top) + c * cloud for t in (0, 0.33, 0.67, 1) for c in (0, 0.35, 0.7)])


def _time(soft: NDArray[np.float32]) -> Reading | None:
    band = soft[: round(0.25 * SIZE_PX)]
    shares = {hour: float((_distance(band, _sky(hour)).min(-1) < _SKY_RADIUS).mean()) for hour in TIMES}
    best = max(shares, key=shares.__getitem__)
    return Reading(best, shares[best]) if shares[best] >= _LEAST_SKY else None


def _background(soft: NDArray[np.float32], hour: str) -> Reading | None:
    band = soft[round(0.62 * SIZE_PX) :]
    distance = _distance(band, np.array([look.ground[hour] for look in BACKGROUNDS.values()], np.float32))
    nearest = np.where(distance.min(-1) < _GROUND_RADIUS, distance.argmin(-1), len(BACKGROUNDS))
    shares = np.bincount(nearest.ravel(), minlength=len(BACKGROUNDS) + 1)[: len(BACKGROUNDS)] / nearest.size
    best = int(shares.argmax())
    return Reading(list(BACKGROUNDS)[best], float(shares[best])) if shares[best] >= _LEAST_GROUND else None


def _scenery(soft: NDArray[np.float32], hour: str, name: str | None) -> NDArray[np.bool_]:
    """Pixels of the background `name` (of any where it is None) and its sky: bool (128, W).

    Sky and silhouettes count above the horizon only, the ground below it. Sky and ground are each moved by the mean
    error of what shows of them: a network's green is not ours.
    """
    sky = _sky(hour)
    sky = sky + _error(soft[: _px(0.2)], sky, _SKY_RADIUS)
    plain, steps, mixed, border, dashes = [sky], [], [], [], []
    for place in (name,) if name else BACKGROUNDS:
        look = BACKGROUNDS[place]
        ground, far = np.array(look.ground[hour], np.float32), np.array(look.far[hour], np.float32)
        if name:
            error = _error(soft[_px(0.62) :], ground[None], _GROUND_RADIUS)
            ground, far = ground + error, far + error
        plain.append(far[None])
        steps.append(ground + np.linspace(-1.6, 1.6, 5)[:, None] * look.texture)
        mixed.append(_between(sky[-3:].mean(0), far))
        border.append(_between(far, ground))
        if place == "city":
            mixed.append(_between(far, world.LIT[hour]))
        if place == "road":
            dashes.append(_between(ground, world.DASH[hour]))
    to_above, to_below = _nearest(soft, plain), _nearest(soft, steps)
    horizon = _horizon(to_above, to_below)
    found = np.zeros(soft.shape[:2], np.bool_)
    upper, lower = slice(None, horizon + 3), slice(horizon - 3, None)
    found[upper] |= (_nearest(soft[upper], [sky]) < _SCENERY_RADIUS) | (_nearest(soft[upper], mixed) < _MIXED_RADIUS)
    found[lower] |= to_below[lower] < _SCENERY_RADIUS
    line = slice(horizon - 3, horizon + 3)
    found[line] |= _nearest(soft[line], border) < _MIXED_RADIUS
    if dashes:
        line = slice(horizon + _px(world.DASH_Y) - 4, horizon + _px(world.DASH_Y) + 4)
        found[line] |= _nearest(soft[line], dashes) < _MIXED_RADIUS
    if hour == "night":
        corners = np.zeros_like(found)
        middle = soft.shape[1] // 2
        for x in (-0.36, 0.36):  # where the world has its moon
            corners[: _px(0.2), middle + _px(x - 0.11) : middle + _px(x + 0.11)] = True
        found |= corners & (_nearest(soft, [_between(sky.mean(0), world.MOON)]) < _MOON_RADIUS)
    return found


def _px(share: float) -> int:
    return round(share * SIZE_PX)


def _between(a: NDArray[np.float32], b: NDArray[np.float32] | Rgb) -> NDArray[np.float32]:
    return a + np.array([[0.25], [0.5], [0.75], [1]], np.float32) * (np.asarray(b, np.float32) - a)


def _nearest(pixels: NDArray[np.float32], colours: list[NDArray]) -> NDArray[np.float32]:
    """The distance of each pixel to the nearest of the colours: (H, W)."""
    return _distance(pixels, np.concatenate(colours).astype(np.float32)).min(-1)


def _error(pixels: NDArray[np.float32], palette: NDArray[np.float32], radius: float) -> NDArray[np.float32]:
    """Mean difference of the pixels that are near a colour of the palette from that colour: (3,)."""
    distance = _distance(pixels, palette)
    like = distance.min(-1) < radius
    if not like.any():
        return np.zeros(3, np.float32)
    return (pixels - palette[distance.argmin(-1)])[like].mean(0)


def _horizon(to_above: NDArray[np.float32], to_below: NDArray[np.float32]) -> int:
    """The row that has most of the sky's and the silhouettes' pixels above it and most of the ground's below."""
    vote = np.where(to_above < to_below, 1, -1) * (np.minimum(to_above, to_below) < _SCENERY_RADIUS)
    lead = np.cumsum(vote.mean(1))[_px(0.2) : _px(0.7)]
    return _px(0.2) + 1 + int(lead.argmax())


def _lit(colour: Rgb, hour: str) -> NDArray[np.float32]:
    return np.array(colour, np.float32) * (world.NIGHT_LIGHT if hour == "night" else 1.0)


def _foreground(soft: NDArray[np.float32], hour: str, place: str | None) -> list[NDArray[np.bool_]]:
    """The masks of things, large before small: bool (128, W) each."""
    import cv2

    mask = _tidied(~_scenery(soft, hour, place))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    areas = stats[1:, cv2.CC_STAT_AREA]
    large = [i for i in np.argsort(-areas) if _LEAST_AREA <= areas[i] / mask.size <= _MOST_AREA]
    found = [labels == i + 1 for i in large]
    if hour == "night":  # its outline is as dark as what is behind it
        found = [cv2.dilate(part.astype(np.uint8), _disc(3)) > 0 for part in found]
    return found


def _tidied(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Without specks and holes; gaps are closed upwards, where a stripe of the background's colour makes them."""
    import cv2

    tidy = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    tidy = cv2.morphologyEx(tidy, cv2.MORPH_CLOSE, _disc(5))
    tidy = cv2.morphologyEx(tidy, cv2.MORPH_CLOSE, np.ones((7, 1), np.uint8))
    contours, _ = cv2.findContours(tidy, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    tidy = cv2.drawContours(np.zeros_like(tidy), contours, -1, 1, cv2.FILLED)
    return cv2.morphologyEx(tidy, cv2.MORPH_OPEN, _disc(5))


def _disc(side: int) -> NDArray[np.uint8]:
    import cv2

    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def _read_thing(soft: NDArray[np.float32], mask: NDArray[np.bool_], hour: str, shape: tuple[int, ...]) -> ThingReading:
    import cv2

    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, upper, right, lower = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    subject = _subject(mask)
    # Its border mixes with what is behind it.
    inside = cv2.erode(mask.astype(np.uint8), _disc(5), borderValue=0) > 0
    name = subject.value if subject else ""
    for x0, y0, x1, y1 in _UNPAINTED.get(name, ()):
        height, width = lower - upper, right - left
        inside[
            round(upper + y0 * height) : round(upper + y1 * height), round(left + x0 * width) : round(left + x1 * width)
        ] = False
    if not inside.any():
        inside = mask
    rgb = tuple(float(level) for level in soft[inside].mean(0))
    colour, second, share, striped = _colour(soft, inside, hour, name)
    full = cv2.resize(mask.astype(np.uint8), shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0
    return ThingReading(
        mask=full,
        x=float((left + right) / 2 / SIZE_PX),
        y=float((upper + lower) / 2 / SIZE_PX),
        size=float(max(right - left, lower - upper) / SIZE_PX),
        aspect=float((right - left) / (lower - upper)),
        subject=subject,
        colour=colour,
        pattern=_pattern(second, share, striped),
        rgb=rgb,  # type: ignore[arg-type]
        second=second,
        rows=striped,
    )


# Parts of a subject's box (left, upper, right, lower, as shares of it) where windows, doors and wheels may be.
_UNPAINTED = {
    "house": ((0.17, 0.56, 0.83, 1.0),),
    "car": ((0.24, 0.08, 0.76, 0.48), (0.08, 0.54, 0.38, 1.0), (0.62, 0.54, 0.92, 1.0)),
}


def _colour(
    soft: NDArray[np.float32], inside: NDArray[np.bool_], hour: str, subject: str
) -> tuple[Reading | None, float, float, float]:
    """The colour, the second colour's share of the paint, the paint's share of the inside, and `rows`.

    Each pixel votes for the colours that it is near; then the paint is sorted into the winner and its second colour.
    """
    import cv2

    if subject == "person":
        inside = inside & (_distance(soft, _lit(world.SKIN, hour)[None])[..., 0] > 30)
    pixels = soft[inside]
    if not len(pixels):
        return None, 0.0, 0.0, 0.0
    votes = {
        name: float(np.exp(-((_distance(pixels, _lit(rgb, hour)[None]) / _VOTE_RADIUS) ** 2)).sum())
        for name, rgb in {**COLOURS, "cream": world.CREAM}.items()
    }
    pale = max(votes.pop("white"), votes.pop("cream"))
    best = max(votes, key=votes.__getitem__)
    if votes[best] < 0.4 * pale:
        best = "white"
    first = _lit(COLOURS[best], hour)
    span = _lit(world.SLATE if best == "white" else world.CREAM, hour) - first
    along = np.clip((soft - first) @ span / (span @ span), 0, 1)
    paint = inside & (np.sqrt(((soft - first - along[..., None] * span) ** 2).sum(-1)) < _PAINT_RADIUS)
    is_second = paint & (along > 0.5)
    if best == "white":  # an outline's blurred border looks like slate, but is thin
        is_second = cv2.morphologyEx(is_second.astype(np.uint8), cv2.MORPH_OPEN, _disc(3)) > 0
    covered = float(paint.sum() / inside.sum())
    share = float(is_second.sum() / max(1, paint.sum()))
    colour = Reading(best, covered) if covered > _LEAST_PAINT else None
    return colour, share, covered, _row_share(paint & ~is_second, is_second)


def _row_share(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """How much of the pattern's variance lies between rows: 0–1."""
    paint, of_second = (first | second).sum(1), second.sum(1)
    mean = of_second.sum() / max(1, paint.sum())
    total = mean * (1 - mean) * paint.sum()
    if total <= 0:
        return 0.0
    rows = paint > 0
    return float((paint[rows] * (of_second[rows] / paint[rows] - mean) ** 2).sum() / total)


def _pattern(second: float, paint: float, striped: float) -> Reading | None:
    if paint < _LEAST_PAINT:
        return None
    if second < 0.1:
        return Reading("plain", 1 - second)
    if striped > 0.5:
        return Reading("striped", striped)
    return Reading("dotted", 1 - striped)


# --- silhouettes -----------------------------------------------------------------------------------------------------


def _subject(mask: NDArray[np.bool_]) -> Reading | None:
    names, templates = _templates()
    shape = _normalised(mask).ravel()
    both = templates @ shape
    overlap = both / (templates.sum(1) + shape.sum() - both)
    best = int(overlap.argmax())
    return Reading(names[best], float(overlap[best])) if overlap[best] >= _LEAST_IOU else None


def _normalised(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The silhouette about its centroid, at a scale that makes all areas equal: float32 (48, 48), 0 or 1."""
    import cv2

    rows, columns = np.nonzero(mask)
    scale = _TEMPLATE_PX / (_WINDOW * math.sqrt(len(rows)))
    offset = (_TEMPLATE_PX - 1) / 2 - scale * np.array([columns.mean(), rows.mean()])
    warp = np.array([[scale, 0, offset[0]], [0, scale, offset[1]]])
    return (cv2.warpAffine(mask.astype(np.float32), warp, (_TEMPLATE_PX, _TEMPLATE_PX)) > 0.5).astype(np.float32)


@functools.cache
def _templates() -> tuple[list[str], NDArray[np.float32]]:
    """Silhouettes of every subject, both ways round, a person in many poses: names, float32 (N, 48 · 48)."""
    rng = np.random.default_rng(0)
    names, shapes = [], []
    for name in SUBJECTS:
        for _ in range(80 if name == "person" else 12):
            mask = world.masks(world.sample(rng, subject=name, count=1))[0]
            names.append(name)
            shapes.append(_normalised(_tidied(mask) > 0).ravel())
    return names, np.stack(shapes)
