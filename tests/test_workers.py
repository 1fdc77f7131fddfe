"""Warm workers, as real processes with the real `render` around stand-in stages: killed, replaced, stopped."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from t2vz.errors import DeviceLost, OutputError, T2VZError, UnexpectedError, WorkerDied
from t2vz.events import Event, listening
from t2vz.plan import Job, plan
from t2vz.render import Retries, Settings, opening
from t2vz.results import ResultRow, ResultStore, read
from t2vz.workers import EXECUTORS, Answer, Ended, Log, Outcome, Place, Pool, ProcessWorker, Worker, placed

BENCHMARKS = Path(__file__).parent / "benchmarks"
CPU = Place("cpu", threads=1)


@pytest.fixture(autouse=True)
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # which workers inherit


@pytest.fixture
def jobs(write_manifest: Callable[..., Path], tmp_path: Path) -> Callable[..., list[Job]]:
    """Plans rows: of each a prompt, or a dict of columns. Their ids are their places, from 0."""

    def planned(*rows: str | dict[str, Any]) -> list[Job]:
        given = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
        full = [{"id": str(i), "seed": i, **row} for i, row in enumerate(given)]
        found = list(plan(write_manifest(tmp_path / "manifest.csv", *full), None))
        assert all(isinstance(job, Job) for job in found)
        return found

    return planned


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path / "out", "manifest.csv", "run", device="cpu", retries=Retries(backoff_s=0))


def pool(settings: Settings, workers: int = 1, **options: Any) -> Pool:
    options = {"function": "stub:render", "backoff_s": 0.05, **options}
    return Pool(settings, "processes", (CPU,) * workers, **options)


def run(settings: Settings, jobs: list[Job], workers: int = 1, **options: Any) -> dict[str, ResultRow]:
    """The result rows by id; each job has one outcome."""
    with opening(settings), pool(settings, workers, **options) as workers_:
        outcomes = list(workers_.run(jobs))
    assert Counter(outcome.id for outcome in outcomes) == Counter(job.row.id for job in jobs)
    rows = {row.id: row for row in read(settings.out)}
    assert {outcome.id: outcome.status for outcome in outcomes} == {id: row.status for id, row in rows.items()}
    return rows


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def await_(what: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def test_rows_are_shared_out_and_each_is_done_once(jobs, settings):
    rows = run(settings, jobs(*["pair a boat"] * 12), workers=2)
    assert {row.status for row in rows.values()} == {"ok"}
    assert {row.attempts for row in rows.values()} == {1}
    assert len({row.device for row in rows.values()}) == 2  # the stub names its process
    assert len(list((settings.out / "videos").iterdir())) == 12


def test_events_arrive_at_the_row_and_at_this_process(jobs, settings):
    heard: list[Event] = []
    fed: dict[str, list[Any]] = {}

    def begin(job: Job) -> Callable[[Any], None]:
        return fed.setdefault(job.row.id, []).append

    with opening(settings), listening(heard.append), pool(settings) as workers:
        list(workers.run(jobs("a boat", "say a boat"), begin))
    for id in ("0", "1"):
        events = [what for what in fed[id] if isinstance(what, Event)]
        assert [event for event in heard if event.id == id] == events
        assert [(event.kind, event.stage) for event in events if event.kind != "step"] == [
            ("row_started", ""),
            *[(kind, stage) for stage in ("decode", "generate", "encode") for kind in ("stage", "stage_ended")],
            ("row_finished", ""),
        ]
        steps = [event for event in events if event.kind == "step"]
        assert (steps[-1].done, steps[-1].total) == (8, 8)
        assert isinstance(fed[id][-1], Outcome)
    logs = [what.message for what in fed["1"] if hasattr(what, "level")]
    assert [log.rpartition(" ")[0] for log in logs] == ["1 is in process"]
    assert not any(hasattr(what, "level") for what in fed["0"])


def test_kill_9_loses_the_attempts_of_the_rows_under_way_and_of_no_others(jobs, settings):
    """Two workers, a row held in each, and more behind; one is killed. Its row goes on in the other one, or in the one
    that takes its place.
    """
    processes: dict[str, int] = {}
    steps: set[str] = set()

    def begin(job: Job) -> Callable[[Any], None]:
        def feed(what: Any) -> None:
            if isinstance(what, Log):
                processes[job.row.id] = int(what.message.rpartition(" ")[2])
            elif isinstance(what, Event) and what.kind == "step":
                steps.add(job.row.id)
            elif isinstance(what, Event) and what.kind == "row_lost":
                (settings.out / "go").touch()
            if {"0", "1"} <= steps and "killed" not in steps:
                os.kill(processes["0"], signal.SIGKILL)
                steps.add("killed")

        return feed

    with opening(settings), pool(settings, 2, in_flight=1) as workers:
        outcomes = list(workers.run(jobs(*["say wait a boat"] * 8), begin))
        after = {worker.pid for worker in workers.workers}
    attempts = {outcome.id: outcome.row.attempts for outcome in outcomes}
    assert attempts == {str(i): 2 if i == 0 else 1 for i in range(8)}
    assert {outcome.status for outcome in outcomes} == {"ok"}
    assert len(after) == 2  # another one was started in its place
    assert len({*after, *processes.values()}) >= 2
    assert len(read(settings.out)) == 8


def test_a_row_that_always_kills_its_worker_fails_alone(jobs, settings):
    go = settings.out / "go"

    def watch(event: Event) -> None:
        if event.kind == "row_lost":
            go.touch()

    with listening(watch):
        rows = run(settings, jobs("wait a boat", "kill a boat", *["a boat"] * 6), workers=1, in_flight=3)
    poison = rows.pop("1")
    assert (poison.status, poison.error_class, poison.attempts, poison.retryable) == ("failed", "WorkerDied", 3, True)
    assert "SIGKILL" in poison.error_message
    assert {row.status for row in rows.values()} == {"ok"}
    # The two beside it lost the attempt of its first kill at most: then it was alone.
    assert 1 <= sum(row.attempts - 1 for row in rows.values()) <= 2


@pytest.mark.parametrize("in_flight", [1, 3])
def test_rows_that_kill_their_worker_one_after_the_other_stop_no_other(jobs, settings, in_flight):
    rows = run(settings, jobs(*["kill a boat"] * 3, "a boat"), in_flight=in_flight)
    assert rows.pop("3").status == "ok"
    assert {(row.status, row.error_class, row.attempts) for row in rows.values()} == {("failed", "WorkerDied", 3)}


def test_a_device_fault_replaces_the_worker(jobs, settings):
    with opening(settings), pool(settings) as workers:
        before = workers.workers[0].pid
        outcomes = list(workers.run(jobs("fault-once a boat", "a boat")))
        (after,) = [worker.pid for worker in workers.workers]
    assert before != after
    assert not running(before)
    # Without its row, where the other one was done and not told yet when the worker was killed.
    assert {outcome.id: outcome.status for outcome in outcomes} == {"0": "ok", "1": "ok"}
    assert {row.id: row.attempts for row in read(settings.out)}["0"] == 2


def test_a_device_that_is_always_lost_fails_the_row_as_lost(jobs, settings):
    rows = run(settings, jobs("fault a boat", "a boat"), in_flight=1)
    assert (rows["0"].status, rows["0"].error_class, rows["0"].attempts) == ("failed", "DeviceLost", 3)
    assert rows["1"].status == "ok"


def test_workers_that_can_t_be_kept_alive_end_the_run(jobs, settings):
    deaths = jobs(*["kill a boat"] * 9)
    with (
        opening(settings),
        pytest.raises(WorkerDied, match=r"no worker can be kept alive: .* SIGKILL"),
        pool(settings, 2, restarts=1, attempts=1, in_flight=1) as workers,
    ):
        list(workers.run(deaths))
    assert not ResultStore(settings.out).done()


def test_workers_that_don_t_start_say_why(jobs, settings):
    with (
        opening(settings),
        pytest.raises(WorkerDied, match="there is no such function to do rows with"),
        pool(settings, 2, function="stub:nothing", restarts=1) as workers,
    ):
        list(workers.run(jobs("a boat")))


def test_an_error_that_stays_is_not_tried_again_and_one_that_mends_is(jobs, settings):
    rows = run(settings, jobs("fail a boat", "slow a boat"))
    assert (rows["0"].status, rows["0"].error_class, rows["0"].attempts) == ("failed", "InvalidFrames", 1)
    assert (rows["1"].status, rows["1"].attempts) == ("ok", 3)
    settings = replace(settings, out=settings.out / "no retries", retries=Retries(generate=1, backoff_s=0))
    rows = run(settings, jobs("slow a boat"))
    assert (rows["0"].status, rows["0"].error_class, rows["0"].attempts) == ("failed", "StorageTimeout", 2)


def test_a_model_is_loaded_once_in_a_row(jobs, settings):
    """Rows of four groups, mixed: as many loads as groups, in one worker; with two at most one more each."""
    groups = [{"dtype": dtype, "mode": "text"} for dtype in ("float32", "float16", "bfloat16")]
    mixed = [{"prompt": "a boat", **groups[i % 3]} for i in range(30)]
    rows = run(settings, jobs(*mixed), in_flight=1)
    assert sum(row.model_s for row in rows.values()) == 3
    settings = replace(settings, out=settings.out / "two")
    rows = run(settings, jobs(*mixed), workers=2, in_flight=1)
    assert sum(row.model_s for row in rows.values()) <= 5


def test_a_result_that_can_t_be_kept_ends_the_run(jobs, settings, monkeypatch):
    with opening(settings):
        records = settings.out / "records"
        records.write_text("in the way")
        with pytest.raises(T2VZError) as raised, pool(settings) as workers:
            list(workers.run(jobs("a boat")))
    assert isinstance(raised.value, T2VZError)
    assert not isinstance(raised.value, WorkerDied)


def test_reading_that_fails_ends_the_run(jobs, settings):
    def broken():
        yield from jobs("a boat")
        raise OutputError("the manifest's disk is gone")

    with opening(settings), pytest.raises(OutputError, match="disk is gone"), pool(settings) as workers:
        list(workers.run(broken()))


def test_reading_that_fails_at_the_last_moment_ends_the_run_too(settings, monkeypatch):
    """All is over but for the reader's last word when it fails: between two looks of the pool."""
    monkeypatch.setattr("t2vz.workers._LEAVE_S", 0.1)  # the reader is held until all is over
    fails, failed, leave = threading.Event(), threading.Event(), threading.Event()

    class Late(Pool):
        def _hand_out(self, *given: Any) -> None:
            super()._hand_out(*given)
            if self._slots[0].ready:  # nothing else is to be told then
                fails.set()
                failed.wait(10)

    class Answers(SimpleQueue):
        def put(self, answer: Any) -> None:  # type: ignore[override]
            if answer is None:
                failed.set()
                leave.wait(10)
            super().put(answer)

    def broken():
        fails.wait(10)
        raise OutputError("the manifest's disk is gone")
        yield

    late = Late(settings)
    late._answers = Answers()
    try:
        with opening(settings), late, pytest.raises(OutputError, match="disk is gone"):
            list(late.run(broken()))
    finally:
        leave.set()


@pytest.mark.parametrize("deaf", [False, True])
def test_stopping_ends_the_rows_in_time(jobs, settings, deaf):
    """At their next step, without results; what is deaf to it is killed when its time is over."""
    started = threading.Event()
    outcomes: list[Any] = []

    def watch(event: Event) -> None:
        if event.kind == "step":
            started.set()
            settings.stopping.set()  # as a cancelled run does, or whoever holds the settings

    planned = jobs("hang a boat" if deaf else "long a boat")
    workers = pool(settings, stop_s=0.3 if deaf else 60)
    pids: list[int] = []

    def begin(job: Job) -> Callable[[Any], None]:
        pids.append(workers.workers[0].pid)
        return outcomes.append

    def stopped() -> None:
        with opening(settings), listening(watch), workers:
            list(workers.run(planned, begin))

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert started.is_set()
    assert not running(*pids)
    assert outcomes[-1].status == "stopped"
    assert not ResultStore(settings.out).done()


PARENT = """
import sys
from pathlib import Path
from t2vz.plan import plan
from t2vz.render import Settings, opening
from t2vz.workers import Place, Pool
manifest, out = sys.argv[1:]
settings = Settings(Path(out), manifest, "run", device="cpu")
with opening(settings), Pool(settings, "processes", (Place("cpu"),) * 2, function="stub:render") as pool:
    print(*(worker.pid for worker in pool.workers), flush=True)
    for outcome in pool.run(plan(manifest, None)):
        pass
"""


def test_workers_die_with_their_parent(write_manifest, tmp_path):
    """In the middle of rows that are deaf to everything but a kill."""
    path = write_manifest(tmp_path / "m.csv", *({"id": str(i), "prompt": "hang a boat"} for i in range(4)))
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, path, tmp_path / "out"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS)},
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        await_(lambda: len(list((tmp_path / "out").glob(".work/run/*/"))) == 4)  # rows under way in both
        assert len(pids) == 2
        assert all(map(running, pids))
        parent.kill()
    await_(lambda: not any(map(running, pids)))


def test_settings_travel_without_their_stopping(settings):
    settings.stopping.set()
    there = pickle.loads(pickle.dumps(settings))
    assert there == settings
    assert not there.stopping.is_set()


def test_places(monkeypatch):
    import torch

    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert placed("auto", "auto", None) == ("threads", (Place("auto"),))
    assert placed("auto", "cpu", 2) == ("processes", (Place("cpu", threads=max(1, cores // 2)),) * 2)
    assert placed("processes", "cpu", None) == ("processes", (Place("cpu", threads=cores),))
    with pytest.raises(UnexpectedError, match="leave workers out"):
        placed("threads", "cpu", 2)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert placed("auto", "auto", None) == ("processes", (Place("auto", gpu="0"), Place("auto", gpu="1")))
    assert placed("auto", "cuda:1", None) == ("processes", (Place("auto", gpu="1"),))
    assert placed("auto", "cpu", None) == ("threads", (Place("cpu"),))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    assert [place.gpu for place in placed("auto", "auto", 3)[1]] == ["4", "GPU-7", "4"]
    assert Place("auto", gpu="GPU-7").environment == {"CUDA_VISIBLE_DEVICES": "GPU-7"}


class NeverReady:
    """As a worker that its cluster has no room for."""

    in_process = False

    def send(self, order: Any) -> None: ...

    def kill(self) -> None: ...

    def join(self, timeout_s: float) -> bool:
        return True


def without_room_for_the_second(name: str, *given: Any) -> Any:
    return ProcessWorker(name, *given) if name == "worker 0" else NeverReady()


@pytest.mark.timeout(60)
def test_a_row_does_not_wait_for_ever_for_a_worker_that_never_comes(jobs, settings, monkeypatch):
    """It would rather be done again where it was not lost."""
    monkeypatch.setitem(EXECUTORS, "processes", f"{__name__}:without_room_for_the_second")
    monkeypatch.setattr("t2vz.workers._HOPE_S", 0.2)
    rows = run(settings, jobs("kill-once a boat"), workers=2)
    assert (rows["0"].status, rows["0"].attempts) == ("ok", 2)


def the_fault_told_first(*given: Any) -> ProcessWorker:
    """A worker whose lost device is told when the row beside it has just ended, and before that."""
    *before, deliver = given
    held: list[Ended] = []

    def delivered(worker: Worker, answer: Answer) -> None:
        if isinstance(answer, Ended) and isinstance(answer.error, DeviceLost):
            held.append(answer)
            return
        if held and isinstance(answer, Ended):
            deliver(worker, held.pop())
        deliver(worker, answer)

    return ProcessWorker(*before, delivered)


def test_what_ends_beside_a_device_fault_has_ended(jobs, settings, monkeypatch):
    """It is not given to another worker while the killed one may still be at it, or has done it."""
    monkeypatch.setitem(EXECUTORS, "processes", f"{__name__}:the_fault_told_first")
    lost: list[str] = []
    with (
        opening(settings),
        listening(lambda event: lost.append(event.id) if event.kind == "row_lost" else None),
        pool(settings) as workers,
    ):
        outcomes = {outcome.id: outcome.row for outcome in workers.run(jobs("fault-once a boat", "a boat"))}
    assert lost == ["0"]
    assert {id: row.attempts for id, row in outcomes.items()} == {"0": 2, "1": 1}


def render_and_die(job: Job, settings: Settings, lost: int) -> None:
    """The row's result is kept, but nobody is told."""
    import stub

    if stub.render(job, settings, lost) is not None:
        if "merge" in job.row.spec.prompt:
            settings.store().flush()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("prompt", ["a boat", "merge a boat"])
@pytest.mark.parametrize("attempts", [1, 2])
def test_a_row_that_is_done_when_its_worker_dies_is_done(jobs, settings, prompt, attempts):
    starts: list[str] = []
    with (
        opening(settings),
        listening(lambda event: starts.append(event.id) if event.kind == "row_started" else None),
        pool(settings, function=f"{__name__}:render_and_die", attempts=attempts) as workers,
    ):
        outcomes = list(workers.run(jobs(prompt)))
    (row,) = read(settings.out, all=True)
    assert (row.status, row.attempts) == ("ok", 1)
    assert [outcome.status for outcome in outcomes] == ["ok"]
    assert starts == ["0"]
