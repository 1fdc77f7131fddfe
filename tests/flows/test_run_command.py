"""`t2vz run` as a user has it: its exit code, its output, the terminal's Ctrl-C and the server that it starts."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from t2vz.cli import main
from t2vz.results import ResultStore, read

Write = Callable[..., Path]

LONG = {"num_inference_steps": "40", "video_length": "8"}  # some seconds


@pytest.fixture
def start(prefect_api: str) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts `t2vz run`."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "t2vz.cli", "run", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PREFECT_API_URL": prefect_api},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def awaiting(what: Callable[[], object], process: "subprocess.Popen[str]", seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.usefixtures("prefect_api")
def test_some_rows_fail_then_all_is_done(manifest: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, which has imported all that is heavy already."""
    out = tmp_path / "out"
    good = {"id": "good", "seed": "1"}
    bad = {"id": "bad", "mode": "edit", "source": "nowhere.mp4"}

    assert main(["run", str(manifest(good, bad)), "--out", str(out), "--device", "cpu"]) == 1
    told, log = capsys.readouterr()
    video = next((out / "videos").iterdir())
    lines = told.splitlines()
    assert any(line.startswith("good  ok") and str(video) in line for line in lines)
    assert any(line.startswith("bad  failed") and "nowhere.mp4" in line for line in lines)
    assert "1 rendered, 1 failed" in lines
    assert "Traceback" not in log
    assert "Task run" not in log

    assert main(["run", str(manifest(good)), "--out", str(out), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"nothing to render: every row is done in {out}\n"


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("sent", "options", "code", "said"),
    [
        (signal.SIGINT, (), 130, "interrupted"),
        (signal.SIGINT, ("--workers", "2"), 130, "interrupted"),
        (signal.SIGTERM, (), 143, "stopped by SIGTERM"),
    ],
)
def test_ctrl_c_or_sigterm_keeps_what_is_finished_and_leaves_nothing_else(
    manifest: Write,
    start: Callable[..., "subprocess.Popen[str]"],
    tmp_path: Path,
    sent: signal.Signals,
    options: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    """A terminal's Ctrl-C reaches the workers, too; what they make of it is the run's to decide."""
    out = tmp_path / "out"
    path = manifest(*({"id": str(i), "seed": str(i), **LONG} for i in range(6)))
    process = start(path, "--out", out, "--in-flight", 1, "--device", "cpu", *options)

    def second_row_runs() -> bool:
        done = ResultStore(out).done()
        return bool(done) and any(folder.name not in done for folder in out.glob(".work/*/*/"))

    awaiting(second_row_runs, process)
    workers = children(process.pid)
    for pid in (*workers, process.pid):
        os.kill(pid, sent)
    _, log = process.communicate(timeout=60)

    assert process.returncode == code, log
    assert log.splitlines()[-1].startswith(f"{said}: finished rows are kept; the same command goes on")
    assert log.count(said) == 1
    assert "Traceback" not in log
    rows = list(read(out))
    assert 1 <= len(rows) < 6
    assert {row.status for row in rows} == {"ok"}
    assert {path.name for path in (out / "videos").iterdir()} == {Path(row.output_uri or "").name for row in rows}
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert [path for path in (out / ".work").iterdir() if path.name not in ("sweep.lock", "snapshots")] == []
    assert not any((out / "records").glob("*.json"))  # merged into the table before the end


def test_unusable_manifest_is_told_before_anything_starts(
    start: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    process = start(tmp_path / "none.csv", "--out", tmp_path / "out")
    _, log = process.communicate(timeout=30)
    assert process.returncode == 2
    assert log == f"error: {tmp_path / 'none.csv'}: there is no such manifest\n"
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module", autouse=True)
def run_with_a_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds a temporary server and prints its URL. It takes long to start: before the other tests."""
    holds = "import time\nfrom t2vz_flows.server import api\nwith api() as url: print(url, flush=True); time.sleep(600)"
    env = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    env |= {"PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")), "DO_NOT_TRACK": "1"}
    with subprocess.Popen([sys.executable, "-c", holds], stdout=subprocess.PIPE, text=True, env=env) as process:
        yield process
        process.kill()


def test_temporary_server_ends_with_a_killed_run(run_with_a_server: "subprocess.Popen[str]") -> None:
    process = run_with_a_server
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
        assert answer.status == 200

    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
        except (urllib.error.URLError, ConnectionError):
            return
        time.sleep(0.1)
    pytest.fail("the server outlives its run")
