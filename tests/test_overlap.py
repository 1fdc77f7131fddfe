"""Runs in processes of their own at one manifest at once: each row is rendered once, kept once, and lost never."""

from __future__ import annotations

import json
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from overlapping import check, ended, renderings, starting, told

from t2vz import storage
from t2vz.results import ResultStore, read


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[int], Path]:
    def write(count: int) -> Path:
        path = tmp_path / "manifest.csv"
        path.write_text("id,prompt\n" + "".join(f"row-{n},a ball\n" for n in range(count)))
        return path

    return write


@pytest.mark.parametrize("second", ["at once", "in the middle"])
def test_two_runs_at_once_render_each_row_once(tmp_path, rows, second):
    out, rendered, count = tmp_path / "out", tmp_path / "rendered", 60
    with starting(rows(count), out, rendered) as start:
        lease_s = 12 if second == "at once" else 24
        first = start("one", lease_s)
        if second == "in the middle":
            told(first, "open")
            for _ in range(20):
                told(first, "row")
            first.send_signal(signal.SIGSTOP)  # for not so long that it would count as dead
        other = start("two", lease_s)
        told(other, "open")
        told(other, "row", "skipped")
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
    """Two runs at once, one of them killed at a random moment, 20 times."""
    out, rendered, count, chance = tmp_path / "out", tmp_path / "rendered", 800, random.Random(3)
    with starting(rows(count), out, rendered) as start:
        running = [start("run-0"), start("run-1")]
        for kill in range(20):
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
    assert sum(renderings(rendered).values()) <= count + 20  # at most one under way a kill
    check(out, count)
