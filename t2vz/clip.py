"""Clip: decoded frames with their times. A record, and where its arrays live; decoding is in `media.decode`."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

# Larger arrays are memory maps, so that a long clip does not fill the memory.
MAX_IN_MEMORY_BYTES = 256 * 2**20


def allocate(shape: tuple[int, ...], workspace: Path | None = None, dtype: Any = np.uint8) -> NDArray[Any]:
    """An array of zeros for a clip's frames: in memory, or above 256 MiB mapped to a file.

    workspace: folder for that file, which has no name and goes with the array. None: the system's temporary
    folder. Raises OSError if the disk has no room, MemoryError if the memory has none: the system would let it be
    taken, and kill the process when it is filled.
    """
    size_bytes = _size_bytes(shape, dtype)
    if size_bytes <= MAX_IN_MEMORY_BYTES:
        if size_bytes > free_memory_bytes():
            raise MemoryError(f"{size_bytes >> 20} MiB are needed")
        return np.zeros(shape, dtype)
    array, file = mapped(shape, workspace, dtype)
    file.close()
    return array


def mapped(
    shape: tuple[int, ...], workspace: Path | None = None, dtype: Any = np.uint8
) -> tuple[NDArray[Any], BinaryIO]:
    """As `allocate`, always mapped to a file, and that file: another process that is handed it can map it, too.

    Up to 256 MiB the file is in memory (Linux).
    """
    size_bytes = _size_bytes(shape, dtype)
    if size_bytes <= MAX_IN_MEMORY_BYTES and hasattr(os, "memfd_create"):
        file: BinaryIO = os.fdopen(os.memfd_create("frames"), "w+b")
    else:
        file = tempfile.TemporaryFile(dir=workspace)  # noqa: SIM115
    try:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a bus error in the middle
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        return np.memmap(file, dtype, "w+", shape=shape), file
    except BaseException:
        file.close()
        raise


def _size_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def free_memory_bytes() -> int:
    """What this machine, or this container of it, has to give. Without a bound where the system doesn't tell."""
    free = 2**63
    with suppress(OSError, ValueError, KeyError):
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(meminfo["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError, KeyError):  # ValueError: "max"
        most = int((group / "memory.max").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        taken = int((group / "memory.current").read_text()) - int(stat["inactive_file"])  # which is given back
        free = min(free, max(0, most - taken))
    return free


@dataclass(frozen=True)
class AudioReference:
    """Where the audio of a clip's range is; the samples stay in the source file.

    path: local path of the source.
    start_s, end_s: the clip's range in seconds of the source's presentation time.
    """

    path: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Clip:
    """Frames at a constant rate.

    frames: uint8 (F, H, W, 3), RGB; may be a memory map.
    rate_fps: frames a second, exact.
    timestamps_s: float64 (F,), each frame's presentation time in the source, in seconds.
    audio: the audio that belongs to these frames, None without.
    decoder: what decoded it, with the reason ("decord", "pyav: edit list", "pillow", …).
    warnings: oddities of the source that the user should know of.
    """

    frames: NDArray[np.uint8]
    rate_fps: Fraction
    timestamps_s: NDArray[np.float64]
    audio: AudioReference | None = None
    decoder: str = ""
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        f = self.frames
        if f.dtype != np.uint8 or f.ndim != 4 or f.shape[-1] != 3 or f.shape[0] < 1:
            raise ValueError(f"frames must be uint8 (F, H, W, 3) with F >= 1, not {f.dtype} {f.shape}")
        if self.timestamps_s.shape != (f.shape[0],):
            raise ValueError(f"{f.shape[0]} frames but timestamps of shape {self.timestamps_s.shape}")
        if self.rate_fps <= 0:
            raise ValueError(f"rate_fps must be positive, not {self.rate_fps}")

    def __len__(self) -> int:
        return int(self.frames.shape[0])

    @property
    def width(self) -> int:
        return int(self.frames.shape[2])

    @property
    def height(self) -> int:
        return int(self.frames.shape[1])

    @property
    def duration_s(self) -> float:
        return float(len(self) / self.rate_fps)

    def __repr__(self) -> str:
        return f"Clip({len(self)} frames, {self.width}x{self.height}, {self.rate_fps} fps, {self.decoder})"
