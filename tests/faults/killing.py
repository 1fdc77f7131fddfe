"""Runs of `t2vz run` that are killed, process by process, and what must be true afterwards.

A victim is found by walking the run's process tree, so it may be anything that a run starts: the flow's process, in
which the table is written too, a worker, whatever a worker has started to decode with. Moments are any, or those at
which a process has a file of the wanted kind open.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from deltalake import DeltaTable

from t2vz.media.encode import checksum
from t2vz.results import ResultStore, read

MOMENTS = ("any", "start", "decode", "encode", "table")
STUB_MOMENTS = ("any", "start", "table")  # there are no media

# Processes of their own, which share nothing but that what is heavy is imported when they are forked.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["t2vz.modes.text", "t2vz.models.loading", "diffusers", "transformers", "t2vz_flows.render_manifest", "t2vz.cli"]
)
_WAIT_S = 900  # on a busy machine


STUB = Path(__file__).parents[1] / "benchmarks"


def command(arguments: list[str], api: str, log: str, is_stub: bool) -> None:
    """A run's own process: as the command line has it. is_stub: with stages that only take time."""
    if is_stub:
        from t2vz import workers

        sys.path.insert(0, str(STUB))
        workers.RENDER = "stub:render"
        os.environ["T2VZ_STUB"] = '{"decode": 0.02, "generate": 0.08, "encode": 0.04}'
    os.environ["PREFECT_API_URL"] = api
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()  # Prefect was imported before
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.argv = ["t2vz", *arguments]
    from t2vz.cli import main

    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


@dataclass
class Tally:
    """What was tried. kills: by moment and victim."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    rows: int = 0
    table_leftovers: int = 0


class Batch:
    """One manifest and its output folder, whose runs are killed. log: what all its runs printed."""

    def __init__(self, manifest: Path, out: Path, rows: int, sources: tuple[Path, ...], api: str, seed: int) -> None:
        self.manifest, self.out, self.rows, self.sources, self.api = manifest, out, rows, sources, api
        self.is_stub = not sources
        self.chance = random.Random(seed)
        self.log = out.with_suffix(".log")
        self.finished: dict[str, tuple[str, tuple[int, int]]] = {}
        self.tally = Tally(rows=rows)

    def start(self, *options: str) -> Any:
        arguments = ["run", str(self.manifest), "--out", str(self.out), "--device", "cpu", "--in-flight", "2", *options]
        process = PROCESSES.Process(target=command, args=(arguments, self.api, str(self.log), self.is_stub))
        process.start()
        self.tally.runs += 1
        return process

    def kill_until(self, kills: int, options: Callable[[random.Random], tuple[str, ...]]) -> None:
        """Start runs and kill, until so many were met or all is done."""
        while self.tally.kills.total() < kills and len(self.finished) < self.rows:
            process = self.start(*options(self.chance))
            while process.is_alive() and self.tally.kills.total() < kills:
                moment = self.chance.choice(STUB_MOMENTS if self.is_stub else MOMENTS)
                victim = self._victim(process.pid, moment)
                if victim is None:
                    continue
                is_flow = victim.pid == process.pid
                name = "flow" if is_flow else _name(victim)
                with suppress(psutil.NoSuchProcess):
                    victim.kill()
                    self.tally.kills[f"{name}, {moment}"] += 1
                if is_flow:
                    process.join(_WAIT_S)
                self.check_unchanged()
            if process.is_alive():
                process.kill()
            process.join(_WAIT_S)
            self.check_unchanged()

    def _victim(self, pid: int, moment: str) -> psutil.Process | None:
        """The process to kill, when its moment has come; None if the run ended meanwhile, or it did not come."""
        if moment == "any":
            time.sleep(self.chance.uniform(0, 1.5))
        elif moment == "start":
            time.sleep(self.chance.uniform(0, 0.3))
        elif not self._awaited(pid, moment):
            return None
        tree = _tree(pid)
        if not tree:
            return None
        if moment == "table":
            return tree[0]
        if moment in ("decode", "encode"):
            at_it = [process for process in tree if self._is_at(process, moment)]
            tree = at_it or tree
            time.sleep(self.chance.uniform(0, 0.01))
        return self.chance.choice(tree)

    def _awaited(self, pid: int, moment: str) -> bool:
        deadline = time.monotonic() + 10
        before = self._table_files()
        while psutil.pid_exists(pid) and time.monotonic() < deadline:
            if moment == "table":
                if self._table_files() != before:
                    time.sleep(self.chance.uniform(0, 0.02))
                    return True
            elif any(self._is_at(process, moment) for process in _tree(pid)):
                return True
            time.sleep(0.004)
        return False

    def _is_at(self, process: psutil.Process, moment: str) -> bool:
        for file in _open_files(process.pid):
            if moment == "encode" and "/.work/" in file and "/video-" in file:
                return True
            if moment == "decode" and any(file == str(source) for source in self.sources):
                return True
        return False

    def _table_files(self) -> int:
        found = 0
        for folder in ("results", "results/_delta_log"):
            with suppress(FileNotFoundError):
                found += len(os.listdir(self.out / folder))
        return found

    def check_unchanged(self) -> None:
        """What was finished is finished, and its file is the one of then."""
        now = {
            job: (done.output_uri, _stamp(self.out / done.output_uri))
            for job, done in ResultStore(self.out).done().items()
        }
        assert self.finished.items() <= now.items(), "a finished row was lost, or rendered again"
        self.finished = now

    def check_end(self) -> None:
        """After one more run: every row once, all checksums right, no temporary file, nothing rendered again."""
        process = self.start()
        process.join(_WAIT_S)
        assert process.exitcode == 0, self.log.read_text()[-3000:]
        self.check_unchanged()
        rows = list(read(self.out))
        assert sorted(row.id for row in rows) == sorted(f"row-{i}" for i in range(self.rows))
        assert {row.status for row in rows} == {"ok"}
        # A row whose source could not be looked at, as the process that does was killed, was of another job then.
        earlier = [row for row in read(self.out, all=True) if row.job_id not in self.finished]
        assert {row.status for row in earlier} <= {"failed"}
        table = DeltaTable(self.out / "results")
        jobs = table.to_pyarrow_dataset().to_table(columns=["job_id"])["job_id"].to_pylist()
        assert sorted(jobs) == sorted([*self.finished, *(row.job_id for row in earlier)])
        for row in rows:
            path = self.out / row.output_uri
            assert checksum(path) == (row.output_sha256, row.output_bytes), row.id
            if path.is_file():  # by other means than its own
                assert hashlib.sha256(path.read_bytes()).hexdigest() == row.output_sha256
        found = strays(self.out)
        assert not found, found
        used = {Path(file).name for file in table.file_uris()}
        on_disk = {path.name for path in (self.out / "results").glob("*.parquet")}
        assert used <= on_disk
        self.tally.table_leftovers = len(on_disk - used)
        assert "Traceback" not in self.log.read_text()


def strays(out: Path) -> list[str]:
    """What lies in the output folder and is neither a result nor the table's (whose replaced files stay for a week)."""
    named = {row.output_uri for row in read(out) if row.output_uri}
    pictures = {f"{folder}/{Path(uri).name}.webp" for folder in ("strips", "thumbnails") for uri in named}
    allowed = named | pictures | {".work/sweep.lock"}
    found = []
    for path in out.rglob("*"):
        key = path.relative_to(out).as_posix()
        inside = any(key.startswith(f"{uri}/") for uri in named)
        is_table = key.startswith("results/") and path.suffix in (".parquet", ".json", ".crc") and "#" not in path.name
        is_table = is_table or path.name == "_last_checkpoint"
        if path.is_file() and not (key in allowed or inside or is_table):
            found.append(key)
    return found


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def _tree(pid: int) -> list[psutil.Process]:
    """The process and all below it; none if it is gone. Not psutil's way, which looks at every process there is."""
    found, left = [], [pid]
    while left:
        at = left.pop()
        with suppress(psutil.NoSuchProcess, OSError):
            found.append(psutil.Process(at))
            for task in os.listdir(f"/proc/{at}/task"):
                with suppress(OSError):
                    left += map(int, Path(f"/proc/{at}/task/{task}/children").read_text().split())
    return found


def _open_files(pid: int) -> Iterator[str]:
    with suppress(OSError):
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                yield os.readlink(f"/proc/{pid}/fd/{descriptor}")


def _name(process: psutil.Process) -> str:
    try:
        told = " ".join(process.cmdline())
    except psutil.Error:
        return "child"
    return "worker" if "t2vz.workers" in told else "child"
