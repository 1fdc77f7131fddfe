"""Shards: what is to do of a manifest as small manifests, for many machines to take one after the other.

OUT/manifests/shards/NAME/    NAME tells the manifest and its defaults; a Parquet file a shard, named by its jobs

A shard's rows are the manifest's (`manifest.write_shard`): jobs, seeds and results are what they would be without.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from t2vz import storage
from t2vz.errors import OutputError
from t2vz.manifest import origin, write_shard
from t2vz.plan import Done, Job, Unready, plan
from t2vz.results import ResultStore


@dataclass(frozen=True)
class Shard:
    """Some rows to render. name: the same for the same jobs. first, last: numbers of rows in the manifest."""

    name: str
    path: Path
    rows: int
    first: int
    last: int


def local_out(out: str | Path) -> Path:
    """The output folder, which manifests are written to, and read from as files. Raises OutputError if it is on S3."""
    if storage.is_remote(out):
        raise OutputError(f"{out}: libraries and shards need an output folder that all machines reach, so far")
    return Path(out).absolute()


def folder(manifest: str, out: str, defaults: Mapping[str, str]) -> Path:
    """Where the shards of the manifest lie; its name is of this manifest, output folder and defaults only."""
    place = local_out(out) / "manifests" / "shards"
    return place / _digest(origin(manifest), place, *sorted(defaults.items()))[:16]


def split(
    manifest: str,
    out: str,
    defaults: Mapping[str, str],
    *,
    rows: int,
    held: Collection[str] = (),
    verify: bool = False,
) -> Iterator[Shard | Unready]:
    """The rows to do in shards of `rows`, each written when it is asked for; rows that can't be rendered as they are.

    held: ids of rows that are left out, as another shard has them.
    Raises ManifestError, ResultsError, OutputError.
    """
    place, parent, held = folder(manifest, out, defaults), origin(manifest), frozenset(held)
    batch: list[Job] = []
    for item in plan(manifest, out, defaults, verify=verify):
        if isinstance(item, Unready):
            yield item
        elif isinstance(item, Job) and item.row.id not in held:
            batch.append(item)
            if len(batch) == rows:
                yield _written(place, parent, batch)
                batch = []
    if batch:
        yield _written(place, parent, batch)


def ids(shard: Path) -> list[str]:
    """The rows of a shard; none if its file is gone. Not read as rows: without the run's defaults they may be bad."""
    import pyarrow.parquet as pq

    if not shard.is_file():
        return []
    return pq.read_table(shard, columns=["id"])["id"].to_pylist()


def outcome(manifest: str, out: str, defaults: Mapping[str, str]) -> Counter[str]:
    """How many rows of the manifest are `ok`, `failed` or `open` (to be rendered), by the results table."""
    failed = ResultStore(out).failed()
    counts: Counter[str] = Counter()
    for item in plan(manifest, out, defaults):
        counts["ok" if isinstance(item, Done) else "failed" if item.job_id in failed else "open"] += 1
    return counts


def sweep(manifest: str, out: str, defaults: Mapping[str, str]) -> None:
    """Remove the shards: nothing is left to do with them."""
    place = folder(manifest, out, defaults)
    for shard in place.glob("*.parquet"):
        shard.unlink(missing_ok=True)
    try:
        place.rmdir()
    except OSError:
        return  # another run has just written there


def _written(place: Path, parent: str, jobs: list[Job]) -> Shard:
    name = _digest(*(job.job_id for job in jobs))
    path = place / f"{name}.parquet"
    if not path.exists():
        write_shard(path, parent, [job.row for job in jobs])
    return Shard(name, path, len(jobs), jobs[0].row.number, jobs[-1].row.number)


def _digest(*parts: object) -> str:
    return hashlib.blake2b("\0".join(map(str, parts)).encode("utf-8", "replace"), digest_size=16).hexdigest()
