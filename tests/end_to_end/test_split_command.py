"""`t2vz run --split`: processes that share the frames of each clip, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from t2vz.results import ResultRow, read

Write = Callable[..., Path]
CLIP = Path(__file__).parents[2] / "manifests" / "clips" / "ball.mp4"
FRAMES, STEPS, T0, T1 = 5, 6, 2, 3
ROWS: tuple[dict[str, Any], ...] = (
    {
        "id": "text",
        "seed": 1,
        "video_length": FRAMES,
        "num_inference_steps": STEPS,
        "t0": T0,
        "t1": T1,
        "format": "png",
    },
    {"id": "edit", "seed": 2, "mode": "edit", "source": str(CLIP), "video_length": 4, "format": "png"},
)


def run(manifest: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "t2vz.cli", "run", str(manifest), "--out", str(out), "--device", "cpu", *options]
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def frames_of(out: Path, row: ResultRow) -> np.ndarray:
    assert row.output_uri is not None
    return np.stack([np.asarray(Image.open(file)) for file in sorted((out / row.output_uri).glob("*.png"))]).astype(int)


@pytest.mark.timeout(600)
def test_clips_that_are_shared_are_the_same(write_manifest: Write, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "rows.csv", *ROWS)
    found = []
    for name, options in (("whole", ()), ("shared", ("--split", "2"))):
        process = run(manifest, tmp_path / name, *options)
        _, told = process.communicate()
        assert process.returncode == 0, told
        found.append({row.id: row for row in read(tmp_path / name)})
    whole, shared = found
    for id in ("text", "edit"):
        a, b = frames_of(tmp_path / "whole", whole[id]), frames_of(tmp_path / "shared", shared[id])
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 1
        assert (a != b).mean() <= 1e-3
    # The anchor is made by both; in text mode alone up to t0 first.
    for id, extra in (("text", (STEPS - 1 - T0) + (T1 + 1)), ("edit", 3)):
        made, needed = shared[id].unet_evaluations, whole[id].unet_evaluations
        assert made is not None
        assert needed is not None
        assert made == needed + extra


def test_processes_that_were_launched_for_nothing_end(tmp_path: Path) -> None:
    """As every run of a schedule does that finds nothing new; the others must not wait for a clip."""
    (tmp_path / "rows.csv").write_text("id,prompt\n", encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "t2vz.cli"]
    command = [*launch, "run", str(tmp_path / "rows.csv"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing to render" in done.stdout


@pytest.mark.timeout(600)
def test_a_follower_that_dies_ends_the_run_plainly(write_manifest: Write, tmp_path: Path) -> None:
    long = {"id": "long", "seed": 1, "video_length": 64, "num_inference_steps": 500}
    process = run(write_manifest(tmp_path / "rows.csv", long), tmp_path / "out", "--split", "2")
    try:
        followers: list[psutil.Process] = []
        while not followers:
            assert process.poll() is None
            followers = [
                child
                for child in psutil.Process(process.pid).children()
                if any("t2vz.modes.split" in argument for argument in child.cmdline()) and child.cpu_times().user > 3
            ]
            time.sleep(0.1)
        followers[0].kill()
        _, told = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 2
    assert "has ended" in told
    assert "run again" in told
    assert "Traceback" not in told
