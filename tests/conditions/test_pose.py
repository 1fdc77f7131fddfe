"""Pose: keypoints of two conventions, the skeleton's drawing, and the path through detector and VitPose."""

from dataclasses import replace

import numpy as np
import pytest

from t2vz.conditions import extract
from t2vz.conditions.pose import NOBODY, detect_persons, estimate, openpose_from_coco
from t2vz.conditions.skeleton import COLOURS, LIMBS, draw_skeleton
from t2vz.mini import data
from t2vz.mini.annotators import COCO_KEYPOINTS

# OpenPose's order by COCO's names, written down from the COCO-18 layout of its documentation.
OPENPOSE = (
    "nose", None, "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
    "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle", "right_eye", "left_eye",
    "right_ear", "left_ear",
)  # fmt: skip


def test_coco_to_openpose_by_name():
    people = np.random.default_rng(0).uniform(0, 1, (3, 17, 3))
    out = openpose_from_coco(people)
    for index, name in enumerate(OPENPOSE):
        if name is not None:
            assert np.array_equal(out[:, index], people[:, COCO_KEYPOINTS.index(name)]), name
    left, right = (people[:, COCO_KEYPOINTS.index(f"{side}_shoulder")] for side in ("left", "right"))
    np.testing.assert_allclose(out[:, 1, :2], (left[:, :2] + right[:, :2]) / 2)
    np.testing.assert_allclose(out[:, 1, 2], np.minimum(left[:, 2], right[:, 2]))
    assert openpose_from_coco(people[:0]).shape == (0, 18, 3)


@pytest.fixture
def person():
    """18 keypoints far from one another in 512 px, all certain."""
    points = [(256, 60), (256, 130), (190, 140), (150, 210), (130, 290), (320, 140), (360, 210), (380, 290),
              (215, 300), (205, 390), (200, 480), (295, 300), (305, 390), (310, 480), (236, 40), (276, 40),
              (210, 50), (302, 50)]  # fmt: skip
    return np.array([(x, y, 1.0) for x, y in points])


def test_limbs_and_joints_have_openpose_s_colours(person):
    picture = draw_skeleton(person, 512, 512)
    for (x, y, _), colour in zip(person, COLOURS, strict=True):
        assert tuple(picture[int(y), int(x)]) == colour
    for (a, b), colour in zip(LIMBS, COLOURS, strict=False):
        x, y = person[[a, b], :2].mean(axis=0).astype(int)
        assert tuple(picture[y, x]) == tuple(int(0.6 * level) for level in colour), (a, b)
    allowed = {(0, 0, 0), *COLOURS, *(tuple(int(0.6 * level) for level in colour) for colour in COLOURS)}
    assert {tuple(pixel) for pixel in np.unique(picture.reshape(-1, 3), axis=0).tolist()} <= allowed


def test_the_skeleton_agrees_with_controlnet_aux_s(person):
    from controlnet_aux.open_pose.body import Keypoint
    from controlnet_aux.open_pose.util import draw_bodypose

    theirs = draw_bodypose(np.zeros((512, 512, 3), np.uint8), [Keypoint(x / 512, y / 512) for x, y, _ in person])
    ours = draw_skeleton(person, 512, 512)
    for a, b in LIMBS:
        x, y = person[[a, b], :2].mean(axis=0).astype(int)
        assert theirs[y, x].any()
        assert np.array_equal(ours[y, x], theirs[y, x]), (a, b)
    for x, y, _ in person.astype(int):
        assert np.array_equal(ours[y, x], theirs[y, x])
    # Theirs rounds centres, lengths and angles to integers.
    assert (ours != theirs).any(axis=-1).sum() < 0.15 * theirs.any(axis=-1).sum()


@pytest.mark.parametrize(("size", "width"), [(64, 3), (512, 9), (1024, 17)])
def test_lines_grow_with_the_picture(size, width):
    keypoints = np.zeros((18, 3))
    keypoints[11] = (size * 0.1, size // 2, 1)
    keypoints[12] = (size * 0.9, size // 2, 1)
    column = draw_skeleton(keypoints, size, size)[:, size // 2].any(axis=-1)
    assert abs(column.sum() - width) <= 1


def test_uncertain_and_impossible_points_are_left_out(person):
    whole = draw_skeleton(person, 512, 512)
    for bad in ((100, 100, 0.1), (np.nan, 100, 1), (1e12, 100, 1), (-np.inf, 5, 1)):
        changed = person.copy()
        changed[10] = bad
        picture = draw_skeleton(changed, 512, 512)
        assert not picture[470:, :250].any(), bad  # neither the ankle nor the limb to it
        assert np.array_equal(picture[:380], whole[:380])
    assert not draw_skeleton(np.zeros((0, 18, 3)), 40, 30).any()


def test_several_people(person):
    shifted = (person * [0.5, 0.5, 1]) + [250, 0, 0]
    small = person * [0.5, 0.5, 1]
    both = draw_skeleton(np.stack([small, shifted]), 512, 512)
    assert np.array_equal(both[:, 380:], draw_skeleton(shifted, 512, 512)[:, 380:])
    assert np.array_equal(both[:, :190], draw_skeleton(small, 512, 512)[:, :190])


@pytest.fixture
def eager(options):
    """Options under which the detector finds persons everywhere and every keypoint counts."""
    return replace(options, person_threshold=0.01, keypoint_threshold=0.0)


def test_without_persons_the_clip_is_black_with_a_warning(options):
    balls = data.pictures(data.scenes(1, 3, subject="ball", count=1))
    pictures, warnings = extract("pose", balls, options)
    assert pictures.shape == balls.shape
    assert not pictures.any()
    assert warnings == (NOBODY,)


def test_boxes_are_inside_the_frame_and_sorted(noise, eager):
    for boxes in detect_persons(noise[:2], eager):
        assert len(boxes) > 1
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 0] + boxes[:, 2] <= 130 + 1e-6).all()
        assert (boxes[:, 1] + boxes[:, 3] <= 90 + 1e-6).all()
        assert (np.diff(boxes[:, 2] * boxes[:, 3]) >= 0).all()


BOXES = [
    np.array([[10.0, 5.0, 40.0, 80.0], [60.0, 0.0, 50.0, 90.0]]),
    np.zeros((0, 4)),
    np.array([[0.0, 0.0, 130.0, 90.0]]),
]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_keypoints_are_vitpose_s_whatever_the_batch(batch_size, noise, options):
    """Three frames with two, no and one person, against transformers as its documentation calls it."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, VitPoseForPoseEstimation

    processor = AutoImageProcessor.from_pretrained(options.pose_model)
    model = VitPoseForPoseEstimation.from_pretrained(options.pose_model, dtype=torch.float32).eval()
    people = estimate(noise[:3], BOXES, replace(options, batch_size=batch_size))
    assert [len(each) for each in people] == [2, 0, 1]
    for frame in (0, 2):
        inputs = processor(Image.fromarray(noise[frame]), boxes=[BOXES[frame]], return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        (expected,) = processor.post_process_pose_estimation(outputs, boxes=[BOXES[frame]])
        for person, pose in zip(people[frame], expected, strict=True):
            np.testing.assert_allclose(person[:, :2], pose["keypoints"], atol=0.05)
            np.testing.assert_allclose(person[:, 2], pose["scores"], atol=1e-4)


def test_the_whole_path(noise, eager):
    pictures, warnings = extract("pose", noise[:1], eager)
    assert pictures.shape == noise[:1].shape
    assert warnings == ()
    people = estimate(noise[:1], detect_persons(noise[:1], eager), eager)[0]
    assert np.array_equal(pictures[0], draw_skeleton(openpose_from_coco(people), 90, 130, 0.0))
    assert pictures.any()
    pictures, warnings = extract("pose", noise[:1], replace(eager, keypoint_threshold=1e6))
    assert not pictures.any()
    assert "no keypoint" in warnings[0]


def test_a_tiny_frame(eager):
    frames = np.random.default_rng(0).integers(0, 256, (1, 16, 24, 3), dtype=np.uint8)
    assert extract("pose", frames, eager)[0].shape == frames.shape
