"""Sources, outputs and table on S3 behind a network that fails: errors, slow, lost and cut answers; a killed run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from overlapping import check, ended, renderings, starting, told
from s3 import S3

from t2vz import storage
from t2vz.cli import main
from t2vz.plan import Done, plan
from t2vz.results import ResultStore, read

CLIP = Path(__file__).parents[2] / "manifests" / "clips" / "ball.mp4"


@contextmanager
def troubled(upstream: str, seed: int, share: float) -> Iterator[tuple[str, Callable[[], dict[str, int]]]]:
    """The URL of a proxy that fails `share` of the requests, and what ends it and tells how many."""
    command = [sys.executable, str(Path(__file__).with_name("faulty_proxy.py")), upstream, str(seed), str(share)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout is not None
        port = proxy.stdout.readline().strip()

        def counts() -> dict[str, int]:
            return json.loads(proxy.communicate()[0])

        try:
            yield f"http://127.0.0.1:{port}", counts
        finally:
            proxy.kill()


def test_two_runs_over_a_bad_network_and_one_of_them_killed(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rendered, count = f"{s3.bucket()}/out", tmp_path / "rendered", 40
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("id,prompt\n" + "".join(f"row-{n},a ball\n" for n in range(count)))
    with troubled(s3.url, seed=1, share=0.08) as (url, counts), starting(manifest, out, rendered) as start:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        first, second = start("one", 6), start("two", 6)
        told(first, "open")
        told(first, "row", "skipped")
        told(first, "row", "skipped")
        first.kill()
        first.wait()
        shutil.rmtree(storage.workspace(out) / "one", ignore_errors=True)
        ended(second)
        assert ended(start("three", 6)) == 0
        met = counts()
    assert all(met.get(trouble) for trouble in ("500", "503", "slow", "lost", "cut")), met
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    committed = {line[:-1] for line in rendered.read_text().splitlines() if line.endswith("+")}
    again = {job for job, n in renderings(rendered).items() if n > 1}
    assert len(again) <= 1, "only the row that was under way may be rendered again"
    assert committed <= set(ResultStore(out).done())
    check(out, count)


def test_the_whole_path_over_a_bad_network(
    prefect_api: str, s3: S3, write_manifest: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, out = s3.bucket(), f"{s3.bucket()}/out"
    storage.upload(CLIP, sources, "ball.mp4")
    source = {"mode": "control", "condition": "edge", "source": f"{sources}/ball.mp4", "guidance_scale": 2}
    manifest = write_manifest(tmp_path / "m.csv", {"id": "text"}, {"id": "png", "format": "png"}, {"id": "c"} | source)
    with troubled(s3.url, seed=2, share=0.15) as (url, counts):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert main(["run", str(manifest), "--out", out, "--device", "cpu"]) == 0
        met = counts()
    assert sum(met.values()) - met["none"] >= 5, met
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    assert {row.id: row.status for row in read(out)} == dict.fromkeys(("text", "png", "c"), "ok")
    assert [type(item) for item in plan(manifest, out, verify=True)] == [Done] * 3
