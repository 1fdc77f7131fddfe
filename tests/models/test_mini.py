"""The embedded family: part of the package, in the ordinary layout, small; and it loads in all modes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from t2vz.models import loading, table
from t2vz.modes import Request, generate
from t2vz.spec import JobSpec


def test_the_family_is_small_and_nothing_in_it_can_run_code():
    files = [path for path in table.MINI_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for config in table.MINI_FOLDER.rglob("config.json"):  # where it was trained is nobody's business
        assert not any(str(value).startswith("/") for value in json.loads(config.read_text()).values())


@pytest.mark.parametrize(
    ("mode", "columns"),
    [
        ("text", {}),
        ("edit", {"source": "unused"}),
        ("control", {"source": "unused", "condition": "edge+depth+pose"}),
        ("control", {"source": "unused", "condition": "openpose"}),
        ("text", {"model": "mini/dreambooth", "lora": "mini/lora"}),
        ("control", {"source": "unused", "condition": "edge", "model": "mini/dreambooth"}),
    ],
)
def test_mini_generates_in_every_mode(mode, columns):
    spec = JobSpec(prompt="a red ball", mode=mode, num_inference_steps=3, **columns)
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    inputs = {"source": frames} if mode == "edit" else {"conditions": (frames,) * len(spec.condition)}
    made = generate(loading.load(spec, "cpu"), Request(spec, 1, 64, 64, 2, **inputs))
    assert made.latents.shape == (2, 4, 8, 8)
    assert made.latents.isfinite().all()
    assert made.warnings == ()


def test_native_px_is_minis():
    assert loading.native_px(JobSpec(prompt="x")) == 128
