"""Shards: what is to do of a manifest as small manifests, for many machines to take one after the other.

OUT/manifests/shards/NAME/    NAME tells the manifest and its defaults; a Parquet file a shard, named by its jobs

A shard's rows are the manifest's (`manifest.write_shard`): jobs, seeds and results are what they would be without.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from t2vz import storage
from t2vz.manifest import is_there, origin, write_shard
from t2vz.media.limits import Limits
from t2vz.media.local import local_source
from t2vz.models.policy import ModelPolicy
from t2vz.plan import ContentPolicy, Done, Job, Unready, plan
from t2vz.results import ResultStore
from t2vz.storage import Place

_FOLDER = "manifests/shards"


@dataclass(frozen=True)
class Shard:
    """Some rows to render. name: the same for the same jobs. path: a file's, or of an object on S3 its URL.

    first, last: numbers of rows in the manifest.
    """

    name: str
    path: Place
    rows: int
    first: int
    last: int


def folder_name(manifest: Place, out: Place, defaults: Mapping[str, str]) -> str:
    """The name of the manifest's shards: of this manifest, output place and defaults only."""
    place = storage.joined(storage.normal(out), _FOLDER)
    return _digest(origin(manifest), place, *sorted(defaults.items()))[:16]


def split(
    manifest: Place,
    out: Place,
    defaults: Mapping[str, str],
    *,
    rows: int,
    held: Collection[str] = (),
    verify: bool = False,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    models: ModelPolicy = ModelPolicy(),  # noqa: B008 (frozen)
    content: ContentPolicy = "flag",
) -> Iterator[Shard | Unready]:
    """The rows to do in shards of `rows`, each written when it is asked for; rows that can't be rendered as they are.

    held: ids of rows that are left out, as another shard has them. content: see `plan`.
    Raises ManifestError, ResultsError, OutputError, StorageTimeout.
    """
    out, parent, held = storage.normal(out), origin(manifest), frozenset(held)
    inside = f"{_FOLDER}/{folder_name(manifest, out, defaults)}"
    batch: list[Job] = []
    for item in plan(manifest, out, defaults, limits, verify, models, content):
        if isinstance(item, Unready):
            yield item
        elif isinstance(item, Job) and item.row.id not in held:
            batch.append(item)
            if len(batch) == rows:
                yield _written(out, inside, parent, batch)
                batch = []
    if batch:
        yield _written(out, inside, parent, batch)


def ids(shard: Place) -> list[str]:
    """The rows of a shard; none if its file is gone. Not read as rows: without the run's defaults they may be bad."""
    import pyarrow.parquet as pq

    if not is_there(shard):
        return []
    return pq.read_table(local_source(str(shard)), columns=["id"])["id"].to_pylist()


def outcome(
    manifest: Place,
    out: Place,
    defaults: Mapping[str, str],
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    models: ModelPolicy = ModelPolicy(),  # noqa: B008 (frozen)
    content: ContentPolicy = "flag",
) -> Counter[str]:
    """How many rows of the manifest are `ok`, `failed` or `open` (to be rendered), by the results table."""
    failed = ResultStore(out).failed()
    counts: Counter[str] = Counter()
    for item in plan(manifest, out, defaults, limits, models=models, content=content):
        counts["ok" if isinstance(item, Done) else "failed" if item.job_id in failed else "open"] += 1
    return counts


def sweep(manifest: Place, out: Place, defaults: Mapping[str, str]) -> None:
    """Remove the shards: nothing is left to do with them."""
    out, inside = storage.normal(out), f"{_FOLDER}/{folder_name(manifest, out, defaults)}"
    storage.remove_all(out, [entry.key for entry in storage.entries(out, inside) if entry.key.endswith(".parquet")])
    if not storage.is_remote(out):
        with suppress(OSError):  # another run has just written there
            Path(out, inside).rmdir()


def _written(out: Place, inside: str, parent: str, jobs: list[Job]) -> Shard:
    name = _digest(*(job.job_id for job in jobs))
    key = f"{inside}/{name}.parquet"
    if storage.head(out, key) is None:
        write_shard(out, key, parent, [job.row for job in jobs])
    path = storage.joined(out, key)
    return Shard(
        name, path if storage.is_remote(out) else Path(path), len(jobs), jobs[0].row.number, jobs[-1].row.number
    )


def _digest(*parts: object) -> str:
    return hashlib.blake2b("\0".join(map(str, parts)).encode("utf-8", "replace"), digest_size=16).hexdigest()
