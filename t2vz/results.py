"""Results: a row for every job, kept so that a kill at any moment loses no finished row and doubles none.

OUT is a folder, or a prefix on S3 (`t2vz.storage`).

OUT/records/  a small record a finished job, written whole or not at all: the job's commit point
OUT/results/  the Delta table that the records are merged into, in batches

A row counts once its record is there, so whoever reads takes the table and the waiting records together.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from t2vz import storage
from t2vz.errors import ContentWithheld, OutputError, ResultsBusy, ResultsError, translate
from t2vz.storage import Entry, Place, translating_storage

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SCHEMA_VERSION = 2

_log = logging.getLogger(__name__)
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_MERGE_TRIES = 20
_MERGE_BYTES = 128 * 2**10  # a merge of one row takes 60 kB; the table's library panics aloud on a full disk
_COMPACT_FILES = 100  # a MERGE slows with the number of files, and every flush adds one


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultRow:
    """What became of one manifest row in one run. `None` is "not known": a failed row has no output.

    job_id, run_id: letters, digits, `-` and `_`. id: the manifest row's.
    parameters, quality: JSON objects. fps: exact, as "30000/1001". output_uri: relative to the output folder.
    content: what the model's safety checker found: "clear", "flagged"; "no checker" (the model has none) and
    "unchecked" (the run asked for none) say nothing of the frames. content_frames: how many it flagged.
    signed: the file carries a C2PA signature.
    started_at, finished_at: of the attempt that ended so; with a time zone. Raises ValueError if a field is
    of another type than the schema's.
    """

    schema_version: int = SCHEMA_VERSION
    job_id: str
    run_id: str
    id: str
    manifest: str | None = None
    row_number: int | None = None
    status: str
    error_stage: str | None = None
    error_class: str | None = None
    error_message: str | None = None
    retryable: bool | None = None
    attempts: int = 1
    warnings: tuple[str, ...] = ()

    mode: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    parameters: str | None = None
    seed: int | None = None
    model: str | None = None
    model_revision: str | None = None
    controlnets: tuple[str, ...] | None = None
    loras: tuple[str, ...] | None = None
    scheduler: str | None = None
    dtype: str | None = None

    source_uri: str | None = None
    source_fingerprint: str | None = None
    decoder: str | None = None
    output_uri: str | None = None
    output_sha256: str | None = None
    output_bytes: int | None = None
    output_mtime_ns: int | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    fps: str | None = None
    codec: str | None = None
    audio_kept: bool | None = None
    signed: bool | None = None
    content: str | None = None
    content_frames: int | None = None

    decode_s: float | None = None
    conditions_s: float | None = None
    model_s: float | None = None
    generate_s: float | None = None
    encode_s: float | None = None
    wall_s: float | None = None
    unet_evaluations: int | None = None
    device: str | None = None
    peak_memory_bytes: int | None = None
    quality: str | None = None

    t2vz_version: str | None = None
    torch_version: str | None = None
    diffusers_version: str | None = None
    started_at: datetime
    finished_at: datetime

    def __post_init__(self) -> None:
        # A value that Arrow can't hold would stop the merge of all waiting records: refuse it at birth.
        for name, (kind, optional) in _FIELDS.items():
            value = getattr(self, name)
            if not (value is None and optional) and not _fits(value, kind):
                raise ValueError(f"{name} must be {kind}{' or None' if optional else ''}, not {value!r}")
        if self.status not in ("ok", "failed", "skipped"):
            raise ValueError(f"status must be ok, failed or skipped, not {self.status!r}")
        if self.status == "ok" and any(getattr(self, name) is None for name in _NEEDED):
            raise ValueError(f"an ok row needs {', '.join(_NEEDED)}")
        for name in ("job_id", "run_id"):
            if not _KEY.fullmatch(getattr(self, name)):
                raise ValueError(f"{name} must be of letters, digits, - and _, not {getattr(self, name)!r}")


_FIELDS: dict[str, tuple[str, bool]] = {  # name → (type as written, may be None)
    field.name: (str(field.type).removesuffix(" | None"), str(field.type).endswith(" | None"))
    for field in fields(ResultRow)
}


def _fits(value: Any, kind: str) -> bool:
    if kind == "tuple[str, ...]":
        return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    if kind == "int":
        return isinstance(value, int) and -(2**63) <= value < 2**63
    if kind == "float":
        return isinstance(value, int | float)
    if kind == "datetime":
        return isinstance(value, datetime) and value.tzinfo is not None
    return isinstance(value, {"str": str, "bool": bool}[kind])


def schema() -> pa.Schema:
    """The table's columns. Fixed: types inferred from data change with it (an empty column is void)."""
    import pyarrow as pa

    types = {
        "str": pa.string(),
        "int": pa.int64(),
        "float": pa.float64(),
        "bool": pa.bool_(),
        "datetime": pa.timestamp("us", tz="UTC"),
        "tuple[str, ...]": pa.list_(pa.string()),
    }
    return pa.schema([(name, types[kind]) for name, (kind, _) in _FIELDS.items()])


class Finished(NamedTuple):
    """An ok job's output, as it was when its row was written, and what its content was found to be."""

    output_uri: str
    output_bytes: int
    output_mtime_ns: int
    output_sha256: str
    content: str | None = None


_NEEDED = ("output_uri", "output_bytes", "output_mtime_ns", "output_sha256")


class State(NamedTuple):
    """The results at a moment. done: the outputs of all ok jobs by job_id. version: the table's, -1 if there is none.

    until: the latest time in any row. A row that is made from this state is dated no earlier, whatever the clock of
    its machine says: which of two rows of a job holds is told by their times.
    """

    done: Mapping[str, Finished]
    version: int
    until: datetime | None


def replaces(new: ResultRow, old: ResultRow) -> bool:
    """True if `new` takes the place of `old`, a row of the same job.

    An ok row holds from its finish, any other from its start: the later one wins. So a failure replaces an
    ok only if it began after that had finished, when its planner had found the file gone. One order for
    all rows: in which order they arrive doesn't matter.
    """
    a, b = _holds_from(new), _holds_from(old)
    return a > b or (a == b and new.status == "ok")


def _holds_from(row: ResultRow) -> datetime:
    return row.finished_at if row.status == "ok" else row.started_at


_HOLDS_FROM = "CASE WHEN {0}.status = 'ok' THEN {0}.finished_at ELSE {0}.started_at END"
_REPLACES = "({s}) > ({t}) OR (({s}) = ({t}) AND s.status = 'ok')".format(
    s=_HOLDS_FROM.format("s"), t=_HOLDS_FROM.format("t")
)


class ResultStore:
    """The results of an output folder. Safe for several threads, processes and runs at once.

    Nothing is created before the first `commit`.
    """

    def __init__(self, out: Place) -> None:
        self.out = storage.normal(out)
        if re.search("%[0-9A-Fa-f]{2}", str(self.out)):  # deltalake 1.6 decodes it and then looks elsewhere
            raise ResultsError(f"{self.out}: a % before two hex digits can't be in the output folder's path")

    def commit(self, row: ResultRow) -> bool:
        """Keep a finished row; durable against kill -9 once this returns.

        False if an ok row of the job is waiting already, from a run that worked at the same time: that one
        stands. Raises ResultsBusy, ResultsError, OutputError (no space, no permission), StorageTimeout.
        """
        body = _to_json(row)
        if row.status != "ok":
            storage.put(self.out, f"records/{row.job_id}.{row.run_id}.{row.status}.json", body)
            return True
        key = _ok_key(row.job_id)
        for _ in range(_MERGE_TRIES):
            if storage.create(self.out, key, body):
                return True
            there = storage.get(self.out, key)
            if there is None:
                continue  # merged in this moment
            if there == body:
                return True  # written by ourselves; only the answer was lost
            other = self._parsed(key, there)
            if other is not None and row.started_at <= other.finished_at:
                return False
            # It had finished before this attempt began, so our planner saw it and found its file gone.
            entry = storage.head(self.out, key)
            if entry is not None:
                self._flush([entry])
        raise ResultsBusy(f"{self.out}: other runs keep writing job {row.job_id}; try again")

    def flush(self, limit: int = 10_000) -> int:
        """Merge the waiting records into the table, at most `limit` in one step; how many they were.

        Raises ResultsBusy if other writers won every try, ResultsError, OutputError, StorageTimeout. The
        records then wait on: nothing is lost.
        """
        waiting = self._waiting()
        merged = sum(self._flush(waiting[at : at + limit]) for at in range(0, len(waiting), limit))
        if merged:
            with translating_storage(self.out):
                self._compact()
        return merged

    def done(self) -> Mapping[str, Finished]:
        """The outputs of all ok jobs by job_id, waiting ones included."""
        return self.state().done

    @storage.patient
    def state(self) -> State:
        """What there is now."""
        import pyarrow.compute as pc

        times: list[datetime] = []
        with translating_storage(self.out):
            # Before the table: a record that is merged in between is then seen twice, not never.
            waiting: dict[str, Finished] = {}
            for row in self._records():
                times.append(max(row.started_at, row.finished_at))
                if row.status == "ok":
                    waiting[row.job_id] = _finished(row)
            found: dict[str, Finished] = {}
            if (table := self._table()) is not None:
                columns = ["status", "job_id", *Finished._fields, "started_at", "finished_at"]
                for batch in table.to_pyarrow_dataset().to_batches(columns=columns):
                    found.update(_oks(batch))
                    if batch.num_rows:
                        times += [pc.max(batch[name]).as_py() for name in ("started_at", "finished_at")]
        return State(found | waiting, -1 if table is None else table.version(), max(times, default=None))

    def merged_since(self, version: int, run_id: str) -> Mapping[str, Finished]:
        """The outputs of the ok jobs that other runs have merged into the table after its `version`.

        Remembered in the process: another look costs one for the table's next version, and reads only what is new.
        """
        return _additions(self.out, version, run_id).look()

    @storage.patient
    def failed(self) -> Mapping[str, tuple[str, str]]:
        """Stage and message of all failed jobs by job_id, waiting ones included; what is ok since is not among them."""
        import pyarrow.compute as pc

        with translating_storage(self.out):
            newest: dict[str, ResultRow] = {}
            for row in self._records():
                if row.job_id not in newest or replaces(row, newest[row.job_id]):
                    newest[row.job_id] = row
            found: dict[str, tuple[str, str]] = {}
            if (table := self._table()) is not None:
                columns = ["status", "job_id", "error_stage", "error_message"]
                for batch in table.to_pyarrow_dataset().to_batches(columns=columns):
                    rows = batch.filter(pc.equal(batch["status"], "failed")).to_pylist()
                    found.update(
                        (row["job_id"], (row["error_stage"] or "", row["error_message"] or "")) for row in rows
                    )
        for job, row in newest.items():
            found.pop(job, None)
            if row.status == "failed":
                found[job] = row.error_stage or "", row.error_message or ""
        return found

    def withheld(self) -> Mapping[str, str]:
        """Why, for the jobs whose frames were made and withheld, by job_id."""
        return {job: why for job, (stage, why) in self.failed().items() if stage == ContentWithheld.stage}

    def is_done(self, job_id: str) -> Finished | None:
        """The job's output if an ok record of it waits: a cheap look for what another run has just finished."""
        body = storage.get(self.out, _ok_key(job_id))
        row = None if body is None else self._parsed(_ok_key(job_id), body)
        return None if row is None else _finished(row)

    @storage.patient
    def arrow(self) -> pa.Table:
        """A row for every job: the table's and the waiting ones. Raises ResultsError if there are none."""
        import pyarrow as pa
        import pyarrow.compute as pc

        with translating_storage(self.out):
            waiting: dict[str, ResultRow] = {}
            for row in self._records():
                if row.job_id not in waiting or replaces(row, waiting[row.job_id]):
                    waiting[row.job_id] = row
            table = self._table()
            if table is None and not waiting:
                raise ResultsError(f"{self.out}: there are no results here; is it a run's output folder?")
            merged = schema().empty_table()
            if table is not None:
                merged = table.to_pyarrow_dataset().to_table().select(schema().names).cast(schema())
                known = pc.is_in(merged["job_id"], pa.array(waiting, pa.string()))
                for old in _rows(merged.filter(known)):
                    if not replaces(waiting[old.job_id], old):
                        waiting[old.job_id] = old
                merged = merged.filter(pc.invert(known))
            return pa.concat_tables([merged, _to_arrow(list(waiting.values()))])

    def _waiting(self) -> list[Entry]:
        return [entry for entry in storage.entries(self.out, "records") if entry.key.endswith(".json")]

    def _records(self) -> Iterator[ResultRow]:
        for key, body in storage.get_all(self.out, [entry.key for entry in self._waiting()]):
            if (row := self._parsed(key, body)) is not None:
                yield row

    def _parsed(self, key: str, body: bytes) -> ResultRow | None:
        """The record's row. What is none (a power loss can leave zero bytes) is logged, None."""
        try:
            return _from_json(body)
        except ValueError as error:
            _log.warning("%s/%s is not a result record (%s); its row will be done again", self.out, key, error)
            return None

    def _flush(self, waiting: Sequence[Entry]) -> int:
        listed = {entry.key: entry for entry in waiting}
        merged: dict[str, Entry] = {}
        newest: dict[str, ResultRow] = {}  # MERGE would insert a key twice that is in its source twice
        for key, body in storage.get_all(self.out, list(listed)):  # what is gone, another flusher has merged
            row = self._parsed(key, body)
            if row is None:
                storage.rename(self.out, key, key.replace("records/", "records/corrupt/", 1))
                continue
            merged[key] = listed[key]
            if row.job_id not in newest or replaces(row, newest[row.job_id]):
                newest[row.job_id] = row
        if newest:
            storage.check_room(self.out, _MERGE_BYTES + 2 * sum(entry.size_bytes for entry in merged.values()))
            with translating_storage(self.out):
                self._merge(_to_arrow(list(newest.values())))
        # Another flusher may have removed one, and a later run put a new one in its place: that stays.
        storage.remove_unchanged(self.out, merged)
        return len(merged)

    def _merge(self, rows: pa.Table) -> None:
        from deltalake.exceptions import CommitFailedError

        for attempt in range(_MERGE_TRIES):
            try:
                (
                    self._table(create=True)
                    .merge(rows, "t.job_id = s.job_id", source_alias="s", target_alias="t")
                    .when_matched_update_all(predicate=_REPLACES)
                    .when_not_matched_insert_all()
                    .execute()
                )
                return
            except CommitFailedError:
                time.sleep(random.uniform(0, 0.1 * 2 ** min(attempt, 5)))
        raise ResultsBusy(f"{self.out}: other writers won {_MERGE_TRIES} times; the records wait, flush again")

    def _table(self, create: bool = False) -> Any:
        """The Delta table as it is now; None if there is none and it shall not be created."""
        from deltalake import DeltaTable

        path, options = storage.joined(self.out, "results"), storage.table_options(self.out)
        if not DeltaTable.is_deltatable(path, storage_options=options):
            if not create:
                return None
            DeltaTable.create(
                path,
                schema=schema(),
                mode="ignore",
                storage_options=options,
                configuration={
                    "delta.checkpointInterval": "50",
                    "delta.logRetentionDuration": "interval 1 days",
                },
            )
        table = DeltaTable(path, storage_options=options)
        if [field.name for field in table.schema().fields] != schema().names:
            raise ResultsError(f"{path}: was written by another version of t2vz; use another output folder")
        return table

    def _compact(self) -> None:
        """Join small files once they are many. Replaced ones stay for a week: readers may be at them."""
        if len(self._table().file_uris()) > _COMPACT_FILES:
            try:
                self.compact(tries=1)
            except ResultsBusy as error:
                _log.debug("%s; a later flush will compact", error)

    def compact(self, tries: int = _MERGE_TRIES) -> None:
        """Join the table's small files, and remove what was replaced over a week ago. Writers may be at work.

        Raises ResultsBusy if they won every try.
        """
        from deltalake.exceptions import CommitFailedError

        with translating_storage(self.out):
            for attempt in range(tries):
                if (table := self._table()) is None:
                    return
                try:
                    table.optimize.compact()
                    table.vacuum(dry_run=False, full=True)
                    table.create_checkpoint()
                    table.cleanup_metadata()
                    return
                except CommitFailedError:
                    time.sleep(random.uniform(0, 0.1 * 2 ** min(attempt, 5)))
        raise ResultsBusy(f"{self.out}: other writers won {tries} times; try again later")

    @storage.patient
    def is_empty(self) -> bool:
        """True if there is neither a table nor a waiting record."""
        with translating_storage(self.out):
            return self._table() is None and not self._waiting()

    @storage.patient
    def unused_files(self) -> list[str]:
        """Keys of the table's files that `compact` would remove: replaced over a week ago, or never finished."""
        with translating_storage(self.out):
            table = self._table()
            return [] if table is None else [f"results/{file}" for file in table.vacuum(dry_run=True, full=True)]

    @storage.patient
    def table_files(self) -> int:
        """How many data files the table has now."""
        with translating_storage(self.out):
            table = self._table()
            return 0 if table is None else len(table.file_uris())

    def forget(self, before: datetime) -> int:
        """Remove the rows that finished before; how many. Their outputs are then named by no result.

        Raises ResultsBusy if other writers won every try.
        """
        from deltalake.exceptions import CommitFailedError

        with translating_storage(self.out):
            for attempt in range(_MERGE_TRIES):
                if (table := self._table()) is None:
                    return 0
                try:
                    told = table.delete(f"finished_at < TIMESTAMP '{before.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}Z'")
                    return int(told["num_deleted_rows"])
                except CommitFailedError:
                    time.sleep(random.uniform(0, 0.1 * 2 ** min(attempt, 5)))
        raise ResultsBusy(f"{self.out}: other writers won {_MERGE_TRIES} times; try again later")


def _oks(batch: Any, but_of: str | None = None) -> Iterator[tuple[str, Finished]]:
    """Job and output of the ok rows of an Arrow batch or table, without those of the run `but_of`."""
    import pyarrow.compute as pc

    # Filtered here: a filter handed to the dataset fails on deltalake's string_view statistics.
    wanted = pc.equal(batch["status"], "ok")
    if but_of is not None:
        wanted = pc.and_(wanted, pc.not_equal(batch["run_id"], but_of))
    ok = batch.filter(wanted)
    values = [ok[name].to_pylist() for name in ("job_id", *Finished._fields)]
    return ((job, Finished(*output)) for job, *output in zip(*values, strict=True))


class _Additions:
    """Follows the table's log from a version on, which names the files that each merge adds."""

    def __init__(self, out: Place, version: int, run_id: str) -> None:
        self._out, self._next, self._run_id = out, version + 1, run_id
        self._found: dict[str, Finished] = {}
        self._lock = threading.Lock()
        self._is_first_look = True

    @storage.patient
    def look(self) -> Mapping[str, Finished]:
        with self._lock, translating_storage(self._out):
            files, following = list[str](), self._next
            while (log := storage.get(self._out, f"results/_delta_log/{following:020d}.json")) is not None:
                following += 1
                files += _files_added(log)
            if not files and self._is_first_look and self._is_at_least(following):
                return self._everything()  # that version's log is removed already
            for file in files:
                body = storage.get(self._out, f"results/{file}")
                if body is None:  # replaced and vacuumed meanwhile
                    return self._everything()
                self._found.update(_oks(_read_parquet(body), self._run_id))
            self._next, self._is_first_look = following, False  # only now: a look that fails is taken again
        return self._found

    def _is_at_least(self, version: int) -> bool:
        table = ResultStore(self._out)._table()
        return table is not None and table.version() >= version

    def _everything(self) -> Mapping[str, Finished]:
        done, version, _ = ResultStore(self._out).state()
        self._found, self._next, self._is_first_look = dict(done), version + 1, False
        return self._found


@lru_cache(maxsize=8)
def _additions(out: Place, version: int, run_id: str) -> _Additions:
    return _Additions(out, version, run_id)


def _files_added(log: bytes) -> list[str]:
    """The files with new rows that a commit of a Delta table's log names; those that only join others are left out."""
    added = (json.loads(line).get("add") for line in log.splitlines() if line.strip())
    return [unquote(add["path"]) for add in added if add and add.get("dataChange", True)]


def _read_parquet(body: bytes) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = pa.schema([schema().field(name) for name in ("job_id", "run_id", "status", *Finished._fields)])
    # Cast: delta-rs writes string_view, which Arrow can compare with nothing.
    return pq.read_table(pa.BufferReader(body), columns=wanted.names).cast(wanted)


@dataclass(frozen=True)
class Results:
    """Rows read from an output folder."""

    table: pa.Table

    def arrow(self) -> pa.Table:
        return self.table

    def pandas(self) -> pd.DataFrame:
        """With nullable types: as plain numpy ones, integers beside nulls become floats and seeds change."""
        import pandas as pd
        import pyarrow as pa

        types = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
        return self.table.to_pandas(types_mapper=types.get)

    def where(
        self, status: str | None = None, mode: str | None = None, model: str | None = None, run_id: str | None = None
    ) -> Results:
        """The rows that have all of the given values."""
        import pyarrow.compute as pc

        table = self.table
        for name, value in (("status", status), ("mode", mode), ("model", model), ("run_id", run_id)):
            if value is not None:
                table = table.filter(pc.equal(table[name], value))
        return Results(table)

    def __iter__(self) -> Iterator[ResultRow]:
        return _rows(self.table)

    def __len__(self) -> int:
        return int(self.table.num_rows)


def read(out: Place, *, all: bool = False) -> Results:
    """The results in an output folder; creates nothing.

    For each row of each manifest, known by its path and the row's `id`, the result that finished last, in the
    order of finishing; with `all` also those of earlier versions of the row. Raises ResultsError if the folder
    has no results.
    """
    import pyarrow as pa

    table = ResultStore(out).arrow().sort_by("finished_at")
    if not all:
        places = pa.table({"manifest": table["manifest"], "id": table["id"], "place": range(table.num_rows)})
        last = places.group_by(["manifest", "id"]).aggregate([("place", "max")])["place_max"]
        table = table.take(last.combine_chunks().sort())
    return Results(table)


def export(
    out: Place,
    path: str | Path,
    *,
    status: str | None = None,
    mode: str | None = None,
    model: str | None = None,
    all: bool = False,
) -> int:
    """Write the current results to a .csv, .parquet or .json file, whole or not at all; how many rows.

    In CSV, lists (warnings, controlnets, loras) are JSON texts. Raises ResultsError, OutputError.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path}: there is no such folder to write to; make it first", stage="results")
    write = {".csv": _write_csv, ".parquet": _write_parquet, ".json": _write_json}.get(path.suffix.lower())
    if write is None:
        raise ResultsError(f"{path}: name a file that ends in .csv, .parquet or .json")
    table = read(out, all=all).where(status, mode, model).arrow()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(table, temporary)
        os.replace(temporary, path)
    except Exception as error:
        raise translate(error, "results", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return int(table.num_rows)


def _write_csv(table: pa.Table, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.csv

    for at, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            texts = [None if v is None else json.dumps(v, ensure_ascii=False) for v in table[at].to_pylist()]
            table = table.set_column(at, field.name, pa.array(texts, pa.string()))
    pyarrow.csv.write_csv(table, path)


def _write_parquet(table: pa.Table, path: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, path)


def _write_json(table: pa.Table, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(table.to_pylist(), file, ensure_ascii=False, indent=1, default=datetime.isoformat)


def _finished(row: ResultRow) -> Finished:
    return Finished(*(getattr(row, name) for name in Finished._fields))


def _ok_key(job_id: str) -> str:
    return f"records/{job_id}.ok.json"


def _to_json(row: ResultRow) -> bytes:
    values = {name: getattr(row, name) for name in _FIELDS}
    # "replace": a file name that isn't UTF-8 reaches us with lone surrogates, which Arrow can't hold.
    return json.dumps(values, ensure_ascii=False, default=_utc_text).encode("utf-8", "replace")


def _utc_text(value: datetime) -> str:
    return value.astimezone(UTC).isoformat()


def _from_json(body: bytes) -> ResultRow:
    """Raises ValueError if the body is no record."""
    values = json.loads(body)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    try:
        return _row(
            {
                name: datetime.fromisoformat(value) if _FIELDS[name][0] == "datetime" else value
                for name, value in values.items()
            }
        )
    except (TypeError, KeyError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _row(values: dict[str, Any]) -> ResultRow:
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return ResultRow(**(values | lists))


def _rows(table: pa.Table) -> Iterator[ResultRow]:
    for batch in table.to_batches(max_chunksize=1000):
        yield from map(_row, batch.to_pylist())


def _to_arrow(rows: Sequence[ResultRow]) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_pylist([{name: getattr(row, name) for name in _FIELDS} for row in rows], schema())
