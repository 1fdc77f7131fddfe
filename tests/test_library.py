"""Libraries: which files are rows, where long ones are cut, and that nothing is between the parts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import ffmpeg, make_clip
from s3 import S3

from t2vz import storage
from t2vz.clip import Clip
from t2vz.errors import ManifestError, OutputError, SourceError
from t2vz.library import Cutting, Source, find, scan
from t2vz.manifest import Row, read
from t2vz.media.decode import decode
from t2vz.plan import Job, Unready, plan

STYLE = {"mode": "edit", "prompt": "make it snow", "num_inference_steps": "3"}


def rows_of(manifest: Path) -> list[Row]:
    rows = list(read(manifest))
    assert all(isinstance(row, Row) for row in rows), rows
    return rows  # type: ignore[return-value]


def decoded(row: Row) -> Clip:
    spec = row.spec
    assert spec.source is not None
    return decode(spec.source, fps=spec.fps, start_s=spec.start_s, end_s=spec.end_s, video_length=spec.video_length)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources whose times are awkward, each in its own way."""
    folder = tmp_path_factory.mktemp("clips")
    make_clip(folder / "plain.mp4", 4, "25")
    make_clip(folder / "ntsc.mkv", 4, "30000/1001")  # whole milliseconds
    ffmpeg("-i", folder / "plain.mp4", "-c", "copy", folder / "late.ts")  # begins at 1.4 s
    ffmpeg("-i", folder / "plain.mp4", "-vf", "select='lt(n,20)+not(mod(n,3))'", "-fps_mode", "vfr", folder / "vfr.mp4")
    ffmpeg("-ss", "1.3", "-i", folder / "plain.mp4", "-c", "copy", folder / "edited.mp4")  # an edit list
    ffmpeg("-i", folder / "plain.mp4", "-itsoffset", "0.5", "-i", folder / "plain.mp4", "-map", "1:v", "-map", "0:a",
           "-c", "copy", folder / "after_the_sound.mp4")  # fmt: skip
    make_clip(folder / "web.webm", 3, "24")
    return folder


@pytest.mark.parametrize(
    "name", ["plain.mp4", "ntsc.mkv", "late.ts", "vfr.mp4", "edited.mp4", "after_the_sound.mp4", "web.webm"]
)
@pytest.mark.parametrize(
    "range_",
    [{}, {"fps": "8"}, {"fps": "23.976", "start_s": "0.73"}, {"end_s": "2.31"}, {"fps": "7", "video_length": "13"}],
    ids=str,
)
@pytest.mark.parametrize("by", ["length", "scenes"])
def test_the_parts_have_the_frames_of_the_whole(
    clips: Path, tmp_path: Path, name: str, range_: dict[str, str], by: Any
) -> None:
    """The very frames that one row would have had: none twice, none left out, none other."""
    found = scan([Source(name, str(clips / name))], tmp_path, STYLE | range_, cutting=Cutting(by, max_frames=5))
    (cut,) = found.cuts
    rows = rows_of(found.manifest)
    assert [row.id for row in rows] == [f"{name}#{i:03d}" for i in range(len(rows))]
    assert len({row.spec.seed for row in rows}) == 1
    assert rows[0].spec.seed is not None

    one = scan([Source(name, str(clips / name))], tmp_path, STYLE | range_, cutting=Cutting("none"), name="one")
    (whole,) = map(decoded, rows_of(one.manifest))
    parts = [decoded(row) for row in rows]
    assert max(map(len, parts)) <= 5
    assert tuple(map(len, parts)) == cut.lengths
    assert cut.frames == len(whole)
    assert np.array_equal(np.concatenate([part.timestamps_s for part in parts]), whole.timestamps_s)
    assert np.array_equal(np.concatenate([part.frames for part in parts]), whole.frames)
    assert cut.begin_s == (whole.audio.start_s if whole.audio else cut.begin_s)
    # What the plan promises is what decoding delivers.
    jobs = [item for item in plan(found.manifest, None) if isinstance(item, Job)]
    assert tuple(job.frames for job in jobs) == cut.lengths


def test_scenes_are_cut_where_they_begin(tmp_path: Path) -> None:
    for name, picture in (("a", "testsrc2"), ("b", "mandelbrot"), ("c", "smptebars")):
        make_clip(tmp_path / f"{name}.mp4", 1.5, "10", "128x96", sound=False, picture=picture)
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    inputs = [part for name in "abc" for part in ("-i", tmp_path / f"{name}.mp4")]
    ffmpeg(*inputs, "-filter_complex", "concat=n=3", folder / "abc.mp4")

    def starts(max_frames: int) -> list[tuple[int, ...]]:
        found = scan(find(folder, out=out), out, STYLE, cutting=Cutting("scenes", max_frames=max_frames))
        return [cut.starts for cut in found.cuts]

    assert starts(20) == [(0, 15, 30)]
    assert starts(10) == [(0, 7, 15, 22, 30, 37)]  # long scenes are cut by length, within them
    assert starts(45) == []  # short enough to stay whole


def test_lengths_are_nearly_equal_and_bounded(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", 4, "12", sound=False)
    for cutting, lengths in (
        (Cutting(max_frames=47), (24, 24)),
        (Cutting(max_frames=13), (12, 12, 12, 12)),
        (Cutting(max_clip_s=1.5), (16, 16, 16)),
        (Cutting(max_clip_s=0.001), (1,) * 48),
    ):
        (cut,) = scan([Source("clip.mp4", str(clip))], tmp_path / "out", STYLE, cutting=cutting).cuts
        assert cut.lengths == lengths
    for cutting in (Cutting(max_frames=48), Cutting("none", max_frames=1)):
        found = scan([Source("clip.mp4", str(clip))], tmp_path / "out", STYLE, cutting=cutting)
        assert (found.cuts, found.rows) == ((), 1)


def test_what_is_found(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "in" / "out"
    for name in ("b.MP4", "a/deep/c.mov", "notes.txt", ".hidden.mp4", ".trash/d.mp4", "out/videos/e.mp4", "a/x.webm"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert [source.name for source in find(folder, out=out)] == ["a/deep/c.mov", "a/x.webm", "b.MP4"]
    assert [source.name for source in find(folder, "*/*.webm", out=out)] == ["a/x.webm"]
    with pytest.raises(SourceError, match="nowhere"):
        list(find(tmp_path / "nowhere", out=out))
    with pytest.raises(ManifestError, match="glob"):
        list(find(folder, "/etc/*", out=out))


@pytest.mark.parametrize(
    "glob", ["**/*", "*", "*/*.webm", "**/*.mov", "a/**/*", "a/**", "*/*/*", "[ab]*.m?4", "**/a b/*"]
)
def test_on_s3_the_same_is_found_as_in_a_folder(s3: S3, tmp_path: Path, glob: str) -> None:
    folder, bucket = tmp_path / "in", s3.bucket()
    names = ("b.mp4", "a/deep/c.mov", "notes.txt", ".hidden.mp4", ".trash/d.mp4", "out/videos/e.mp4", "a/x.webm")
    for name in (*names, "B.MP4", "a/deep/a b/é#1 100%.mov"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        storage.put(bucket, f"in/{name}", b"")
    storage.put(bucket, "in2/other.mp4", b"")
    expected = find(folder, glob, out=folder / "out")
    found = find(f"{bucket}/in/", glob, out=f"{bucket}/in/out")
    assert {source.name for source in found} == {source.name for source in expected}
    assert all(source.path == f"{bucket}/in/{source.name}" for source in found)
    assert all(storage.get(*storage.split(source.path)) == b"" for source in found)


def test_what_can_not_be_found_on_s3_is_told(s3: S3, tmp_path: Path) -> None:
    assert find(f"{s3.bucket()}/nothing", out=tmp_path) == []
    with pytest.raises(SourceError, match="no such bucket"):
        find("s3://no-such-bucket/x", out=tmp_path)
    for glob in ("/etc/*", "", "../*", "a**/x"):
        with pytest.raises(ManifestError, match="glob"):
            find(s3.bucket(), glob, out=tmp_path)


def test_rows_are_planned_once_and_again_only_if_their_file_changes(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    make_clip(folder / "same.mp4", 1)
    make_clip(folder / "changes.mp4", 1)

    def jobs() -> dict[str, str]:
        found = scan(find(folder, out=out), out, STYLE, cutting=Cutting(max_frames=6))
        return {item.row.id: item.job_id for item in plan(found.manifest, out) if isinstance(item, Job)}

    before = jobs()
    assert before == jobs()
    assert len(before) == 4
    make_clip(folder / "changes.mp4", 1, picture="mandelbrot")
    make_clip(folder / "new.mp4", 0.5)
    after = jobs()
    assert {id for id in after if after[id] != before.get(id)} == {"changes.mp4#000", "changes.mp4#001", "new.mp4"}


def test_unchanged_sources_are_not_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    make_clip(folder / "long.mp4", 2)
    make_clip(folder / "short.mp4", 0.5)
    first = scan(find(folder, out=out), out, STYLE, cutting=Cutting("scenes", max_frames=10))
    content = first.manifest.read_bytes()
    monkeypatch.setattr("t2vz.media.probe.probe", lambda *_: pytest.fail("it is known"))
    again = scan(find(folder, out=out), out, STYLE, cutting=Cutting("scenes", max_frames=10))
    assert (again, again.manifest.read_bytes()) == (first, content)


def test_a_damaged_source_is_a_row_whose_failure_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    make_clip(folder / "good.mp4", 1)
    (folder / "bad.mp4").write_bytes(b"no video at all")
    found = scan(find(folder, out=tmp_path / "out"), tmp_path / "out", STYLE)
    items = {item.row.id if isinstance(item, Job) else item.id: item for item in plan(found.manifest, None)}
    assert isinstance(items["good.mp4"], Job)
    assert isinstance(items["bad.mp4"], Unready)
    assert "bad.mp4" in items["bad.mp4"].error.message


def test_names_that_ids_can_not_have(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    clip = make_clip(tmp_path / "clip.mp4", 0.5)
    long = "/".join(["d" * 90] * 3)
    for name in (f"{long}/one.mp4", f"{long}/two.mp4", "line\nbreak.mp4", os.fsdecode(b"latin-\xe9.mp4")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, folder / name)
    found = scan(find(folder, out=out), out, STYLE, cutting=Cutting(max_frames=3))
    assert found.sources == 3
    assert len(found.left_out) == 1
    assert "latin" in found.left_out[0]
    ids = [row.id for row in rows_of(found.manifest)]
    assert len(ids) == 6
    assert all(len(id) <= 200 and "\n" not in id for id in ids)
    assert [id.split("#")[0] for id in ids[::2]] == [id.split("#")[0] for id in ids[1::2]]


@pytest.mark.parametrize(
    ("style", "told"),
    [
        ({"mode": "text"}, "mode must be"),
        ({"prompt": ""}, "prompt"),
        ({"promt": "x"}, "did you mean 'prompt'"),
        ({"source": "x.mp4"}, "source can't be given"),
        ({"crf": "99"}, "crf"),
        ({"vae": "./mine.safetensors"}, "absolute path"),
        ({"mode": "control"}, "condition is needed"),
    ],
)
def test_a_style_that_no_row_could_have_is_refused_at_once(tmp_path: Path, style: dict[str, str], told: str) -> None:
    with pytest.raises(ManifestError, match=told):
        scan([], tmp_path, STYLE | style)
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_can_not_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        scan([], tmp_path / "file" / "out", STYLE)
    with pytest.raises(ManifestError, match="name"):
        scan([], tmp_path, STYLE, name="../elsewhere")


def test_the_seed_is_the_sources_own_unless_the_style_has_one(tmp_path: Path) -> None:
    clips = [Source(name, str(make_clip(tmp_path / name, 0.5))) for name in ("a.mp4", "b.mp4")]
    drawn = [row.spec.seed for row in rows_of(scan(clips, tmp_path, STYLE).manifest)]
    assert len(set(drawn)) == 2
    assert drawn == [row.spec.seed for row in rows_of(scan(clips, tmp_path, STYLE | {"prompt": "other"}).manifest)]
    assert [row.spec.seed for row in rows_of(scan(clips, tmp_path, STYLE | {"seed": "7"}).manifest)] == [7, 7]
