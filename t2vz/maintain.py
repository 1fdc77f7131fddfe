"""Maintain: an output place tidied while runs may be at work: its table compacted, what nobody needs any more removed.

Nothing is removed that a result names or a living run is at, and no machine's clock decides that: a video is listed
first, then the claims, then the results. So what a result names by then is kept, and what has none yet is of a row that
a living run has claimed, or of nobody. What was put again meanwhile is another version, and stays. A joined video is
kept for as long as a result names any of its parts.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from t2vz import claims, storage
from t2vz.errors import ResultsError
from t2vz.plan import check_out
from t2vz.render import Settings, file_name, opening
from t2vz.results import ResultStore
from t2vz.storage import Entry, Place

Kind = Literal["video", "joined video", "strip", "thumbnails", "workspace", "snapshot", "claim", "draft", "table file"]
_PICTURES = {"strips": "strip", "thumbnails": "thumbnails"}  # folder → kind

_DRAFT_KEPT_S = 3600


@dataclass(frozen=True)
class Item:
    """Something that was removed, or would be. key: in the output place, or a local path of S3's workspace."""

    kind: Kind
    key: str
    size_bytes: int


@dataclass(frozen=True)
class Report:
    """dry_run: nothing was done. rows_forgotten: results removed for their age.

    files_before, files_after: data files of the table. corrupt: records that can't be read, for a look by hand.
    """

    dry_run: bool
    items: tuple[Item, ...]
    corrupt: tuple[str, ...]
    rows_forgotten: int
    files_before: int
    files_after: int

    @property
    def freed_bytes(self) -> int:
        return sum(item.size_bytes for item in self.items)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Number and bytes of the items of each kind."""
        found: dict[str, tuple[int, int]] = {}
        for item in self.items:
            count, size_bytes = found.get(item.kind, (0, 0))
            found[item.kind] = count + 1, size_bytes + item.size_bytes
        return found

    def lines(self) -> list[str]:
        """What was done, or would be, in plain words."""
        would = "would be removed" if self.dry_run else "removed"
        counts = [
            f"{count} {kind}{'s' if count > 1 else ''} ({size:,} bytes)"
            for kind, (count, size) in self.counts().items()
        ]
        told = [f"{', '.join(counts) or 'nothing'} {would}; {self.freed_bytes:,} bytes in all"]
        if self.rows_forgotten:
            told.append(f"{self.rows_forgotten} result{'s' if self.rows_forgotten > 1 else ''} {would} for their age")
        if not self.dry_run:
            told.append(f"the table has {self.files_after} data files (it had {self.files_before})")
        told += [f"{key} is no readable record; look at it and remove it" for key in self.corrupt]
        return told


def maintain(out: Place, run_id: str, *, dry_run: bool = False, older_than: timedelta | None = None) -> Report:
    """Tidy an output place; with `dry_run` only say what would be removed.

    older_than: also forget the results that finished longer ago, and remove their videos. None: none.
    Raises ResultsError (no results there), OutputError, StorageTimeout, ResultsBusy.
    """
    out = storage.normal(out)
    check_out(out, to_write=not dry_run)
    store = ResultStore(out)
    if store.is_empty():  # in any other folder what lies in `videos` is not ours
        raise ResultsError(f"{out}: there are no results here; is it a run's output folder?")
    before = None if older_than is None else datetime.now(UTC) - older_than
    dead = [*_dead_workspaces(out), *_dead_claims(out)]  # which the opening of a run removes
    files_before = store.table_files()
    with nullcontext() if dry_run else opening(Settings(out, "", run_id)):
        forgotten = 0
        if before is not None:
            forgotten = len(_finished_before(store, before)) if dry_run else store.forget(before)
        orphans = list(_orphans(out, store, before if dry_run else None, run_id))
        unused = _table_files(out, store)
        items = [*dead, *(item for item, _ in orphans), *_snapshots(out, store), *_drafts(out), *unused]
        if not dry_run:
            _remove(out, orphans, items)
            store.compact()
    corrupt = tuple(entry.key for entry in storage.entries(out, "records/corrupt"))
    return Report(dry_run, tuple(items), corrupt, forgotten, files_before, store.table_files())


def _finished_before(store: ResultStore, before: datetime) -> list[str | None]:
    """The outputs of all results that are older; None for those that have none."""
    import pyarrow.compute as pc

    table = store.arrow()
    return table.filter(pc.less(table["finished_at"], before))["output_uri"].to_pylist()


def _orphans(
    out: Place, store: ResultStore, before: datetime | None, run_id: str
) -> Iterator[tuple[Item, list[Entry]]]:
    """Videos, and pictures of them, that no result names and no living run is at; the results before `before` count as
    gone."""
    listed = {folder: _grouped(out, folder) for folder in ("videos", *_PICTURES, "joined")}
    is_alone = not claims.living_runs(out) - {run_id}
    at_work = tuple(f"{file_name(claim.row)}-" for claim in claims.claimed(out) if claim.is_live)
    outputs = {finished.output_uri for finished in store.done().values()}
    outputs -= set() if before is None else set(filter(None, _finished_before(store, before)))
    named = {Path(output).name for output in outputs}
    for folder, kind in (("videos", "video"), *_PICTURES.items()):
        for name, entries in listed[folder].items():
            video = name.removesuffix(".webp") if folder in _PICTURES else name
            if video not in named and not (at_work and name.startswith(at_work)):
                size_bytes = sum(entry.size_bytes for entry in entries)
                yield Item(kind, f"{folder}/{name}", size_bytes), entries  # type: ignore[arg-type]
    yield from _unjoined(out, listed["joined"], outputs, is_alone)


def _unjoined(
    out: Place, listed: dict[str, list[Entry]], outputs: set[str], is_alone: bool
) -> Iterator[tuple[Item, list[Entry]]]:
    """Joined videos of parts that no result names any more, with their records; those without a record, which a run
    writes last: so only if there was none at work when they were listed."""
    recorded = set()
    for key, body in storage.get_all(out, [f"joined/{name}" for name in listed if name.endswith(".json")]):
        record = _record(body)
        name = str(record.get("output_uri")).rpartition("/")[2]
        recorded.add(name)
        if record and outputs.isdisjoint(record["parts"]):
            entries = [*listed[key.rpartition("/")[2]], *listed.get(name, ())]
            yield Item("joined video", f"joined/{name}", sum(entry.size_bytes for entry in entries)), entries
    for name, entries in listed.items():
        if is_alone and not name.endswith(".json") and name not in recorded:
            yield Item("joined video", f"joined/{name}", sum(entry.size_bytes for entry in entries)), entries


def _record(body: bytes) -> dict[str, Any]:
    """Of a joined video; empty if it is damaged."""
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("parts"), list) else {}


def _grouped(out: Place, folder: str) -> dict[str, list[Entry]]:
    """The objects below a folder by the name that they have in it; those of a folder of images share one."""
    groups: dict[str, list[Entry]] = {}
    for entry in storage.entries(out, folder, deep=True):
        groups.setdefault(entry.key.split("/")[1], []).append(entry)
    return groups


def _dead_workspaces(out: Place) -> Iterator[Item]:
    """Of runs whose process has ended: the lock that each holds is free."""
    for lock in sorted(storage.workspace(out).glob("*.run")):
        with suppress(OSError):
            descriptor = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                folder = lock.with_suffix("")
                size_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                yield Item("workspace", str(folder), size_bytes)
            finally:
                os.close(descriptor)


def _dead_claims(out: Place) -> Iterator[Item]:
    for claim in claims.claimed(out):
        if not claim.is_live:
            yield Item("claim", f"claims/{claim.job_id}.json", 0)


def _snapshots(out: Place, store: ResultStore) -> Iterator[Item]:
    """Saved states of jobs that are done."""
    files = sorted((storage.workspace(out) / "snapshots").glob("*.pt"))
    done = store.done() if files else {}
    for file in files:
        if file.stem in done:
            with suppress(FileNotFoundError):
                yield Item("snapshot", str(file), file.stat().st_size)


def _drafts(out: Place) -> Iterator[Item]:
    """Objects of a local folder that a killed process left half written; by the file system's own clock."""
    for file in storage.drafts(out):
        with suppress(FileNotFoundError):
            if _now_s(Path(out)) - file.stat().st_mtime > _DRAFT_KEPT_S:
                yield Item("draft", str(file.relative_to(out)), file.stat().st_size)


def _now_s(folder: Path) -> float:
    """The newest sign of life that the file system's clock gave: a run's heartbeat, else the records' last change."""
    return max((path.stat().st_mtime for path in (folder / "runs", folder / "records") if path.exists()), default=0.0)


def _table_files(out: Place, store: ResultStore) -> Iterator[Item]:
    unused = store.unused_files()
    sizes = {entry.key: entry.size_bytes for entry in storage.entries(out, "results", deep=True)} if unused else {}
    return (Item("table file", key, sizes.get(key, 0)) for key in unused)


def _remove(out: Place, orphans: list[tuple[Item, list[Entry]]], items: list[Item]) -> None:
    storage.remove_unchanged(out, {entry.key: entry for _, entries in orphans for entry in entries})
    for item in items:
        if item.kind in ("video", "joined video") and not storage.is_remote(out):
            with suppress(OSError):  # a folder of images, empty now
                Path(out, item.key).rmdir()
        elif item.kind in ("snapshot", "draft"):
            Path(out, item.key).unlink(missing_ok=True)
