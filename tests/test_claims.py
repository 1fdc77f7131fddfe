"""Claims: one run at a job at a time; the dead lose theirs, the living don't, whatever the clocks say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from t2vz import claims, storage
from t2vz.claims import LEASE_S, _Heart, living, release, sweep, take
from t2vz.errors import StorageTimeout

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def left(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for name in ("claims", "runs") for path in (out / name).rglob("*"))


def test_a_claim_of_a_living_run_holds_until_it_is_released(tmp_path):
    with living(tmp_path, "one"), living(tmp_path, "two"):
        assert take(tmp_path, "job", "one")
        assert take(tmp_path, "job", "one"), "another worker of the same run"
        assert not take(tmp_path, "job", "two")
        assert take(tmp_path, "other", "two")
        release(tmp_path, "job", "two")  # not its own
        assert not take(tmp_path, "job", "two")
        release(tmp_path, "job", "one")
        assert take(tmp_path, "job", "two")
    assert left(tmp_path) == []


def test_a_claim_of_a_run_without_heartbeat_is_taken_over_by_one_of_many(tmp_path):
    runs = [f"run-{n}" for n in range(8)]
    for run in runs:
        _Heart(tmp_path, run, LEASE_S).beat()
    for job in (f"job-{n}" for n in range(50)):
        assert take(tmp_path, job, "dead")
        start = threading.Barrier(len(runs))

        def at_once(run, job=job, start=start):
            start.wait()
            return take(tmp_path, job, run)

        with ThreadPoolExecutor(len(runs)) as pool:
            assert sum(pool.map(at_once, runs)) == 1


@pytest.mark.parametrize("body", [b"", b"{", b'{"run_id": 3}', b"\xff", b"[]"])
def test_a_damaged_claim_is_nobodys(tmp_path, body):
    with living(tmp_path, "one"):
        storage.put(tmp_path, "claims/job.json", body)
        storage.put(tmp_path, "claims/swept.json", body)
        assert take(tmp_path, "job", "one")
    with living(tmp_path, "two"):
        assert sweep(tmp_path, "two") == []  # it was when the run began
        assert left(tmp_path) == ["runs/two.json"]


DIES = """
import os, sys
from t2vz import claims
with claims.living(sys.argv[1], "dead"):
    claims.take(sys.argv[1], "job", "dead")
    os._exit(9)
"""


def test_a_run_whose_process_died_on_this_machine_loses_its_claims_at_once(tmp_path):
    subprocess.run([sys.executable, "-c", DIES, tmp_path], check=False)
    assert left(tmp_path) == ["claims/job.json", "runs/dead.json"]
    with living(tmp_path, "next"):
        assert left(tmp_path) == ["runs/next.json"]


def test_a_run_that_is_started_again_under_its_name_is_alive(tmp_path):
    """As Prefect starts a crashed run again; between two beats of another run that watched the dead one."""
    watcher = _Heart(tmp_path, "watcher", LEASE_S)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    body = {"home": claims._home(process.pid), "beat": 1}
    storage.put(tmp_path, "runs/again.json", json.dumps(body).encode())
    watcher.beat()
    process.kill()
    process.wait()
    _Heart(tmp_path, "again", LEASE_S).beat()
    watcher.beat()
    assert left(tmp_path) == ["runs/again.json", "runs/watcher.json"]


# --- leases, by a clock that the test winds ---------------------------------------------------------------


class Wound:
    """Monotonic time and the storage's clock, each moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monotonic_s, self.storage_s = 1000.0, 0.0
        self._modified: dict[str, float] = {}
        real_put, real_entries = storage.put, storage.entries
        monkeypatch.setattr(claims.time, "monotonic", lambda: self.monotonic_s)

        def put(place, key, body):
            self._modified[key] = self.storage_s
            real_put(place, key, body)

        def entries(place, folder):
            for entry in real_entries(place, folder):
                yield entry._replace(modified=NOON + timedelta(seconds=self._modified.get(entry.key, 0)))

        monkeypatch.setattr(storage, "put", put)
        monkeypatch.setattr(storage, "entries", entries)

    def passes(self, seconds: float) -> None:
        self.monotonic_s += seconds
        self.storage_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Wound:
    monkeypatch.setattr(claims, "_is_gone", lambda home: False)  # as of another machine
    return Wound(monkeypatch)


def test_a_run_that_stops_beating_is_dead_after_its_lease_and_not_before(tmp_path, clock):
    theirs, ours = _Heart(tmp_path, "theirs", 60), _Heart(tmp_path, "ours", 60)
    theirs.beat()
    for _ in range(10):
        clock.passes(20)
        theirs.beat()
        ours.beat()
        assert claims.living_runs(tmp_path) == {"theirs", "ours"}
    for _ in range(3):
        clock.passes(20)
        ours.beat()
        assert "theirs" in claims.living_runs(tmp_path)
    clock.passes(20)
    ours.beat()
    assert claims.living_runs(tmp_path) == {"ours"}


def test_one_that_was_dead_before_we_came_needs_half_a_lease_of_watching(tmp_path, clock):
    _Heart(tmp_path, "theirs", 60).beat()
    clock.passes(3600)
    ours = _Heart(tmp_path, "ours", 60)
    ours.beat()
    clock.passes(20)
    ours.beat()
    assert claims.living_runs(tmp_path) == {"theirs", "ours"}
    clock.passes(20)
    ours.beat()
    assert claims.living_runs(tmp_path) == {"ours"}


@pytest.mark.parametrize("jump_s", [3600, -3600])
def test_a_jump_of_the_storages_clock_kills_nobody_who_beats_and_saves_nobody_who_does_not(tmp_path, clock, jump_s):
    theirs, dead, ours = (_Heart(tmp_path, name, 60) for name in ("theirs", "dead", "ours"))
    dead.beat()
    theirs.beat()
    ours.beat()
    clock.storage_s += jump_s
    for _ in range(5):
        clock.passes(19)
        ours.beat()  # before theirs: their last beat is from before the jump
        assert "theirs" in claims.living_runs(tmp_path)
        theirs.beat()
    assert claims.living_runs(tmp_path) == {"theirs", "ours"}


def test_a_beat_that_storage_does_not_take_is_told_and_tried_again(tmp_path, monkeypatch, caplog):
    beat, beaten, failed = _Heart.beat, threading.Event(), []

    def failing(heart):
        if len(failed) < 2 and threading.current_thread() is not threading.main_thread():
            failed.append(heart)
            raise StorageTimeout("no answer")
        beat(heart)
        if failed:
            beaten.set()

    monkeypatch.setattr(_Heart, "beat", failing)
    with living(tmp_path, "one", lease_s=0.03):
        assert beaten.wait(10)
    assert caplog.text.count("could not be renewed") == 2


def test_an_end_that_storage_does_not_take_is_told_and_fails_no_run(tmp_path, monkeypatch, caplog):
    def failing(place, key, old):
        raise StorageTimeout("no answer")

    with monkeypatch.context() as patched, living(tmp_path, "one"):  # undone after the end
        assert take(tmp_path, "job", "one")
        patched.setattr(storage, "remove_if", failing)
    assert "could not be given back" in caplog.text
    assert left(tmp_path) == ["claims/job.json", "runs/one.json"]
    storage.remove(tmp_path, "runs/one.json")  # as the next run does once it finds it dead
    with living(tmp_path, "two"):
        assert left(tmp_path) == ["runs/two.json"]


def test_waiting_for_others_ends_when_each_has_beaten_again_or_is_gone(tmp_path):
    theirs, dead = _Heart(tmp_path, "theirs", 60), _Heart(tmp_path, "dead", 60)
    theirs.beat()
    dead.beat()
    waited = threading.Event()

    def wait():
        claims.await_others(tmp_path, "ours", threading.Event(), lease_s=0.3)
        waited.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    theirs.beat()
    assert not waited.wait(0.2)
    storage.remove(tmp_path, "runs/dead.json")
    while not waited.wait(0.05):  # the first look may have come after the beat above
        theirs.beat()
    stopping = threading.Event()
    stopping.set()
    claims.await_others(tmp_path, "ours", stopping)  # at once


def test_processes_are_told_apart_by_their_start(monkeypatch):
    here = claims._home(os.getpid())
    assert here is not None
    assert not claims._is_gone(here)
    machine, _, started = here.rpartition("/")
    assert claims._is_gone(f"{machine}/{int(started) - 1}"), "the number was used again"
    assert not claims._is_gone(f"another-{here}"), "nothing is known of other machines"
    assert not claims._is_gone(None)
    ended = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    home = claims._home(ended.pid)
    assert not claims._is_gone(home)
    ended.kill()
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert claims._is_gone(home), "killed, though its parent has not asked for its exit code"
    ended.communicate()
