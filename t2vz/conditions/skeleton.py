"""Drawing body keypoints as the pose ControlNets know them: OpenPose's 18 points, limbs and colours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from t2vz.conditions import Frames

# nose, neck, right shoulder, elbow, wrist, left shoulder, elbow, wrist, right hip, knee, ankle,
# left hip, knee, ankle, right eye, left eye, right ear, left ear
KEYPOINTS = 18

LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10),
    (1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip

# RGB; the i-th limb and the i-th keypoint share the i-th colour.
COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0),
    (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255),
    (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip

# Limbs are darker than joints, and 8 px wide in pictures of 512 px, as in ControlNet's training data.
LIMB_BRIGHTNESS = 0.6
_RADIUS = 4 / 512


def draw_skeleton(keypoints: NDArray[np.floating], height: int, width: int, min_score: float = 0.3) -> Frames:
    """People as stick figures on black: uint8 (height, width, 3), RGB, without antialiasing.

    keypoints: (18, 3) for one person or (N, 18, 3): x_px, y_px, score 0–1; N may be 0. Later people cover
    earlier ones. Points that score below `min_score`, are not finite or lie further outside than the
    picture is large are left out, and so are limbs that end there.
    """
    import cv2

    canvas = np.zeros((height, width, 3), np.uint8)
    radius = max(1, round(_RADIUS * min(height, width)))
    for person in np.asarray(keypoints, np.float64).reshape(-1, KEYPOINTS, 3):
        seen = _seen(person, height, width, min_score)
        for (a, b), colour in zip(LIMBS, COLOURS, strict=False):
            if seen[a] and seen[b]:
                (ax, ay), (bx, by) = person[a, :2], person[b, :2]
                box = (
                    ((ax + bx) / 2, (ay + by) / 2),
                    (np.hypot(bx - ax, by - ay), 2 * radius),
                    np.degrees(np.arctan2(by - ay, bx - ax)),
                )
                dark = [int(level * LIMB_BRIGHTNESS) for level in colour]
                cv2.ellipse(canvas, box, dark, cv2.FILLED, cv2.LINE_8)
        for (x, y, _), there, colour in zip(person, seen, COLOURS, strict=True):
            if there:
                cv2.circle(canvas, (round(x), round(y)), radius, colour, cv2.FILLED, cv2.LINE_8)
    return canvas


def _seen(person: NDArray[np.float64], height: int, width: int, min_score: float) -> NDArray[np.bool_]:
    x, y, score = person.T
    # Comparisons with NaN are False, and OpenCV's integers overflow on coordinates far outside.
    return (score >= min_score) & (x >= -width) & (x <= 2 * width) & (y >= -height) & (y <= 2 * height)
