"""The user's cache of sources: fingerprints by path and version, and local copies of objects on S3.

In T2VZ_CACHE_DIR, else XDG_CACHE_HOME/t2vz or ~/.cache/t2vz; shared by all processes of the user, and of no
consequence: what is lost is made again, and a cache that can't be used is none.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import tempfile
import threading
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from t2vz import storage
from t2vz.storage import Entry

_MAX_COPIES_BYTES = 50 * 10**9
_KEPT_S = 24 * 3600  # a copy that was used within this may be in use
_BUSY_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)
_lock = threading.Lock()


def folder() -> Path:
    if given := os.environ.get("T2VZ_CACHE_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "t2vz")


def get(path: str, version: str) -> str | None:
    """What was put for this version of the path."""
    with _lock, suppress(sqlite3.Error):
        if (database := _database(str(folder()), os.getpid())) is not None:
            found = database.execute("SELECT value FROM known WHERE path = ? AND version = ?", (path, version))
            return next((value for (value,) in found), None)
    return None


def put(path: str, version: str, value: str) -> None:
    with _lock, suppress(sqlite3.Error):
        if (database := _database(str(folder()), os.getpid())) is not None:
            database.execute("INSERT OR REPLACE INTO known VALUES (?, ?, ?)", (path, version, value))


@lru_cache(maxsize=1)
def _database(folder: str, process: int) -> sqlite3.Connection | None:
    """process: a connection can't be carried over a fork."""
    try:
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "fingerprints.sqlite")
        database = sqlite3.connect(path, _BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = OFF")  # it may be lost
        database.execute("CREATE TABLE IF NOT EXISTS known (path TEXT PRIMARY KEY, version TEXT, value TEXT)")
        return database
    except (OSError, sqlite3.Error) as error:
        _log.debug("no cache of fingerprints in %s (%s)", folder, error)
        return None


def local_copy(uri: str, entry: Entry) -> Path:
    """A local file with the content of an object on S3, fetched if it isn't here; its suffix is the object's.

    Copies that were not used for a day go when all together take more than T2VZ_CACHE_BYTES (50 GB if not set).
    Raises what `t2vz.storage` does, and OSError (a full disk).
    """
    name = hashlib.sha256(f"{uri}\0{entry.size_bytes}\0{entry.version}".encode()).hexdigest()[:32]
    path = folder() / "sources" / f"{name}{Path(uri).suffix}"
    if path.is_file():
        with suppress(OSError):
            os.utime(path)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    _make_room(path.parent, entry.size_bytes)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=".draft-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in storage.stream(*storage.split(uri)):
                file.write(part)
        os.replace(draft, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(draft)
    return path


def _make_room(folder: Path, needed_bytes: int) -> None:
    """Remove the copies that were not used for longest, until the one that comes has room."""
    limit_bytes = int(os.environ.get("T2VZ_CACHE_BYTES", _MAX_COPIES_BYTES))
    copies = []
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            copies.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
    total_bytes = needed_bytes + sum(size for _, size, _ in copies)
    for used_at, size, path in sorted(copies):
        if total_bytes <= limit_bytes or time.time() - used_at < _KEPT_S:
            return
        with suppress(FileNotFoundError):
            os.unlink(path)
        total_bytes -= size
