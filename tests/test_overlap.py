"""Runs in processes of their own at one manifest at once: each row is rendered once, kept once, and lost never."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from deltalake import DeltaTable

from t2vz import storage
from t2vz.results import ResultStore, read
from t2vz.storage import Place

WORKER = Path(__file__).with_name("overlap_worker.py")
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[int], Path]:
    def write(count: int) -> Path:
        path = tmp_path / "manifest.csv"
        path.write_text("id,prompt\n" + "".join(f"row-{n},a ball\n" for n in range(count)))
        return path

    return write


@contextmanager
def starting(manifest: Path, out: Place, rendered: Path) -> Iterator[Start]:
    """Starts runs; kills what is still there in the end."""
    started: list[subprocess.Popen[str]] = []

    def start(run_id: str, lease_s: float = 2, seconds: float = 0.01) -> subprocess.Popen[str]:
        command = [sys.executable, WORKER, manifest, out, run_id, rendered, lease_s, seconds]
        started.append(subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.communicate()


def told(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == line


def ended(process: subprocess.Popen[str]) -> int:
    """How many rows were under way elsewhere in the end."""
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    word, left = out.splitlines()[-1].split()
    assert word == "end"
    return int(left)


def check(out: Place, rows: int, left: tuple[str, ...] = ()) -> None:
    """Each row once, in the table, ok, its output as recorded; nothing else lies about."""
    store = ResultStore(out)
    table = DeltaTable(storage.joined(out, "results"), storage_options=storage.table_options(out))
    ids = table.to_pyarrow_dataset().to_table(columns=["job_id"])["job_id"].to_pylist()
    assert len(ids) == len(set(ids)) == rows == len(store.done())
    results = list(read(out))
    assert sorted(row.id for row in results) == sorted(f"row-{n}" for n in range(rows))
    for row in results:
        body = storage.get(out, row.output_uri)
        assert body is not None
        assert hashlib.sha256(body).hexdigest() == row.output_sha256
    named = {row.output_uri for row in results}
    assert {entry.key for entry in storage.entries(out, "videos")} == named
    for folder in ("claims", "runs", "records"):
        assert [entry.key for entry in storage.entries(out, folder)] == []
    assert sorted(path.name for path in storage.workspace(out).iterdir()) == ["sweep.lock"]


def renderings(rendered: Path) -> Counter[str]:
    return Counter(line for line in rendered.read_text().splitlines() if not line.endswith("+"))


@pytest.mark.parametrize("second", ["at once", "in the middle"])
def test_two_runs_at_once_render_each_row_once(tmp_path, rows, second):
    out, rendered, count = tmp_path / "out", tmp_path / "rendered", 60
    with starting(rows(count), out, rendered) as start:
        lease_s = 12 if second == "at once" else 60
        first = start("one", lease_s)
        if second == "in the middle":
            told(first, "open")
            for _ in range(20):
                told(first, "row")
            first.send_signal(signal.SIGSTOP)  # for not so long that it would count as dead
        other = start("two", lease_s)
        told(other, "open")
        told(other, "row")
        first.send_signal(signal.SIGCONT)
        left = ended(first), ended(other)
    assert set(renderings(rendered).values()) == {1}
    assert len(renderings(rendered)) == count
    assert min(left) == 0  # whoever ends last has seen all the others' rows done
    check(out, count)
    assert {row.run_id for row in read(out)} == {"one", "two"}


@pytest.mark.parametrize("where", ["on this machine", "on another"])
def test_after_a_kill_the_other_run_does_all_that_is_left(tmp_path, rows, where):
    """On another machine the lease has to pass first: the second run waits for it before it ends."""
    out, rendered, count = tmp_path / "out", tmp_path / "rendered", 40
    with starting(rows(count), out, rendered) as start:
        first = start("one")
        told(first, "open")
        for _ in range(10):
            told(first, "row")
        if where == "on another":  # as if it were: nothing is known of its process
            first.send_signal(signal.SIGSTOP)  # it shall not beat again with its own
            beat = json.loads(storage.get(out, "runs/one.json") or b"")
            storage.put(out, "runs/one.json", json.dumps(beat | {"home": "elsewhere/pid/1/2"}).encode())
            storage.create(out, f"claims/{jobs_in(out, rows(count))[-1]}.json", b'{"run_id": "one"}')
        first.kill()
        first.wait()
        committed = {line[:-1] for line in rendered.read_text().splitlines() if line.endswith("+")}
        assert ended(start("two")) == 0
    assert all(n == 1 for job, n in renderings(rendered).items() if job in committed)
    assert sum(renderings(rendered).values()) <= count + 1  # the one that was under way
    check(out, count)


def jobs_in(out: Path, manifest: Path) -> list[str]:
    from t2vz.plan import plan

    return [item.job_id for item in plan(manifest, out)]


def test_kills_at_random_moments_lose_and_double_nothing(tmp_path, rows):
    """Two runs at once, one of them killed at a random moment, 24 times."""
    out, rendered, count, chance = tmp_path / "out", tmp_path / "rendered", 1000, random.Random(3)
    with starting(rows(count), out, rendered) as start:
        running = [start("run-0"), start("run-1")]
        for kill in range(24):
            victim = running.pop(chance.randrange(2))
            if kill % 4:  # else at any moment, that of its start, too
                told(victim, "open")
            try:
                victim.wait(chance.uniform(0, 0.3))
            except subprocess.TimeoutExpired:
                victim.kill()
                victim.wait()
            running.append(start(f"run-{kill + 2}"))
        assert len(ResultStore(out).done()) < count, "it was done before the last kill: give it more rows"
        for process in running:
            process.communicate(timeout=120)
        assert ended(start("last")) == 0
    lines = rendered.read_text().splitlines()
    acknowledged = Counter(line[:-1] for line in lines if line.endswith("+"))
    assert set(acknowledged.values()) <= {1}
    assert set(acknowledged) <= set(ResultStore(out).done())
    assert sum(renderings(rendered).values()) <= count + 24  # at most one under way a kill
    check(out, count)
