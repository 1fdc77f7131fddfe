"""Body pose by OpenPose's own network, through controlnet-aux. Its licence is for non-commercial use only.

Only the body network is loaded: hands and faces take two more, larger ones and are not drawn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2vz.clip import allocate
from t2vz.conditions import ConditionOptions, Extracted, Frames
from t2vz.conditions.annotators import controlnet_aux
from t2vz.conditions.loading import fetch, load
from t2vz.conditions.pose import NOBODY
from t2vz.conditions.skeleton import KEYPOINTS, draw_skeleton

FILES = ("body_pose_model.pth",)


def extract(frames: Frames, options: ConditionOptions) -> Extracted:
    """Skeletons: uint8 (F, H, W, 3) from RGB frames of that shape. A frame without persons is black."""
    detector = load(_loader, options.annotators, options.device, "annotators")
    _, height, width, _ = frames.shape
    out = allocate(frames.shape, options.workspace)
    found = False
    for frame, picture in zip(frames, out, strict=True):
        # Not the detector itself, which stretches frames to multiples of 64 and draws lines of fixed width.
        people = keypoints(detector.detect_poses(frame), height, width)
        found |= len(people) > 0
        picture[:] = draw_skeleton(people, height, width)
    return out, () if found else (NOBODY,)


def keypoints(poses: list[Any], height: int, width: int) -> NDArray[np.float64]:
    """(N, 18, 3) x_px, y_px, score from controlnet-aux's poses; the score is 1 for what was found, else 0."""
    people = np.zeros((len(poses), KEYPOINTS, 3))
    for person, pose in zip(people, poses, strict=True):
        for point, keypoint in zip(person, pose.body.keypoints, strict=True):
            if keypoint is not None:
                point[:] = keypoint.x * width, keypoint.y * height, 1.0
    return people


def _loader(reference: str, device: str) -> Any:
    path = fetch(reference, FILES) / FILES[0]
    with controlnet_aux():
        from controlnet_aux.open_pose import Body, OpenposeDetector

        detector = OpenposeDetector(Body(str(path)))
        detector.body_estimation.to(device)
    return detector
