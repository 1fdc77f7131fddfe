"""Draws the example manifests' source clips: a rolling ball, a pan along a house, a cat, a dancer and her skeleton.

    python manifests/make_clips.py [folder]

They are drawn here, so that the examples run without anything to download and nobody else's pictures are in them; and
in the world that the embedded models know (`t2vz.mini.world`).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import av
import numpy as np

from t2vz.clip import AudioReference
from t2vz.media.encode import Encoding, encode
from t2vz.mini.clips import CLIPS, FRAMES, RATE_FPS

DURATION_S = float(FRAMES / RATE_FPS)


def write_tone(path: Path, rate_hz: int = 44_100) -> None:
    """A soft tone that falls as the ball rolls away, as WAV."""
    time_s = np.arange(int(DURATION_S * rate_hz)) / rate_hz
    phase = 2 * np.pi * np.cumsum(330 - 80 * time_s / DURATION_S) / rate_hz
    fade = np.clip(np.minimum(time_s, DURATION_S - time_s) / 0.1, 0, 1)
    samples = (0.2 * fade * np.sin(phase) * 32767).astype(np.int16)[None]
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=rate_hz, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = rate_hz
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("clips")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as workspace:
        tone = Path(workspace) / "tone.wav"
        write_tone(tone)
        sound = AudioReference(str(tone), 0.0, DURATION_S)
        for name, draw in CLIPS.items():
            frames, audio = draw(), sound if name == "ball" else None
            path = folder / f"{name}.mp4"
            path.unlink(missing_ok=True)
            made = encode(
                [frames],
                path,
                width=frames.shape[2],
                height=frames.shape[1],
                rate_fps=RATE_FPS,
                encoding=Encoding(),
                audio=audio,
                metadata={"made_by": "manifests/make_clips.py"},
            )
            print(f"{path}: {made.frames} frames, {made.width}x{made.height}, {made.size_bytes / 1000:.1f} kB")


if __name__ == "__main__":
    main()
