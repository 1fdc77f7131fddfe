"""Limits: what a source may be, before one row can exhaust the machine or read what is none of its business."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from t2vz.errors import SourceTooLarge

SCHEMES = ("file", "s3")


def _limit(default: Any, title: str, meaning: str) -> Any:
    return field(default=default, metadata={"title": title, "meaning": meaning})


@dataclass(frozen=True)
class Limits:
    """Bounds of a source, each also an option of the command line and a parameter of the flows.

    What exceeds max_source_bytes, max_duration_s, max_pixels, max_frames or max_clip_bytes raises `SourceTooLarge`, if
    its header tells, before it is read; what takes more than max_decode_bytes, too; more than max_decode_s
    `SourceTooSlow`.
    schemes, roots: `SourceForbidden` for sources from elsewhere. Raises ValueError for bounds that are none.

    The defaults: hours of 1080p; 8K, of which a frame is 106 MB in RGB; two minutes at 25 fps, which are 2.4 GB at
    512 × 512; four minutes of 720p at 25 fps; what a decoder of 8K takes with a frame in each of 16 threads.
    """

    max_source_bytes: int = _limit(8 * 2**30, "Source size (bytes)", "Of the file, or of a folder's images together")
    max_duration_s: float = _limit(6 * 3600.0, "Source duration (s)", "Of the whole source, whatever the row's range")
    max_pixels: int = _limit(8192 * 4320, "Source pixels", "Width × height of a source's frame")
    max_frames: int = _limit(3000, "Frames", "Of a row's clip; longer ones need video_length, end_s or a lower fps")
    max_clip_bytes: int = _limit(16 * 2**30, "Clip (bytes)", "Of a row's frames together, uncompressed")
    max_decode_s: float = _limit(900.0, "Decoding time (s)", "For each reading of a source; then it counts as hanging")
    max_decode_bytes: int = _limit(4 * 2**30, "Decoding memory (bytes)", "Of the process that decodes (Linux)")
    schemes: tuple[str, ...] = _limit(SCHEMES, "Source schemes", "From where sources may come: file, s3")
    roots: tuple[str, ...] = _limit(
        (), "Source roots", "Folders and s3:// prefixes that all sources must lie in; empty: anywhere"
    )

    def __post_init__(self) -> None:
        for name in ("schemes", "roots"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if unknown := [scheme for scheme in self.schemes if scheme not in SCHEMES]:
            raise ValueError(f"sources can't come from {', '.join(unknown)}: only from {' and '.join(SCHEMES)}")
        for limit in fields(self):
            if limit.name.startswith("max_") and not getattr(self, limit.name) > 0:
                raise ValueError(f"{limit.name} must be above 0, not {getattr(self, limit.name)}")

    def check_clip(self, about: str, frames: int, width: int, height: int) -> None:
        """Raise SourceTooLarge if a clip of that size is over the limit. about: the row's source, or "the clip"."""
        size_bytes = frames * width * height * 3
        if size_bytes > self.max_clip_bytes:
            raise SourceTooLarge(
                f"{about}: {frames} frames of {width}x{height} are {size_bytes / 2**30:.3g} GiB, the limit is "
                f"{self.max_clip_bytes / 2**30:.3g}: lower video_length, or width and height"
            )
