"""A process at a results table: python table_worker.py OUT WHAT NAME COUNT

WHAT: `write` commits COUNT rows and merges them now and then, `compact` joins small files and vacuums until it is
killed, `read` reads until it is killed, and fails if a row that was there once is missing. Prints a line for each row,
or each time.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime

from t2vz.errors import T2VZError
from t2vz.results import ResultRow, ResultStore


def main() -> None:
    out, what, name, count = sys.argv[1:5]
    store = ResultStore(out)
    if what == "write":
        for number in range(int(count)):
            now = datetime.now(UTC)
            job = f"{name}-{number}"
            row = ResultRow(
                job_id=job, run_id=name, id=job, status="ok", started_at=now, finished_at=now,
                output_uri=f"videos/{job}", output_bytes=1, output_mtime_ns=1, output_sha256=job,
            )  # fmt: skip
            store.commit(row)
            print(job, flush=True)
            if number % 5 == 4:
                retried(store.flush)
        retried(store.flush)
        return
    seen: set[str] = set()
    while True:
        if what == "compact":
            retried(store.compact)
        else:
            now_there = set(store.done())
            assert seen <= now_there, seen - now_there
            seen = now_there
        print(len(seen), flush=True)


def retried(work: object) -> None:
    """Once more later, if others are faster every time: the caller's next round."""
    try:
        work()  # type: ignore[operator]
    except T2VZError as error:
        if not error.retryable:
            raise


if __name__ == "__main__":
    main()
