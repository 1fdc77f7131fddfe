"""What ffmpeg says of a file: an independent eye on the pipeline's outputs, and the tests' maker of sources."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray


def ffmpeg(*arguments: str | Path) -> bytes:
    """Run ffmpeg; its standard output."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


@dataclass(frozen=True)
class Video:
    """A video, GIF or folder of PNGs as ffmpeg reads it."""

    path: Path

    @cached_property
    def streams(self) -> str:
        """ffmpeg's description of the streams, a line each."""
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(self._input)]
        told = subprocess.run(command, capture_output=True, text=True).stderr
        return "\n".join(line for line in told.splitlines() if " Stream #" in line)

    @property
    def size(self) -> tuple[int, int]:
        found = re.search(r"Video: .*?, (\d+)x(\d+)", self.streams)
        assert found, self.streams
        return int(found[1]), int(found[2])

    def frames(self, *options: str) -> NDArray[np.uint8]:
        """uint8 (F, H, W, 3), RGB. options: of ffmpeg, for the output."""
        raw = ffmpeg(
            "-i", self._input, *options, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"
        )
        width, height = self.size
        return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)

    @property
    def rate_fps(self) -> Fraction:
        """Exact, from the packets' durations, which must be equal."""
        (duration,) = {packet[3] for packet in self._packets("v")[1]}
        return 1 / (self._packets("v")[0] * duration)

    @property
    def audio_s(self) -> float:
        """How long the sound lasts; 0 without."""
        if "Audio:" not in self.streams:
            return 0.0
        tick_s, packets = self._packets("a")
        return float(tick_s * (max(p[2] + p[3] for p in packets) - max(0, min(p[2] for p in packets))))

    @property
    def metadata(self) -> dict[str, Any]:
        """The JSON that the pipeline leaves in its outputs."""
        if self.path.is_dir():
            return json.loads((self.path / "t2vz.json").read_text())
        told = ffmpeg("-i", self.path, "-f", "ffmetadata", "-").decode()
        comment = re.search(r"^comment=((?:\\.|[^\\\n])*)", told, re.MULTILINE | re.DOTALL | re.IGNORECASE)
        assert comment, told
        return json.loads(re.sub(r"\\(.)", r"\1", comment[1], flags=re.DOTALL))

    @property
    def _input(self) -> Path:
        return self.path / "%06d.png" if self.path.is_dir() else self.path

    def _packets(self, kind: str) -> tuple[Fraction, list[list[int]]]:
        """(seconds a tick, [stream, dts, pts, duration] of each packet) of the first stream of a kind."""
        told = ffmpeg("-i", self.path, "-map", f"0:{kind}:0", "-c", "copy", "-f", "framecrc", "-").decode()
        base = re.search(r"#tb 0: (\d+/\d+)", told)
        assert base, told
        packets = [line.split(",")[:4] for line in told.splitlines() if not line.startswith("#")]
        return Fraction(base[1]), [[int(part) for part in packet] for packet in packets]


def frames_agree(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> bool:
    """Equal to rounding: one level, in at most a thousandth of the values."""
    difference = np.abs(a.astype(np.int16) - b)
    return a.shape == b.shape and difference.max() <= 1 and (difference > 0).mean() <= 1e-3
