"""Shards: their jobs are the manifest's jobs, whatever the rows are named after."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from clips import make_clip
from s3 import S3

from t2vz import shards, storage
from t2vz.manifest import BadRow, origin, read
from t2vz.plan import Job, Unready, plan
from t2vz.shards import Shard

DEFAULTS = {"num_inference_steps": "5", "canny_low": "90", "fps": "6"}
ROWS = [
    {"prompt": "a ball"},  # without an id
    {"prompt": "a ball"},  # alike
    {"id": "named", "prompt": 'quotes " and, commas\nand lines', "seed": "0012"},
    {"id": "clip", "mode": "edit", "prompt": "snow", "source": "clips/one.mp4", "start_s": "0.1"},
    {"id": "NA", "prompt": "None", "video_length": "3"},
    {"id": "missing", "mode": "edit", "prompt": "snow", "source": "clips/none.mp4"},
    {"id": "bad", "prompt": "x", "crf": "99"},
    {"id": "named", "prompt": "the same id"},
    {"id": "last", "mode": "control", "condition": "edge", "prompt": "é 🎈", "source": "clips/one.mp4"},
]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    make_clip(tmp_path / "data" / "clips" / "one.mp4", 0.5, sound=False)
    path = tmp_path / "data" / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        columns = ("id", "mode", "prompt", "source", "condition", "start_s", "video_length", "seed", "crf")
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def cut(manifest: Path, out: Path, rows: int = 2, **options: object) -> list[Shard | Unready]:
    return list(shards.split(str(manifest), str(out), DEFAULTS, rows=rows, **options))  # type: ignore[arg-type]


def test_jobs_of_the_shards_are_the_manifests(manifest: Path, tmp_path: Path) -> None:
    whole = {item.job_id: item for item in plan(manifest, None, DEFAULTS)}
    items = cut(manifest, tmp_path / "out")
    pieces = [item for item in items if isinstance(item, Shard)]
    assert [piece.rows for piece in pieces] == [2, 2, 2]
    assert [(piece.first, piece.last) for piece in pieces] == [(1, 2), (3, 4), (5, 9)]
    again = [item for piece in pieces for item in plan(piece.path, None, DEFAULTS)]
    jobs = [item for item in whole.values() if isinstance(item, Job)]
    assert len(jobs) == 6
    assert again == jobs  # ids, numbers, specs, seeds, models, fingerprints
    unready = [item for item in items if isinstance(item, Unready)]
    assert [item.id for item in unready] == ["missing", "bad", "named (duplicate)"]
    assert [item.job_id for item in unready] == [item.job_id for item in whole.values() if isinstance(item, Unready)]
    assert {origin(piece.path) for piece in pieces} == {str(manifest)} == {origin(manifest)}
    assert shards.ids(pieces[0].path) == [job.row.id for job in jobs[:2]]


def test_a_shard_can_be_read_where_its_manifest_is_not(manifest: Path, tmp_path: Path) -> None:
    """The results are what counts; another machine may not have the manifest."""
    jobs = [item for item in plan(manifest, None, DEFAULTS) if isinstance(item, Job)]
    (piece,) = (item for item in cut(manifest, tmp_path / "out", rows=100) if isinstance(item, Shard))
    manifest.unlink()
    assert list(plan(piece.path, None, DEFAULTS)) == jobs


def test_names_are_the_same_for_the_same_work(manifest: Path, tmp_path: Path) -> None:
    first = [item for item in cut(manifest, tmp_path / "out") if isinstance(item, Shard)]
    assert [item for item in cut(manifest, tmp_path / "out") if isinstance(item, Shard)] == first
    assert len({piece.name for piece in first}) == 3
    held = shards.ids(first[0].path)
    assert [item for item in cut(manifest, tmp_path / "out", held=held) if isinstance(item, Shard)] == first[1:]
    shards.sweep(str(manifest), str(tmp_path / "out"), DEFAULTS)
    assert not first[0].path.parent.exists()
    assert shards.ids(first[0].path) == []


def test_rows_that_are_none_without_the_defaults_are_known_as_a_shards(tmp_path: Path) -> None:
    manifest = tmp_path / "rows.csv"
    manifest.write_text("id,condition\none,edge\ntwo,depth\n", encoding="utf-8")
    clip = tmp_path / "one.mp4"
    make_clip(clip, 0.5, sound=False)
    defaults = {"prompt": "a ball", "mode": "control", "source": str(clip)}
    (piece,) = shards.split(str(manifest), str(tmp_path / "out"), defaults, rows=2)
    assert isinstance(piece, Shard)
    assert shards.ids(piece.path) == ["one", "two"]


def test_a_shard_of_a_shard_is_the_manifests(manifest: Path, tmp_path: Path) -> None:
    piece = next(item for item in cut(manifest, tmp_path / "out", rows=5) if isinstance(item, Shard))
    inner = next(item for item in cut(piece.path, tmp_path / "out", rows=1) if isinstance(item, Shard))
    assert origin(inner.path) == str(manifest)
    (row,) = read(inner.path, DEFAULTS)
    assert not isinstance(row, BadRow)
    assert row == next(iter(read(manifest, DEFAULTS)))


def test_shards_on_s3(manifest: Path, s3: S3) -> None:
    out = f"{s3.bucket()}/runs/"
    jobs = [item for item in plan(manifest, None, DEFAULTS) if isinstance(item, Job)]
    pieces = [item for item in shards.split(str(manifest), out, DEFAULTS, rows=4) if isinstance(item, Shard)]
    assert len(pieces) == 2
    assert [item for piece in pieces for item in plan(piece.path, None, DEFAULTS)] == jobs
    assert {origin(piece.path) for piece in pieces} == {str(manifest)}
    assert shards.ids(pieces[0].path) == [job.row.id for job in jobs[:4]]
    s3.requests()
    again = [item for item in shards.split(str(manifest), out, DEFAULTS, rows=4) if isinstance(item, Shard)]
    assert again == pieces
    assert not [request for request in s3.requests() if request.startswith("PUT")], "they are there already"
    other = shards.split(str(manifest), f"{s3.bucket()}/runs", DEFAULTS, rows=4)
    assert {str(item.path).rsplit("/", 2)[1] for item in other if isinstance(item, Shard)} != {
        str(pieces[0].path).rsplit("/", 2)[1]
    }
    shards.sweep(str(manifest), out, DEFAULTS)
    assert shards.ids(pieces[0].path) == []
    assert not list(storage.entries(out, "manifests", deep=True))
