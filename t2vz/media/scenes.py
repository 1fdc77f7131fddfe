"""Where the scenes of a clip begin, by PySceneDetect."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

# A cut is a jump of the content score. Two frames are enough for a scene: a clip has few of them at 4 fps.
_THRESHOLD = 27.0  # PySceneDetect's default
_SHORTEST_FRAMES = 2


def scene_starts(frames: Iterable[NDArray[np.uint8]]) -> tuple[int, ...]:
    """Numbers of the frames that begin a scene, 0 first. frames: each uint8 (H, W, 3), RGB; one is held at a time."""
    from scenedetect import ContentDetector, FrameTimecode

    detector = ContentDetector(threshold=_THRESHOLD, min_scene_len=_SHORTEST_FRAMES)
    cuts = []
    for number, frame in enumerate(frames):
        cuts += detector.process_frame(FrameTimecode(number, fps=25.0), np.ascontiguousarray(frame[..., ::-1]))
    return tuple(sorted({0, *(cut.frame_num for cut in cuts)}))
