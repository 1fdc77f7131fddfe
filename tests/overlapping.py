"""Starts runs in processes of their own (`overlap_worker.py`), and checks what they leave."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from deltalake import DeltaTable

from t2vz import storage
from t2vz.results import ResultStore, read
from t2vz.storage import Place

WORKER = Path(__file__).with_name("overlap_worker.py")
Start = Callable[..., "subprocess.Popen[str]"]


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


def told(process: subprocess.Popen[str], *lines: str) -> None:
    """Wait for the next line, which must be one of these."""
    assert process.stdout is not None
    assert process.stdout.readline().strip() in lines


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
