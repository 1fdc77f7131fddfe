"""The long form of the fault tests: hundreds of kills, and many rows in one go. RELIABILITY.md has its figures.

python tests/benchmarks/faults.py [--kills 200] [--stub-kills 200] [--rows 10000] [--seed 1]

kills: processes of `t2vz run` that got SIGKILL, by victim and moment; after each batch one run more, and then every
row is there exactly once, all checksums are right, nothing temporary is left and no finished row was rendered again, or
this ends in an assertion. table_leftovers: files of the table that killed merges left, which go after a week.

rows: rows whose stages take no time, rendered by one run; memory, open files and speed as it goes along.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

BESIDE = Path(__file__).parent
for folder in (BESIDE, BESIDE.parent / "faults"):
    sys.path.insert(0, str(folder))
from batches import batch, options, stub_batch, stub_options  # noqa: E402

BATCH_ROWS, BATCH_KILLS = 24, 25
STUB_ROWS, STUB_KILLS = 200, 50
SAMPLE_S = 1.0

# A run's own process, with the stub in the stages' place.
RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from t2vz import workers
workers.RENDER = "stub:render"
from t2vz.cli import main
sys.exit(main(sys.argv[2:]))
"""


def say(*what: object) -> None:
    print(*what, file=sys.stderr, flush=True)


def kills(folder: Path, api: str, number: int, seed: int, *, stub: bool = False) -> dict[str, Any]:
    """Batch after batch until so many processes were killed. stub: of rows that only take time."""
    make, size, most = (stub_batch, STUB_ROWS, STUB_KILLS) if stub else (batch, BATCH_ROWS, BATCH_KILLS)
    met, runs, rows, leftovers, begun = Counter[str](), 0, 0, 0, time.monotonic()
    while met.total() < number:
        one = make(folder / f"batch-{seed}", size, api, seed)
        one.kill_until(min(most, number - met.total()), stub_options if stub else options)
        one.check_end()
        met += one.tally.kills
        runs, rows, leftovers = runs + one.tally.runs, rows + one.rows, leftovers + one.tally.table_leftovers
        seed += 1000
        say(f"  {met.total()} kills, {rows} rows, {runs} runs, {time.monotonic() - begun:.0f} s: {dict(met)}")
    return {
        "kills": met.total(),
        "by_victim": dict(sum((Counter({key.split(", ")[0]: n}) for key, n in met.items()), Counter())),
        "by_moment": dict(sum((Counter({key.split(", ")[1]: n}) for key, n in met.items()), Counter())),
        "runs": runs,
        "rows": rows,
        "table_leftovers": leftovers,
        "wall_s": round(time.monotonic() - begun),
    }


def many_rows(folder: Path, api: str, rows: int) -> dict[str, Any]:
    """One run of so many rows that take no time: what its process holds, and how fast it is, along the way."""
    folder.mkdir()
    manifest, out = folder / "manifest.csv", folder / "out"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "seed", "video_length", "num_inference_steps"])
        writer.writerows([f"row-{n}", f"scene {n}", n, 2, 3] for n in range(rows))
    command = [sys.executable, "-c", RUN, str(BESIDE), "run", str(manifest), "--out", str(out), "--device", "cpu", "-q"]
    environment = {**os.environ, "PREFECT_API_URL": api, "T2VZ_STUB": "{}", "PREFECT_LOGGING_LEVEL": "WARNING"}
    samples: list[tuple[float, int, int, int]] = []  # seconds, rows done, bytes, open files
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        watched, begun = psutil.Process(process.pid), time.monotonic()
        while process.poll() is None:
            time.sleep(SAMPLE_S)
            try:
                done = len(os.listdir(out / "videos")) if (out / "videos").is_dir() else 0
                held = watched.memory_info().rss, watched.num_fds()
            except psutil.Error:
                break
            samples.append((time.monotonic() - begun, done, *held))
        told = process.communicate()[0]
    assert process.returncode == 0, told
    assert f"{rows} rendered" in told.splitlines(), told
    under_way = [sample for sample in samples if 0 < sample[1] < rows]
    parts = [[s for s in under_way if low <= s[1] / rows < low + 0.2] for low in (0.0, 0.2, 0.4, 0.6, 0.8)]
    return {
        "rows": rows,
        "wall_s": round(samples[-1][0], 1),
        # Of each fifth of the rows.
        "rows_per_s": [round((p[-1][1] - p[0][1]) / (p[-1][0] - p[0][0]), 1) for p in parts if len(p) > 1],
        "memory_mb": [round(max(s[2] for s in p) / 1e6) for p in parts if p],
        "open_files": [max(s[3] for s in p) for p in parts if p],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in batches of real rows")
    parser.add_argument("--stub-kills", type=int, default=200, help="in batches of rows that only take time")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="t2vz-faults-") as name:
        os.environ.update(PREFECT_HOME=f"{name}/prefect", T2VZ_CACHE_DIR=f"{name}/cache", HF_HUB_OFFLINE="1")
        os.environ.update(DO_NOT_TRACK="1", PREFECT_SERVER_ANALYTICS_ENABLED="false")
        from t2vz_flows.server import api

        with api() as url:
            figures: dict[str, Any] = {"benchmark": "faults", "cores": os.cpu_count(), "seed": asked.seed}
            if asked.kills:
                say("kills")
                figures["kills"] = kills(Path(name), url, asked.kills, asked.seed)
            if asked.stub_kills:
                say("kills, rows that only take time")
                figures["stub_kills"] = kills(Path(name, "stub"), url, asked.stub_kills, asked.seed, stub=True)
            if asked.rows:
                say("many rows")
                figures["rows"] = many_rows(Path(name, "rows"), url, asked.rows)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
