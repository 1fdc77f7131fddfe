"""Plan: which rows of a manifest are to be rendered, which are done, and which can't be as they stand.

Reads the manifest, the results and the sources' headers; renders and writes nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache, partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from t2vz import storage
from t2vz.errors import (
    ConditionError,
    ContentWithheld,
    GenerationError,
    OutputError,
    SourceEmpty,
    SourceError,
    SourceMissing,
    SourceTooLarge,
    T2VZError,
    translating,
)
from t2vz.manifest import BadRow, Problem, Row, meant, read
from t2vz.media.limits import Limits
from t2vz.media.local import check_allowed, naming, reading
from t2vz.models.policy import ModelPolicy
from t2vz.results import Finished, ResultStore, State
from t2vz.spec import MASK_SOURCES, MODEL_COLUMNS, TEXT_FRAMES, JobSpec, evaluations, job_id, seed_of
from t2vz.storage import Place

if TYPE_CHECKING:
    from t2vz.media.probe import Probe

# What happens to frames that the model's safety checker flags. off: it is not asked; flag: the row says so; withhold:
# there is no video.
ContentPolicy = Literal["off", "flag", "withhold"]


@dataclass(frozen=True, slots=True)
class Job:
    """A row to render.

    seed: as used, drawn from the job's id if the row has none. source_fingerprint: None in text mode.
    frames: expected; exact but for damaged sources. unet_evaluations: of one frame, all guidance branches.
    results_version: of the results table in which the job was not done; -1: there was none.
    results_until: the latest time in any result of then; see `results.State`.
    published: the output of an earlier run, made under a laxer content policy than this one's.
    """

    job_id: str
    row: Row
    seed: int
    model_revision: str
    source_fingerprint: str | None
    frames: int
    unet_evaluations: int
    results_version: int = field(default=-1, compare=False)
    results_until: datetime | None = field(default=None, compare=False)
    published: Finished | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Unready:
    """A row that can't be rendered as the manifest, its sources and models stand.

    job_id: of this defective state; the mended row is another job. spec: None if the row itself is bad, and
    problems are those of its cells then.
    """

    row_number: int
    id: str
    job_id: str
    error: T2VZError
    spec: JobSpec | None = None
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    """A row with an ok result whose output is there."""

    job_id: str
    id: str


@dataclass(frozen=True)
class Work:
    """An amount of rendering."""

    jobs: int = 0
    frames: int = 0
    unet_evaluations: int = 0

    def plus(self, job: Job) -> Work:
        return Work(self.jobs + 1, self.frames + job.frames, self.unet_evaluations + job.unet_evaluations)


@dataclass(frozen=True)
class Summary:
    """to_do: of all jobs; groups: of those of each (model, mode). done, unready: rows."""

    to_do: Work
    done: int
    unready: int
    groups: Mapping[tuple[str, str], Work] = field(default_factory=dict)


def plan(
    manifest: str | Path,
    out: Place | None,
    defaults: Mapping[str, str] | None = None,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    verify: bool = False,
    models: ModelPolicy = ModelPolicy(),  # noqa: B008 (frozen)
    content: ContentPolicy = "flag",
) -> Iterator[Job | Unready | Done]:
    """What each row of the manifest comes to, in its order, as it is asked for.

    out: the output folder whose results say what is done; None: nothing is.
    defaults: see `manifest.read`. verify: read every done output again, not its size and time only.
    limits, models: what sources and models the rows may name.
    content: under `withhold` a row that was withheld before is an `Unready` again, and one is not done whose frames
    were flagged or never checked.

    Raises ManifestError (the manifest as a whole), ResultsError and OutputError (the output folder). What is
    wrong with a row or its source is an `Unready` among the others.
    """
    if out is not None:
        check_out(out, to_write=False)
    rows = read(manifest, defaults)
    state = State({}, -1, None) if out is None else ResultStore(out).state()
    there = outputs(out, verify) if out is not None and state.done else None
    withheld = {} if out is None or content != "withhold" else ResultStore(out).withheld()
    return _planned(rows, state, there, limits, models, content, withheld)


def suffices(finished: Finished, content: ContentPolicy) -> bool:
    """True if a finished output may stand under the policy."""
    return content != "withhold" or finished.content not in (None, "unchecked", "flagged")


def check_out(out: Place, *, to_write: bool = True) -> None:
    """Raise OutputError if `out` is no folder and can't become one, or no bucket that answers. Nothing is made or
    written. to_write: also if nothing can be written there."""
    if storage.is_remote(out):
        storage.check(out)
        return
    text = os.fspath(out)
    if not text.strip() or "\0" in text:
        raise OutputError("the output folder has no name; give one")
    name, folder = text if len(text) <= 240 else f"{text[:240]}…", Path(out).absolute()
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise OutputError(f"{name}: can't be the output folder ({error.strerror})") from error
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        inside = "" if folder == Path(out).absolute() else f"{folder} is "
        raise OutputError(f"{name}: {inside}not a folder; choose another output folder")
    if to_write and not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{name}: no permission to write in {folder}; choose another output folder")


def summarise(planned: Iterable[Job | Unready | Done]) -> Summary:
    """The totals of a plan."""
    to_do, done, unready = Work(), 0, 0
    groups: dict[tuple[str, str], Work] = {}
    for item in planned:
        if isinstance(item, Job):
            key = item.row.spec.model, item.row.spec.mode
            to_do = to_do.plus(item)
            groups[key] = groups.get(key, Work()).plus(item)
        elif isinstance(item, Done):
            done += 1
        else:
            unready += 1
    return Summary(to_do, done, unready, groups)


def is_there(out: Place, finished: Finished, verify: bool = False) -> bool:
    """True if the output is as it was recorded.

    Its size and modification time are proof enough; the checksum is computed if the time differs (a copied
    folder), for folders of images, and with `verify`. On S3, where an object never changes in part, the size is.
    Raises OutputError if it can't be read.
    """
    return outputs(out, verify)(finished)


def outputs(out: Place, verify: bool = False) -> Callable[[Finished], bool]:
    """`is_there` for many: on S3 the bucket is listed once, by the second question."""
    if not storage.is_remote(out):
        return partial(_is_there_locally, str(out), verify=verify)
    asked: list[Finished] = []
    sizes: dict[str, int] = {}

    def is_there_remotely(finished: Finished) -> bool:
        from t2vz.media.encode import remote_checksum

        key = finished.output_uri
        if not asked:
            found = {entry.key: entry.size_bytes for entry in [storage.head(out, key)] if entry} or _sizes(out, key)
        else:
            if len(asked) == 1:
                sizes.update(_sizes(out, "videos"))
            found = sizes
        asked.append(finished)
        if found.get(key) != finished.output_bytes:
            return False
        return not verify or remote_checksum(out, key) == finished.output_sha256

    return is_there_remotely


def _sizes(out: Place, folder: str) -> dict[str, int]:
    """Bytes by key of all objects below `folder`; a folder of images has those of its files together."""
    sizes: dict[str, int] = {}
    for entry in storage.entries(out, folder, deep=True):
        key = "/".join(entry.key.split("/")[:2])  # videos/name
        sizes[key] = sizes.get(key, 0) + entry.size_bytes
    return sizes


def _is_there_locally(out: str, finished: Finished, verify: bool) -> bool:
    path = os.path.join(out, finished.output_uri)
    with translating("results", path):
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        if not stat.S_ISDIR(found.st_mode):
            if not stat.S_ISREG(found.st_mode) or found.st_size != finished.output_bytes:
                return False
            if found.st_mtime_ns == finished.output_mtime_ns and not verify:
                return True
        from t2vz.media.encode import checksum

        return checksum(Path(path))[0] == finished.output_sha256


def _planned(
    rows: Iterable[Row | BadRow],
    state: State,
    there: Callable[[Finished], bool] | None,
    limits: Limits,
    models: ModelPolicy,
    policy: ContentPolicy,
    withheld: Mapping[str, str],
) -> Iterator[Job | Unready | Done]:
    from t2vz.media.sandbox import probe

    @lru_cache(maxsize=256)  # rows that share a source mostly follow each other
    def probed(path: str) -> Probe:
        return probe(path, limits)

    revision_of = _revisions(models)
    for row in rows:
        if isinstance(row, BadRow):
            yield Unready(row.number, row.id, row.fingerprint, row.error, problems=row.problems)
            continue
        spec = row.spec
        source = spec.condition_video or spec.source
        try:
            revision = revision_of(spec)
            content = _content(spec, limits)
            job = job_id(spec, revision, content)
            published = state.done.get(job)
            if there is not None and published is not None and there(published):
                if suffices(published, policy):
                    yield Done(job, row.id)
                    continue
            else:
                published = None
            if job in withheld:
                yield Unready(row.number, row.id, job, ContentWithheld(withheld[job]), spec)
                continue
            frames = _frames(spec, None if source is None else probed(source), limits)
            _check_pictures(spec, frames, probed, limits)
        except T2VZError as error:
            yield Unready(row.number, row.id, job_id(spec, f"unready {spec.model}", source), error, spec)
            continue
        seed = seed_of(spec, revision, content)
        work = evaluations(spec, frames)
        yield Job(job, row, seed, revision, content, frames, work, state.version, state.until, published)


def _content(spec: JobSpec, limits: Limits) -> str | None:
    """The fingerprints of the row's files, in the order of `spec.sources`."""
    from t2vz.media.fingerprint import fingerprint

    found = []
    if source := spec.condition_video or spec.source:
        check_allowed(source, limits)
        found.append(fingerprint(source))
    if spec.mask_video is not None:
        with naming("foreground_mask"):
            check_allowed(spec.mask_video, limits)
            try:
                found.append(fingerprint(spec.mask_video))
            except SourceMissing as error:
                names = dict.fromkeys(MASK_SOURCES)
                raise SourceMissing(error.message + meant(Path(spec.mask_video).name, names)) from error
    if spec.ip_adapter_image is not None:
        with naming("ip_adapter_image"):
            check_allowed(spec.ip_adapter_image, limits)
            found.append(fingerprint(spec.ip_adapter_image))
    return "+".join(found) or None


def _check_pictures(spec: JobSpec, frames: int, probed: Callable[[str], Probe], limits: Limits) -> None:
    """Raise SourceError and its kinds, ConditionError, if the row's mask video or picture can't be used."""
    from t2vz.media.sandbox import image_size

    if spec.mask_video is not None:
        with naming("foreground_mask"):
            mask = probed(spec.mask_video)
            if mask.constant_rate:  # else only decoding tells how many frames it has
                check_mask_length(mask.frames, frames)
    if (picture := spec.ip_adapter_image) is not None:
        with naming("ip_adapter_image"), reading(picture):
            if Path(picture).is_dir():
                raise SourceError(f"{picture}: a folder; name one picture")
            image_size(picture, limits)


def check_mask_length(given: int, frames: int) -> None:
    """Raise ConditionError if a mask video of `given` frames is too short for a clip."""
    if given < frames:
        raise ConditionError(
            f"foreground_mask: the mask video has {given} frame{'' if given == 1 else 's'}, but {frames} are asked "
            f"for; lower video_length to {given} or give a longer one"
        )


def _revisions(policy: ModelPolicy) -> Callable[[JobSpec], str]:
    """`models.table.identity` of models that are let in, asked once for all rows with the same model columns."""
    from t2vz.models.policy import check
    from t2vz.models.table import identity

    known: dict[tuple[object, ...], str | T2VZError] = {}

    def revision_of(spec: JobSpec) -> str:
        key = (
            spec.mode,
            spec.condition,
            spec.conditions_extracted,
            spec.revision,
            *map(spec.__getattribute__, MODEL_COLUMNS),
        )
        if key not in known:
            try:
                with translating("model", spec.model):
                    revision = identity(spec)
                    check(spec, policy)
                    known[key] = revision
            except T2VZError as error:
                known[key] = error
        found = known[key]
        if isinstance(found, T2VZError):
            raise found.with_traceback(None)  # else it would grow with every row
        return found

    return revision_of


def _frames(spec: JobSpec, source: Probe | None, limits: Limits) -> int:
    """How many frames the row will have, once all that headers can tell is found to be in order."""
    from t2vz.media.decode import sized
    from t2vz.media.encode import check_rate

    if source is None:
        frames, rate = spec.video_length or TEXT_FRAMES, spec.fps
        if frames > limits.max_frames:
            raise GenerationError(f"{frames} frames, the limit is {limits.max_frames}: lower video_length")
        if spec.width is not None and spec.height is not None:
            limits.check_clip("the clip", frames, spec.width, spec.height)
    else:
        frames, rate = _frames_of(spec, source, limits), spec.fps or source.rate_fps
        if spec.width is not None or spec.height is not None:  # else the model's size decides
            limits.check_clip(source.path, frames, *sized(source, spec.width, spec.height, None))
    if rate is not None:
        check_rate(spec.format, rate)
    return frames


def _frames_of(spec: JobSpec, source: Probe, limits: Limits) -> int:
    """The frames of the row's range at its rate, at most video_length."""
    from t2vz.conditions import check_condition_length

    rate, begin_s, end_s = spec.fps or source.rate_fps, source.first_pts_s, source.end_s
    if source.kind == "folder":  # images have no times of their own: the row's rate is theirs
        begin_s, end_s = 0.0, float(source.frames / rate)
    stop_s = end_s if spec.end_s is None else min(spec.end_s, end_s)
    # Two ticks: a range that ends on a frame's rounded time doesn't hold that frame.
    length_s = stop_s - max(spec.start_s, begin_s) - 2 * source.tick_s
    if length_s <= 0:
        raise SourceEmpty(f"{source.path}: lasts until {end_s:g} s; there is no frame after {spec.start_s:g} s")
    frames = max(1, ceil(length_s * float(rate) - 1e-6))
    if spec.condition_video is not None:
        check_condition_length(frames, spec.video_length or frames)
    frames = min(frames, spec.video_length or frames)
    if frames > limits.max_frames:
        raise SourceTooLarge(
            f"{source.path}: {frames} frames, the limit is {limits.max_frames}: set end_s or video_length, or lower fps"
        )
    return frames
