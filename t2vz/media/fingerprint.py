"""fingerprint: what a source contains, as a short string that is part of a job's identity."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from t2vz.media.images import image_files
from t2vz.media.local import local_source, reading

WHOLE_UP_TO_BYTES = 64 * 2**20
_SAMPLES = 64
_SAMPLE_BYTES = 2**20


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Identity of a source's content; its name and place do not enter.

    Files of up to 64 MiB are hashed whole (`sha256:…`). Of larger ones the size and 64 evenly spread samples
    of 1 MiB, first and last bytes among them, are hashed (`sha256-sampled:…`): an edit between the samples
    that keeps the size goes unseen. For a folder its images' names and contents count (`sha256-folder:…`).

    Remembered in the process by path, size, modification time and inode.
    Errors: SourceMissing, SourceEmpty (a folder without images), SourceError (not to be read, a pipe, a device).
    """
    with reading(path):
        path = local_source(path)
        if not path.is_dir():
            return _of_file(path)
        digest = hashlib.sha256()
        for image in image_files(path):
            digest.update(f"{image.name}\0{_of_file(image)}\0".encode())
        return f"sha256-folder:{digest.hexdigest()}"


def _of_file(path: Path) -> str:
    stat = path.stat()
    return _hashed(path.absolute(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=4096)
def _hashed(path: Path, size_bytes: int, mtime_ns: int, inode: int) -> str:
    if size_bytes == 0:  # what /proc holds says so, too, and reading it may never end
        return f"sha256:{hashlib.sha256().hexdigest()}"
    with path.open("rb") as file:
        if size_bytes <= WHOLE_UP_TO_BYTES:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        digest = hashlib.sha256(str(size_bytes).encode())
        for i in range(_SAMPLES):
            file.seek(i * (size_bytes - _SAMPLE_BYTES) // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
        return f"sha256-sampled:{digest.hexdigest()}"
