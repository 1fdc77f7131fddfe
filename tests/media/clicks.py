"""Sources that flash white and click at the same times, and when a file does."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

from t2vz.clip import Clip

CLICK_EVERY_S = 0.5
# ffmpeg's source of clicks, which wants a duration (`:d=5`), and its filter that makes any video flash for 1/8 s.
CLICK = f"aevalsrc='if(lt(mod(t,{CLICK_EVERY_S}),0.01),sin(2*PI*2000*t),0)':s=44100"
FLASH = f"geq=lum='if(lt(mod(T,{CLICK_EVERY_S}),1/8),235,16)':cb=128:cr=128"


def flash_times_s(clip: Clip) -> np.ndarray:
    """When flashes begin, from the clip's first frame on, which never counts."""
    bright = clip.frames[:, 32, 32, 0] > 128
    return (np.flatnonzero(bright[1:] & ~bright[:-1]) + 1) / float(clip.rate_fps)


def click_times_s(path: Path) -> np.ndarray:
    """When clicks begin, on the presentation clock that the frames have too."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        rate_hz = stream.sample_rate
        sound = np.zeros(10 * rate_hz)
        for frame in container.decode(stream):
            samples = frame.to_ndarray().astype(float) / (32768 if "16" in frame.format.name else 1)
            if not frame.format.is_planar:
                samples = samples.reshape(-1, len(frame.layout.channels)).T
            begin = max(round(frame.time * rate_hz), 0)
            sound[begin : begin + frame.samples] = samples[0]
    loud = np.flatnonzero(np.abs(sound) > 0.2)
    return loud[np.concatenate([[True], np.diff(loud) > 0.1 * rate_hz])] / rate_hz
