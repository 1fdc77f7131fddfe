"""Limits: how large a source may be before it is refused, so that one row can't exhaust the machine."""

from __future__ import annotations

from dataclasses import dataclass

from t2vz.errors import SourceTooLarge


@dataclass(frozen=True)
class Limits:
    """Bounds of a source. What exceeds one raises `SourceTooLarge` before it is read.

    max_source_bytes: size of the file, or of all images of a folder together. 8 GiB: hours of 1080p.
    max_pixels: width × height of a source frame. 8192 × 4320 (8K); one such frame is 106 MB in RGB.
    max_frames: frames delivered for a row. 3000 are two minutes at 25 fps, 2.4 GB at 512 × 512.
    max_clip_bytes: the frames of a row together, uncompressed. 16 GiB: four minutes of 720p at 25 fps.
    """

    max_source_bytes: int = 8 * 2**30
    max_pixels: int = 8192 * 4320
    max_frames: int = 3000
    max_clip_bytes: int = 16 * 2**30

    def check_clip(self, about: str, frames: int, width: int, height: int) -> None:
        """Raise SourceTooLarge if a clip of that size is over the limit. about: the row's source, or "the clip"."""
        size_bytes = frames * width * height * 3
        if size_bytes > self.max_clip_bytes:
            raise SourceTooLarge(
                f"{about}: {frames} frames of {width}x{height} are {size_bytes / 2**30:.3g} GiB, the limit is "
                f"{self.max_clip_bytes / 2**30:.3g}: lower video_length, or width and height"
            )
