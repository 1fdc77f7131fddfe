"""`kill -9` of `t2vz run` at arbitrary moments: nothing finished is lost or done again, nothing is doubled."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from t2vz.results import ResultStore, read

ROWS = 8
KILLS = 3


def test_killed_runs_lose_and_double_nothing(
    prefect_api: str, manifest: Callable[..., Path], leftovers: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    chance = random.Random(1)
    out = tmp_path / "out"
    formats = ("mp4", "png", "mkv", "webm")
    path = manifest(
        tmp_path / "m.csv",
        *({"id": f"row-{i}", "seed": i, "format": formats[i % 4], "num_inference_steps": 40} for i in range(ROWS)),
    )
    finished: dict[str, tuple[str, int]] = {}  # job id → output, its modification time
    for kill in range(KILLS):
        with starting(path, out, prefect_api) as process:
            # From the second row's start on, or the first one's in the first run; then anywhere within a row.
            await_rows(out, len(finished) + (kill > 0), process)
            time.sleep(chance.uniform(0, 0.4))
            assert process.poll() is None, "it was done before the kill: make the rows longer"
            process.kill()
        finished = unchanged(out, finished)
    assert 0 < len(finished) < ROWS, "the kills met nothing"

    with starting(path, out, prefect_api) as process:
        _, log = process.communicate(timeout=120)
        assert process.returncode == 0, log
    finished = unchanged(out, finished)

    rows = list(read(out, all=True))
    assert sorted(row.id for row in rows) == sorted(f"row-{i}" for i in range(ROWS))
    assert {row.status for row in rows} == {"ok"}
    assert {row.job_id for row in rows} == finished.keys()
    for row in rows:
        video = out / row.output_uri
        if video.is_file():
            assert hashlib.sha256(video.read_bytes()).hexdigest() == row.output_sha256
        else:
            assert len(list(video.glob("*.png"))) == row.frames
    assert leftovers(out) == []
    assert not any((out / "records").glob("*.json"))


def starting(manifest: Path, out: Path, api: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "t2vz.cli", "run", manifest, "--out", out, "--device", "cpu", "--in-flight", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PREFECT_API_URL": api},
    )


def await_rows(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Return once `count` rows are finished and another is under way."""
    deadline = time.monotonic() + 120
    while True:
        done = ResultStore(out).done()
        if len(done) >= count and any(folder.name not in done for folder in out.glob(".work/*/*/")):
            return
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def unchanged(out: Path, before: dict[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
    """What is finished now; all that was before must be as it was."""
    now = {
        job: (done.output_uri, (out / done.output_uri).stat().st_mtime_ns)
        for job, done in ResultStore(out).done().items()
    }
    assert before.items() <= now.items()
    return now
