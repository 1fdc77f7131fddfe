"""Clips made with ffmpeg, and what ffmpeg says of files: the tests' maker of sources and their oracle."""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

SOUND_HZ = 8000


def ffmpeg(*arguments: str | Path) -> bytes:
    """Run ffmpeg; its standard output."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def make_clip(
    path: Path, seconds: float, fps: str = "12", size: str = "64x64", sound: bool = True, picture: str = "testsrc2"
) -> Path:
    """A moving pattern, with a sound that is like itself at no other time: a rising tone in bursts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tone = f"aevalsrc='sin(2*PI*t*(200+150*t))*gt(mod(t*7.3\\,1)\\,0.4)':s=48000:d={seconds}"
    video = ["-f", "lavfi", "-t", str(seconds), "-i", f"{picture}=s={size}:r={fps}"]
    codec = (
        ["-c:v", "libvpx-vp9", "-deadline", "realtime"] if path.suffix == ".webm" else ["-c:v", "libx264", "-bf", "2"]
    )
    with_sound = ["-f", "lavfi", "-i", tone] if sound else []
    ffmpeg(*video, *with_sound, *codec, "-pix_fmt", "yuv420p", path)
    return path


def frames_of(path: Path, width: int, height: int) -> NDArray[np.uint8]:
    """uint8 (F, height, width, 3), RGB: every frame as ffmpeg decodes it."""
    raw = ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def sound_of(path: Path) -> NDArray[np.float64]:
    """The sound as ffmpeg decodes it, from the video's time 0 on: mono, SOUND_HZ."""
    raw = ffmpeg(
        "-i",
        path,
        "-map",
        "0:a",
        "-af",
        "aresample=async=1:first_pts=0",
        "-ac",
        "1",
        "-ar",
        SOUND_HZ,
        "-f",
        "s16le",
        "-",
    )
    return np.frombuffer(raw, np.int16).astype(np.float64)


def lag_s(sound: NDArray[np.float64], of: NDArray[np.float64]) -> float:
    """By how much `sound` comes later than `of`, by their correlation."""
    size = 2 ** int(np.ceil(np.log2(len(sound) + len(of))))
    correlation = np.fft.irfft(np.fft.rfft(sound, size) * np.conj(np.fft.rfft(of, size)), size)
    at = int(np.argmax(correlation))
    return (at if at < size // 2 else at - size) / SOUND_HZ
