"""The table of conditions, its options, and what every condition shares."""

import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from typing import get_args

import cv2
import numpy as np
import pytest

from t2vz.conditions import CONDITIONS, ConditionOptions, extract, fit_condition
from t2vz.conditions.segmentation import foreground
from t2vz.errors import ConditionError, ModelError, UnknownModel, UnsupportedModel
from t2vz.spec import ConditionName, JobSpec


def test_the_table_has_exactly_the_names_of_the_manifest():
    assert set(CONDITIONS) == set(get_args(ConditionName))
    assert {entry.controlnet for entry in CONDITIONS.values()} <= set(CONDITIONS)
    for entry in CONDITIONS.values():
        assert callable(import_module(entry.module).extract)


def test_importing_conditions_is_light():
    code = (
        "import sys, t2vz.conditions, t2vz.conditions.pose, t2vz.conditions.openpose\n"
        "print(sorted({'torch', 'cv2', 'controlnet_aux', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_options_take_the_row_s_models_and_else_the_family_s():
    row = {"mode": "control", "prompt": "a fox", "source": "a.mp4", "condition": "pose+edge", "model": "sd15"}
    options = ConditionOptions.of(JobSpec(**row), "cuda:1", batch_size=2)
    assert (options.device, options.batch_size) == ("cuda:1", 2)
    assert options.depth_model == "depth-anything/Depth-Anything-V2-Small-hf"
    assert options.pose_model == "usyd-community/vitpose-base-simple"
    assert options.person_detector == "PekingU/rtdetr_r50vd_coco_o365"
    assert options.annotators == "lllyasviel/Annotators"
    named = ConditionOptions.of(JobSpec(**row, pose_model="/models/pose", canny_low=10, canny_high=20))
    assert (named.pose_model, named.canny_low, named.canny_high) == ("/models/pose", 10, 20)


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_what_are_no_frames_is_refused(bad, options):
    with pytest.raises(ConditionError, match="uint8"):
        extract("edge", bad, options)


def test_an_unknown_condition_is_refused(noise, options):
    with pytest.raises(ConditionError, match=r"scribble.*edge"):
        extract("scribble", noise, options)


def test_edge_is_canny_on_colour(clip, options):
    edges, warnings = extract("edge", clip, replace(options, canny_low=50, canny_high=120))
    for frame, edge in zip(clip, edges, strict=True):
        expected = cv2.Canny(frame, 50, 120)
        assert expected.any()
        for channel in range(3):
            assert np.array_equal(edge[..., channel], expected)
    assert warnings == ()


def test_edge_takes_strided_and_tiny_frames(options):
    frames = np.zeros((1, 3, 5, 3), np.uint8)
    frames[:, :, 3:] = 255
    edges, _ = extract("edge", frames[..., ::-1], options)
    assert edges.shape == frames.shape
    assert edges.any()


def test_fit_condition():
    frames = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    same, warnings = fit_condition(frames, 5)
    assert len(same) == 5
    assert warnings == ()
    cut, warnings = fit_condition(frames, 3)
    assert np.array_equal(cut, frames[:3])
    assert "5" in warnings[0]
    assert "3" in warnings[0]
    with pytest.raises(ConditionError, match=r"5 frames.* 8 "):
        fit_condition(frames, 8)


def test_a_model_that_is_nowhere_is_one_clear_error(noise, options, tmp_path):
    with pytest.raises(UnknownModel, match=r"^depth_model: .*nowhere: no such folder"):
        extract("depth", noise, replace(options, depth_model=str(tmp_path / "nowhere")))
    with pytest.raises(ModelError, match=r"^annotators .*ControlNetHED\.pth"):
        extract("hed", noise, replace(options, annotators=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    for name, column in (("depth", "depth_model"), ("pose", "person_detector")):
        with pytest.raises(ModelError, match=f"^{column} .*can't be loaded"):
            extract(name, noise, replace(options, **{column: str(tmp_path)}))
    with pytest.raises(ModelError, match=r"^segmentation_model .*can't be loaded"):
        foreground(noise, str(tmp_path))


@pytest.mark.parametrize("name", ["depth", "pose", "hed", "openpose"])
def test_a_hub_model_without_a_network_fails_at_once(name, noise, monkeypatch):
    """A port where nobody listens stands for the network that isn't there; downloads alone retry for 90 s."""
    import socket
    import time

    from huggingface_hub import HfApi, constants

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr("t2vz.models.hub._PROBE_TIMEOUT_S", 2.0)
        monkeypatch.setattr("t2vz.models.hub._commits", {})
        assert HfApi().endpoint.endswith(str(port))
        options = ConditionOptions("acme/none", "acme/none", "acme/none", "acme/none")
        started_s = time.monotonic()
        with pytest.raises(ModelError, match=r"acme/none.*can't be reached .*refused.*name a folder"):
            extract(name, noise[:1], options)
        assert time.monotonic() - started_s < 15  # retries alone would sleep for 23 s


def test_a_detector_given_as_depth_model_is_refused(noise, options):
    with pytest.raises(ModelError, match="can't be loaded"):
        extract("depth", noise[:1], replace(options, depth_model=options.person_detector))


def test_unsupported_kinds_are_named():
    from types import SimpleNamespace

    from t2vz.conditions.depth import gives_distance

    with pytest.raises(UnsupportedModel, match="chmv2"):
        gives_distance(SimpleNamespace(model_type="chmv2"), "some/model")
