"""A run in a process of its own, whose stages only write a small file: what goes on around them is what is tested.

python overlap_worker.py MANIFEST OUT RUN_ID RENDERED LEASE_S SECONDS

Appends the job's id to the file RENDERED once per rendering that was begun, with + once it is committed; prints "row"
as each row ends.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterator
from fractions import Fraction

from t2vz import claims, render, storage
from t2vz.media.encode import Encoded, checksum, publish
from t2vz.plan import Job, plan
from t2vz.render import Render, Settings, opening


def main() -> None:
    manifest, out, run_id, rendered, lease_s, seconds = sys.argv[1:7]
    settings = Settings(storage.normal(out), manifest, run_id, device="cpu", lease_s=float(lease_s))
    tally = os.open(rendered, os.O_APPEND | os.O_CREAT | os.O_WRONLY)

    class Tiny(Render):
        def run(self, stage: str) -> None:
            if stage != "encode":
                os.write(tally, f"{self.job.job_id}\n".encode())
                time.sleep(random.uniform(0.5, 1.5) * float(seconds))
                return
            self.workspace.mkdir(parents=True, exist_ok=True)
            draft = self.workspace / "draft.mp4"
            draft.write_text(f"video of {self.job.job_id}")
            sha256, size_bytes = checksum(draft)
            done = Encoded(draft, sha256, size_bytes, draft.stat().st_mtime_ns, 64, 64, 1, Fraction(4), "h264", False)
            self.output_uri = f"videos/{render.file_name(self.job.row.id)}-{sha256[:12]}.mp4"  # as `Render` names it
            self.encoded = publish(done, settings.out, self.output_uri)

    def ended(job: Job) -> Iterator[Job]:
        """The job again if another run is at it."""
        row = render.render(job, settings, kind=Tiny)
        if row is not None and row.status == "ok":
            os.write(tally, f"{job.job_id}+\n".encode())
        print("row" if row is None or row.status == "ok" else row.status, flush=True)
        if row is not None and row.status == "skipped":
            yield job

    jobs = [item for item in plan(manifest, out) if isinstance(item, Job)]
    with opening(settings):
        print("open", flush=True)
        elsewhere: list[Job] = []
        for n, job in enumerate(jobs, 1):
            elsewhere += ended(job)
            if n % 20 == 0:
                render.merge_results(settings)
        if elsewhere:
            claims.await_others(settings.out, run_id, settings.stopping, settings.lease_s)
        left = [job for late in elsewhere for job in ended(late)]
    print(f"end {len(left)}", flush=True)


if __name__ == "__main__":
    main()
