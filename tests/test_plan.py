"""Plans: a row is to do, done or unready, and what is done is so only while its file is there."""

import os
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import imageio_ffmpeg
import pytest

from t2vz.errors import (
    ConditionError,
    EncodeError,
    GenerationError,
    ManifestError,
    OutputError,
    SourceCorrupt,
    SourceEmpty,
    SourceError,
    SourceMissing,
    SourceTooLarge,
    UnknownModel,
)
from t2vz.media.encode import checksum
from t2vz.media.limits import Limits
from t2vz.plan import Done, Job, Unready, Work, plan, summarise
from t2vz.results import ResultRow, ResultStore
from t2vz.spec import evaluations

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """2 s at 10 frames a second, 64x64."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    make_clip(path, "testsrc=duration=2:size=64x64:rate=10")
    return path


def make_clip(path: Path, source: str) -> None:
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    command = [ffmpeg, "-v", "error", "-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p", str(path)]
    subprocess.run(command, check=True)


@pytest.fixture
def manifest(tmp_path, clip) -> Callable[[str], Path]:
    shutil.copy(clip, tmp_path / "clip.mp4")

    def write(text: str) -> Path:
        path = tmp_path / "m.csv"
        path.write_text(text)
        return path

    return write


def jobs(path: Path, out: Path | None = None, **more: object) -> list[Job]:
    planned = list(plan(path, out, **more))
    assert all(isinstance(item, Job) for item in planned), planned
    return planned


def finish(job: Job, out: Path, content: bytes = b"video") -> Path:
    """An output of the job and its ok row, as a run leaves them."""
    path = out / f"{job.job_id}.mp4"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    commit(job, out, path)
    return path


def commit(job: Job, out: Path, path: Path) -> None:
    sha256, size_bytes = checksum(path)
    row = ResultRow(
        job_id=job.job_id,
        run_id="r",
        id=job.row.id,
        status="ok",
        output_uri=path.name,
        output_sha256=sha256,
        output_bytes=size_bytes,
        output_mtime_ns=path.stat().st_mtime_ns,
        started_at=NOW,
        finished_at=NOW + timedelta(seconds=1),
    )
    assert ResultStore(out).commit(row)


# --- jobs ------------------------------------------------------------------------------------------------


def test_a_manifest_of_all_modes(manifest):
    path = manifest(
        "id,mode,prompt,source,condition,seed\nt,text,a,,,\nc,control,b,clip.mp4,edge,7\ne,edit,c,clip.mp4,,\nx,text,d,,,q\n"
    )
    text, control, edit, bad = plan(path, None)
    assert (text.frames, text.source_fingerprint) == (8, None)
    assert text.unet_evaluations == 389  # method, section 2
    assert (control.frames, control.unet_evaluations, control.seed) == (20, 1000, 7)
    assert control.source_fingerprint == edit.source_fingerprint != None  # noqa: E711
    assert isinstance(bad, Unready)
    assert (bad.row_number, bad.id, bad.spec) == (4, "x", None)
    assert isinstance(bad.error, ManifestError)
    assert summarise(plan(path, None)).groups == {
        ("mini", "text"): Work(1, 8, 389),
        ("mini", "control"): Work(1, 20, 1000),
        ("mini", "edit"): Work(1, 20, 1000),
    }
    assert summarise(plan(path, None)).to_do == Work(3, 48, 2389)
    assert summarise(plan(path, None)).unready == 1


@pytest.mark.parametrize(
    ("columns", "frames"),
    [
        ({}, 20),
        ({"video_length": "5"}, 5),
        ({"video_length": "50"}, 20),
        ({"start_s": "0.5"}, 15),
        ({"start_s": "0.5", "end_s": "1"}, 5),
        ({"end_s": "1"}, 10),
        ({"end_s": "99"}, 20),
        ({"fps": "5"}, 10),
        ({"fps": "30000/1001"}, 60),
        ({"fps": "4", "start_s": "1"}, 4),
        ({"end_s": "0.05"}, 1),
    ],
)
def test_expected_frames_are_those_that_decoding_gives(manifest, columns, frames):
    from t2vz.media.decode import decode

    names, cells = ",".join(columns), ",".join(columns.values())
    (job,) = jobs(manifest(f"mode,prompt,source,{names}\nedit,a,clip.mp4,{cells}\n".replace(",\n", "\n")))
    spec = job.row.spec
    clip = decode(spec.source, start_s=spec.start_s, end_s=spec.end_s, fps=spec.fps, video_length=spec.video_length)
    assert job.frames == frames == len(clip)
    assert job.unet_evaluations == evaluations(spec, frames)


def test_the_same_work_has_the_same_id_wherever_its_source_lies(manifest, tmp_path):
    (before,) = jobs(manifest("id,mode,prompt,source\nx,edit,a,clip.mp4\n"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "clip.mp4").rename(tmp_path / "sub" / "other.mp4")
    (after,) = jobs(manifest("id,mode,prompt,source\nx,edit,a,sub/other.mp4\n"))
    assert (before.job_id, before.seed) == (after.job_id, after.seed)
    make_clip(tmp_path / "clip.mp4", "testsrc2=duration=2:size=64x64:rate=10")
    (changed,) = jobs(manifest("id,mode,prompt,source\nx,edit,a,clip.mp4\n"))
    assert changed.job_id != before.job_id


def test_rows_that_are_alike_are_different_jobs(manifest):
    first, second = jobs(manifest("prompt\na\na\n"))
    assert first.job_id != second.job_id
    assert first.seed != second.seed


# --- rows that can't be rendered -------------------------------------------------------------------------


def test_sources_and_models_that_stop_a_row_only(manifest, tmp_path):
    (tmp_path / "corrupt.mp4").write_bytes(b"no video at all" * 99)
    (tmp_path / "empty.mp4").touch()
    path = manifest(
        "id,mode,prompt,source,model,start_s\n"
        "a,edit,x,none.mp4,,\n"
        "b,edit,x,corrupt.mp4,,\n"
        "c,edit,x,empty.mp4,,\n"
        "d,edit,x,clip.mp4,minni,\n"
        "e,edit,x,clip.mp4,,2.5\n"
        "f,edit,x,clip.mp4,,\n"
    )
    *unready, good = plan(path, None)
    assert [type(item.error) for item in unready] == [
        SourceMissing,
        SourceCorrupt,
        SourceEmpty,
        UnknownModel,
        SourceEmpty,
    ]
    assert [item.spec.id for item in unready] == ["a", "b", "c", "d", "e"]
    assert isinstance(good, Job)
    assert len({item.job_id for item in [*unready, good]}) == 6
    assert [item.job_id for item in plan(path, None)] == [item.job_id for item in [*unready, good]]


def test_too_many_frames_are_told_before_anything_is_rendered(manifest):
    path = manifest("mode,prompt,source,video_length\nedit,a,clip.mp4,\nedit,a,clip.mp4,10\n")
    long, short = plan(path, None, limits=Limits(max_frames=10))
    assert isinstance(long.error, SourceTooLarge)
    assert isinstance(short, Job)


def test_a_bad_manifest_is_refused_at_once(manifest, tmp_path):
    with pytest.raises(ManifestError, match="no prompt"):
        plan(manifest("seed\n1\n"), None)
    with pytest.raises(ManifestError, match="default"):
        plan(manifest("prompt\na\n"), None, defaults={"seed": "x"})


def test_what_the_header_tells_is_told_before_anything_is_rendered(manifest, tmp_path):
    make_clip(tmp_path / "wide.mp4", "testsrc2=duration=1:size=130x66:rate=10")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    path = manifest(
        "mode,prompt,source,condition,condition_video,video_length,width,fps,format\n"
        "control,a,,pose,clip.mp4,21,,,\n"
        "edit,a,wide.mp4,,,,64,,\n"
        "edit,a,wide.mp4,,,,,60,gif\n"
        "edit,a,pipe.mp4,,,,,,\n"
        "edit,a,zero.mp4,,,,,,\n"
        "edit,a,http://x/y.mp4,,,,,,\n"
        "text,a,,,,3001,,,\n"
    )
    errors = [item.error for item in plan(path, None)]
    expected = (
        (ConditionError, "has 20 frames, but 21 are asked for"),
        (SourceError, "130x66 would become 64x32"),
        (EncodeError, "at most 50 frames/s"),
        (SourceError, "neither a file nor a folder"),
        (SourceError, "neither a file nor a folder"),
        (SourceError, "http://x/y.mp4: only local files"),
        (GenerationError, "3001 frames, the limit is 3000"),
    )
    for error, (kind, said) in zip(errors, expected, strict=True):
        assert type(error) is kind
        assert said in error.message


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("", "has no name"),
        ("m.csv", "m.csv: not a folder"),
        ("m.csv/deep/er", "m.csv is not a folder"),
        ("x" * 3000, "can't be the output folder"),
    ],
)
def test_what_can_not_be_an_output_folder_is_told_at_once(manifest, tmp_path, monkeypatch, out, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=said) as caught:
        plan(manifest("prompt\na\n"), out)
    assert len(caught.value.message) < 400


# --- done ------------------------------------------------------------------------------------------------


def test_a_rerun_renders_only_what_is_not_done(manifest, tmp_path):
    path, out = manifest("prompt\na\nb\n"), tmp_path / "out"
    first, second = jobs(path, out)
    assert not out.exists()  # planning writes nothing
    finish(first, out)
    assert list(plan(path, out)) == [Done(first.job_id, first.row.id), second]
    ResultStore(out).flush()
    assert list(plan(path, out)) == [Done(first.job_id, first.row.id), second]
    assert summarise(plan(path, out)).done == 1


def test_done_needs_its_file(manifest, tmp_path):
    path, out = manifest("prompt\na\n"), tmp_path / "out"
    (job,) = jobs(path)
    video = finish(job, out)
    recorded_ns = video.stat().st_mtime_ns

    os.utime(video, ns=(0, 0))  # copied: another time, the same content
    assert isinstance(next(plan(path, out)), Done)
    video.write_bytes(b"VIDEO")
    assert isinstance(next(plan(path, out)), Job)
    video.write_bytes(b"video and more")
    os.utime(video, ns=(0, recorded_ns))
    assert isinstance(next(plan(path, out)), Job)
    video.unlink()
    assert isinstance(next(plan(path, out)), Job)
    video.symlink_to("/dev/zero")
    assert isinstance(next(plan(path, out)), Job)


def test_size_and_time_are_proof_unless_verified(manifest, tmp_path):
    path, out = manifest("prompt\na\n"), tmp_path / "out"
    (job,) = jobs(path)
    video = finish(job, out)
    recorded_ns = video.stat().st_mtime_ns
    video.write_bytes(b"VIDEO")
    os.utime(video, ns=(0, recorded_ns))
    assert isinstance(next(plan(path, out)), Done)
    assert isinstance(next(plan(path, out, verify=True)), Job)
    video.write_bytes(b"video")
    assert isinstance(next(plan(path, out, verify=True)), Done)


def test_a_folder_of_images_is_done_with_all_its_images_only(manifest, tmp_path):
    path, out = manifest("prompt,format\na,png\n"), tmp_path / "out"
    (job,) = jobs(path)
    folder = out / "images"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(b"0")
    (folder / "1.png").write_bytes(b"1")
    commit(job, out, folder)
    assert isinstance(next(plan(path, out)), Done)
    (folder / "1.png").write_bytes(b"2")  # leaves the folder's own time as it was
    assert isinstance(next(plan(path, out)), Job)


def test_a_failed_row_is_to_do_again(manifest, tmp_path):
    path, out = manifest("prompt\na\n"), tmp_path / "out"
    (job,) = jobs(path)
    row = ResultRow(job_id=job.job_id, run_id="r", id=job.row.id, status="failed", started_at=NOW, finished_at=NOW)
    ResultStore(out).commit(row)
    assert isinstance(next(plan(path, out)), Job)
