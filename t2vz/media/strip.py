"""A row in small pictures: frames of its source, its conditions and its result in step under each other.

Of each row two: the strip, eight frames to look at beside each other, and its thumbnails, up to sixteen for a page to
play one after the other (`t2vz.gallery`). Both are one still picture, in which a line's frames lie side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from t2vz import storage
from t2vz.storage import Place

FRAMES = 8
MOVING_FRAMES = 16
HEIGHT_PX = 128
_WIDTH_PX = 1020  # at most: WebP ends at 16,383 px, which MOVING_FRAMES beside each other shall not reach
_QUALITY = 85  # of WebP: a strip of three lines takes some 30 kB
_MOVING_QUALITY = 75

Frames = NDArray[np.uint8]  # (F, H, W, 3), RGB


def shown(count: int, most: int = FRAMES) -> tuple[int, ...]:
    """Which of `count` frames a strip shows: the first, the last, and evenly between."""
    return tuple(round(i * (count - 1) / max(1, min(count, most) - 1)) for i in range(min(count, most)))


def thumbnail_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of a frame of the given size in a strip, px."""
    scale = min(1.0, HEIGHT_PX / height, _WIDTH_PX / width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def thumbnails(frames: Frames) -> Frames:
    """Of a whole clip MOVING_FRAMES frames, at most `HEIGHT_PX` high and `_WIDTH_PX` wide."""
    return np.stack([_small(frames[i]) for i in shown(len(frames), MOVING_FRAMES)])


def collecting(batches: Iterable[Frames], count: int, into: list[NDArray[np.uint8]]) -> Iterator[Frames]:
    """The same batches of a clip of `count` frames; its thumbnails go `into` the list as they pass."""
    wanted, at = set(shown(count, MOVING_FRAMES)), 0
    for batch in batches:
        into.extend(_small(frame) for i, frame in enumerate(batch, at) if i in wanted)
        at += len(batch)
        yield batch


def write(out: Place, key: str, lines: Sequence[Frames | list[NDArray[np.uint8]]], workspace: Path) -> None:
    """Write a strip, whole or not at all. lines: of thumbnails of one size, a line each. Raises OSError, and what
    `t2vz.storage` does.

    workspace: a folder of the writer's own on the file system of a local `out`, where the draft lies meanwhile.
    """
    _write(out, key, [[line[i] for i in shown(len(line))] for line in lines], workspace, _QUALITY)


def write_moving(out: Place, key: str, lines: Sequence[Frames | list[NDArray[np.uint8]]], workspace: Path) -> None:
    """As `write`, with all thumbnails of each line, for a page that plays them."""
    _write(out, key, lines, workspace, _MOVING_QUALITY)


def _write(
    out: Place, key: str, lines: Sequence[Frames | list[NDArray[np.uint8]]], workspace: Path, quality: int
) -> None:
    from PIL import Image

    drawn = [np.concatenate(list(line), axis=1) for line in lines]
    width = max(line.shape[1] for line in drawn)  # a condition video may be shorter than what came out
    picture = np.concatenate([np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0))) for line in drawn])
    draft = workspace / "strip.webp"
    Image.fromarray(picture).save(draft, "webp", quality=quality)
    if storage.is_remote(out):
        storage.upload(draft, out, key, {"Content-Type": "image/webp"})
        return
    path = Path(out, key)
    path.parent.mkdir(exist_ok=True)
    draft.replace(path)


def _small(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    import cv2

    height, width = frame.shape[:2]
    size = thumbnail_size(width, height)
    if size == (width, height):
        return np.ascontiguousarray(frame)
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8)
