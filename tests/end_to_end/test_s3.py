"""`t2vz` with sources, videos and table on S3: a real server, the flow, and runs that are killed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from overlapping import check, ended, renderings, starting, told
from PIL import Image
from s3 import S3

from t2vz import storage
from t2vz.cli import main
from t2vz.media.fingerprint import WHOLE_UP_TO_BYTES, fingerprint
from t2vz.plan import Done, Job, plan
from t2vz.results import Finished, ResultStore, read

CLIP = Path(__file__).parents[2] / "manifests" / "clips" / "ball.mp4"


def run(manifest: Path, out: str) -> int:
    return main(["run", str(manifest), "--out", out, "--device", "cpu"])


def objects(place: str) -> list[str]:
    return [entry.key for entry in storage.entries(place, "", deep=True)]


def test_sources_videos_and_table_on_s3(
    prefect_api: str, s3: S3, write_manifest: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sources, out = s3.bucket(), f"{s3.bucket()}/my/runs"
    storage.upload(CLIP, sources, "clips/ball.mp4")
    source = f"{sources}/clips/ball.mp4"
    manifest = write_manifest(
        tmp_path / "m.csv",
        {"id": "text"},
        {"id": "png", "format": "png"},
        {"id": "control", "mode": "control", "source": source, "condition": "edge", "guidance_scale": 2},
        {"id": "gone", "mode": "control", "source": f"{sources}/gone.mp4", "condition": "edge"},
        {"id": "closed", "mode": "control", "source": "s3://no-such-bucket/x.mp4", "condition": "edge"},
    )
    assert run(manifest, out) == 1
    rows = {row.id: row for row in read(out)}
    assert {id: row.status for id, row in rows.items()} == {
        **dict.fromkeys(("text", "png", "control"), "ok"),
        **dict.fromkeys(("gone", "closed"), "failed"),
    }
    assert rows["gone"].error_class == rows["closed"].error_class == "SourceMissing"
    assert rows["control"].source_uri == source
    assert rows["control"].source_fingerprint == fingerprint(CLIP), "the same content is the same work anywhere"
    for row in rows.values():
        if row.status == "ok" and row.id != "png":
            body = storage.get(out, row.output_uri or "")
            assert body is not None
            assert hashlib.sha256(body).hexdigest() == row.output_sha256
            assert len(body) == row.output_bytes
    images = [entry.key for entry in storage.entries(out, rows["png"].output_uri or "")]
    assert len(images) == (rows["png"].frames or 0) + 1
    assert not [key for key in objects(out) if key.startswith(("claims/", "runs/", "records/"))]
    assert [path.name for path in storage.workspace(out).iterdir()] == ["sweep.lock"]

    assert main(["sheet", out, str(tmp_path / "sheet.png")]) == 0
    assert Image.open(tmp_path / "sheet.png").height > 3 * 64
    capfd.readouterr()
    assert main(["results", out, "--status", "ok"]) == 0
    assert f"{out}/{rows['text'].output_uri}" in capfd.readouterr().out

    # The same again: nothing is done, until a video or an image is lost or damaged.
    kinds = [type(item) for item in plan(manifest, out, verify=True)]
    assert kinds.count(Done) == 3
    storage.remove(out, rows["text"].output_uri or "")
    storage.put(out, images[0], b"damaged")
    to_do = {item.row.id for item in plan(manifest, out) if isinstance(item, Job)}
    assert to_do == {"text", "png"}
    assert run(manifest, out) == 1
    assert [type(item) for item in plan(manifest, out, verify=True)].count(Done) == 3

    log = capfd.readouterr()
    assert s3.secret not in log.out + log.err
    for place in (sources, out):
        for key in objects(place):
            assert s3.secret.encode() not in (storage.get(place, key) or b"")


def test_an_output_place_that_cant_be_used_is_told_before_anything_starts(
    s3: S3, write_manifest: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path / "m.csv", {"id": "a"})
    assert run(manifest, "s3://no-such-bucket/x") == 2
    assert "no such bucket" in capfd.readouterr().err


def test_a_source_is_read_once_and_again_when_it_changes(s3: S3, tmp_path: Path) -> None:
    place = s3.bucket()
    (tmp_path / "a.bin").write_bytes(b"a" * 300_000)
    storage.upload(tmp_path / "a.bin", place, "a.bin")
    assert fingerprint(f"{place}/a.bin") == fingerprint(tmp_path / "a.bin")
    s3.requests()
    fingerprint(f"{place}/a.bin")
    assert [request.split()[0] for request in s3.requests()] == ["HEAD"]
    (tmp_path / "b.bin").write_bytes(b"b" * 300_000)
    storage.upload(tmp_path / "b.bin", place, "a.bin")
    assert fingerprint(f"{place}/a.bin") == fingerprint(tmp_path / "b.bin")
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(WHOLE_UP_TO_BYTES + 1)
    storage.upload(tmp_path / "large.bin", place, "large.bin")
    s3.requests()
    assert fingerprint(f"{place}/large.bin") == fingerprint(tmp_path / "large.bin")


def test_two_runs_on_s3_and_one_of_them_killed(s3: S3, tmp_path: Path) -> None:
    """Each row is rendered once, but for the one that was under way; requests fail meanwhile, too."""
    out, rendered, count = f"{s3.bucket()}/out", tmp_path / "rendered", 40
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("id,prompt\n" + "".join(f"row-{n},a ball\n" for n in range(count)))
    with starting(manifest, out, rendered) as start:
        first, second = start("one", 3), start("two", 3)
        for process in (first, second):
            told(process, "open")
            s3.fails(before=2, after=1)
            told(process, "row", "skipped")
        first.kill()
        first.wait()
        shutil.rmtree(storage.workspace(out) / "one", ignore_errors=True)
        s3.fails(before=1, after=2)
        ended(second)
        assert ended(start("three", 3)) == 0
    committed = {line[:-1] for line in rendered.read_text().splitlines() if line.endswith("+")}
    again = {job: n for job, n in renderings(rendered).items() if n > 1}
    assert len(again) <= 1
    assert not again.keys() & committed or set(again.values()) == {2}
    check(out, count)


def test_what_a_row_costs_in_requests(s3: S3, tmp_path: Path) -> None:
    """Eight with its merge, and not more the more rows there are; `done` asks for no row by itself."""
    out, rendered = f"{s3.bucket()}/out", tmp_path / "rendered"

    def requests(count: int) -> list[str]:
        manifest = tmp_path / "manifest.csv"
        manifest.write_text("id,prompt\n" + "".join(f"{count}-{n},a ball\n" for n in range(count)))
        s3.requests()
        with starting(manifest, out, rendered) as start:
            ended(start(f"run-{count}", 300))  # heartbeats come by time, not by rows
        return s3.requests()

    few, many = requests(20), requests(60)
    more = {kind: sum(r.startswith(kind) for r in many) - sum(r.startswith(kind) for r in few) for kind in KINDS}
    merges = 2  # of the 40 rows; a merge takes some 65 requests, whatever its size
    assert more["PUT"] <= 40 * 3 + merges * 10  # claim, video, record
    assert more["POST"] <= 40 * 1 + merges * 10  # the claim's removal
    assert sum(more.values()) <= 40 * 8 + merges * 80  # record? next version? claim still ours? and its merging
    s3.requests()
    done = ResultStore(out).done()
    assert len(done) == 80
    assert isinstance(next(iter(done.values())), Finished)
    assert len(s3.requests()) < 40


KINDS = ("PUT", "GET", "HEAD", "DELETE", "POST")
