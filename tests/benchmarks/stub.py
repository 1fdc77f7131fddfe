"""A stand-in for the stages, with the costs that it is told and faults at will: what goes on around them is real.

Results, events, retries, snapshots' absence, files and their checksums are as of real rows; the video is a tiny file.

T2VZ_STUB in the environment, a JSON object of seconds: decode, generate, encode, model (loading it); computing (true:
generation keeps a core busy instead of sleeping). A prompt may ask for trouble, in words:

kill, kill-once      SIGKILL; only at the first attempt
fault, fault-once    a device lost
fail                 an error that stays
slow                 an error that mends at the third try
long                 until it is stopped; hang: deaf to that, too
say                  a log line with the process's number
wait                 until the file `go` is in the output folder
pair                 until such rows are under way in two processes
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import time
from fractions import Fraction
from pathlib import Path

from t2vz import render as rendering
from t2vz.errors import DeviceLost, InvalidFrames, StorageTimeout
from t2vz.events import Event, emit
from t2vz.media.encode import Encoded, publish
from t2vz.plan import Job
from t2vz.render import Render, Settings
from t2vz.results import ResultRow

STEPS = 8
_loaded: set[tuple[str, ...]] = set()
_log = logging.getLogger("t2vz.stub")


def render(job: Job, settings: Settings, lost: int = 0) -> ResultRow | None:
    return rendering.render(job, settings, lost, Stub)


class Stub(Render):
    stages = ("decode", "generate", "encode")

    @property
    def costs(self) -> dict[str, float]:
        return json.loads(os.environ.get("T2VZ_STUB", "{}"))

    def _decode(self) -> None:
        self._spend(self.costs.get("decode", 0.0))

    def _generate(self) -> None:
        words = self.spec.prompt.split()
        self.device = f"worker of process {os.getpid()}"
        self.seconds["model"] = 0.0
        if (model := (self.job.model_revision, self.spec.mode, self.spec.dtype)) not in _loaded:
            self._spend(self.costs.get("model", 0.0))
            self.seconds["model"] = 1.0  # tells that it was loaded
            _loaded.clear()
            _loaded.add(model)
        if "say" in words:
            _log.warning("%s is in process %d", self.job.row.id, os.getpid())
        steps = 10**6 if "long" in words or "hang" in words else STEPS
        for step in range(steps):
            self._generate_step(self.costs.get("generate", 0.0) / STEPS or ("long" in words or "hang" in words) * 0.02)
            if "hang" not in words:
                self.settings.check_stopping()
            emit(Event("step", self.job.row.id, "generate", step + 1, steps))
            if step == STEPS // 2:
                self._trouble(words)

    def _may_go_on(self, words: list[str]) -> bool:
        if "pair" in words:
            (self.settings.workspace / f"pair-{os.getpid()}").touch()
            return len(list(self.settings.workspace.glob("pair-*"))) > 1
        return "wait" not in words or Path(self.settings.out, "go").exists()

    def _trouble(self, words: list[str]) -> None:
        if "kill" in words or ("kill-once" in words and not self.lost):
            os.kill(os.getpid(), signal.SIGKILL)
        if "fault" in words or ("fault-once" in words and not self.lost):
            raise DeviceLost("device lost: CUDA error: an illegal memory access was encountered")
        if "fail" in words:
            raise InvalidFrames("NaN values in the frames")
        if "slow" in words and self.attempts["generate"] < 3:
            raise StorageTimeout("no answer in time")

    def _encode(self) -> None:
        self._spend(self.costs.get("encode", 0.0))
        while not self._may_go_on(self.spec.prompt.split()):  # here, as another row has the device by now
            self.settings.check_stopping()
            time.sleep(0.01)
        content = f"{self.job.job_id} {self.spec.prompt}".encode()
        draft = self.workspace / "video"
        draft.write_bytes(content)
        stat, digest = draft.stat(), hashlib.sha256(content).hexdigest()
        encoded = Encoded(
            draft, digest, stat.st_size, stat.st_mtime_ns, 64, 64, self.job.frames, Fraction(4), "h264", False
        )
        self.output_uri = f"videos/{rendering.file_name(self.job.row.id)}-{digest[:12]}.mp4"
        self.encoded = publish(encoded, self.settings.out, self.output_uri)

    def _spend(self, seconds: float) -> None:
        time.sleep(seconds)

    def _generate_step(self, seconds: float) -> None:
        if not self.costs.get("computing"):
            time.sleep(seconds)
            return
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass
