"""Library: a folder of videos made a manifest of one style, long ones in parts; the parts' videos joined again.

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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from t2vz.clip import AudioReference
from t2vz.errors import ManifestError, OutputError, SourceError, T2VZError, translating
from t2vz.files import whole
from t2vz.manifest import Problem, explained, meant
from t2vz.media.limits import Limits
from t2vz.plan import Done, Job, Unready, check_out, plan
from t2vz.render import Settings, file_name
from t2vz.results import Finished
from t2vz.shards import local_out
from t2vz.spec import COLUMN_MODES, MASK_SOURCES, MODEL_COLUMNS, SOURCE_COLUMNS, JobSpec

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
    """A file of a library. name: how it is called there (a relative path with `/`). path: where it is read from."""

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

    manifest: Path
    style: JobSpec
    sources: int
    rows: int
    cuts: tuple[Cut, ...]
    left_out: tuple[str, ...] = ()


def find(folder: str | Path, glob: str = "**/*", *, out: str | Path) -> list[Source]:
    """The videos in a folder that match the glob, sorted by name. Hidden files and the output folder are left out.

    Raises SourceError if there is no such folder, ManifestError if the glob is none.
    """
    folder, inside = Path(folder).absolute(), Path(out).absolute()
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder to take videos from")
    try:
        found = sorted(folder.glob(glob))
    except (ValueError, NotImplementedError) as error:
        raise ManifestError(f"glob {glob!r} can't be used ({error}); write one like **/*.mp4") from None
    sources = []
    for path in found:
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if not hidden and path.suffix.lower() in SUFFIXES and inside not in path.parents and path.is_file():
            sources.append(Source(name.as_posix(), str(path)))
    return sources


def scan(
    sources: Iterable[Source],
    out: str | Path,
    style: Mapping[str, str],
    *,
    cutting: Cutting = Cutting(),
    name: str = "library",
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> Library:
    """Write the manifest of the sources in one style to OUT/manifests/NAME.parquet.

    style: column → cell, the same for all; `prompt` and a mode that takes a source at least.
    A source that can't be read becomes a row all the same: what is wrong with it is then in the results.
    Raises ManifestError (a style that no row could have, a bad name), OutputError.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    style = {column: cell for column, cell in style.items() if cell}
    spec = check_style(style)
    if name != file_name(name):
        raise ManifestError(f"the library's name {name!r} must be of letters, digits, '.', '_' and '-'")
    local_out(out)
    check_out(out)
    folder = Path(out).absolute() / "manifests"
    path, memory = folder / f"{name}.parquet", folder / f"{name}.cuts.json"
    known, kept = _read_json(memory), {}
    columns = list(dict.fromkeys(("id", "source", "start_s", "end_s", "video_length", "seed", *style)))
    schema = pa.schema([(column, pa.string()) for column in columns])
    count = rows = 0
    cuts: list[Cut] = []
    left_out: list[str] = []
    taken: set[str] = set()
    with translating("manifest", str(path)), whole(path) as draft, pq.ParquetWriter(draft, schema) as writer:
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
            key, cut = _cut(id, source.path, spec, cutting, limits, known)
            if key:
                kept[key] = None if cut is None else _cut_to_json(cut)
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
    _write_json(memory, kept)
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
    from t2vz.media.probe import probe

    if cutting.by == "none":
        return "", None
    try:
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
    from t2vz.media.decode import decode
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
        for item in plan(library.manifest, settings.out)
        if (id := item.row.id if isinstance(item, Job) else item.id) in wanted
    }
    store = settings.store()
    done, failed = store.done(), store.failed()
    for cut in library.cuts:
        parts = [_part(id, state.get(id), done, failed) for id in cut.ids]
        if missing := [part for part in parts if isinstance(part, str)]:
            yield cut.id, Joined(cut.id, "waiting", missing[0])
            continue
        join = _Join(cut, tuple(part for part in parts if not isinstance(part, str)), library.style, settings)
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
        before = _read_json(self._record)
        if before.get("key") != self._key or not _is_there(Path(self.settings.out), before):
            return None
        return Joined(self.cut.id, "kept", "", before["output_uri"], before["frames"], before["audio_kept"])

    def run(self) -> Joined:
        cut, before = self.cut, _read_json(self._record)
        try:
            made, warnings = self._joined()
            record: dict[str, Any] = {
                "key": self._key,
                "id": cut.id,
                "manifest": self.settings.manifest,
                "source": cut.path,
                "parts": [part.output_uri for part in self.parts],
                "output_uri": made.path.relative_to(Path(self.settings.out)).as_posix(),
                "sha256": made.sha256,
                "size_bytes": made.size_bytes,
                "frames": made.frames,
                "fps": str(made.rate_fps),
                "audio_kept": made.audio_kept,
                "warnings": warnings,
            }
            _write_json(self._record, record)
        except T2VZError as error:
            return Joined(cut.id, "failed", error.message)
        if "output_uri" in before and before["output_uri"] != record["output_uri"]:
            _remove(Path(self.settings.out) / before["output_uri"])  # made of parts that are no more
        return Joined(cut.id, "joined", "", record["output_uri"], made.frames, made.audio_kept, tuple(warnings))

    @property
    def _record(self) -> Path:
        name = f"{file_name(self.cut.id)}-{_digest(self.settings.manifest, self.cut.id)[:8]}.json"
        return Path(self.settings.out) / "joined" / name

    @property
    def _key(self) -> str:
        """What the joined video is a function of: the parts' videos, and the sound of their source."""
        from t2vz.media.fingerprint import fingerprint

        checksums = [part.output_sha256 for part in self.parts]
        return _digest(_RULES, *checksums, fingerprint(self.cut.path), *_cut_to_json(self.cut).values())

    def _joined(self) -> tuple[Encoded, list[str]]:
        from t2vz.media.encode import Encoding, publish
        from t2vz.media.join import join
        from t2vz.media.probe import probe

        cut, settings = self.cut, self.settings
        encoding = Encoding.of(self.style)
        silent = not self.style.audio or encoding.format in ("gif", "png")
        audio = None
        if not silent and probe(cut.path, settings.limits).has_audio:
            audio = AudioReference(cut.path, cut.begin_s, cut.begin_s + float(cut.frames / cut.rate_fps))
        workspace = settings.workspace / f"join-{_digest(cut.id)[:12]}"
        with translating("encode", str(workspace)):
            workspace.mkdir(parents=True, exist_ok=True)
        made = join(
            [Path(settings.out) / part.output_uri for part in self.parts],
            workspace / "joined",
            frames=cut.lengths,
            rate_fps=cut.rate_fps,
            encoding=encoding,
            audio=audio,
            metadata={"id": cut.id, "parts": [part.output_uri for part in self.parts]},
        )
        suffix = "" if encoding.format == "png" else f".{encoding.format}"
        published = publish(made, settings.out, f"joined/{file_name(cut.id)}-{made.sha256[:12]}{suffix}")
        return published, list(published.warnings)


def _is_there(out: Path, record: Mapping[str, Any]) -> bool:
    path = out / record["output_uri"]
    if path.is_dir():
        from t2vz.media.encode import checksum

        return checksum(path)[0] == record["sha256"]
    return path.is_file() and path.stat().st_size == record["size_bytes"]


def _remove(path: Path) -> None:
    import shutil

    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    """Empty if there is none, or it is damaged: all that is in such files can be found out again."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        return {}
    except OSError as error:
        raise OutputError(f"{path}: can't be read ({error.strerror})") from error
    return found if isinstance(found, dict) else {}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with translating("encode", str(path)), whole(path) as draft:
        draft.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", "utf-8")
