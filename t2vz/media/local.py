"""What every reader of a source begins with: that it is here, and can be opened without waiting for ever."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from t2vz import storage
from t2vz.errors import (
    OutputError,
    ResultsError,
    SourceError,
    SourceForbidden,
    SourceMissing,
    SourceTooLarge,
    StorageTimeout,
    UnexpectedError,
    harmless,
    translate,
)
from t2vz.media import cache
from t2vz.media.limits import Limits

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")
_SHOWN_CHARACTERS = 240


def local_source(path: str | os.PathLike[str], limits: Limits | None = None) -> Path:
    """The path of a regular file or a folder; nothing is opened, as a pipe or a device may never answer.

    Of an object on S3 (`s3://bucket/key`) the path of a local copy (`media.cache`).
    limits: what it must keep to, if anything: where it comes from, and on S3 its size, before it is fetched.
    Raises SourceMissing; SourceError (an address, a pipe, a device; S3 refuses); SourceForbidden; SourceTooLarge;
    StorageTimeout; the operating system's own errors pass.
    """
    text = os.fspath(path)  # Path would make `http:/` of `http://`
    if limits is not None:
        check_allowed(text, limits)
    if storage.is_remote(text):
        with fetching():
            entry = entry_of_source(text)
            if limits is not None:
                check_bytes(text, entry.size_bytes, limits)
            return cache.local_copy(text, entry)
    stat_of_source(text)
    return Path(text)


def check_allowed(text: str, limits: Limits) -> None:
    """Raise SourceForbidden if sources must not come from there. Says nothing of what is there.

    Links count as what they lead to, those of a folder's images too.
    """
    remote = storage.is_remote(text)
    # Of others (http://…) `stat_of_source` says that they are never read.
    if ("s3" if remote else "file") not in limits.schemes and (remote or not _SCHEME.match(text)):
        raise SourceForbidden(f"{shown(text)}: sources may come from {' and '.join(limits.schemes)} only")
    if not limits.roots or "\0" in text:
        return
    if remote:
        parts = text.split("/")
        found = [] if ".." in parts or "." in parts else [text]
    else:
        found = [os.path.realpath(text)]
        with suppress(OSError):
            found += [os.path.realpath(entry.path) for entry in os.scandir(found[0]) if entry.is_symlink()]
    roots = [root if storage.is_remote(root) else os.path.realpath(root) for root in limits.roots]
    inside = [any(f"{one}/".startswith(f"{root.rstrip('/')}/") for root in roots) for one in found]
    if not inside or not all(inside):
        raise SourceForbidden(f"{shown(text)}: outside of the folders that sources may come from ({_listed(limits)})")


def _listed(limits: Limits) -> str:
    return shown(", ".join(limits.roots))


def check_bytes(path: str, size_bytes: int, limits: Limits) -> None:
    """Raise SourceTooLarge if a source has more bytes than it may."""
    if size_bytes > limits.max_source_bytes:
        raise SourceTooLarge(
            f"{shown(path)}: {size_bytes / 1e6:,.3g} MB, the limit is {limits.max_source_bytes / 1e6:,.3g} MB; "
            "cut it first"
        )


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
    """The path as messages show it: both ends of an endless one, without passwords."""
    text, half = harmless(os.fspath(path)), _SHOWN_CHARACTERS // 2
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:half]}…{text[-half:]}"
