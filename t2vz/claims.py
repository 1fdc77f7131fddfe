"""Claims: which run is at which job, so that runs that overlap don't do each other's work.

OUT/claims/<job_id>.json  the run that is at the job; gone when that ends, however it ends
OUT/runs/<run_id>.json    the run's heartbeat: written again every third of the lease for as long as the run lives

A run without a heartbeat is dead, and its claims are anybody's. The living take the heartbeats of the dead away:
    at once       if its process is gone, and it was on this machine;
    after a lease in which a heartbeat was watched and did not change, by the watcher's own monotonic clock;
    after half    if it is also older than the lease by the storage's clock, compared with the watcher's own heartbeat.
No two machines' clocks are ever compared, and a clock that jumps makes nobody dead who goes on beating.

A claim saves work and is no lock: a run that was held up for longer than its lease may find its job done twice. The
results store keeps one row of the two.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from t2vz import storage
from t2vz.errors import T2VZError
from t2vz.storage import Entry, Place

LEASE_S = 60.0
_BEATS_A_LEASE = 3
_LOOKS_A_BEAT = 10  # while waiting for other runs' next beat
_TRIES = 10

_log = logging.getLogger(__name__)


def take(out: Place, job_id: str, run_id: str, row: str = "") -> bool:
    """Claim a job for the run: True if it is the run's now, False if a living run is at it.

    row: the manifest row's id, for whoever reads the claim. Workers of one run claim in its name; a claim that it has
    already is its own. Raises what `t2vz.storage` does.
    """
    key, mine = _claim_key(job_id), json.dumps({"run_id": run_id, "row": row}).encode()
    for _ in range(_TRIES):
        if storage.create(out, key, mine):
            return True
        there = storage.get(out, key)
        if there is None:  # released in this moment
            continue
        owner = _read(there).get("run_id")
        if owner == run_id:
            return True
        if owner is not None and storage.head(out, _run_key(owner)) is not None:
            return False
        if storage.swap(out, key, there, mine):
            return True
    return False  # others were faster every time: they are alive


def release(out: Place, job_id: str, run_id: str) -> None:
    """Give the job back, if it is still the run's."""
    there = storage.get(out, _claim_key(job_id))
    if there is not None and _read(there).get("run_id") == run_id:
        storage.remove_if(out, _claim_key(job_id), there)


@contextmanager
def living(out: Place, run_id: str, lease_s: float = LEASE_S) -> Iterator[None]:
    """A run that lives while the block runs, by a thread that beats for it. What dead runs left is swept before.

    Raises what `t2vz.storage` does for the first beat; later ones that fail are told to the log and tried again.
    """
    heart = _Heart(out, run_id, lease_s)
    heart.beat()
    sweep(out, run_id)
    thread = threading.Thread(target=heart.keep_beating, name=f"heartbeat of run {run_id}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        heart.stopped.set()
        thread.join()
        try:
            _release_all(out, run_id)
            storage.remove(out, _run_key(run_id))
        except T2VZError as error:  # what the run has done stands; the next one finds it dead, and sweeps
            _log.warning("the run's claims could not be given back: %s", error)


def _release_all(out: Place, run_id: str) -> None:
    """What is still the run's at its end: of workers that were killed."""
    for claim in claimed(out):
        if claim.run_id == run_id:
            release(out, claim.job_id, run_id)


class Claim(NamedTuple):
    """run_id: None if the claim is damaged. row: the manifest row's id. is_live: a living run's."""

    job_id: str
    run_id: str | None
    row: str
    is_live: bool


def claimed(out: Place) -> list[Claim]:
    """The claims there are."""
    found = []
    for key, body in storage.get_all(out, [entry.key for entry in storage.entries(out, "claims")]):
        claim = _read(body)
        run_id = claim.get("run_id")
        is_live = run_id is not None and storage.head(out, _run_key(run_id)) is not None
        found.append(Claim(Path(key).stem, run_id, claim.get("row", ""), is_live))
    return found


def sweep(out: Place, run_id: str) -> list[str]:
    """Remove the claims of dead runs, for a run that lives; the jobs they were of."""
    swept = []
    for claim in claimed(out):
        # First made our own: it may be taken over in this moment.
        if not claim.is_live and take(out, claim.job_id, run_id):
            release(out, claim.job_id, run_id)
            swept.append(claim.job_id)
    return swept


def living_runs(out: Place) -> set[str]:
    """The runs that have a heartbeat: alive, or dead for less than about a lease."""
    return {Path(entry.key).stem for entry in _beats(out)}


def await_others(out: Place, run_id: str, stopping: threading.Event, lease_s: float = LEASE_S) -> None:
    """Return once every other run that has a heartbeat now has beaten again, or has none any more.

    So at most some lease later every claim there is, is of a run that lives. Returns early when `stopping` is set.
    """
    before = {entry.key: entry.version for entry in _beats(out) if entry.key != _run_key(run_id)}
    while before and not stopping.wait(lease_s / _BEATS_A_LEASE / _LOOKS_A_BEAT):
        now = {entry.key: entry.version for entry in _beats(out)}
        before = {key: version for key, version in before.items() if now.get(key) == version}


class _Watch(NamedTuple):
    version: str
    since_s: float  # monotonic
    home: str | None  # of its process


class _Heart:
    """One run's heartbeat, and its watch over the others'."""

    def __init__(self, out: Place, run_id: str, lease_s: float) -> None:
        self._out, self._key, self._lease_s = out, _run_key(run_id), lease_s
        self._beats = 0
        self._watched: dict[str, _Watch] = {}
        self.stopped = threading.Event()

    def keep_beating(self) -> None:
        while not self.stopped.wait(self._lease_s / _BEATS_A_LEASE):
            try:
                self.beat()
            except T2VZError as error:
                _log.warning("the run's sign of life could not be renewed, next try soon: %s", error)

    def beat(self) -> None:
        self._beats += 1  # so that the object's version changes on storage that makes it of the content
        body = {"home": _home(os.getpid()), "beat": self._beats}
        storage.put(self._out, self._key, json.dumps(body).encode())
        found = {entry.key: entry for entry in _beats(self._out)}
        own = found.pop(self._key, None)
        self._watched = {key: watch for key, watch in self._watched.items() if key in found}
        for key, entry in found.items():
            watch = self._watched.get(key)
            if watch is None or watch.version != entry.version:
                home = None if watch is None else watch.home
                if home is None or _is_gone(home):  # a run that is started again beats on from another process
                    home = _read(storage.get(self._out, key)).get("home")
                watch = self._watched[key] = _Watch(entry.version, time.monotonic(), home)
            if own is not None and self._is_dead(watch, entry, own):
                _log.info("run %s is dead: its rows are free", Path(key).stem)
                storage.remove(self._out, key)

    def _is_dead(self, watch: _Watch, entry: Entry, own: Entry) -> bool:
        if _is_gone(watch.home):
            return True
        watched_s = time.monotonic() - watch.since_s
        is_old = (own.modified - entry.modified).total_seconds() > self._lease_s
        return watched_s > self._lease_s or (is_old and watched_s > self._lease_s / 2)


def _beats(out: Place) -> list[Entry]:
    return [entry for entry in storage.entries(out, "runs") if entry.key.endswith(".json")]


def _claim_key(job_id: str) -> str:
    return f"claims/{job_id}.json"


def _run_key(run_id: str) -> str:
    return f"runs/{run_id}.json"


def _read(body: bytes | None) -> dict[str, str]:
    """The texts of a claim or heartbeat; none if it is damaged, as after a power loss."""
    try:
        values = json.loads(body or b"")
    except ValueError:
        return {}
    return (
        {name: value for name, value in values.items() if value and isinstance(value, str)}
        if isinstance(values, dict)
        else {}
    )


def _home(pid: int) -> str | None:
    """Which process: "machine's start / process table / number / its start". None where the system doesn't tell."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        started = rest[18]
    except (OSError, IndexError, ValueError):
        return None
    if state in "ZX" or _machine() is None:  # Z: killed, and its parent has not asked for its exit code yet
        return None
    return f"{_machine()}/{pid}/{started}"


@lru_cache(maxsize=1)
def _machine() -> str | None:
    """This start of this machine, and this container of it: only here do process numbers mean what they say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _is_gone(home: str | None) -> bool:
    """True if the process was on this machine and is no more; False if that can't be known."""
    if home is None or _machine() is None or not home.startswith(f"{_machine()}/"):
        return False
    pid = home.split("/")[-2]
    return pid.isdigit() and _home(int(pid)) != home
