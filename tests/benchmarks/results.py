"""Rows a second of committing and merging results, and the time that `done` takes over all of them.

python tests/benchmarks/results.py [rows]
"""

import json
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta

from t2vz.results import ResultRow, ResultStore, _to_arrow, read

COMMITTED = 2_000  # through records; the rest is merged directly, for committing takes a file each


def make(n: int) -> ResultRow:
    started = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=n)
    return ResultRow(
        job_id=f"{n:032x}",
        run_id="benchmark",
        id=f"row {n}",
        manifest="m.csv",
        row_number=n,
        status="ok",
        mode="text",
        prompt=f"a small ball, number {n}, rolling over a lawn in the evening light",
        parameters=json.dumps({"num_inference_steps": 50, "guidance_scale": 7.5, "n": n}),
        seed=n,
        model="mini",
        output_uri=f"videos/{n:032x}.mp4",
        output_sha256=f"{n:064x}",
        output_bytes=100_000,
        output_mtime_ns=n,
        started_at=started,
        finished_at=started + timedelta(seconds=1),
    )


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    figures: dict[str, float] = {"rows": rows}
    with tempfile.TemporaryDirectory() as out:
        store = ResultStore(out)

        for first in range(COMMITTED, rows, 20_000):
            store._merge(_to_arrow([make(n) for n in range(first, min(first + 20_000, rows))]))

        some = [make(n) for n in range(COMMITTED)]
        begun = time.perf_counter()
        for row in some:
            store.commit(row)
        figures["commit_rows_per_s"] = round(COMMITTED / (time.perf_counter() - begun))

        begun = time.perf_counter()
        figures["flushed"] = store.flush()
        figures["flush_rows_per_s"] = round(COMMITTED / (time.perf_counter() - begun))

        begun = time.perf_counter()
        figures["done"] = len(store.done())
        figures["done_s"] = round(time.perf_counter() - begun, 2)

        begun = time.perf_counter()
        figures["current"] = len(read(out))
        figures["read_s"] = round(time.perf_counter() - begun, 2)
    print(json.dumps({"benchmark": "results", **figures}))


if __name__ == "__main__":
    main()
