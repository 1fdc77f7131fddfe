"""Clips of many kinds, made with ffmpeg, which is also the oracle for what their frames are."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

_PATTERN = ["-f", "lavfi", "-i", "testsrc2=s=160x120:r=25:d=4"]
_X264 = ["-c:v", "libx264", "-preset", "veryfast", "-threads", "1", "-pix_fmt", "yuv420p"]
_X265 = ["-c:v", "libx265", "-preset", "ultrafast", "-pix_fmt", "yuv420p"]
_OPEN_GOP = "keyint=24:min-keyint=24:scenecut=0"

# name → ffmpeg's arguments; an argument that names another clip is replaced by its path.
_RECIPES: dict[str, list[str]] = {
    "closed.mp4": [*_PATTERN, *_X264, "-bf", "3", "-g", "30"],
    "closed.mkv": ["-i", "closed.mp4", "-c", "copy"],
    "closed.ts": ["-i", "closed.mp4", "-c", "copy"],
    "closed.avi": ["-i", "closed.mp4", "-c", "copy"],
    "hevc.mp4": [*_PATTERN, *_X265, "-x265-params", "log-level=error:open-gop=0"],
    "open.mp4": [*_PATTERN, *_X264, "-bf", "3", "-x264-params", f"open-gop=1:{_OPEN_GOP}"],
    "open_hevc.mp4": [*_PATTERN, *_X265, "-x265-params", f"log-level=error:open-gop=1:{_OPEN_GOP}"],
    "edit_list.mp4": ["-ss", "1.3", "-i", "closed.mp4", "-c", "copy"],
    "bt709.mp4": [*_PATTERN, *_X264, "-colorspace", "bt709", "-color_range", "tv"],
    "full_range.mp4": [*_PATTERN, "-vf", "scale=out_range=full,format=yuv420p", *_X264, "-color_range", "pc"],
    "rotated.mp4": ["-display_rotation", "90", "-i", "closed.mp4", "-c", "copy"],
    "vp9.webm": [*_PATTERN, "-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"],
    "animation.gif": ["-f", "lavfi", "-i", "testsrc2=s=160x120:r=10:d=2"],
    "hd.mp4": ["-f", "lavfi", "-i", "testsrc2=s=1280x720:r=10:d=1", *_X264],
    "anamorphic.mp4": [*_PATTERN, *_X264, "-vf", "setsar=2/1"],
    "variable.mp4": [*_PATTERN, "-vf", r"select='lt(n,20)+not(mod(n,3))'", "-fps_mode", "vfr", *_X264],
}


@pytest.fixture(scope="session")
def ffmpeg() -> Callable[..., bytes]:
    """Run ffmpeg with some arguments; its standard output."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    executable = imageio_ffmpeg.get_ffmpeg_exe()

    def run(*arguments: str | Path) -> bytes:
        command = [executable, "-v", "error", "-y", *map(str, arguments)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout

    return run


@pytest.fixture(scope="session")
def clip_path(ffmpeg, tmp_path_factory) -> Callable[[str], Path]:
    """Path of a generated clip by name, made at the first call."""
    folder = tmp_path_factory.mktemp("clips")

    def path_of(name: str) -> Path:
        path = folder / name
        if not path.exists():
            arguments = [str(path_of(a)) if a in _RECIPES else a for a in _RECIPES[name]]
            ffmpeg(*arguments, path)
        return path

    return path_of


@pytest.fixture(scope="session")
def ffmpeg_frames(ffmpeg) -> Callable[..., np.ndarray]:
    """What ffmpeg decodes a file to: uint8 (F, height, width, 3)."""

    def frames(path: Path, width: int, height: int, *options: str) -> np.ndarray:
        raw = ffmpeg("-i", path, "-fps_mode", "passthrough", *options, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
        return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)

    return frames
