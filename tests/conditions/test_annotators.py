"""controlnet-aux's detectors: undistorted at any size, quiet, and loaded without running code."""

import os
import pickle
import subprocess
import sys
import threading
from dataclasses import replace

import cv2
import numpy as np
import pytest

from t2vz.conditions import extract
from t2vz.conditions.annotators import annotate
from t2vz.errors import ModelError


@pytest.mark.parametrize(("height", "width"), [(128, 192), (100, 150), (90, 201), (20, 30)])
def test_a_circle_stays_where_it_is(height, width, annotators):
    """The test's HED network answers a pixel's red, so its output must be the circle itself."""
    frames = np.zeros((1, height, width, 3), np.uint8)
    cv2.circle(frames[0], (width // 2, height // 2), min(height, width) // 3, (255, 255, 255), cv2.FILLED)
    pictures, warnings = extract("hed", frames, annotators)
    assert pictures.shape == frames.shape
    assert np.array_equal(pictures[0] > 200, frames[0] > 200)
    assert warnings == ()


def test_lineart_is_controlnet_aux_s_own_at_multiples_of_64(annotators):
    from controlnet_aux import LineartDetector

    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 128, 3), dtype=np.uint8)
    detector = LineartDetector.from_pretrained(annotators.annotators)
    expected = np.stack([detector(f, detect_resolution=64, image_resolution=64, output_type="np") for f in frames])
    pictures, _ = extract("lineart", frames, annotators)
    assert pictures.std() > 0
    assert np.array_equal(pictures, expected)


def test_normal_with_its_real_network(capfd):
    """Random weights straight into the detector: a checkpoint of this network is 300 MB."""
    import types

    import torch
    from controlnet_aux import NormalBaeDetector
    from controlnet_aux.normalbae import NNET

    from t2vz.conditions.annotators import controlnet_aux

    with controlnet_aux(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        args = types.SimpleNamespace(
            mode="client", architecture="BN", pretrained="scannet", sampling_ratio=0.4, importance_ratio=0.7
        )
        detector = NormalBaeDetector(NNET(args).eval())
    assert capfd.readouterr().out == ""  # it prints "Loading base model"
    frames = np.random.default_rng(0).integers(0, 256, (1, 60, 70, 3), dtype=np.uint8)
    pictures = annotate(detector, frames)
    assert pictures.shape == frames.shape
    assert pictures.std() > 0


def test_openpose_finds_nobody_in_noise(annotators):
    frames = np.random.default_rng(0).integers(0, 256, (1, 60, 70, 3), dtype=np.uint8)
    pictures, warnings = extract("openpose", frames, annotators)
    assert pictures.shape == frames.shape
    assert not pictures.any()
    assert "no person" in warnings[0]


def test_openpose_keypoints_in_pixels():
    from controlnet_aux.open_pose import BodyResult, Keypoint, PoseResult

    from t2vz.conditions.openpose import keypoints

    points = [None] * 18
    points[4] = Keypoint(0.25, 0.5)
    people = keypoints([PoseResult(BodyResult(points, 1.0, 1), None, None, None)], 100, 400)
    assert people.shape == (1, 18, 3)
    assert tuple(people[0, 4]) == (100, 50, 1)
    assert people[0, :, 2].sum() == 1


def test_threads_share_one_loaded_model(annotators, monkeypatch):
    from t2vz.conditions import lineart, loading

    frames = np.zeros((1, 64, 64, 3), np.uint8)
    calls = []
    original = lineart.detector
    monkeypatch.setattr(lineart, "detector", lambda *args: calls.append(args) or original(*args))
    loading._load.cache_clear()
    threads = [threading.Thread(target=extract, args=("lineart", frames, annotators)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


class Harm:
    """What a hostile pickle may do when it is read: here it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("name", "file"), [("hed", "ControlNetHED.pth"), ("openpose", "body_pose_model.pth"), ("normal", "scannet.pt")]
)
def test_weights_that_carry_code_are_refused(name, file, annotators, tmp_path):
    import torch

    torch.save({"model": Harm(tmp_path / "harm")}, tmp_path / file)
    frames = np.zeros((1, 64, 64, 3), np.uint8)
    with pytest.raises(ModelError, match="can't be loaded"):
        extract(name, frames, replace(annotators, annotators=str(tmp_path)))
    assert not (tmp_path / "harm").exists()
    with pytest.raises(pickle.UnpicklingError):  # the file is what it is taken for: torch refuses it by this error
        torch.load(tmp_path / file)


def test_importing_controlnet_aux_is_quiet_and_leaves_the_environment():
    code = (
        "import os\n"
        "from t2vz.conditions.annotators import controlnet_aux\n"
        "with controlnet_aux() as module: module.HEDdetector\n"
        "print(os.environ.get('KMP_DUPLICATE_LIB_OK'))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "KMP_DUPLICATE_LIB_OK"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "None"
    assert done.stderr == ""
