"""Manifest: the rows of a CSV or Parquet file as checked JobSpecs, streamed, with every problem of every row.

A defect of the file as a whole is a `ManifestError` when it is opened; a defect of a row is a `BadRow`
among the rows, so that one bad row never stops a batch.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import os
import posixpath
import re
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from t2vz import storage
from t2vz.errors import ManifestError, SourceError, SourceMissing, translating
from t2vz.media.local import entry_of_source, fetching, local_source
from t2vz.spec import COLUMN_MODES, MASK_SOURCES, MODEL_COLUMNS, SOURCE_COLUMNS, JobSpec

_MODES = ("text", "control", "edit")
# Without these cells it can't be told whether others fit.
_OTHERS_DEPEND_ON = frozenset(("mode", "format", "codec", "num_inference_steps"))
# In the Parquet schema's metadata of a shard: JSON {"manifest": absolute path or URL, "numbers": [of the rows, there]}.
_SHARD = b"t2vz.shard"
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")

_LONGEST_LINE_BYTES = 16 * 2**20  # all columns at the longest that a cell may be take less

_Record = tuple[int, Sequence[str] | str]  # (row number, cells); a text instead of cells says why there are none


@dataclass(frozen=True, slots=True)
class Row:
    """A row that can be planned.

    number: its place after the header, from 1; blank rows count, so it is a spreadsheet's row minus one.
    id: given, or made from the row's content; unique in the manifest. Also in `spec.id`.
    cells: as the manifest has them, the empty ones left out; neither defaults nor the folder are in them.
    """

    number: int
    id: str
    spec: JobSpec
    cells: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one cell.

    column: "" if it is the row as a whole. value: the cell as read, "" if absent.
    reason: plain English that continues the column's name ("must be at least 1").
    suggestion: the value that was probably meant, "" if none is near.
    """

    row: int
    id: str
    column: str
    value: str
    reason: str
    suggestion: str = ""

    def __str__(self) -> str:
        text = f"{self.column} {self.reason}" if self.column else self.reason
        if self.value:
            text += f" (it is {_shortened(self.value)!r})"
        return f"{text}; did you mean {self.suggestion!r}?" if self.suggestion else text


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that can't be planned, with all its problems.

    fingerprint: 32 hex digits of its id and content, so that a mended row is another one.
    """

    number: int
    id: str
    problems: tuple[Problem, ...]
    fingerprint: str

    @property
    def error(self) -> ManifestError:
        return ManifestError(f"row {self.number} ({_shortened(self.id)}): " + "; ".join(map(str, self.problems)))


def read(path: str | Path, defaults: Mapping[str, str] | None = None) -> Iterator[Row | BadRow]:
    """The rows of a manifest in their order, read as they are asked for.

    path: CSV (comma, semicolon or tab; UTF-8) or Parquet, told apart by content; on S3 (`s3://bucket/key`), too.
    A shard (`write_shard`) gives its rows as the manifest that it is of would: with its numbers, ids and paths.
    defaults: column → cell, for the columns that a row leaves empty and its mode uses. Paths in them are
    relative to the manifest's folder, as those in the cells are.

    Raises ManifestError at once if the file as a whole is unusable: missing, empty, not UTF-8, without a
    prompt column, with unknown, unnamed or repeated columns, or if a default is bad. StorageTimeout.
    """
    name = os.fspath(path)
    path = _here(name)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ManifestError(f"{name}: is a folder; name the manifest file in it")
        if not stat.S_ISREG(mode):  # opening a pipe may wait for ever, and the file is read more than once
            raise ManifestError(f"{name}: is not a regular file; save the manifest as one")
        with path.open("rb") as file:
            magic = file.read(4)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
        raise ManifestError(f"{_shortened(name, 240)}: there is no such manifest") from None
    except OSError as error:
        raise ManifestError(f"{_shortened(name, 240)}: can't be read ({error.strerror})") from error
    if magic == b"PK\x03\x04":
        raise ManifestError(f"{name}: is a spreadsheet or zip file; save it as CSV (UTF-8)")
    header, records = _open_parquet(path, name) if magic == b"PAR1" else _open_csv(path, name)
    defaults = dict(defaults or {})
    _check_header(name, header, defaults)
    _check_defaults(defaults)
    return _rows(name, header, records, defaults)


def _here(name: str) -> Path:
    """Of a manifest on S3 a local copy. Raises ManifestError if it can't be fetched, StorageTimeout."""
    if not storage.is_remote(name):
        return Path(name)
    try:
        return local_source(name)
    except SourceError as error:
        raise ManifestError(error.message) from error
    except OSError as error:
        raise ManifestError(f"{name}: can't be fetched ({error.strerror})") from error


def cells_of(spec: JobSpec) -> dict[str, str]:
    """The cells of a manifest row that means the spec; what was left open stays so, and paths are absolute."""
    values = {name: getattr(spec, name) for name in JobSpec.model_fields if name in spec.model_fields_set}
    return {name: _cell(value) for name, value in values.items() if value not in (None, "", ())}


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def is_there(path: str | os.PathLike[str]) -> bool:
    """True if there is a file. Raises SourceError (S3 refuses), StorageTimeout."""
    name = os.fspath(path)
    if not storage.is_remote(name):
        return os.path.isfile(name)
    try:
        with fetching():
            entry_of_source(name)
    except SourceMissing:
        return False
    return True


def origin(path: str | os.PathLike[str]) -> str:
    """Absolute path, or URL, of the manifest that the rows at `path` are of: of a shard the one it was cut from."""
    name = os.fspath(path)
    shard = _shard_of(name)
    if shard:
        return str(shard["manifest"])
    return name if storage.is_remote(name) else os.path.abspath(name)


def write_shard(place: storage.Place, key: str, manifest: str, rows: Sequence[Row]) -> None:
    """Write some rows of a manifest as a manifest of their own, a Parquet file; whole or not at all.

    The rows keep what they are there: number, id, cells and what their paths are relative to. So a job of the shard
    is the same job, with the same seed. Raises OutputError, StorageTimeout.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{**row.cells, "id": row.id} for row in rows]
    names = sorted({name for row in cells for name in row})
    about = json.dumps({"manifest": manifest, "numbers": [row.number for row in rows]})
    schema = pa.schema([(name, pa.string()) for name in names], {_SHARD: about.encode("utf-8", "surrogateescape")})
    with translating("manifest", storage.joined(place, key)), storage.whole(place, key) as draft:
        pq.write_table(pa.Table.from_pylist(cells, schema), draft)


def _shard_of(name: str) -> dict[str, Any] | None:
    """What a shard says of itself; None if the file is none, or can't be read, which `read` says better."""
    try:
        path = _here(name)
        with open(path, "rb") as file:
            if file.read(4) != b"PAR1":
                return None
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            metadata = pq.read_schema(path).metadata or {}
        except pa.ArrowException:
            return None
    except (OSError, ValueError, ManifestError):
        return None
    return json.loads(metadata[_SHARD].decode("utf-8", "surrogateescape")) if _SHARD in metadata else None


def _rows(
    name: str, header: Sequence[str], records: Iterator[_Record], defaults: Mapping[str, str]
) -> Iterator[Row | BadRow]:
    width = len(header)
    filled = [(name, value) for name, value in defaults.items() if value]
    filling = {mode: {name: value for name, value in filled if mode in COLUMN_MODES[name]} for mode in _MODES}
    anywhere = {name: value for name, value in filling["text"].items() if len(COLUMN_MODES[name]) == len(_MODES)}
    paths = _Paths(origin(name).rpartition("/")[0] or "/", {*header, *defaults})
    ids = _Ids()
    with translating("manifest", name):
        for number, record in records:
            if isinstance(record, str) or (len(record) != width and not _is_padded(record, width)):
                yield _unreadable(number, record, width, ids)
                continue
            cells = {name: text for name, text in zip(header, map(str.strip, record), strict=False) if text}
            if not cells:
                continue
            given = cells.get("id", "")
            problems: list[tuple[str, str, str, str]] = []  # column, value, reason, suggestion
            if not given or _CONTROL_CHARACTERS.search(given):
                id = ids.unique(_made_id(cells), number)
                if given:
                    problems.append(("id", given, "contains a control character", ""))
            elif (first := ids.rows.setdefault(given, number)) != number:
                problems.append(("id", given, f"is the id of row {first} already", ""))
                id = ids.unique(f"{given} (duplicate)", number)
            else:
                id = given
            wanted = {**filling.get(cells.get("mode") or defaults.get("mode", "text"), anywhere), **cells}
            problems += paths.resolve(wanted)
            wanted["id"] = id
            try:
                spec = JobSpec.model_validate(wanted, context=wanted.keys() - cells.keys())
            except ValidationError as error:
                problems += _all_explained(error, wanted, wanted.keys() - cells.keys())
            if problems:
                yield _bad(number, id, problems, sorted(cells.items()))
            else:
                yield Row(number, id, spec, cells)


def _is_padded(record: Sequence[str], width: int) -> bool:
    """True if only empty cells are too many: spreadsheets write delimiters after the last column."""
    return len(record) > width and not any(map(str.strip, record[width:]))


def _bad(number: int, id: str, problems: list[tuple[str, str, str, str]], content: object) -> BadRow:
    return BadRow(number, id, tuple(Problem(number, id, *problem) for problem in problems), _digest((id, content), 16))


def _unreadable(number: int, record: Sequence[str] | str, expected: int, ids: _Ids) -> BadRow:
    if isinstance(record, str):
        reason = record
    else:
        reason = f"has {len(record)} cell{'' if len(record) == 1 else 's'} where the header has {expected}"
    id = ids.unique(_digest(record, 5), number)
    return _bad(number, id, [("", "", reason, "")], record)


def _made_id(cells: Mapping[str, str]) -> str:
    """Of what the row asks for: not of the order of the columns, nor of how much is done at once."""
    return _digest({name: cells[name] for name in sorted(cells) if name != "chunk_size"}, 5)


def _digest(content: object, size_bytes: int) -> str:
    return hashlib.blake2b(repr(content).encode("utf-8", "replace"), digest_size=size_bytes).hexdigest()


class _Ids:
    """The ids of the manifest so far, each with the row that has it."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self._copies: dict[str, int] = {}

    def unique(self, id: str, number: int) -> str:
        """`id`, or with -2, -3, … if other rows have it."""
        candidate = id
        while self.rows.setdefault(candidate, number) != number:
            self._copies[id] = self._copies.get(id, 1) + 1
            candidate = f"{id}-{self._copies[id]}"
        return candidate


class _Paths:
    """Makes the paths in cells absolute; they are relative to the manifest's folder."""

    def __init__(self, folder: str, columns: Collection[str]) -> None:
        self._folder = folder
        self._sources = [name for name in SOURCE_COLUMNS if name in columns]
        self._models = [name for name in MODEL_COLUMNS if name in columns]
        self._known: dict[str, str] = {}

    def resolve(self, cells: dict[str, str]) -> list[tuple[str, str, str, str]]:
        """The cells with their paths made absolute, in place; problems as (column, value, reason, suggestion)."""
        problems = []
        for name in self._sources:
            value = cells.get(name)
            if value and not _URI.match(value) and value not in MASK_SOURCES:
                cells[name] = _absolute(self._folder, value)
        for name in self._models:
            value = cells.get(name)
            if value:
                parts = value.split("+") if name in ("controlnet", "lora", "textual_inversion") else [value]
                cells[name] = "+".join(self._model(part.strip()) for part in parts)
                if len(parts) > 1 and os.path.exists(_absolute(self._folder, value)):
                    problems.append((name, value, "is read as several, joined by +: rename the file without it", ""))
        return problems

    def _model(self, name: str) -> str:
        """A model is a name or a hub id unless it is written as a path or lies beside the manifest."""
        if name and name not in self._known:  # an empty one is refused later, and is not the manifest's folder
            path = _absolute(self._folder, name)
            is_path = name.startswith(("./", "../")) or name.endswith(".safetensors") or os.path.exists(path)
            is_path &= "\0" not in name and not name.startswith("~")
            self._known[name] = path if is_path else name
        return self._known.get(name, "")


@lru_cache(maxsize=4096)  # many rows share a source
def _absolute(folder: str, path: str) -> str:
    if storage.is_remote(folder) and not path.startswith("/"):
        scheme, bucket = folder[: len("s3://")], folder[len("s3://") :]
        return scheme + posixpath.normpath(posixpath.join(bucket, path))
    return os.path.normpath(os.path.join(folder, path))


def _check_header(path: str, header: Sequence[str], defaults: Mapping[str, str]) -> None:
    if unnamed := [str(at) for at, name in enumerate(header, 1) if not name]:
        raise ManifestError(f"{path}: column {', '.join(unnamed)} has no name in the header")
    if unknown := [name for name in header if name not in COLUMN_MODES]:
        listed = ", ".join(f"{_shortened(name)!r}{meant(name, COLUMN_MODES)}" for name in unknown)
        raise ManifestError(f"{path}: unknown column{'s' if len(unknown) > 1 else ''} {listed}")
    if repeated := sorted({name for name in header if header.count(name) > 1}):
        raise ManifestError(f"{path}: column {', '.join(repeated)} appears more than once: remove one")
    if "prompt" not in header and not defaults.get("prompt"):
        raise ManifestError(f"{path}: there is no prompt column; the columns are {', '.join(header)}")


def _check_defaults(defaults: Mapping[str, str]) -> None:
    """Refuse what no row could use; rules that span columns are left to the rows."""
    for name in defaults:
        if name not in COLUMN_MODES:
            raise ManifestError(f"default for an unknown column {name!r}{meant(name, COLUMN_MODES)}")
        if name == "id":
            raise ManifestError("there can't be a default for id: it names a single row")
    try:
        JobSpec.model_validate({"prompt": "-", **{name: value for name, value in defaults.items() if value}})
    except ValidationError as error:
        if error.errors()[0]["type"] != "columns":
            bad = "; ".join(str(Problem(0, "", *problem)) for problem in explained(error))
            raise ManifestError(f"bad default: {bad}") from None


def _open_csv(path: Path, name: str) -> tuple[list[str], Iterator[_Record]]:
    first, first_at = "", 0
    with path.open("rb") as file:  # the whole of it: no row is begun if one can't be read
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE_BYTES), b""), 1):
            if len(line) == _LONGEST_LINE_BYTES:
                raise ManifestError(f"{name}: line {number} has over {_LONGEST_LINE_BYTES:,} bytes; is it a CSV file?")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise ManifestError(f"{name}: line {number} is not UTF-8; save it as CSV UTF-8") from None
            if not first:
                first, first_at = text.strip("\r\n "), number
    if not first:
        raise ManifestError(f"{name}: is empty; the first line must name the columns")

    if told := re.fullmatch(r'"?sep=(.)"?', first, re.IGNORECASE):  # Excel's own line before the header
        records = _csv_records(path, told[1], first_at)
    else:
        delimiter = max(",;\t", key=lambda mark: sum(part.strip(' "') in COLUMN_MODES for part in first.split(mark)))
        records = _csv_records(path, delimiter, first_at - 1)
    header = next(records, [])
    if isinstance(header, str):
        raise ManifestError(f"{name}: the header {header}")
    names = [cell.strip() for cell in header]
    while len(names) > 1 and not names[-1]:
        names.pop()
    return names, ((number, cells) for number, cells in enumerate(records, 1) if cells)


def _csv_records(path: Path, delimiter: str, skipped: int) -> Iterator[Sequence[str] | str]:
    """Header and rows as they come, blank lines as empty ones; a text says why there are no cells.

    skipped: lines before the header.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        for _ in range(skipped):
            file.readline()
        reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
        line, ended = 0, False
        while not ended:
            try:
                for cells in reader:
                    line = reader.line_num
                    yield cells
                ended = True
            except csv.Error as error:  # the reader goes on with the next line
                first, line = line + 1, reader.line_num
                yield _csv_reason(str(error), skipped + first, skipped + line)


def _csv_reason(error: str, line: int, last_line: int) -> str:
    swallowed = f"; what is up to line {last_line} was read as a part of it" if last_line > line else ""
    if "expected after" in error:
        return f'(line {line}) has text after a closing quote; write quotes inside a cell twice (""){swallowed}'
    if "end of data" in error:
        return f"(line {line}) opens a quote that is never closed: the rows after it may be inside it"
    if "field limit" in error:
        return f"(line {line}) opens a quote that is not closed, or has a cell of over 131072 characters{swallowed}"
    return f"(line {line}) is not CSV: {error}"


def _open_parquet(path: Path, name: str) -> tuple[list[str], Iterator[_Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"{name}: is not a readable Parquet file ({_first_line(error)})") from error
    for column in file.schema_arrow:
        if not _is_cell(column.type):
            raise ManifestError(f"{name}: column {_shortened(column.name)} holds {column.type}; write it as text")
    names = [column.strip() for column in file.schema_arrow.names]
    return names, _parquet_records(name, file, names)


def _parquet_records(path: str, file: Any, names: Sequence[str]) -> Iterator[_Record]:
    import pyarrow as pa

    number = 0
    shard = _shard_of(path)
    numbers = shard["numbers"] if shard else range(1, file.metadata.num_rows + 1)
    try:
        for batch in file.iter_batches(batch_size=4096):
            columns = [_texts(column) for column in batch.columns]
            for number, cells in enumerate(zip(*columns, strict=True), number + 1):  # noqa: B020
                if None in cells:
                    yield numbers[number - 1], f"has a list with an empty element in column {names[cells.index(None)]}"
                else:
                    yield numbers[number - 1], cells
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ManifestError(
            f"{path}: row {number + 1} or one soon after can't be read ({_first_line(error)})"
        ) from error


def _is_cell(type: Any, *, in_list: bool = False) -> bool:
    """True for text, numbers and true/false, and for lists of them."""
    from pyarrow import types

    if types.is_list(type) or types.is_large_list(type) or types.is_fixed_size_list(type):
        return not in_list and _is_cell(type.value_type, in_list=True)
    if types.is_dictionary(type):
        return _is_cell(type.value_type, in_list=True)
    kinds = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_decimal)
    return any(is_kind(type) for is_kind in (*kinds, types.is_boolean, types.is_null))


def _texts(column: Any) -> list[str | None]:
    """The cells as a CSV file would hold them: 512.0 as 512, lists joined by `+`, nulls empty.

    None for a list with a null in it, which no text can tell.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if hasattr(column.type, "value_field"):  # a list
        lists = column.cast(pa.list_(pa.string())).to_pylist()
        return [None if None in (parts or ()) else "+".join(parts or ()) for parts in lists]
    text = column.cast(pa.string())
    if pa.types.is_floating(column.type):
        wide = column.cast(pa.float64())
        whole = pc.and_(pc.equal(wide, pc.trunc(wide)), pc.less(pc.abs(wide), 2.0**63))
        text = pc.if_else(whole, wide.cast(pa.int64(), safe=False).cast(pa.string()), text)  # no 1e+18
        text = pc.if_else(pc.is_nan(wide), None, text)  # pandas' way to say absent
    return text.fill_null("").to_pylist()


def explained(error: ValidationError) -> list[tuple[str, str, str, str]]:
    """(column, value, reason, suggestion) of every problem that pydantic found."""
    found = []
    for detail in error.errors(include_url=False):
        context: dict[str, Any] = detail.get("ctx", {})
        if detail["type"] == "columns":
            cells = detail["input"]
            found += [(column, str(cells.get(column, "")), reason, "") for column, reason in context["problems"]]
            continue
        column = str(detail["loc"][0])
        value = "" if detail["type"] == "missing" else str(detail["input"])
        choices = re.findall(r"'([^']*)'", context["expected"]) if detail["type"] == "literal_error" else []
        near = difflib.get_close_matches(value.lower(), choices, n=1)
        found.append((column, value, _reason(detail["type"], detail["msg"], context, choices), *(near or [""])))
    return found


def _all_explained(
    error: ValidationError, cells: Mapping[str, str], defaults: Collection[str]
) -> list[tuple[str, str, str, str]]:
    """`explained`, and what is wrong between the other cells: JobSpec looks at that only when each is good."""
    found = explained(error)
    bad = {column for column, *_ in found}
    if error.errors()[0]["type"] == "columns" or bad & _OTHERS_DEPEND_ON:
        return found
    others = {"prompt": "-", **{name: value for name, value in cells.items() if name not in bad}}
    try:
        JobSpec.model_validate(others, context=defaults)
    except ValidationError as more:
        found += [problem for problem in explained(more) if problem[0] not in bad]
    return found


def _reason(kind: str, message: str, context: Mapping[str, Any], choices: list[str]) -> str:
    if choices:
        return f"must be one of {', '.join(choices)}"
    reasons = {
        "missing": "is needed",
        "bool_parsing": "must be true or false",
        "finite_number": "must be a finite number",
        "float_parsing": "must be a number",
        "greater_than": "must be above {gt}",
        "greater_than_equal": "must be at least {ge}",
        "int_from_float": "must be a whole number",
        "int_parsing": "must be a whole number",
        "int_parsing_size": "has too many digits",
        "less_than": "must be below {lt}",
        "less_than_equal": "must be at most {le}",
        "multiple_of": "must be a multiple of {multiple_of}",
        "parts": message,
        "rate": "is " + message if message.startswith("not") else message.removeprefix("a rate "),
        "string_too_long": "is longer than {max_length} characters",
        "string_too_short": "is empty",
    }
    return reasons[kind].format(**context) if kind in reasons else f"is not accepted: {message}"


def meant(name: str, choices: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name.lower(), choices, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "…"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
