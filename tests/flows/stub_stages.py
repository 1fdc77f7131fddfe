"""render-manifest with stages that only take time and write a small file: for tests of what is around them.

Is the entrypoint of deployments in tests. STUB_STEP_S: seconds of each of ten steps of generation.
"""

from __future__ import annotations

import os
import time
from fractions import Fraction
from pathlib import Path

from t2vz import storage
from t2vz.media.encode import Encoded, checksum, publish
from t2vz.render import Render
from t2vz_flows.render_manifest import render_manifest

__all__ = ["render_manifest"]


def _generate(self: Render) -> None:
    self.seconds["model"] = 0.0
    self.device = "cpu"
    if not storage.is_remote(self.settings.out):
        with Path(self.settings.out, "begun.txt").open("a") as begun:  # one write: runs at the same time may share it
            begun.write(f"{self.job.row.id} {os.getpid()}\n")
    for _ in range(10):
        self.settings.check_stopping()
        time.sleep(float(os.environ.get("STUB_STEP_S", "0.01")))


def _encode(self: Render) -> None:
    draft = self.workspace / "video"
    draft.write_text(f"{self.job.job_id} {self.job.seed}")
    sha256, size_bytes = checksum(draft)
    made = Encoded(draft, sha256, size_bytes, 0, 64, 64, 2, Fraction(4), "h264", False)
    self.output_uri = f"videos/{self.job.row.id}-{sha256[:12]}.mp4"
    self.encoded = publish(made, self.settings.out, self.output_uri)


Render._generate = _generate  # type: ignore[method-assign]
Render._encode = _encode  # type: ignore[method-assign]
