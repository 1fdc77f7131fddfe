"""What every reader of a source begins with: that it is here, and can be opened without waiting for ever."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from t2vz import storage
from t2vz.errors import (
    OutputError,
    ResultsError,
    SourceError,
    SourceMissing,
    StorageTimeout,
    UnexpectedError,
    translate,
)
from t2vz.media import cache

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")
_SHOWN_CHARACTERS = 240


def local_source(path: str | os.PathLike[str]) -> Path:
    """The path of a regular file or a folder; nothing is opened, as a pipe or a device may never answer.

    Of an object on S3 (`s3://bucket/key`) the path of a local copy (`media.cache`).
    Raises SourceMissing; SourceError (an address, a pipe, a device; S3 refuses); StorageTimeout; the operating system's
    own errors pass.
    """
    text = os.fspath(path)  # Path would make `http:/` of `http://`
    if storage.is_remote(text):
        with fetching():
            return cache.local_copy(text, entry_of_source(text))
    stat_of_source(text)
    return Path(text)


def entry_of_source(uri: str) -> storage.Entry:
    """Of an object on S3. Raises SourceMissing, and what `t2vz.storage` does."""
    entry = storage.head(*storage.split(uri))
    if entry is None:
        raise SourceMissing(f"{shown(uri)}: no such object")
    return entry


@contextmanager
def fetching() -> Iterator[None]:
    """What S3 has against the block's reading, as errors of a source."""
    try:
        yield
    except StorageTimeout as error:
        raise StorageTimeout(error.message, stage="decode") from error
    except (OutputError, ResultsError) as error:
        raise SourceError(error.message) from error


def stat_of_source(text: str) -> os.stat_result:
    """Of a local file or folder. Raises as `local_source`."""
    try:
        found = os.stat(text)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in it
        if _SCHEME.match(text):
            raise SourceError(
                f"{shown(text)}: only local files and folders and objects on S3 are read; copy it here first"
            ) from None
        raise SourceMissing(f"{shown(text)}: no such file or folder") from None
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise SourceError(f"{shown(text)}: neither a file nor a folder, but a device, pipe or socket; name a file")
    return found


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise what leaves the block as a T2VZError; the operating system's refusals to read, as SourceError."""
    try:
        yield
    except Exception as error:
        ours = translate(error, "decode", shown(path))
        if isinstance(ours, UnexpectedError) and isinstance(error, OSError):
            ours = SourceError(f"{shown(path)}: can't be read ({error.strerror or error})")
        if ours is error:
            raise
        raise ours from error


@contextmanager
def naming(column: str) -> Iterator[None]:
    """The block's errors about a file, with the manifest's column that names it."""
    try:
        yield
    except SourceError as error:
        raise type(error)(f"{column}: {error.message}", stage=error.stage) from error


def shown(path: str | os.PathLike[str]) -> str:
    """The path as messages show it: both ends of an endless one."""
    text, half = os.fspath(path), _SHOWN_CHARACTERS // 2
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:half]}…{text[-half:]}"
