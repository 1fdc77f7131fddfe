"""Maintain: all that nobody needs goes, nothing that anybody needs, also while runs are at work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from deltalake import DeltaTable
from overlapping import check, ended, renderings, starting, told

from t2vz import claims, storage
from t2vz.errors import ResultsError
from t2vz.maintain import maintain
from t2vz.results import ResultRow, ResultStore, read
from t2vz.storage import Place

NOW = datetime.now(UTC)


@pytest.fixture(params=["folder", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return tmp_path / "out" if request.param == "folder" else f"{request.getfixturevalue('s3').bucket()}/runs"


def finish(out: Place, job: str, age: timedelta = timedelta(), folder: bool = False) -> str:
    """A finished job with its video and strip; the video's name."""
    name = f"row_{job}-0123456789ab" + ("" if folder else ".mp4")
    for key in (f"videos/{name}/1.png", f"videos/{name}/2.png") if folder else (f"videos/{name}",):
        storage.put(out, key, b"12345")
    for folder_of_pictures in ("strips", "thumbnails"):
        storage.put(out, f"{folder_of_pictures}/{name}.webp", b"123")
    row = ResultRow(
        job_id=job,
        run_id="r",
        id=f"row {job}",
        status="ok",
        output_uri=f"videos/{name}",
        output_bytes=5,
        output_mtime_ns=0,
        output_sha256="s",
        started_at=NOW - age,
        finished_at=NOW - age,
    )
    ResultStore(out).commit(row)
    return name


def names(out: Place) -> set[str]:
    return {entry.key for name in ("videos", "strips", "thumbnails") for entry in storage.entries(out, name, deep=True)}


def test_what_no_result_names_goes_and_all_else_stays(out):
    """One row merged, one waiting, one whose result is not committed yet and a living run is at."""
    finish(out, "merged")
    ResultStore(out).flush()
    finish(out, "waiting", folder=True)
    kept = names(out)
    for key in (
        "videos/lost-1.mp4",
        "videos/lost-2/1.png",
        "strips/lost-1.mp4.webp",
        "strips/gone.mp4.webp",
        "thumbnails/gone.mp4.webp",
    ):
        storage.put(out, key, b"1234567890")
    storage.put(out, "videos/at_work-0123456789ab.mp4", b"1")
    storage.put(out, "records/bad.ok.json", b"{")
    claims.take(out, "left", "dead", "row left")
    with claims.living(out, "living"):
        claims.take(out, "job", "living", "at work")
        claims.take(out, "left", "dead", "row left")  # the beginning of a run has swept it
        before = names(out)

        told = maintain(out, "dry", dry_run=True)
        assert names(out) == before, "a dry run removes nothing"
        assert told.counts() == {"claim": (1, 0), "video": (2, 20), "strip": (2, 20), "thumbnails": (1, 10)}
        assert told.freed_bytes == 50
        done = maintain(out, "m")
        assert set(done.items) == set(told.items)
        assert done.corrupt == ("records/corrupt/bad.ok.json",)
        assert names(out) == kept | {"videos/at_work-0123456789ab.mp4"}
        assert [claim.job_id for claim in claims.claimed(out)] == ["job"]
    # No run is at it any more, and it has no result:
    assert maintain(out, "m").counts() == {"video": (1, 1)}
    assert names(out) == kept
    assert {row.job_id for row in read(out)} == {"merged", "waiting"}
    assert maintain(out, "m").items == ()


def test_old_results_and_their_videos_go_only_when_asked(out):
    old, new = finish(out, "old", timedelta(days=40)), finish(out, "new", timedelta(days=20))
    assert maintain(out, "m").rows_forgotten == 0
    told = maintain(out, "m", dry_run=True, older_than=timedelta(days=30))
    assert (told.rows_forgotten, len(told.items)) == (1, 3)
    assert len(names(out)) == 6
    assert len(read(out)) == 2
    done = maintain(out, "m", older_than=timedelta(days=30))
    assert (done.rows_forgotten, set(done.items)) == (1, set(told.items))
    assert [row.job_id for row in read(out)] == ["new"]
    assert names(out) == {f"videos/{new}", f"strips/{new}.webp", f"thumbnails/{new}.webp"}
    assert old not in str(names(out))


def join(out: Place, name: str, *parts: str) -> None:
    """What the joining of a library's source leaves: a video (a folder of images without a suffix), and its record."""
    for key in (f"joined/{name}",) if "." in name else (f"joined/{name}/1.png", f"joined/{name}/2.png"):
        storage.put(out, key, b"12345")
    record = {"output_uri": f"joined/{name}", "parts": [f"videos/{part}" for part in parts]}
    storage.put(out, f"joined/of-{name}.json", json.dumps(record).encode())


def test_a_joined_video_goes_with_the_results_of_its_parts(out):
    old, young = finish(out, "old", timedelta(days=40)), finish(out, "young")
    join(out, "kept.mp4", old, young)
    join(out, "images", old)
    join(out, "gone.mp4", old)
    storage.put(out, "joined/lost.mp4", b"12345")  # by a run that was killed before it wrote the record

    def joined() -> set[str]:
        return {entry.key for entry in storage.entries(out, "joined", deep=True)}

    everything = joined()
    with claims.living(out, "joining"):
        assert "joined video" not in maintain(out, "m").counts(), "that run may be about to write it"
        assert joined() == everything
    assert maintain(out, "m").counts() == {"joined video": (1, 5)}
    assert joined() == everything - {"joined/lost.mp4"}
    told = maintain(out, "m", dry_run=True, older_than=timedelta(days=30))
    assert told.counts()["joined video"][0] == 2
    assert maintain(out, "m", older_than=timedelta(days=30)).counts() == told.counts()
    assert joined() == {"joined/kept.mp4", "joined/of-kept.mp4.json"}
    assert storage.is_remote(out) or not Path(out, "joined", "images").exists()


def test_a_video_that_is_put_again_while_it_is_looked_at_stays(out, monkeypatch):
    finish(out, "a")
    storage.put(out, "videos/again-1.mp4", b"1")
    real = storage.remove_unchanged

    def remove(place, listed):
        if "videos/again-1.mp4" in listed:
            if not storage.is_remote(out):
                storage.put(out, "videos/again-1.mp4", b"1")
            else:
                time.sleep(1.1)  # S3 tells times in seconds
                storage.put(out, "videos/again-1.mp4", b"1")
        real(place, listed)

    monkeypatch.setattr(storage, "remove_unchanged", remove)
    maintain(out, "m")
    assert storage.get(out, "videos/again-1.mp4") == b"1"


def test_leftovers_of_killed_processes_go_once_they_are(tmp_path):
    out = tmp_path / "out"
    finish(out, "a")
    dead = (
        "import os, sys; from pathlib import Path; from t2vz.render import Settings, opening\n"
        "with opening(Settings(Path(sys.argv[1]), 'm', 'dead')) as _:\n"
        "    (Path(sys.argv[1]) / '.work/dead/half.mp4').write_text('12345'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", dead, str(out)], check=False)
    snapshots = out / ".work" / "snapshots"
    snapshots.mkdir()
    (snapshots / "a.pt").write_text("of a job that is done")
    (snapshots / "b.pt").write_text("of one that may go on")
    for name, age_s in (("old", 7200), ("young", -60)):  # one is older than this process, and no other run lives
        draft = out / "records" / f"{name}.ok.json#1"
        draft.write_text("half")
        os.utime(draft, (time.time() - age_s,) * 2)
    kinds = maintain(out, "m").counts()
    assert kinds == {"workspace": (1, 5), "snapshot": (1, 21), "draft": (1, 4)}
    assert [file.name for file in snapshots.iterdir()] == ["b.pt"]
    assert [file.name for file in (out / "records").iterdir()] == ["young.ok.json#1"]
    assert not (out / ".work" / "dead").exists()


def test_the_table_becomes_few_files_and_old_readers_keep_theirs(tmp_path):
    store = ResultStore(tmp_path)
    for n in range(6):
        finish(tmp_path, f"j{n}")
        store.flush()
    reader = DeltaTable(tmp_path / "results")
    report = maintain(tmp_path, "m")
    assert (report.files_before, report.files_after) == (6, 1)
    assert len(reader.to_pyarrow_dataset().to_table()) == 6  # opened before: its files are still there
    assert len(store.done()) == 6


def test_a_folder_without_results_is_left_alone(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "holiday.mp4").write_text("mine")
    with pytest.raises(ResultsError, match="no results"):
        maintain(tmp_path, "m")
    assert (tmp_path / "videos" / "holiday.mp4").exists()


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_beside_runs_that_work_it_takes_nothing_from_them(tmp_path, where, request):
    """Two runs in processes of their own; maintain, again and again, until they are done."""
    out: Place = tmp_path / "out" if where == "folder" else f"{request.getfixturevalue('s3').bucket()}/out"
    count, rendered, manifest = 150 if where == "folder" else 60, tmp_path / "rendered", tmp_path / "m.csv"
    manifest.write_text("id,prompt\n" + "".join(f"row-{n},a ball\n" for n in range(count)))
    with starting(manifest, out, rendered) as start:
        running = [start("one", 12), start("two", 12)]
        told(running[0], "open")
        told(running[0], "row", "skipped")
        rounds, swept = 0, []
        while any(process.poll() is None for process in running):
            swept += maintain(out, f"m{rounds}").items
            rounds += 1
        assert min(map(ended, running)) == 0
    assert rounds > 1
    assert swept == []
    assert set(renderings(rendered).values()) == {1}
    check(out, count)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], out_of: Callable[[Path], str]) -> None:
    from t2vz.cli import main

    out = out_of(tmp_path / "out")
    assert main(["maintain", out, "--dry-run"]) == 0
    assert "video  videos/lost.mp4  4 bytes\n1 video (4 bytes) would be removed; 4 bytes" in capsys.readouterr().out
    assert main(["maintain", out]) == 0
    assert "1 video (4 bytes) removed; 4 bytes in all" in capsys.readouterr().out
    assert main(["maintain", out, "--json", "--older-than", "0"]) == 0
    assert '"rows_forgotten": 1' in capsys.readouterr().out
    assert main(["maintain", str(tmp_path)]) == 2
    assert "no results here" in capsys.readouterr().err


@pytest.fixture
def out_of() -> Callable[[Path], str]:
    def make(out: Path) -> str:
        finish(out, "a")
        storage.put(out, "videos/lost.mp4", b"1234")
        return str(out)

    return make


def test_flow(prefect_api: str, tmp_path: Path, out_of: Callable[[Path], str]) -> None:
    from prefect.client.orchestration import get_client

    from t2vz_flows.maintain import MaintainParameters, maintain_out

    out = out_of(tmp_path / "out")
    told = maintain_out(MaintainParameters(out=out, dry_run=True))
    assert told["removed"] == {"video": (1, 4)}
    assert maintain_out(MaintainParameters(out=out))["freed_bytes"] == 4
    with get_client(sync_client=True) as client:
        found = [artifact for artifact in client.read_artifacts() if artifact.key == "maintain"]
    assert any("videos/lost.mp4" in str(artifact.data) for artifact in found)
    with pytest.raises(ResultsError):
        maintain_out(MaintainParameters(out=str(tmp_path / "nothing")))
