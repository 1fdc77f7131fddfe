"""What a terminal shows of a run: progress from its events, the closing table, plain lines, completion."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from t2vz.cli import _run_json, _tell_run, main
from t2vz.events import Event, emit
from t2vz.results import ResultRow, ResultStore
from t2vz.terminal import Tally, closing_table, duration, following


def row(id: str, status: str = "ok", **values: object) -> ResultRow:
    now = datetime.now(UTC)
    made = {"output_uri": f"videos/{id}.mp4", "output_bytes": 1, "output_mtime_ns": 1, "output_sha256": "0",
            "frames": 8, "mode": "text", "wall_s": 2.5}  # fmt: skip
    given = (made if status == "ok" else {}) | values
    return ResultRow(job_id=id, run_id="run", id=id, status=status, started_at=now, finished_at=now, **given)


FAILED = {"error_stage": "decode", "error_class": "SourceMissing", "error_message": "[b]no.mp4[/b]: no such file"}

RUN = (
    Event("planned", total=3, done=1),
    Event("row_started", "a"),
    Event("stage", "a", "generate"),
    Event("step", "a", "generate", 4, 8),
    Event("row_finished", "a", status="ok", row=row("a")),
    Event("row_started", "b"),
    Event("warning", "b", message="a [strange] clip"),
    Event("row_finished", "b", status="failed", message="[b]no.mp4[/b]: no such file"),
)


class Clock:
    """Seconds that pass when told to."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_speed_and_time_left_are_of_what_was_done() -> None:
    clock = Clock()
    tally = Tally(clock)
    assert tally.left_s is None
    tally.add(Event("planned", total=5))
    for event in (Event("row_started", "a"), Event("row_started", "b"), Event("step", "b", "generate", 2, 4)):
        tally.add(event)
    clock.now_s += 6
    tally.add(Event("row_finished", "a", status="ok", row=row("a")))
    tally.add(Event("row_finished", "bad", status="failed", message="never begun: it took no time"))
    assert tally.frames_per_s == pytest.approx(8 / 6)
    assert tally.left_s == pytest.approx(6 / 1.5 * 2.5)  # a row and a half in 6 s; 5 less a, bad and half of b are left
    assert str(tally) == "2 of 5 rows, 1 failed, 1.3 frames/s, 0:00:10 left"


def test_a_row_that_was_lost_is_begun_again() -> None:
    clock = Clock()
    tally = Tally(clock)
    for event in (Event("planned", total=1), Event("row_started", "a"), Event("step", "a", "generate", 1, 2)):
        tally.add(event)
    clock.now_s += 4
    assert tally.left_s == pytest.approx(4)
    tally.add(Event("row_lost", "a", message="its worker died"))
    assert tally.left_s is None


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.6, 3661, 360_000)] == ["0:00:00", "0:01:00", "1:01:01", "100:00:00"]


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2vz.terminal._PLAIN_INTERVAL_S", 0.0)
    told = io.StringIO()
    with following(Console(file=told)):
        for event in RUN:
            emit(event)
    lines = told.getvalue().splitlines()
    assert lines[0] == "3 rows to render, 1 done before"
    assert "\x1b" not in told.getvalue()
    assert "b: warning: a [strange] clip" in lines
    assert "b: failed: [b]no.mp4[/b]: no such file" in lines
    assert lines[-1].startswith("2 of 3 rows, 1 failed, ")


def test_bars_on_a_terminal_show_rows_speed_and_failures() -> None:
    told = io.StringIO()
    console = Console(file=told, force_terminal=True, width=120, color_system=None)
    with following(console):
        for event in RUN:
            emit(event)
    shown = told.getvalue()
    assert "rows, 1 failed" in shown
    assert "2/3" in shown
    assert "frames/s" in shown
    assert " left" in shown
    assert "b: failed: [b]no.mp4[/b]: no such file" in shown


def test_quiet_is_quiet() -> None:
    told = io.StringIO()
    with following(Console(file=told, force_terminal=True), quiet=True):
        for event in RUN:
            emit(event)
    assert told.getvalue() == ""


def test_the_closing_table_has_rows_reasons_and_speed() -> None:
    told = io.StringIO()
    rows = [row("a"), row("b", "failed", **FAILED)]
    closing_table(Console(file=told, width=100), rows, Counter(ok=1, failed=1, done=2), 4.0)
    lines = told.getvalue().splitlines()
    assert lines[1].split() == ["a", "text", "8", "2.5", "s", "videos/a.mp4"]
    assert "decode: [b]no.mp4[/b]: no such file" in lines[2]
    assert lines[-1] == "1 rendered, 1 failed, 2 done before in 0:00:04 (8 frames, 2 frames/s)"


@pytest.fixture
def out(tmp_path: Path) -> str:
    store = ResultStore(tmp_path / "out")
    store.commit(row("a"))
    store.commit(row("b", "failed", retryable=False, **FAILED))
    return str(tmp_path / "out")


def test_a_run_as_json(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(_run_json(out, {"ok": 1, "failed": 1, "run_id": "run"}, 4.0))
    assert told == {
        "run_id": "run",
        "out": out,
        "rows": {"ok": 1, "failed": 1},
        "frames": 8,
        "elapsed_s": 4.0,
        "frames_per_s": 2.0,
        "failed_rows": [
            {"id": "b", "stage": "decode", "error": "SourceMissing", "message": FAILED["error_message"],
             "retryable": False}
        ],
    }  # fmt: skip


def test_nothing_to_render_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("prompt\n")
    assert main(["run", str(manifest), "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["frames"], told["failed_rows"]) == ({"done": 0}, 0, [])


def test_the_end_is_plain_lines_where_there_is_no_terminal(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    _tell_run(out, {"ok": 1, "failed": 1, "run_id": "run"}, quiet=False, elapsed_s=4.0)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines[:2])[0].startswith("a  ok  ")
    assert lines[2] == "1 rendered, 1 failed"
    assert len(lines) == 4
    _tell_run(out, {"ok": 1, "failed": 1, "run_id": "run"}, quiet=True, elapsed_s=4.0)
    assert capsys.readouterr().out.splitlines() == lines[2:]


def test_the_end_is_a_table_on_a_terminal(
    out: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # by which rich takes anything for a terminal
    _tell_run(out, {"ok": 1, "failed": 1, "run_id": "run"}, quiet=False, elapsed_s=4.0)
    told = capsys.readouterr().out
    assert "video, or why there is none" in told
    assert "in 0:00:04" in told
    _tell_run(out, {"ok": 1, "failed": 1, "run_id": "run"}, quiet=True, elapsed_s=4.0)
    assert "video, or why" not in capsys.readouterr().out


def asked_by_a_shell(**environment: str) -> str:
    """What `t2vz` prints for a shell that completes its words."""
    code = "import sys; sys.argv[0] = 't2vz'; from t2vz.cli import main; sys.exit(main())"
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_options_and_columns(shell: str) -> None:
    def told(*words: str) -> str:
        last = words[-1] if shell == "fish" else str(len(words))
        return asked_by_a_shell(
            _T2VZ_COMPLETE=f"{shell}_complete", COMP_WORDS=" ".join(["t2vz", *words]), COMP_CWORD=last
        )

    assert "results" in told("res")
    assert "--workers" in told("run", "--wor")
    assert "processes" in told("run", "--executor", "pro")
    assert "num_inference_steps=" in told("run", "--default", "num_inf")
    if shell != "bash":  # which splits words at `=` before it asks
        assert "dtype=float16" in told("run", "--default", "dtype=fl")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(shell: str) -> None:
    """As documented: `_T2VZ_COMPLETE=bash_source t2vz`."""
    script = asked_by_a_shell(_T2VZ_COMPLETE=f"{shell}_source")
    assert "_t2vz_completion" in script
    assert "_T2VZ_COMPLETE=" in script
