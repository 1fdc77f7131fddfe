"""The table is compacted and vacuumed while others write to it and read it; some of them are killed."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from deltalake import DeltaTable

from t2vz.results import ResultStore

WORKER = Path(__file__).with_name("table_worker.py")
WRITERS, ROWS, KILLS = 3, 40, 12


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(what: str, name: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(WORKER), str(tmp_path / "out"), what, name, str(ROWS)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_compaction_and_vacuum_beside_writers_and_readers_lose_nothing(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    chance, out = random.Random(1), tmp_path / "out"
    writers = [start("write", f"writer-{i}") for i in range(WRITERS)]
    reader, committed, kills = start("read", "reader"), [], 0
    while any(writer.poll() is None for writer in writers) and kills < KILLS:
        compacting = start("compact", "compact")
        assert compacting.stdout is not None
        compacting.stdout.readline()  # once whole, then at any moment
        time.sleep(chance.uniform(0, 0.3))
        compacting.kill()
        kills += 1
    for writer in writers:
        told, log = writer.communicate(timeout=120)
        assert writer.returncode == 0, log
        committed += told.split()
    reader.kill()
    _, log = reader.communicate()
    assert "Error" not in log, log

    assert len(committed) == WRITERS * ROWS
    store = ResultStore(out)
    store.compact()
    assert set(store.done()) == set(committed)
    jobs = DeltaTable(out / "results").to_pyarrow_dataset().to_table(columns=["job_id"])["job_id"].to_pylist()
    assert sorted(jobs) == sorted(committed)
    assert store.table_files() == 1
