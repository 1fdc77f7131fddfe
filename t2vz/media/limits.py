"""Limits: how large a source may be before it is refused, so that one row can't exhaust the machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of a source. What exceeds one raises `SourceTooLarge` before it is read.

    max_source_bytes: size of the file, or of all images of a folder together. 8 GiB: hours of 1080p.
    max_pixels: width × height of a source frame. 8192 × 4320 (8K); one such frame is 106 MB in RGB.
    max_frames: frames delivered for a row. 3000 are two minutes at 25 fps, 2.4 GB at 512 × 512.
    """

    max_source_bytes: int = 8 * 2**30
    max_pixels: int = 8192 * 4320
    max_frames: int = 3000
