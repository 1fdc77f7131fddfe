"""Library: a folder of videos made a manifest of one style, long ones in parts; the parts' videos joined again.

The folder and OUT may each be on S3 (s3://bucket/prefix).

OUT/manifests/NAME.parquet    the manifest, written anew by every scan
OUT/manifests/NAME.cuts.json  where long sources were cut, so that unchanged ones are not looked at again
OUT/joined/                   a video for every source that was cut, and of each a record of what it was made from

What is new or changed needs no bookkeeping here: a job's identity has its source's content in it, so an unchanged
source plans as done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from math import ceil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from t2vz import storage
from t2vz.clip import AudioReference
from t2vz.errors import ManifestError, SourceError, T2VZError, translating
from t2vz.manifest import Problem, explained, meant
from t2vz.media.limits import Limits
from t2vz.media.local import check_allowed, fetching
from t2vz.plan import Done, Job, Unready, check_out, plan, suffices
from t2vz.render import Settings, file_name
from t2vz.results import Finished
from t2vz.spec import COLUMN_MODES, MASK_SOURCES, MODEL_COLUMNS, SOURCE_COLUMNS, JobSpec
from t2vz.storage import Place

if TYPE_CHECKING:
    from t2vz.media.decode import Timeline
    from t2vz.media.encode import Encoded
    from t2vz.media.probe import Probe

# What is taken for a video if the glob lets everything pass.
SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".mxf", ".flv"),
    *(".wmv", ".ogv", ".3gp", ".gif"),
)
_OWN_COLUMNS = ("id", "source")  # the scan fills them
_LONGEST_ID = 180  # leaves room for "#000" in the 200 characters of an id
_SCENE_BATCH = 256  # frames decoded at once to look for scenes
_SCENE_PX = 96  # their longest side: a cut shows at any size
_BATCH_ROWS = 10_000
_RULES = 1  # raised when the same source and cutting give other cuts


@dataclass(frozen=True)
class Source:
    """A file of a library. name: how it is called there (a relative path with `/`). path: a file's, or its URL."""

    name: str
    path: str


@dataclass(frozen=True)
class Cutting:
    """Which sources are cut, and where.

    by: `length` into parts of nearly equal length; `scenes` where scenes begin, and long scenes by length; `none`.
    max_clip_s, max_frames: a source whose row would be longer, or have more frames, is cut into parts that are not.
    """

    by: Literal["none", "length", "scenes"] = "length"
    max_clip_s: float = 20.0
    max_frames: int = Limits.max_frames


@dataclass(frozen=True)
class Cut:
    """A source in parts. id: of the source; its parts are `id#000`, …

    begin_s: of the first frame, in the source. starts: number of the frame that begins each part, 0 first.
    frames: of the whole, at rate_fps.
    """

    id: str
    path: str
    begin_s: float
    rate_fps: Fraction
    starts: tuple[int, ...]
    frames: int

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"{self.id}#{number:03d}" for number in range(len(self.starts)))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Frames of each part."""
        return tuple(b - a for a, b in zip(self.starts, (*self.starts[1:], self.frames), strict=True))


@dataclass(frozen=True)
class Library:
    """A scanned library: its manifest, how many sources and rows it has, the sources that were cut.

    style: a row of it, without source. left_out: files that can't be rows, each with the reason.
    """

    manifest: Place
    style: JobSpec
    sources: int
    rows: int
    cuts: tuple[Cut, ...]
    left_out: tuple[str, ...] = ()


def find(folder: Place, glob: str = "**/*", *, out: Place) -> list[Source]:
    """The videos in a folder that match the glob, sorted by name. Hidden files and the output folder are left out.

    folder: or s3://bucket/prefix, where a prefix that has nothing below it is as good as an empty folder.
    Raises SourceError if there is no such folder or bucket, ManifestError if the glob is none, StorageTimeout.
    """
    if storage.is_remote(folder):
        inside = f"{storage.normal(out)}/"
        with fetching():
            return _find_objects(str(storage.normal(folder)), glob, inside)
    folder, results = Path(folder).absolute(), Path(out).absolute()
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder to take videos from")
    try:
        found = sorted(folder.glob(glob))
    except (ValueError, NotImplementedError) as error:
        raise ManifestError(f"glob {glob!r} can't be used ({error}); write one like **/*.mp4") from None
    sources = []
    for path in found:
        name = path.relative_to(folder)
        if _is_video(name) and results not in path.parents and path.is_file():
            sources.append(Source(name.as_posix(), str(path)))
    return sources


def _is_video(name: PurePosixPath | Path) -> bool:
    """By its name alone; hidden files are none."""
    return name.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in name.parts)


def _find_objects(folder: str, glob: str, inside: str) -> list[Source]:
    pattern = PurePosixPath(glob)
    if pattern.is_absolute() or not pattern.parts or any(p == ".." or (p != "**" and "**" in p) for p in pattern.parts):
        raise ManifestError(f"glob {glob!r} can't be used; write one like **/*.mp4")
    sources = []
    for entry in storage.entries(folder, "", deep=True):
        name, url = PurePosixPath(entry.key), storage.joined(folder, entry.key)
        if _is_video(name) and not url.startswith(inside) and _matches(name.parts, pattern.parts):
            sources.append(Source(entry.key, url))
    return sources


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """As `Path.glob` would find it."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[at:], pattern[1:]) for at in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def scan(
    sources: Iterable[Source],
    out: Place,
    style: Mapping[str, str],
    *,
    cutting: Cutting = Cutting(),
    name: str = "library",
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> Library:
    """Write the manifest of the sources in one style to OUT/manifests/NAME.parquet.

    style: column → cell, the same for all; `prompt` and a mode that takes a source at least.
    A source that can't be read becomes a row all the same: what is wrong with it is then in the results.
    Raises ManifestError (a style that no row could have, a bad name), OutputError, StorageTimeout.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    style = {column: cell for column, cell in style.items() if cell}
    spec = check_style(style)
    if name != file_name(name):
        raise ManifestError(f"the library's name {name!r} must be of letters, digits, '.', '_' and '-'")
    check_out(out)
    out = storage.normal(out)
    key, memory = f"manifests/{name}.parquet", f"manifests/{name}.cuts.json"
    path = storage.joined(out, key) if storage.is_remote(out) else Path(out, key)
    known, kept = _read_json(out, memory), {}
    columns = list(dict.fromkeys(("id", "source", "start_s", "end_s", "video_length", "seed", *style)))
    schema = pa.schema([(column, pa.string()) for column in columns])
    count = rows = 0
    cuts: list[Cut] = []
    left_out: list[str] = []
    taken: set[str] = set()
    with (
        translating("manifest", str(path)),
        storage.whole(out, key) as draft,
        pq.ParquetWriter(draft, schema) as writer,
    ):
        batch: list[dict[str, str]] = []
        for source in sources:
            try:
                source.name.encode(), source.path.encode()
            except UnicodeEncodeError:
                left_out.append(f"{os.fsencode(source.name)!r}: its name is not UTF-8; rename it")
                continue
            id = _id(source.name)
            if id in taken:
                left_out.append(f"{source.name}: is there twice")
                continue
            taken.add(id)
            count += 1
            known_as, cut = _cut(id, source.path, spec, cutting, limits, known)
            if known_as:
                kept[known_as] = None if cut is None else _cut_to_json(cut)
            if cut is not None:
                cuts.append(cut)
            cells = {"seed": str(_seed(id)), **style, "source": source.path}
            batch += [{**cells, "id": id}] if cut is None else _part_cells(cut, cells, spec)
            if len(batch) >= _BATCH_ROWS:
                rows += len(batch)
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        rows += len(batch)
        writer.write_table(pa.Table.from_pylist(batch, schema))
    _write_json(out, memory, kept)
    return Library(path, spec, count, rows, tuple(cuts), tuple(left_out))


def check_style(style: Mapping[str, str]) -> JobSpec:
    """A row of the style. Raises ManifestError with all that is wrong with it."""
    if unknown := [column for column in style if column not in COLUMN_MODES]:
        listed = ", ".join(f"{column!r}{meant(column, COLUMN_MODES)}" for column in unknown)
        raise ManifestError(f"style: unknown column {listed}")
    if own := [column for column in (*_OWN_COLUMNS, "condition_video") if style.get(column)]:
        raise ManifestError(f"style: {', '.join(own)} can't be given: each source has its own")
    if style.get("mode", "text") == "text":
        raise ManifestError("style: mode must be control or edit: text mode takes no source")
    for column in (*SOURCE_COLUMNS, *MODEL_COLUMNS):
        for part in filter(None, style.get(column, "").split("+")):
            relative = not part.startswith("/") and "://" not in part and part not in MASK_SOURCES
            if relative and (column in SOURCE_COLUMNS or part.startswith(".") or part.endswith(".safetensors")):
                raise ManifestError(f"style: {column} names {part!r}; give its absolute path")
    try:
        return JobSpec.model_validate({**{name: cell for name, cell in style.items() if cell}, "source": "-"})
    except ValidationError as error:
        problems = "; ".join(str(Problem(0, "", *problem)) for problem in explained(error))
        raise ManifestError(f"style: {problems}") from None


def _id(name: str) -> str:
    """The row's id: the name; of a longer one than ids may be, its end and what tells it from others."""
    clean = "".join(letter if letter.isprintable() else "_" for letter in name).strip()
    if clean == name and len(name) <= _LONGEST_ID:
        return name
    return f"{clean[-_LONGEST_ID + 13 :]}-{_digest(name)[:12]}"


def _seed(id: str) -> int:
    """One seed for all parts of a source, whatever the style: drawn from its name."""
    return int(_digest(id)[:15], 16)


def _digest(*parts: object) -> str:
    return hashlib.blake2b(json.dumps([*map(str, parts)]).encode(), digest_size=16).hexdigest()


def _part_cells(cut: Cut, cells: Mapping[str, str], spec: JobSpec) -> list[dict[str, str]]:
    """The rows of the parts. Each begins where the whole row's frame of that number is shown, so that together
    they have its frames: none twice, none left out."""
    ends: list[str] = [repr(cut.begin_s + float(number / cut.rate_fps)) for number in cut.starts[1:]]
    # The last ends where the whole would: at the source's or the range's end, or after video_length frames.
    last = cells.get("end_s", "")
    if spec.video_length is not None:
        last = repr(cut.begin_s + float(cut.frames / cut.rate_fps))
    starts = [repr(cut.begin_s + float(number / cut.rate_fps)) for number in cut.starts]
    return [
        {**cells, "id": id, "start_s": start_s, "end_s": end_s, "video_length": ""}
        for id, start_s, end_s in zip(cut.ids, starts, [*ends, last], strict=True)
    ]


def _cut(
    id: str, path: str, spec: JobSpec, cutting: Cutting, limits: Limits, known: Mapping[str, Any]
) -> tuple[str, Cut | None]:
    """(under which name the cut is remembered, the cut; None for a source that stays whole).

    A source that can't be read stays whole, and is not remembered: its row's failure says why.
    """
    from t2vz.media.decode import timeline
    from t2vz.media.fingerprint import fingerprint
    from t2vz.media.sandbox import probe

    if cutting.by == "none":
        return "", None
    try:
        check_allowed(path, limits)
        range_ = (spec.start_s, spec.end_s, spec.fps, spec.video_length)
        key = _digest(_RULES, id, fingerprint(path), *range_, *asdict(cutting).values(), limits.max_frames)
        if key in known:
            return key, None if known[key] is None else _cut_from_json(id, path, known[key])
        source = probe(path, limits)
        uncut = timeline(source, start_s=spec.start_s, end_s=spec.end_s, fps=spec.fps, video_length=spec.video_length)
        longest = max(1, min(cutting.max_frames, limits.max_frames, int(cutting.max_clip_s * uncut.rate_fps + 1e-9)))
        if uncut.frames <= longest:
            return key, None
        scenes: tuple[int, ...] = (0,)
        if cutting.by == "scenes":
            scenes = _scenes(source, uncut, spec, limits)
        starts = tuple(
            begin + number
            for begin, end in zip(scenes, (*scenes[1:], uncut.frames), strict=True)
            for number in _even(end - begin, longest)
        )
        return key, Cut(id, path, uncut.begin_s, uncut.rate_fps, starts, uncut.frames)
    except T2VZError:
        return "", None


def _even(frames: int, longest: int) -> list[int]:
    """Where parts of nearly equal length begin, none of more than `longest` frames."""
    parts = ceil(frames / longest)
    return [number * frames // parts for number in range(parts)]


def _scenes(source: Probe, timeline: Timeline, spec: JobSpec, limits: Limits) -> tuple[int, ...]:
    """Numbers of the frames that begin a scene. Few small frames at a time: the source may last for hours."""
    from t2vz.media.sandbox import decode
    from t2vz.media.scenes import scene_starts

    batch = min(_SCENE_BATCH, limits.max_frames)

    def pictures() -> Iterator[Any]:
        for start in range(0, timeline.frames, batch):
            clip = decode(
                source.path,
                start_s=timeline.begin_s + float(start / timeline.rate_fps),
                fps=spec.fps,
                video_length=min(batch, timeline.frames - start),
                width=_SCENE_PX,
                height=_SCENE_PX,
                limits=limits,
                probed=source,
            )
            yield from clip.frames

    return scene_starts(pictures())


def _cut_to_json(cut: Cut) -> dict[str, Any]:
    return {
        "begin_s": cut.begin_s,
        "rate_fps": str(cut.rate_fps),
        "starts": list(cut.starts),
        "frames": cut.frames,
    }


def _cut_from_json(id: str, path: str, saved: Mapping[str, Any]) -> Cut:
    return Cut(id, path, saved["begin_s"], Fraction(saved["rate_fps"]), tuple(saved["starts"]), saved["frames"])


@dataclass(frozen=True)
class Joined:
    """What became of a source that was cut. status: `joined`, `kept` (it was before), `waiting` or `failed`.

    reason: of waiting (a part's) and failed. output_uri: relative to the output folder.
    """

    id: str
    status: Literal["joined", "kept", "waiting", "failed"]
    reason: str = ""
    output_uri: str | None = None
    frames: int | None = None
    audio_kept: bool = False
    warnings: tuple[str, ...] = ()


def joining(library: Library, settings: Settings) -> Iterator[tuple[str, Joined | Callable[[], Joined]]]:
    """(id, what became of it) of every source that was cut; for those whose videos are to be joined, a call does it.

    To be used while the output folder is open (`render.opening`). Raises ManifestError, ResultsError, OutputError.
    """
    if not library.cuts:
        return
    wanted = {id for cut in library.cuts for id in cut.ids}
    state = {
        id: item
        for item in plan(
            library.manifest,
            settings.out,
            limits=settings.limits,
            models=settings.models,
            content=settings.content,
        )
        if (id := item.row.id if isinstance(item, Job) else item.id) in wanted
    }
    store = settings.store()
    done, failed = store.done(), store.failed()
    may_stand = {finished.output_uri for finished in done.values() if suffices(finished, settings.content)}
    for cut in library.cuts:
        parts = [_part(id, state.get(id), done, failed) for id in cut.ids]
        join = _Join(cut, tuple(part for part in parts if not isinstance(part, str)), library.style, settings)
        if settings.content == "withhold":
            join.withdraw(may_stand)
        if missing := [part for part in parts if isinstance(part, str)]:
            yield cut.id, Joined(cut.id, "waiting", missing[0])
            continue
        yield cut.id, join.kept() or join.run


def _part(
    id: str,
    item: Job | Unready | Done | None,
    done: Mapping[str, Finished],
    failed: Mapping[str, tuple[str, str]],
) -> Finished | str:
    """A part's video; else why there is none."""
    if isinstance(item, Done):
        return done[item.job_id]
    if isinstance(item, Unready):
        return f"part {id} can't be rendered: {item.error.message}"
    if item is not None and item.job_id in failed:
        return "part {} failed in {}: {}".format(id, *failed[item.job_id])
    return f"part {id} is not rendered yet"


@dataclass(frozen=True)
class _Join:
    cut: Cut
    parts: tuple[Finished, ...]
    style: JobSpec
    settings: Settings

    def kept(self) -> Joined | None:
        """What was joined from the same before; None if there is none."""
        before = _read_json(self.settings.out, self._record)
        if before.get("key") != self._key or not _is_there(self.settings.out, before):
            return None
        return Joined(self.cut.id, "kept", "", before["output_uri"], before["frames"], before["audio_kept"])

    def withdraw(self, may_stand: set[str]) -> None:
        """Remove what was joined before if a part of it is withheld by now. may_stand: parts that are not."""
        out, before = self.settings.out, _read_json(self.settings.out, self._record)
        if not may_stand.issuperset(before.get("parts", ())):
            storage.remove_output(out, before["output_uri"])
            storage.remove(out, self._record)

    def run(self) -> Joined:
        cut, out = self.cut, self.settings.out
        try:
            before = _read_json(out, self._record)
            output_uri, made = self._joined()
            record: dict[str, Any] = {
                "key": self._key,
                "id": cut.id,
                "manifest": self.settings.manifest,
                "source": cut.path,
                "parts": [part.output_uri for part in self.parts],
                "output_uri": output_uri,
                "sha256": made.sha256,
                "size_bytes": made.size_bytes,
                "frames": made.frames,
                "fps": str(made.rate_fps),
                "audio_kept": made.audio_kept,
                "warnings": list(made.warnings),
            }
            _write_json(out, self._record, record)
            if before.get("output_uri", output_uri) != output_uri:
                storage.remove_output(out, before["output_uri"])  # made of parts that are no more
        except T2VZError as error:
            return Joined(cut.id, "failed", error.message)
        return Joined(cut.id, "joined", "", output_uri, made.frames, made.audio_kept, made.warnings)

    @property
    def _record(self) -> str:
        return f"joined/{file_name(self.cut.id)}-{_digest(self.settings.manifest, self.cut.id)[:8]}.json"

    @property
    def _key(self) -> str:
        """What the joined video is a function of: the parts' videos, and the sound of their source."""
        from t2vz.media.fingerprint import fingerprint

        checksums = [part.output_sha256 for part in self.parts]
        return _digest(_RULES, *checksums, fingerprint(self.cut.path), *_cut_to_json(self.cut).values())

    def _joined(self) -> tuple[str, Encoded]:
        """(output_uri, what it is)."""
        from t2vz.media.encode import Encoding, publish
        from t2vz.media.join import join
        from t2vz.media.provenance import SIGNED_FORMAT, signed
        from t2vz.media.sandbox import probe
        from t2vz.models.table import identity

        cut, settings = self.cut, self.settings
        encoding = Encoding.of(self.style)
        silent = not self.style.audio or encoding.format in ("gif", "png")
        audio = None
        if not silent and (source := probe(cut.path, settings.limits)).has_audio:
            audio = AudioReference(str(source.path), cut.begin_s, cut.begin_s + float(cut.frames / cut.rate_fps))
        workspace = settings.workspace / f"join-{_digest(cut.id)[:12]}"
        with translating("encode", str(workspace)):
            workspace.mkdir(parents=True, exist_ok=True)
        made = join(
            [self._here(part.output_uri, workspace) for part in self.parts],
            workspace / "joined",
            frames=cut.lengths,
            rate_fps=cut.rate_fps,
            encoding=encoding,
            audio=audio,
            metadata={"id": cut.id, "parts": [part.output_uri for part in self.parts]},
        )
        if settings.signing is not None and encoding.format == SIGNED_FORMAT:
            made = signed(made, settings.signing, self.style, identity(self.style))
        suffix = "" if encoding.format == "png" else f".{encoding.format}"
        output_uri = f"joined/{file_name(cut.id)}-{made.sha256[:12]}{suffix}"
        published = publish(made, settings.out, output_uri)
        shutil.rmtree(workspace, ignore_errors=True)
        return output_uri, published

    def _here(self, output_uri: str, workspace: Path) -> Path:
        """A part's video; of one on S3 a copy in the workspace."""
        if not storage.is_remote(self.settings.out):
            return Path(self.settings.out, output_uri)
        path = workspace / output_uri
        if not path.exists():  # else the same video is a part twice
            storage.download(self.settings.out, output_uri, path)
        return path


def _is_there(out: Place, record: Mapping[str, Any]) -> bool:
    if storage.is_remote(out):
        entry = storage.head(out, record["output_uri"])
        found = [entry] if entry else storage.entries(out, record["output_uri"])
        return sum(one.size_bytes for one in found) == record["size_bytes"]
    path = Path(out, record["output_uri"])
    if path.is_dir():
        from t2vz.media.encode import checksum

        return checksum(path)[0] == record["sha256"]
    return path.is_file() and path.stat().st_size == record["size_bytes"]


def _read_json(out: Place, key: str) -> dict[str, Any]:
    """Empty if there is none, or it is damaged: all that is in such files can be found out again."""
    try:
        found = json.loads(storage.get(out, key) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(out: Place, key: str, value: Mapping[str, Any]) -> None:
    with translating("encode", storage.joined(out, key)), storage.whole(out, key) as draft:
        draft.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", "utf-8")
