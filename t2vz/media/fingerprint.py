"""fingerprint: what a source contains, as a short string that is part of a job's identity."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from functools import lru_cache
from pathlib import Path

from t2vz import storage
from t2vz.media import cache
from t2vz.media.images import image_files
from t2vz.media.local import entry_of_source, fetching, reading, stat_of_source

WHOLE_UP_TO_BYTES = 64 * 2**20
_SAMPLES = 64
_SAMPLE_BYTES = 2**20
_SAMPLES_AT_ONCE = 16
_REMEMBERED_FROM_BYTES = 2**18  # smaller files are hashed in the time of a look into the cache
_SETTLED_NS = 2 * 10**9  # a younger file may be written again without a change of its time


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Identity of a source's content; its name and place do not enter.

    Files of up to 64 MiB are hashed whole (`sha256:…`). Of larger ones the size and 64 evenly spread samples
    of 1 MiB, first and last bytes among them, are hashed (`sha256-sampled:…`): an edit between the samples
    that keeps the size goes unseen. For a folder its images' names and contents count (`sha256-folder:…`).

    Remembered by path, size, modification time and inode: in the process, and of all but small files in the user's
    cache (T2VZ_CACHE_DIR, else ~/.cache/t2vz), so that a rerun does not read its sources again.
    An object on S3 (`s3://bucket/key`) has the fingerprint of a file with its content; remembered by its ETag.
    Errors: SourceMissing, SourceEmpty (a folder without images), SourceError (not to be read, a pipe, a device),
    StorageTimeout.
    """
    text = os.fspath(path)
    if storage.is_remote(text):
        with fetching():
            return _of_object(text)
    with reading(text):
        found = stat_of_source(text)
        if not stat.S_ISDIR(found.st_mode):
            return _of_file(text, found)
        digest = hashlib.sha256()
        for image in image_files(Path(text)):
            digest.update(f"{image.name}\0{_of_file(str(image), image.stat())}\0".encode())
        return f"sha256-folder:{digest.hexdigest()}"


def _of_file(path: str, found: os.stat_result) -> str:
    absolute = path if os.path.isabs(path) else os.path.abspath(path)
    return _known_or_hashed(absolute, found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=4096)
def _known_or_hashed(path: str, size_bytes: int, mtime_ns: int, inode: int) -> str:
    if size_bytes < _REMEMBERED_FROM_BYTES:
        return _hashed(Path(path), size_bytes)
    version = f"{size_bytes} {mtime_ns} {inode}"
    if (known := cache.get(path, version)) is not None:
        return known
    made = _hashed(Path(path), size_bytes)
    if time.time_ns() - mtime_ns > _SETTLED_NS:
        cache.put(path, version, made)
    return made


def _of_object(uri: str) -> str:
    place, key = storage.split(uri)
    entry = entry_of_source(uri)
    version = f"{entry.size_bytes} {entry.version}"
    if (known := cache.get(uri, version)) is not None:
        return known
    size_bytes = entry.size_bytes
    if size_bytes <= WHOLE_UP_TO_BYTES:
        digest = hashlib.sha256()
        for part in storage.stream(place, key):
            digest.update(part)
        made = f"sha256:{digest.hexdigest()}"
    else:
        spans = [(at, at + _SAMPLE_BYTES) for at in _sample_starts(size_bytes)]
        digest = hashlib.sha256(str(size_bytes).encode())
        for at in range(0, _SAMPLES, _SAMPLES_AT_ONCE):
            for part in storage.ranges(place, key, spans[at : at + _SAMPLES_AT_ONCE]):
                digest.update(part)
        made = f"sha256-sampled:{digest.hexdigest()}"
    cache.put(uri, version, made)
    return made


def _sample_starts(size_bytes: int) -> list[int]:
    return [i * (size_bytes - _SAMPLE_BYTES) // (_SAMPLES - 1) for i in range(_SAMPLES)]


def _hashed(path: Path, size_bytes: int) -> str:
    if size_bytes == 0:  # what /proc holds says so, too, and reading it may never end
        return f"sha256:{hashlib.sha256().hexdigest()}"
    with path.open("rb") as file:
        if size_bytes <= WHOLE_UP_TO_BYTES:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        digest = hashlib.sha256(str(size_bytes).encode())
        for start in _sample_starts(size_bytes):
            file.seek(start)
            digest.update(file.read(_SAMPLE_BYTES))
        return f"sha256-sampled:{digest.hexdigest()}"
