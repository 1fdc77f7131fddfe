"""One job, whole: resumed where it was stopped; leftovers of dead runs swept; ids as file names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from t2vz.errors import OutputError
from t2vz.events import Event, listening
from t2vz.plan import Job, plan
from t2vz.render import Settings, file_name, opening, render
from t2vz.results import ResultRow, ResultStore, read
from t2vz.sheet import write_sheet


@pytest.fixture
def job(tmp_path: Path) -> Job:
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("id,prompt,width,height,video_length,num_inference_steps\none,a red ball,64,64,3,8\n")
    (job,) = plan(manifest, None)
    assert isinstance(job, Job)
    return job


def rendered(job: Job, settings: Settings) -> ResultRow:
    with opening(settings):
        row = render(job, settings)
    assert row is not None
    return row


def test_a_stopped_row_is_resumed_and_ends_in_the_same_file(job, tmp_path):
    straight = rendered(job, Settings(tmp_path / "straight", "m", "run", snapshot_s=0))
    settings = Settings(tmp_path / "stopped", "m", "run-1", snapshot_s=0)

    def stop(event: Event) -> None:
        if event.kind == "step" and event.done == event.total - 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), opening(settings), listening(stop):
        render(job, settings)
    assert not list((settings.out / "videos").iterdir())
    snapshots = settings.out / ".work" / "snapshots"
    assert [file.name for file in snapshots.iterdir()] == [f"{job.job_id}.pt"]

    resumed = rendered(job, Settings(settings.out, "m", "run-2", snapshot_s=0))
    assert resumed.output_sha256 == straight.output_sha256
    assert resumed.warnings == ("resumed at denoising step 7 of 8",)
    assert straight.unet_evaluations == job.unet_evaluations
    assert resumed.unet_evaluations < straight.unet_evaluations
    assert not list(snapshots.iterdir())


def test_a_video_that_vanished_is_rendered_again_though_its_record_still_waits(job, tmp_path):
    settings = Settings(tmp_path / "out", "m", "run-1")
    (settings.workspace).mkdir(parents=True)  # as a killed run leaves it: nothing merged
    first = render(job, settings)
    assert render(job, settings) is None
    (settings.out / first.output_uri).unlink()
    again = render(job, replace(settings, run_id="run-2"))
    assert again.output_sha256 == first.output_sha256
    assert (settings.out / again.output_uri).is_file()


def test_a_run_that_stops_leaves_no_result_of_a_row_in_the_middle(job, tmp_path):
    settings = Settings(tmp_path / "out", "m", "run")

    def stop(event: Event) -> None:
        if event.kind == "stage" and event.stage == "encode":
            settings.stopping.set()
            shutil.rmtree(settings.workspace)

    with opening(settings):
        with pytest.raises(KeyboardInterrupt), listening(stop):
            render(job, settings)
        assert not settings.store().done()
    assert not list((settings.out / "records").glob("*.json"))


def test_a_result_that_storage_does_not_take_at_once_is_tried_again(job, tmp_path, monkeypatch):
    from t2vz.errors import StorageTimeout

    commit, tries = ResultStore.commit, []

    def slow(store, row):
        tries.append(row)
        if len(tries) < 3:
            raise StorageTimeout("no answer")
        return commit(store, row)

    monkeypatch.setattr(ResultStore, "commit", slow)
    monkeypatch.setattr("t2vz.render.time.sleep", lambda seconds: None)
    assert rendered(job, Settings(tmp_path / "out", "m", "run")).status == "ok"
    assert len(tries) == 3


def test_a_strip_that_cant_be_written_costs_a_warning_and_not_the_video(job, tmp_path):
    settings = Settings(tmp_path / "out", "m", "run")
    settings.out.mkdir()
    (settings.out / "strips").write_text("in the way")
    row = rendered(job, settings)
    assert row.status == "ok"
    assert row.warnings == ("its strip could not be written (File exists)",)
    with pytest.raises(OutputError, match="no finished row with a strip"):
        write_sheet(settings.out, tmp_path / "sheet.png")


def test_a_damaged_snapshot_costs_the_time_it_would_have_saved_and_no_more(job, tmp_path):
    settings = Settings(tmp_path / "out", "m", "run")
    snapshot = settings.out / ".work" / "snapshots" / f"{job.job_id}.pt"
    snapshot.parent.mkdir(parents=True)
    snapshot.write_bytes(b"PK\x03\x04 cut off")
    row = rendered(job, settings)
    assert row.status == "ok"
    assert "begun anew" in row.warnings[0]


def test_a_snapshot_that_another_run_removes_while_this_one_opens(tmp_path):
    snapshots = tmp_path / "out" / ".work" / "snapshots"
    snapshots.mkdir(parents=True)
    (snapshots / "gone.pt").symlink_to("nowhere")  # listed, and not there to be looked at
    with opening(Settings(tmp_path / "out", "m", "run")):
        pass


def test_leftovers_of_dead_runs_are_swept_and_those_of_living_ones_kept(tmp_path):
    out = tmp_path / "out"
    dead = (
        "import os, sys; from pathlib import Path; from t2vz.render import Settings, opening\n"
        "with opening(Settings(Path(sys.argv[1]), 'm', 'dead')) as _:\n"
        "    (Path(sys.argv[1]) / '.work/dead/half.mp4').write_text('…'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", dead, str(out)], check=False)
    assert (out / ".work/dead/half.mp4").exists()
    living = Settings(out, "m", "living")
    with opening(living):
        assert not (out / ".work/dead").exists()
        (living.workspace / "half.mp4").write_text("…")
        with opening(Settings(out, "m", "other")):
            assert (living.workspace / "half.mp4").exists()
    assert [file.name for file in (out / ".work").iterdir()] == ["sweep.lock"]


@pytest.mark.parametrize(
    ("id", "name"),
    [("deer 12", "deer_12"), ("../../etc/passwd", "_.._etc_passwd"), ("Ünïcode", "_n_code"), ("…", "_"), (".", "row")],
)
def test_any_id_makes_a_plain_file_name(id, name):
    assert file_name(id) == name
    assert len(file_name(id * 100)) <= 80


def test_a_run_is_not_begun_a_second_time_while_it_lives(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "out", "manifest.csv", "one")
    with opening(settings):
        with pytest.raises(OutputError, match="still under way"), opening(settings):
            pass
        with opening(replace(settings, run_id="other")):  # which has not been waiting for it
            assert settings.workspace.is_dir()


@pytest.mark.parametrize("merged", [False, True])
def test_a_clock_that_went_back_loses_no_result(job, tmp_path, merged):
    """A failure that is dated an hour ahead, as by a machine whose clock was put right since."""
    settings, ahead = Settings(tmp_path / "out", "m", "run-2", "cpu"), datetime.now(UTC) + timedelta(hours=1)
    store = settings.store()
    store.commit(
        ResultRow(job_id=job.job_id, run_id="run-1", id="one", status="failed", started_at=ahead, finished_at=ahead)
    )
    if merged:
        store.flush()
    (again,) = plan(tmp_path / "manifest.csv", settings.out)
    assert again == job
    assert rendered(again, settings).status == "ok"
    assert list(store.done()) == [job.job_id]
    (row,) = read(settings.out)
    assert row.status == "ok"
    assert ahead < row.started_at <= row.finished_at


def test_what_killed_processes_left_half_written_goes_with_the_next_run_that_is_alone(tmp_path):
    out, living = tmp_path / "out", Settings(tmp_path / "out", "m", "living")
    drafts = [out / "records" / "a.ok.json#1", out / "results" / "_delta_log" / "_commit_0f-1.json.tmp"]

    def left() -> list[bool]:
        return [draft.exists() for draft in drafts]

    with opening(living):
        for draft in drafts:
            draft.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text("half")
            os.utime(draft, (draft.stat().st_atime, draft.stat().st_mtime - 10))
        with opening(Settings(out, "m", "other")):
            pass
        assert left() == [True, True], "the other may be writing them"
    assert left() == [False, False]
    drafts[0].write_text("half")
    os.utime(drafts[0], (drafts[0].stat().st_atime, drafts[0].stat().st_mtime + 100))
    with opening(living):
        pass
    assert left() == [True, False], "younger than the run: not of one that was killed before"
