"""A run of the playground is a manifest's row: rendered, found done, stopped, failed with its reason, appended."""

from __future__ import annotations

import csv
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from t2vz.app.runs import Playground, append, line, relative
from t2vz.cli import main
from t2vz.errors import ManifestError
from t2vz.events import Event
from t2vz.manifest import BadRow, read
from t2vz.media.limits import Limits
from t2vz.models.policy import ModelPolicy
from t2vz.render import Settings
from t2vz.results import ResultStore
from t2vz.results import read as results

QUICK = {"mode": "text", "prompt": "a red ball", "width": "64", "height": "64", "video_length": "2",
         "num_inference_steps": "3", "guidance_scale": "1", "seed": "5"}  # fmt: skip


@pytest.fixture
def playground(tmp_path: Path) -> Iterator[Playground]:
    out = tmp_path / "out"
    made = Playground(Settings(out=out, manifest="kept.csv", run_id="app-test", device="cpu"), out / "kept.csv")
    with made.opened():
        yield made


def test_a_run_is_a_row_and_is_not_done_twice(playground: Playground) -> None:
    heard: list[Event] = []
    ran = playground.run(QUICK, heard.append)
    assert ran.row is not None
    assert (ran.row.status, ran.row.seed, ran.row.frames, ran.before) == ("ok", 5, 2, False)
    assert Path(playground.video(ran.row)).stat().st_size == ran.row.output_bytes
    assert {event.kind for event in heard} >= {"stage", "step", "row_finished"}
    again = playground.run(QUICK)
    assert again.before
    assert again.row is not None
    assert again.row.output_sha256 == ran.row.output_sha256
    assert [row.job_id for row in results(playground.out)] == [ran.row.job_id]
    assert not list(playground.folder.glob(".t2vz-app-*"))


def test_what_a_later_version_of_the_row_replaced_is_found_done(playground: Playground) -> None:
    first = playground.run({**QUICK, "id": "ball"}).row
    assert first is not None
    later = replace(first, job_id="another", prompt="a blue ball", finished_at=first.finished_at + timedelta(seconds=1))
    ResultStore(playground.out).commit(later)
    again = playground.run({**QUICK, "id": "ball"})
    assert again.before
    assert again.row is not None
    assert again.row.job_id == first.job_id


def test_what_is_wrong_is_told_all_at_once(playground: Playground) -> None:
    ran = playground.run({**QUICK, "num_inference_steps": "2O", "warp": "neerest"})
    assert ran.row is None
    assert len(ran.problems) == 2
    assert any("num_inference_steps must be a whole number" in problem for problem in ran.problems)
    assert any("did you mean 'nearest'?" in problem for problem in ran.problems)
    (problem,) = playground.run({"mode": "edit", "prompt": "make it snow", "source": "nowhere.mp4"}).problems
    assert "nowhere.mp4" in problem


def test_a_run_that_is_stopped_leaves_nothing_and_can_be_done_later(playground: Playground) -> None:
    def stop_it(event: Event) -> None:
        if event.kind == "step":
            threading.Thread(target=playground.stop).run()

    assert playground.run(QUICK, stop_it).problems == ("stopped",)
    assert not any((playground.out / "videos").iterdir())
    later = playground.run(QUICK)
    assert later.row is not None
    assert later.row.status == "ok"


def test_what_the_operator_asks_holds_here_too(playground: Playground, tmp_path: Path) -> None:
    source = tmp_path / "elsewhere.mp4"
    source.write_bytes(b"not yours")
    edit = {"mode": "edit", "prompt": "make it snow", "source": str(source)}
    playground.settings = replace(playground.settings, limits=Limits(roots=(str(playground.out),)), content="off")
    (problem,) = playground.run(edit).problems
    assert "outside of the folders that sources may come from" in problem

    ran = playground.run(QUICK)
    assert ran.row is not None
    assert ran.row.content == "unchecked"
    playground.settings = replace(playground.settings, content="withhold")
    ran = playground.run(QUICK)
    assert not ran.before, "nobody has looked at it"
    assert ran.row is not None
    assert ran.row.content == "no checker"

    checksums = tmp_path / "models.json"
    checksums.write_text("{}")
    playground.settings = replace(playground.settings, models=ModelPolicy(checksums=str(checksums)))
    (problem,) = playground.run(QUICK).problems
    assert "does not have it" in problem


def test_the_command_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Playground] = []
    monkeypatch.setattr("t2vz.app.page.serve", lambda playground, **_: served.append(playground))
    policies = ["--content", "withhold", "--source-root", "/videos", "--allow-pickles", "--model-checksums", "m.json"]
    assert main(["app", "--out", str(tmp_path / "out"), *policies]) == 0
    settings = served[0].settings
    assert settings.content == "withhold"
    assert settings.limits == Limits(roots=("/videos",))
    assert settings.models == ModelPolicy(True, "m.json")


def test_uploads_are_kept_by_content(playground: Playground, tmp_path: Path) -> None:
    upload = tmp_path / "my clip; $(x).mp4"
    upload.write_bytes(b"one")
    kept = Path(playground.keep(str(upload)))
    assert kept.parent == playground.out / "sources"
    assert kept.read_bytes() == b"one"
    assert kept.suffix == ".mp4"
    assert set(kept.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_.x")
    assert playground.keep(str(upload)) == str(kept)
    upload.write_bytes(b"two")
    assert Path(playground.keep(str(upload))) != kept
    assert len(list(kept.parent.iterdir())) == 2


def test_paths_are_relative_to_the_manifest(tmp_path: Path) -> None:
    manifest = tmp_path / "kept.csv"
    inside, outside = str(tmp_path / "sources" / "a.mp4"), str(tmp_path.parent / "b.mp4")
    assert relative({"source": inside, "prompt": "/x"}, manifest) == {"source": "sources/a.mp4", "prompt": "/x"}
    assert relative({"condition_video": outside}, manifest) == {"condition_video": outside}


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text("utf-8").splitlines()))


def test_rows_are_appended_and_columns_added(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kept.csv"
    append(path, {"mode": "text", "prompt": 'a "boat", red', "seed": "1"})
    append(path, {"mode": "text", "prompt": "a deer", "seed": "2"})
    before = path.read_text()
    append(path, {"mode": "edit", "prompt": "make it snow", "source": "a.mp4"})
    assert path.read_text() != before
    assert [row["prompt"] for row in rows(path)] == ['a "boat", red', "a deer", "make it snow"]
    assert [row["seed"] for row in rows(path)] == ["1", "2", ""]
    assert [row["source"] for row in rows(path)] == ["", "", "a.mp4"]
    found = list(read(path))
    assert not [row for row in found if isinstance(row, BadRow)]
    assert len(found) == 3


def test_a_manifest_without_a_last_line_end_gets_one(tmp_path: Path) -> None:
    path = tmp_path / "kept.csv"
    path.write_text("prompt,seed\na boat,1")
    append(path, {"prompt": "a deer"})
    assert [row["prompt"] for row in rows(path)] == ["a boat", "a deer"]


@pytest.mark.parametrize("content", [b"prompt;seed\na;1\n", b"\xff\xfe\x00", b'name,other\n"x\n'])
def test_what_is_no_manifest_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "kept.csv"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match="can't be appended to"):
        append(path, {"prompt": "a deer"})
    assert path.read_bytes() == content


def test_a_line_shows_the_row_as_it_would_be_kept(playground: Playground) -> None:
    text = playground.line({"mode": "edit", "prompt": "x", "source": str(playground.folder / "sources" / "a.mp4")})
    assert text == "mode,prompt,source\nedit,x,sources/a.mp4\n"
    assert line({"prompt": "b"}, ["seed", "prompt"]) == ",b\n"
