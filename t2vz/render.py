"""One job, whole: decode, conditions, generate, encode, commit. The only place where the stages meet."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from t2vz import claims, storage
from t2vz.clip import Clip
from t2vz.errors import (
    ContentWithheld,
    DeviceLost,
    ModelError,
    OutputError,
    T2VZError,
    harmless,
    translate,
    translating,
    without_secrets,
)
from t2vz.events import Event, emit
from t2vz.manifest import cells_of
from t2vz.media import strip
from t2vz.media.limits import Limits
from t2vz.media.local import naming
from t2vz.media.provenance import SIGNED_FORMAT, Signing
from t2vz.models import policy, table
from t2vz.models.policy import ModelPolicy
from t2vz.plan import ContentPolicy, Job, Unready, check_mask_length, check_out, is_there, suffices
from t2vz.results import Finished, ResultRow, ResultStore
from t2vz.sheet import strip_key, thumbnails_key
from t2vz.spec import TEXT_FPS, TEXT_FRAMES, JobSpec, canonical, evaluations, t0_t1
from t2vz.storage import Place

if TYPE_CHECKING:
    from t2vz.engine.lockstep import Snapshot
    from t2vz.media.encode import Encoded
    from t2vz.models.loading import Components
    from t2vz.models.safety import Checker
    from t2vz.modes import Generated, Request

_log = logging.getLogger(__name__)

SNAPSHOT_KEPT_S = 30 * 24 * 3600
COMMIT_TRIES = 5
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # devices of Windows, whatever follows

STAGES = ("decode", "conditions", "generate", "encode")
# Their models would compete for the device, and loading one changes torch's default dtype for the whole process.
DEVICE_STAGES = ("conditions", "generate")


@dataclass(frozen=True)
class Retries:
    """How often each stage is tried again if its error can mend by itself, and after how long.

    backoff_s: the first delay; doubled each time, and up to half as much again at random, so that rows which
    failed together don't come back together.
    """

    decode: int = 2
    conditions: int = 1
    generate: int = 2
    encode: int = 3
    backoff_s: float = 2.0

    def delays_s(self, stage: str) -> Iterator[float]:
        """The delay before each further try of `stage`."""
        for tried in range(getattr(self, stage)):
            yield self.backoff_s * 2.0**tried * random.uniform(1, 1.5)


def can_mend(error: T2VZError) -> bool:
    """True if the same stage may succeed in this process a little later. A lost device may come back, too, but not
    to the process that lost it.
    """
    return error.retryable and not isinstance(error, DeviceLost)


@dataclass(frozen=True)
class Settings:
    """What the rows of a run share. Can be sent to other processes; `stopping` is each process's own.

    out: the output folder, or s3://bucket/prefix. manifest: where the rows come from, for the results.
    device: "auto", "cpu", "cuda:0", …
    limits, models: what sources and models the rows may name.
    snapshot_s: seconds of denoising after which its state is saved, for a later run to go on from.
    quality: measure the frames of every row (`t2vz.quality`). clip_model: folder or hub id of a CLIP model that
    measures them, too.
    content: what happens to frames that the model's safety checker flags. signing: files are signed with it (C2PA).
    lease_s: after so long without a sign of life a run counts as dead, and its rows are other runs' to do.
    split: processes that share the frames of each clip (`modes.split`); the run's own process leads them.
    compiled: have torch compile the UNet's blocks (`engine.speed`).
    stopping: once set, rows under way end at their next frame or step, without a result: the next run does them.
    """

    out: Place
    manifest: str
    run_id: str
    device: str = "auto"
    limits: Limits = field(default_factory=Limits)
    models: ModelPolicy = field(default_factory=ModelPolicy)
    snapshot_s: float = 30.0
    quality: bool = False
    clip_model: str | None = None
    compiled: bool = False
    split: int = 1
    content: ContentPolicy = "flag"
    signing: Signing | None = None
    lease_s: float = claims.LEASE_S
    retries: Retries = field(default_factory=Retries)
    stopping: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "stopping"}
        return partial(Settings, **values), ()

    def check_stopping(self) -> None:
        if self.stopping.is_set():
            raise KeyboardInterrupt

    @property
    def measures(self) -> bool:
        return self.quality or self.clip_model is not None

    @property
    def workspace(self) -> Path:
        """This run's temporary files, on the output's file system so that finished files can be renamed."""
        return storage.workspace(self.out) / self.run_id

    def store(self) -> ResultStore:
        return ResultStore(self.out)


@contextmanager
def opening(settings: Settings) -> Iterator[None]:
    """The output folder made ready for a run; leftovers of runs that were killed are removed or, if they are
    results, merged into the table, as are this run's in the end.

    Every run holds a lock on a file of its own, which the system releases when its process ends, however it
    ends: so a run that is still alive is told from a dead one. Raises OutputError.
    """
    work = settings.workspace.parent
    with translating("encode", str(settings.out)):
        check_out(settings.out)
        try:
            work.mkdir(parents=True, exist_ok=True)
            if not storage.is_remote(settings.out):
                Path(settings.out, "videos").mkdir(exist_ok=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise OutputError(f"{settings.out}: can't be made a folder; choose another output folder") from error
        with _locked(work / "sweep.lock", wait=True):
            for lock in work.glob("*.run"):
                with suppress(BlockingIOError), _locked(lock, wait=False):
                    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                    lock.unlink(missing_ok=True)
            own_path = work / f"{settings.run_id}.run"
            own = os.open(own_path, os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(own)
                raise OutputError(
                    f"run {settings.run_id} is still under way in another process; wait for its end, or stop it"
                ) from None
            settings.workspace.mkdir(exist_ok=True)
            _sweep_snapshots(work / "snapshots")
    try:
        with claims.living(settings.out, settings.run_id, settings.lease_s):
            begun_ns = Path(own_path).stat().st_mtime_ns
            merge_results(settings)
            try:
                yield
            finally:
                merge_results(settings)
                _sweep_drafts(settings, begun_ns)
    finally:
        shutil.rmtree(settings.workspace, ignore_errors=True)
        own_path.unlink(missing_ok=True)
        os.close(own)


def merge_results(settings: Settings) -> None:
    """Merge what is committed into the results table; what other writers keep from it waits on. Raises ResultsError,
    OutputError.
    """
    try:
        settings.store().flush()
    except T2VZError as error:
        if not error.retryable:
            raise
        _log.warning("the results wait to be merged into the table: %s", error)


def _sweep_snapshots(folder: Path) -> None:
    """Remove those that no run came back for: their rows were changed or given up."""
    for snapshot in folder.glob("*.pt"):
        with suppress(FileNotFoundError):  # another run has just done its row
            if time.time() - snapshot.stat().st_mtime > SNAPSHOT_KEPT_S:
                snapshot.unlink()


def _sweep_drafts(settings: Settings, begun_ns: int) -> None:
    """Remove what was being written when this run began: by a killed process, if no other run lives."""
    with suppress(OSError, T2VZError):
        drafts = [draft for draft in storage.drafts(settings.out) if draft.stat().st_mtime_ns < begun_ns]
        if drafts and claims.living_runs(settings.out) == {settings.run_id}:
            for draft in drafts:
                draft.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[None]:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


class Render:
    """One job under way. `run` does a stage; a stage that failed can be run again, its inputs are still there.

    lost: earlier attempts at the job in this run, whose process died.
    """

    def __init__(self, job: Job, settings: Settings, lost: int = 0) -> None:
        self.job = job
        self.lost = lost
        self.spec: JobSpec = job.row.spec
        self.settings = settings
        self.started_at = _dated(job, datetime.now(UTC))
        self.attempts: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self.clip: Clip | None = None
        self.conditions: tuple[NDArray[np.uint8], ...] = ()
        self.scenes: tuple[int, ...] = (0,)
        self.components: Components | None = None
        self.request: Request | None = None
        self.generated: Generated | None = None
        self.encoded: Encoded | None = None
        self.output_uri = ""
        self.content = "unchecked" if settings.content == "off" else "no checker"
        self.content_frames: int | None = None  # flagged
        self._checker: Checker | None = None
        self.signed: bool | None = None
        self.quality: dict[str, float] = {}
        self._thumbnails: list[NDArray[np.uint8]] = []  # of source and conditions
        self._edges: NDArray[np.uint8] | None = None  # the edge condition, for as long as quality needs it
        self.device = ""
        self._steps_done = 0
        self._snapshot_due = 0.0

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that this job needs, in order."""
        needed = {"generate", "encode"}
        if self.spec.mode != "text":
            needed.add("decode")
        if self.spec.conditions_extracted:
            needed.add("conditions")
        return tuple(stage for stage in STAGES if stage in needed)

    @property
    def workspace(self) -> Path:
        return self.settings.workspace / self.job.job_id

    def run(self, stage: str) -> None:
        """Do a stage once. Raises T2VZError."""
        self.attempts[stage] = self.attempts.get(stage, 0) + 1
        emit(Event("stage", self.job.row.id, stage))
        self.settings.check_stopping()
        start = time.monotonic()
        subject = self.spec.source or self.spec.condition_video or ""
        try:
            with translating(stage, subject if stage in ("decode", "conditions") else ""):
                self.workspace.mkdir(parents=True, exist_ok=True)
                getattr(self, f"_{stage}")()
        except T2VZError as error:
            emit(Event("stage_ended", self.job.row.id, stage, status="failed", message=error.message))
            raise
        emit(Event("stage_ended", self.job.row.id, stage, status="ok"))
        self.seconds[stage] = time.monotonic() - start
        if stage == "generate":  # which loads the model first, and that is told apart
            self.seconds["generate"] -= self.seconds["model"]

    def _decode(self) -> None:
        from t2vz.conditions import fit_condition
        from t2vz.media.sandbox import decode
        from t2vz.media.scenes import scene_starts
        from t2vz.models.loading import native_px

        spec = self.spec
        sized = spec.width is not None or spec.height is not None
        clip = decode(
            spec.source or spec.condition_video or "",
            start_s=spec.start_s,
            end_s=spec.end_s,
            fps=spec.fps,
            video_length=spec.video_length,
            width=spec.width,
            height=spec.height,
            longest_px=None if sized else native_px(spec),
            fit=spec.fit,
            condition_video=spec.condition_video is not None,
            limits=self.settings.limits,
            workspace=self.workspace,
        )
        self._warn(*clip.warnings)
        if spec.condition_video is not None:
            frames, warnings = fit_condition(clip.frames, spec.video_length or len(clip))
            self._warn(*warnings)
            self.conditions = (frames,)
        if spec.attention_anchor == "scene":
            self.scenes = scene_starts(clip.frames)
        self.clip = clip

    def _conditions(self) -> None:
        from t2vz.conditions import ConditionOptions, extract

        assert self.clip is not None
        options = ConditionOptions.of(self.spec, device=self._device(), workspace=self.workspace)
        made = [extract(name, self.clip.frames, options) for name in self.spec.condition]
        self._warn(*(warning for _, warnings in made for warning in warnings))
        self.conditions = tuple(frames for frames, _ in made)

    def _generate(self) -> None:
        from t2vz.models.loading import load, native_px
        from t2vz.modes import Request, generate

        spec, clip, split = self.spec, self.clip, self.settings.split
        device = self._device()
        began = time.monotonic()
        policy.check(spec, self.settings.models)  # again: the files may be others than when the row was planned
        self.components = load(spec, device, compiled=self.settings.compiled)
        self._checker = self._safety_checker(device)
        self.seconds["model"] = time.monotonic() - began
        if clip is None:
            native = native_px(spec)
            width, height, frames = (
                spec.width or native,
                spec.height or native,
                spec.video_length or TEXT_FRAMES,
            )
        else:
            width, height, frames = clip.width, clip.height, len(clip)
        # Of a clip that is split, this process's part: an anchor is beside it.
        total = evaluations(spec, frames if split == 1 else ceil(frames / split) + 1)

        def on_step(count: int) -> None:
            self.settings.check_stopping()
            self._steps_done = min(self._steps_done + count, total)  # a resumed text row does its anchor again
            emit(Event("step", self.job.row.id, "generate", self._steps_done, total))

        start = self._saved_snapshot() if split == 1 else None  # parts of a clip have no common state
        if start is not None:
            self._warn(f"resumed at denoising step {start.step + 1} of {spec.num_inference_steps}")
        self._steps_done = 0 if start is None else total - (spec.num_inference_steps - start.step) * frames
        self._snapshot_due = time.monotonic() + self.settings.snapshot_s
        self.request = Request(
            spec,
            self.job.seed,
            width,
            height,
            frames,
            source=clip.frames if clip is not None and spec.mode == "edit" else None,
            conditions=self.conditions,
            fps=self._rate_fps(),
            picture=self._picture(),
            scenes=self.scenes,
            masks=self._masks(width, height, frames),
            segment=self._segment() if spec.foreground_mask == "segmentation" else None,
            on_step=on_step,
            start=start,
            on_snapshot=self._save_snapshot,
        )
        if split == 1:
            self.generated = generate(self.components, self.request)
        else:
            from t2vz.modes.split import lead

            self.generated = lead(
                self.components, self.request, compiled=self.settings.compiled, workspace=self.workspace
            )
        self._warn(*self.generated.warnings)
        self._thumbnails = [strip.thumbnails(frames) for frames in self._shown()]
        # The arrays of a long clip are big; from here on only its rate and sound are needed, and what is measured.
        if self.settings.measures and "edge" in spec.condition:
            self._edges = self.conditions[spec.condition.index("edge")]
        self.conditions = ()
        self.request = replace(self.request, source=None, conditions=(), masks=None, start=None)
        if clip is not None:
            self.clip = replace(clip, frames=clip.frames[:1].copy(), timestamps_s=clip.timestamps_s[:1])

    def _safety_checker(self, device: str) -> Checker | None:
        """Raises ModelError if the model's can't be loaded and what it flags is to be withheld."""
        from t2vz.models.safety import checker

        if self.settings.content == "off":
            return None
        try:
            return checker(self.spec, device)
        except ModelError as error:
            if self.settings.content == "withhold":
                raise
            self.content = "unchecked"  # there is one: who withholds later is not to take the row for looked at
            self._warn(f"the content is not checked: {error.message}")
            return None

    def _shown(self) -> list[NDArray[np.uint8]]:
        """What is shown above the result: the source, if it is not the condition itself, and the conditions."""
        source = [self.clip.frames] if self.clip is not None and self.spec.condition_video is None else []
        return source + list(self.conditions)

    def _picture(self) -> NDArray[np.uint8] | None:
        """The IP-Adapter's picture: uint8 (H, W, 3), RGB."""
        from t2vz.media.sandbox import read_image

        path = self.spec.ip_adapter_image
        if path is None:
            return None
        with naming("ip_adapter_image"):
            return read_image(path, self.settings.limits)

    def _masks(self, width: int, height: int, frames: int) -> NDArray[np.bool_] | None:
        """The foreground as the mask video has it: bright is foreground."""
        from t2vz.media.sandbox import decode

        if self.spec.mask_video is None:
            return None
        with naming("foreground_mask"):
            clip = decode(
                self.spec.mask_video,
                video_length=frames,
                width=width,
                height=height,
                condition_video=True,
                limits=self.settings.limits,
                workspace=self.workspace,
            )
        check_mask_length(len(clip), frames)
        self._warn(*(warning.replace("condition video", "mask video") for warning in clip.warnings))
        return np.stack([picture.max(axis=-1) >= 128 for picture in clip.frames])

    def _segment(self) -> Callable[[NDArray[np.uint8]], NDArray[np.bool_]]:
        from t2vz.conditions.segmentation import foreground

        assert self.spec.segmentation_model is not None
        return partial(foreground, model=self.spec.segmentation_model, device=self._device())

    @property
    def _snapshot_path(self) -> Path:
        """Outside of the run's own workspace: it shall outlive a killed run."""
        return self.settings.workspace.parent / "snapshots" / f"{self.job.job_id}.pt"

    def _saved_snapshot(self) -> Snapshot | None:
        import torch

        from t2vz.engine.lockstep import Snapshot

        try:
            return Snapshot(**torch.load(self._snapshot_path, weights_only=True))
        except FileNotFoundError:
            return None
        except Exception as error:  # damaged, or of another version: the job can do without
            self._warn(f"the saved state of an earlier run can't be used ({type(error).__name__}): begun anew")
            return None

    def _save_snapshot(self, take: Callable[[], Snapshot]) -> None:
        import torch

        if time.monotonic() < self._snapshot_due:
            return
        draft = self.workspace / "snapshot.pt"
        try:
            self._snapshot_path.parent.mkdir(exist_ok=True)
            torch.save(vars(take()), draft)
            draft.replace(self._snapshot_path)
        except (OSError, RuntimeError) as error:  # a full disk, which torch may word as its own error
            self._warn(f"the state could not be saved for resuming ({error})")
        self._snapshot_due = time.monotonic() + self.settings.snapshot_s

    def forget_snapshot(self) -> None:
        self._snapshot_path.unlink(missing_ok=True)

    def _encode(self) -> None:
        from t2vz.engine import vae
        from t2vz.media.encode import Encoding, encode, publish

        assert self.components is not None
        assert self.generated is not None
        spec, clip, latents = self.spec, self.clip, self.generated.latents
        cell = self.components.cell_px
        result: list[NDArray[np.uint8]] = []
        decoded = strip.collecting(vae.decode(self.components.vae, latents), len(latents), result)
        encoded = encode(
            self._marked(self._measured(self._checked(self._unless_stopping(decoded)))),
            self.workspace / f"video-{self.attempts['encode']}",
            width=latents.shape[-1] * cell,
            height=latents.shape[-2] * cell,
            rate_fps=self._rate_fps(),
            encoding=Encoding.of(spec),
            audio=clip.audio if clip is not None and spec.audio else None,
            metadata=self._parameters() | {"job_id": self.job.job_id, "t2vz": version("t2vz")},
            limits=self.settings.limits,
        )
        self._warn(*encoded.warnings)
        encoded = self._signed(encoded)
        suffix = "" if spec.format == "png" else f".{spec.format}"
        name = f"{file_name(self.job.row.id)}-{encoded.sha256[:12]}{suffix}"
        self.output_uri = f"videos/{name}"
        self.encoded = publish(encoded, self.settings.out, self.output_uri)
        lines: list[NDArray[np.uint8] | list[NDArray[np.uint8]]] = [*self._thumbnails, result]
        try:
            strip.write(self.settings.out, strip_key(name), lines, self.workspace)
            strip.write_moving(self.settings.out, thumbnails_key(name), lines, self.workspace)
        except (OSError, T2VZError) as error:  # the video is there: a picture of it is not worth its loss
            self._warn(f"its strip could not be written ({getattr(error, 'strerror', None) or error})")

    def _unless_stopping(self, batches: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        for batch in batches:
            self.settings.check_stopping()
            yield batch

    def _signed(self, encoded: Encoded) -> Encoded:
        from t2vz.media.provenance import signed

        signing = self.settings.signing
        self.signed = signing is not None and self.spec.format == SIGNED_FORMAT
        if signing is None:
            return encoded
        if not self.signed:
            self._warn(f"not signed: only {SIGNED_FORMAT} files are")
            return encoded
        return signed(encoded, signing, self.spec, self.job.model_revision)

    def _marked(self, batches: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        from t2vz.media.watermark import marking

        return batches if self.spec.watermark is None else marking(batches, self.spec.watermark)

    def _checked(self, batches: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        """The same batches, looked at by the model's safety checker as they pass. Raises ContentWithheld."""
        if self._checker is None:
            yield from batches
            return
        self.content, self.content_frames = "clear", 0
        for batch in batches:
            self.content_frames += sum(self._checker.flagged(batch))
            if self.content_frames:
                self.content = "flagged"
                if self.settings.content == "withhold":
                    raise ContentWithheld("flagged by the model's safety checker, and withheld as the run asks")
            yield batch
        if self.content_frames:
            self._warn(f"the model's safety checker flags {self.content_frames} of its frames")

    def _measured(self, batches: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        """The same batches, measured as they pass if the run asks for it. What can't be measured is a warning."""
        if not self.settings.measures:
            yield from batches
            return
        from t2vz.quality import ClipScores, Meter

        spec, clip_model = self.spec, self.settings.clip_model
        canny = spec.canny_low, spec.canny_high
        meters: list[Meter | ClipScores] = [Meter(chunk_size=spec.chunk_size, edges=self._edges, canny=canny)]
        if clip_model is not None:  # one of its own: if it fails, the others are measured all the same
            try:
                meters.append(ClipScores(clip_model, spec.prompt, "cpu"))  # another row is at the device
            except Exception as error:
                self._not_measured(error)
        for batch in batches:
            for meter in tuple(meters):
                try:
                    meter.add(batch)
                except Exception as error:
                    self._not_measured(error)
                    meters.remove(meter)
            yield batch
        self.quality = {name: value for meter in meters for name, value in meter.values().items()}

    def _not_measured(self, error: Exception) -> None:
        self._warn(f"the quality could not be measured ({translate(error, 'quality').message})")

    def _warn(self, *warnings: str) -> None:
        for warning in map(harmless, warnings):
            if warning not in self.warnings:
                self.warnings.append(warning)
                emit(Event("warning", self.job.row.id, message=warning))

    def _device(self) -> str:
        self.device = resolve_device(self.settings.device)
        return self.device

    def _parameters(self) -> dict[str, Any]:
        """All parameters as used: what the row left open is filled in."""
        used: dict[str, Any] = canonical(self.spec) | {
            "model": self.spec.model,
            "model_revision": self.job.model_revision,
            "source_fingerprint": self.job.source_fingerprint,
            "seed": self.job.seed,
        }
        if self.spec.mode == "text":
            used["t0"], used["t1"] = t0_t1(self.spec)
        else:
            used["fit"] = self.spec.fit
        if self.spec.mode == "control":
            used["controlnet_conditioning_scale"] = self.spec.scales
            used["controlnet"] = self._controlnets()
        if self.spec.conditions_extracted:
            used["condition_models"] = table.annotator_references(self.spec)
        if self.request is not None:
            used |= {"width": self.request.width, "height": self.request.height, "video_length": self.request.frames}
            used["fps"] = str(self._rate_fps())
        return _open(used)

    def _controlnets(self) -> tuple[str, ...]:
        return table.controlnet_references(self.spec) if self.spec.mode == "control" else ()

    def _rate_fps(self) -> Fraction:
        return self.clip.rate_fps if self.clip is not None else self.spec.fps or TEXT_FPS

    def row(self, error: T2VZError | None = None) -> ResultRow:
        """The results row: ok, or failed with `error`."""
        spec, job, encoded = self.spec, self.job, self.encoded
        finished = max(datetime.now(UTC), self.started_at)
        row = _common_row(self.settings, job.job_id, job.row.id, job.row.number, self.started_at, finished)
        row |= {
            "attempts": self.lost + max(self.attempts.values(), default=0),
            "warnings": tuple(self.warnings),
            "mode": spec.mode,
            "prompt": spec.prompt,
            "negative_prompt": spec.negative_prompt,
            "parameters": json.dumps(self._parameters() | {"cells": cells_of(spec)}, ensure_ascii=False),
            "seed": job.seed,
            "model": spec.model,
            "model_revision": job.model_revision,
            "controlnets": self._controlnets(),
            "loras": spec.lora,
            "scheduler": spec.scheduler_name,
            "dtype": spec.dtype,
            "source_uri": "+".join(spec.sources) or None,
            "source_fingerprint": job.source_fingerprint,
            "decoder": self.clip.decoder if self.clip is not None else None,
            "decode_s": self.seconds.get("decode"),
            "conditions_s": self.seconds.get("conditions"),
            "model_s": self.seconds.get("model"),
            "generate_s": self.seconds.get("generate"),
            "encode_s": self.seconds.get("encode"),
            "wall_s": (finished - self.started_at).total_seconds(),
            "unet_evaluations": self.generated.evaluations if self.generated is not None else None,
            "device": self.device or None,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "quality": json.dumps(self.quality) if self.quality else None,
            "content": self.content if self.generated is not None else None,
            "content_frames": self.content_frames,
        }
        row = _open(row)
        if error is not None:
            return ResultRow(**row, **_failure(error))
        assert encoded is not None
        return ResultRow(
            **row,
            status="ok",
            output_uri=self.output_uri,
            output_sha256=encoded.sha256,
            output_bytes=encoded.size_bytes,
            output_mtime_ns=encoded.mtime_ns,
            width=encoded.width,
            height=encoded.height,
            frames=encoded.frames,
            fps=str(encoded.rate_fps),
            codec=encoded.codec,
            audio_kept=encoded.audio_kept,
            signed=self.signed,
        )


_devices: dict[str, threading.Lock] = {}
_devices_guard = threading.Lock()


@contextmanager
def lease(device: str) -> Iterator[None]:
    """One row at a time generates on a device; the others decode and encode meanwhile."""
    with _devices_guard:
        lock = _devices.setdefault(resolve_device(device), threading.Lock())
    with lock:
        yield


def render(job: Job, settings: Settings, lost: int = 0, kind: type[Render] = Render) -> ResultRow | None:
    """Render one job and commit its result row: ok, or failed with stage and reason. Errors become rows.

    lost: earlier attempts whose process died; counted in the row. kind: does the stages; another class stands in
    for them where what goes on around them is tested.
    Returns the row, or None if another run finished the job meanwhile. If another run is at it, the row is `skipped`,
    and not committed: that run's will be the row's result. Raises DeviceLost, without a row, as another
    process may render the job; ResultsError, OutputError or StorageTimeout if the result can't be kept; and
    KeyboardInterrupt when the run is stopping.
    """
    store = settings.store()
    if not claims.take(settings.out, job.job_id, settings.run_id, job.row.id):
        emit(Event("row_finished", job.row.id, status="skipped", message="another run is at it"))
        now = datetime.now(UTC)
        common = _common_row(settings, job.job_id, job.row.id, job.row.number, now, now)
        return ResultRow(**common, status="skipped", attempts=0)
    finished = _finished_since(job, settings, lost)
    if _stands(finished, settings):
        _release(job, settings)
        emit(Event("row_finished", job.row.id, status="done"))
        return None
    work = kind(job, settings, lost)
    emit(Event("row_started", job.row.id, total=len(work.stages)))
    try:
        try:
            for stage in work.stages:
                _run(work, stage)
            row = work.row()
        except Exception as error:
            settings.check_stopping()  # what fails then may have failed of that
            ours = translate(error, "unknown")
            if isinstance(ours, DeviceLost):
                raise ours from error
            row = work.row(ours)
        if row.status == "failed":
            _withdraw_lax(settings, finished or job.published)
        kept = commit(store, row)
        if row.status == "ok" or row.error_class == ContentWithheld.__name__:
            work.forget_snapshot()
    finally:
        shutil.rmtree(work.workspace, ignore_errors=True)
        _release(job, settings)
    if not kept:
        emit(Event("row_finished", job.row.id, status="done"))
        return None
    told = row.error_message or row.output_uri or ""
    emit(Event("row_finished", job.row.id, status=row.status, message=told, row=row))
    return row


def _dated(job: Job, time: datetime) -> datetime:
    """The time, but after all that the results knew when the job was planned: this machine's clock may be behind."""
    return time if job.results_until is None else max(time, job.results_until + timedelta(microseconds=1))


def _finished_since(job: Job, settings: Settings, lost: int) -> Finished | None:
    """The job's output if it was finished since it was planned: by another run, or by a lost attempt of this one,
    whose process died between the result and telling of it.
    """
    store, but_of = settings.store(), "" if lost else settings.run_id
    return store.is_done(job.job_id) or store.merged_since(job.results_version, but_of).get(job.job_id)


def _stands(finished: Finished | None, settings: Settings) -> bool:
    return finished is not None and suffices(finished, settings.content) and is_there(settings.out, finished)


def _withdraw_lax(settings: Settings, published: Finished | None) -> None:
    """Before a failed row is kept: it replaces the one that names the output of a laxer policy, which nobody would
    find again.
    """
    if published is not None and not suffices(published, settings.content):
        withdraw(settings.out, published)


def withdraw(out: Place, published: Finished) -> None:
    """Remove an earlier output, its strip and its thumbnails."""
    key = published.output_uri
    storage.remove_output(out, key)
    storage.remove_all(out, [strip_key(key), thumbnails_key(key)])


def _release(job: Job, settings: Settings) -> None:
    try:
        claims.release(settings.out, job.job_id, settings.run_id)
    except T2VZError as error:  # the run's end sweeps it, or who finds the run dead
        _log.warning("%s: its claim could not be given back: %s", job.row.id, error)


def _run(work: Render, stage: str) -> None:
    """Do a stage, and again while its error is one that may mend. Others use the device between the tries."""
    delays_s = work.settings.retries.delays_s(stage)
    while True:
        try:
            with lease(work.settings.device) if stage in DEVICE_STAGES else nullcontext():
                work.run(stage)
            return
        except T2VZError as error:
            delay_s = next(delays_s, None)
            if delay_s is None or not can_mend(error):
                raise
            _log.warning("%s: %s: %s; tried again in %.1f s", work.job.row.id, stage, error.message, delay_s)
            work.settings.stopping.wait(delay_s)


def record_lost(job: Job, settings: Settings, error: T2VZError, attempts: int, started: datetime) -> ResultRow | None:
    """Commit the failed row of a job whose process died or lost its device `attempts` times, the last time working
    on it since `started`. None if it turns out to be done.
    """
    finished = _finished_since(job, settings, attempts)
    if _stands(finished, settings):
        _release(job, settings)
        emit(Event("row_finished", job.row.id, status="done"))
        return None
    work = Render(job, settings, attempts)
    work.started_at = _dated(job, started)
    row = work.row(error)
    _withdraw_lax(settings, finished or job.published)
    commit(settings.store(), row)
    _release(job, settings)
    emit(Event("row_finished", job.row.id, status="failed", message=error.message, row=row))
    return row


def commit(store: ResultStore, row: ResultRow) -> bool:
    """`store.commit`, tried again while the error is one that may mend: the work behind a row is worth waiting for."""
    for attempt in range(1, COMMIT_TRIES + 1):
        try:
            return store.commit(row)
        except T2VZError as error:
            if not error.retryable or attempt == COMMIT_TRIES:
                raise
            time.sleep(2.0**attempt / 4)
    raise AssertionError("not reached")


def record_unready(unready: Unready, settings: Settings) -> ResultRow:
    """Commit the failed row of a manifest row that can't be rendered as it stands."""
    now = datetime.now(UTC)
    row = _common_row(settings, unready.job_id, unready.id, unready.row_number, now, now)
    if unready.spec is not None:
        spec = unready.spec
        row |= _open({"mode": spec.mode, "prompt": spec.prompt, "model": spec.model})
        row["parameters"] = json.dumps({"cells": _open(cells_of(spec))}, ensure_ascii=False)
    result = ResultRow(**row, **_failure(unready.error), attempts=0)
    if not isinstance(unready.error, ContentWithheld):  # its row of then stands, and says more
        commit(settings.store(), result)
    emit(Event("row_finished", unready.id, status="failed", message=unready.error.message, row=result))
    return result


def _failure(error: T2VZError) -> dict[str, Any]:
    return {
        "status": "failed",
        "error_stage": error.stage,
        "error_class": type(error).__name__,
        "error_message": error.message,
        "retryable": error.retryable,
    }


def _common_row(
    settings: Settings, job_id: str, id: str, number: int, started: datetime, finished: datetime
) -> dict[str, Any]:
    return {
        "job_id": job_id,
        "run_id": settings.run_id,
        "id": id,
        "manifest": settings.manifest,
        "row_number": number,
        "started_at": started,
        "finished_at": finished,
        "t2vz_version": version("t2vz"),
        "torch_version": _installed("torch"),
        "diffusers_version": _installed("diffusers"),
    }


def _open(values: dict[str, Any]) -> dict[str, Any]:
    """The values, texts without secrets: a row may name addresses with a password."""

    def shown(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(shown, value))
        return without_secrets(value) if isinstance(value, str) else value

    return {name: shown(value) for name, value in values.items()}


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def file_name(id: str) -> str:
    """A row's id as a file name that every file system takes: ASCII letters, digits, `.`, `_` and `-`, at most 80."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", id).lstrip(".")[:80] or "row"
    return f"_{name[:79]}" if _RESERVED.match(name) else name


def resolve_device(device: str) -> str:
    """ "auto" → the device that accelerate gives this process; other names as they are."""
    if device != "auto":
        return device
    from accelerate import PartialState

    return str(PartialState().device)


def peak_memory_bytes(device: str) -> int | None:
    """The most memory that this process has used so far: on the GPU if `device` is one, else its resident set."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    # Not getrusage's ru_maxrss, which a child process inherits from its parent.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
