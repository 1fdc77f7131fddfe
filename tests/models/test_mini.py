"""The embedded family: written once, whole, the same everywhere; and it loads in all modes."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from t2vz.errors import ModelError
from t2vz.models import loading, mini, table
from t2vz.modes import Request, generate
from t2vz.spec import JobSpec


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_two_processes_that_write_at_once_leave_one_whole_folder(tmp_path, monkeypatch):
    """While this process writes its draft another one starts and finishes."""
    monkeypatch.setenv("T2VZ_CACHE", str(tmp_path))
    write, drafts = mini.write, []

    def overtaken(draft):
        write(draft)
        drafts.append(contents(draft))
        other = "from t2vz.models import mini; print(mini.folder())"
        subprocess.run([sys.executable, "-c", other], check=True, capture_output=True, timeout=120)

    monkeypatch.setattr(mini, "write", overtaken)
    torch.manual_seed(123)  # what a process drew before has no part in the weights
    folder = mini.folder()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    theirs = contents(folder)
    assert {"base/model_index.json", "edit/model_index.json", "depth/model.safetensors"} <= theirs.keys()
    assert drafts == [theirs]  # byte for byte the same, from two processes

    assert mini.folder() == folder
    assert len(drafts) == 1


def test_an_interrupted_writer_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("T2VZ_CACHE", str(tmp_path))

    def interrupted(draft):
        (draft / "base").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(mini, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mini.folder()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_told_as_a_model_error(tmp_path, monkeypatch):
    monkeypatch.setenv("T2VZ_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ModelError, match="let T2VZ_CACHE name a folder that can"):
        loading.load(JobSpec(prompt="x"), "cpu")


def test_writing_leaves_the_callers_random_state(tmp_path):
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    mini.write(tmp_path)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("mode", "columns"),
    [
        ("text", {}),
        ("edit", {"source": "unused"}),
        ("control", {"source": "unused", "condition": "edge+depth+pose"}),
        ("control", {"source": "unused", "condition": "openpose"}),
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
    assert loading.native_px(JobSpec(prompt="x")) == mini.SIZE_PX
    assert table.resolve("mini/base") == str(mini.folder() / "base")
