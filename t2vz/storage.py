"""Storage: whole objects in a local folder or under an S3 prefix, by a few plain functions.

A place is a folder's path or `s3://bucket/prefix`; keys in it are relative, with `/`. Credentials and endpoint of S3
come from the environment alone (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION,
AWS_ENDPOINT_URL), so that no settings, results or logs can hold them.

Functions that touch storage raise OutputError (no space, no permission, no such bucket), StorageTimeout (it does not
answer; retryable) and ResultsError (anything else).
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

from t2vz import files
from t2vz.errors import OutputError, ResultsError, StorageTimeout, T2VZError, translate

Place = str | Path

_S3 = "s3://"
# Where objects are written by renaming a draft, and what the drafts of obstore, deltalake and `files.whole` are named.
_FOLDERS = ("records", "claims", "runs", "results", "results/_delta_log", "joined", "manifests/shards")
_DRAFT = re.compile(r"#\d+$|^_commit_.*\.tmp$|^\..*\.draft$")
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_REQUEST_TIMEOUT_S = 30
_RETRIES = 6  # of a request that got no answer or a 5xx, with exponential backoff
_RETRY_TIMEOUT_S = 60
_READ_PAUSES_S = (0.2, 0.8, 3.0)
_PARALLEL_REQUESTS = 16

_NO_ANSWER = re.compile(
    r"timed out|timeout|error sending request|connection (reset|refused|closed)|status code: (5\d\d|429)|dns error"
    r"|body error|IncompleteBody|UnexpectedEof",
    re.IGNORECASE,
)


class Entry(NamedTuple):
    """An object as it is listed. modified: by the storage's own clock. version: changes with the content."""

    key: str
    size_bytes: int
    modified: datetime
    version: str


P = ParamSpec("P")
T = TypeVar("T")


def patient(ask: Callable[P, T]) -> Callable[P, T]:
    """A function that is tried again if storage does not answer: an answer that ends in its middle the library does
    not ask for again. For what reads, and what may be done twice. Raises what it raises in the end.
    """

    @functools.wraps(ask)
    def again(*arguments: P.args, **options: P.kwargs) -> T:
        for pause_s in _READ_PAUSES_S:
            try:
                return ask(*arguments, **options)
            except StorageTimeout:
                time.sleep(pause_s)
        return ask(*arguments, **options)

    return again


def is_remote(place: Place) -> bool:
    return str(place).startswith(_S3)


def normal(place: Place) -> Place:
    """The place in the one way that it is written everywhere: an absolute path, or a URL without a slash at its end.

    Raises OutputError if the URL names no bucket.
    """
    if not is_remote(place):
        return Path(place).absolute()
    _bucket(str(place))
    return str(place).rstrip("/")


def workspace(place: Place) -> Path:
    """A local folder for what is not finished yet: in the place, or for S3 in T2VZ_WORKSPACE (else the temporary
    folder), the same one for every run of this user that works for the place."""
    if not is_remote(place):
        return Path(place) / ".work"
    root = os.environ.get("T2VZ_WORKSPACE") or Path(tempfile.gettempdir(), f"t2vz-{os.getuid()}")
    return Path(root, "work", hashlib.sha256(str(normal(place)).encode()).hexdigest()[:16]).absolute()


def joined(place: Place, key: str) -> str:
    """Where the object is, as path or URL."""
    return f"{str(place).rstrip('/')}/{key}"


def split(uri: str) -> tuple[str, str]:
    """Place (the bucket) and key of a single object's URL."""
    bucket, key = _bucket(uri)
    return f"{_S3}{bucket}", key


@patient
def get(place: Place, key: str) -> bytes | None:
    """The object; None if there is none."""
    import obstore

    with translating_storage(place), suppress(FileNotFoundError, NotADirectoryError):
        return bytes(obstore.get(store(place), key).bytes()) if is_remote(place) else Path(place, key).read_bytes()
    return None


@patient
def head(place: Place, key: str) -> Entry | None:
    """What a listing would say of the object; None if there is none."""
    import obstore

    with translating_storage(place):
        if _is_missing(place):
            return None
        try:
            return _entry(obstore.head(store(place), key))
        except FileNotFoundError:
            return None


@patient
def create(place: Place, key: str, body: bytes) -> bool:
    """Put the object if there is none; False if there is one.

    That one may be what this very call has put, if the first answer was lost: who must know compares the bodies.
    """
    import obstore
    from obstore.exceptions import AlreadyExistsError

    with translating_storage(place):
        try:
            obstore.put(store(place), key, body, mode="create", use_multipart=False)
            return True
        except AlreadyExistsError:
            return False


@patient
def put(place: Place, key: str, body: bytes, attributes: dict[str, str] | None = None) -> None:
    """attributes: see `upload`."""
    import obstore

    with translating_storage(place):
        obstore.put(store(place), key, body, use_multipart=False, **_attributes(place, attributes))


def swap(place: Place, key: str, old: bytes, new: bytes) -> bool:
    """Put `new` in the place of `old`; False, and nothing done, if the object is another or gone. Of several at once
    that swap the same `old` one wins."""
    import obstore
    from obstore.exceptions import PreconditionError

    with translating_storage(place):
        if not is_remote(place):
            with _only_one(place, key):
                if get(place, key) != old:
                    return False
                put(place, key, new)
                return True
        try:
            found = obstore.get(store(place), key)
            if bytes(found.bytes()) != old:
                return False
            obstore.put(store(place), key, new, mode={"e_tag": found.meta["e_tag"]}, use_multipart=False)
            return True
        except FileNotFoundError:
            return False
        except PreconditionError:  # or our own put, the answer to which was lost
            return get(place, key) == new


def remove(place: Place, key: str) -> None:
    """Remove the object if it is there."""
    import obstore

    with translating_storage(place), suppress(FileNotFoundError):
        obstore.delete(store(place), key)


def remove_if(place: Place, key: str, old: bytes) -> bool:
    """Remove the object if it is `old`; False if it is another or gone.

    On S3, which has no conditional removal, what another puts between the look and the removal is lost.
    """
    with translating_storage(place):
        if not is_remote(place):
            with _only_one(place, key):
                if get(place, key) != old:
                    return False
                remove(place, key)
                return True
        if get(place, key) != old:
            return False
        remove(place, key)
        return True


def remove_all(place: Place, keys: list[str]) -> None:
    """Remove the objects that are there; on S3 a thousand with a request."""
    import obstore

    if not is_remote(place):
        for key in keys:
            remove(place, key)
        return
    with translating_storage(place):
        for at in range(0, len(keys), 1000):
            obstore.delete(store(place), keys[at : at + 1000])


def remove_output(place: Place, key: str) -> None:
    """Remove what a row made, a file or a folder of images, if it is there."""
    if is_remote(place):
        remove_all(place, [entry.key for entry in entries(place, key, deep=True)] or [key])
        return
    with translating_storage(place):
        files.remove(Path(place, key))


def get_all(place: Place, keys: list[str]) -> Iterator[tuple[str, bytes]]:
    """Key and body of each object that is there, in the order of `keys`; from S3 many at a time."""
    if not is_remote(place):
        bodies: Iterable[bytes | None] = (get(place, key) for key in keys)
        yield from ((key, body) for key, body in zip(keys, bodies, strict=True) if body is not None)
        return
    with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
        for at in range(0, len(keys), 1000):  # bodies of more are never in memory
            some = keys[at : at + 1000]
            bodies = pool.map(partial(get, place), some)
            yield from ((key, body) for key, body in zip(some, bodies, strict=True) if body is not None)


def remove_unchanged(place: Place, listed: Mapping[str, Entry]) -> None:
    """Remove the objects that are still as they were listed."""
    if is_remote(place):
        folders = {key.rpartition("/")[0] for key in listed}
        now = {entry.key: entry.version for folder in folders for entry in entries(place, folder)}
        remove_all(place, [key for key, entry in listed.items() if now.get(key) == entry.version])
        return
    for key, entry in listed.items():
        found = head(place, key)
        if found is not None and found.version == entry.version:
            remove(place, key)


def rename(place: Place, key: str, new_key: str) -> bool:
    """False if the object is gone."""
    import obstore

    with translating_storage(place):
        try:
            obstore.rename(store(place), key, new_key)
            return True
        except FileNotFoundError:
            return False


@patient
def entries(place: Place, folder: str, *, deep: bool = False) -> list[Entry]:
    """The objects directly in a folder of the place, in the order of their keys; deep: in the folders below it, too."""
    import obstore

    with translating_storage(place):
        if _is_missing(place):
            return []
        if deep:
            listed: Any = (found for batch in obstore.list(store(place), folder) for found in batch)
        else:
            listed = obstore.list_with_delimiter(store(place), folder)["objects"]
        return sorted(map(_entry, listed))


def upload(path: Path, place: Place, key: str, attributes: dict[str, str] | None = None) -> None:
    """A local file to an object, which appears whole or not at all.

    attributes: kept with an object on S3 (Content-Type, or metadata of one's own).
    """
    import obstore

    with translating_storage(place), path.open("rb") as file:
        obstore.put(store(place), key, file, **_attributes(place, attributes))


def _attributes(place: Place, attributes: dict[str, str] | None) -> dict[str, Any]:
    """A folder has no place to keep them in."""
    return {"attributes": attributes} if is_remote(place) and attributes else {}


@contextmanager
def whole(place: Place, key: str) -> Iterator[Path]:
    """A local draft to write to, which becomes the object when the block ends well.

    The operating system's errors with the draft pass.
    """
    if not is_remote(place):
        with files.whole(Path(place, key)) as draft:
            yield draft
        return
    if root := os.environ.get("T2VZ_WORKSPACE"):
        os.makedirs(root, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="t2vz-", dir=root or None) as folder:
        draft = Path(folder, key.rpartition("/")[2])
        yield draft
        upload(draft, place, key)


def download(place: Place, key: str, path: Path) -> None:
    """An object to a local file, or all below `key` to a folder of files of that name; both are new."""
    below = [entry.key for entry in entries(place, key)]
    with translating_storage(place):
        if below:
            path.mkdir(parents=True)
        for one, target in [(one, path / one.rpartition("/")[2]) for one in below] or [(key, path)]:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                file.writelines(stream(place, one))


@patient
def ranges(place: Place, key: str, spans: list[tuple[int, int]]) -> list[bytes]:
    """The bytes from `start` to before `end` of each span."""
    import obstore

    with translating_storage(place):
        starts, ends = [start for start, _ in spans], [end for _, end in spans]
        return [bytes(part) for part in obstore.get_ranges(store(place), key, starts=starts, ends=ends)]


def stream(place: Place, key: str) -> Iterator[bytes]:
    """The object's bytes as they come. Raises FileNotFoundError if there is none."""
    import obstore

    try:
        for part in obstore.get(store(place), key).stream(min_chunk_size=2**20):
            yield bytes(part)
    except FileNotFoundError:
        raise
    except Exception as error:
        with translating_storage(place):
            raise error


def drafts(place: Place) -> Iterator[Path]:
    """What a process that was killed left half written in a local folder beside the objects; of others at work, too."""
    if is_remote(place):
        return
    for folder in _FOLDERS:
        with suppress(FileNotFoundError, NotADirectoryError):
            yield from sorted(path for path in Path(place, folder).iterdir() if _DRAFT.search(path.name))


def check(place: Place) -> None:
    """Raise OutputError or StorageTimeout if the S3 place can't be listed: no such bucket, no permission, no answer."""
    entries(place, "claims")


def check_room(place: Place, size_bytes: int) -> None:
    """Raise OutputError if a local folder's disk has not so much room. For writers that bear a full disk badly."""
    with translating_storage(place):
        if _is_missing(place) or is_remote(place):
            return
        found = os.statvfs(place)
        if found.f_bavail * found.f_frsize < size_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")


def table_options(place: Place) -> dict[str, str] | None:
    """What deltalake must be told of the place beside what it takes from the environment."""
    if not is_remote(place):
        return None
    return {
        "allow_http": str(_is_http()).lower(),
        "timeout": f"{_REQUEST_TIMEOUT_S}s",
        "max_retries": str(_RETRIES),
        "retry_timeout": f"{_RETRY_TIMEOUT_S}s",
    } | ({"endpoint": url} if (url := _endpoint()) else {})


def store(place: Place) -> Any:
    """The obstore store of a place; a local folder is made."""
    return _store(str(place), _endpoint() if is_remote(place) else None)


@lru_cache(maxsize=64)
def _store(place: str, endpoint: str | None) -> Any:
    from obstore.store import LocalStore, S3Store

    if not is_remote(place):
        return LocalStore(place, mkdir=True)
    bucket, prefix = _bucket(place)
    return S3Store(
        bucket,
        prefix=prefix.strip("/") or None,
        **({"endpoint": endpoint} if endpoint else {}),
        client_options={"allow_http": _is_http(), "timeout": timedelta(seconds=_REQUEST_TIMEOUT_S)},
        retry_config={"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_TIMEOUT_S)},
    )


def _endpoint() -> str | None:
    return next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), None)


def _is_http() -> bool:
    return (_endpoint() or "").startswith("http://")


def _bucket(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix(_S3).partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
        raise OutputError(f"{url[:240]}: names no S3 bucket; write s3://bucket/prefix", stage="results")
    return bucket, key


def _is_missing(place: Place) -> bool:
    """A local folder that isn't there is empty; looking into it must not make it."""
    return not is_remote(place) and not os.path.isdir(place)


def _entry(meta: Any) -> Entry:
    return Entry(meta["path"], meta["size"], meta["last_modified"], f"{meta['e_tag']} {meta['last_modified']}")


@contextmanager
def _only_one(place: Place, key: str) -> Iterator[None]:
    """One process and thread at a time compares and writes in a local folder; a kill frees it."""
    folder = Path(place, key).parent
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def translating_storage(place: Place) -> Iterator[None]:
    """Translate what obstore, deltalake and the file system raise over a place."""
    try:
        yield
    except T2VZError:
        raise
    except Exception as error:
        from deltalake.exceptions import DeltaError
        from obstore.exceptions import BaseError

        if not isinstance(error, BaseError | DeltaError | OSError):
            raise translate(error, "results", str(place)) from error
        raise _translated(place, str(error), type(error).__name__) from error


def _translated(place: Place, text: str, kind: str) -> T2VZError:
    reason = (text.splitlines() or [kind])[0]
    if "No space left" in text or "os error 28" in text:
        return OutputError(f"{place}: no space left on the device", stage="results")
    if "NoSuchBucket" in text:
        return OutputError(f"{place}: there is no such bucket; make it, or name another", stage="results")
    if re.search(r"status code: 40[13]|AccessDenied|Credentials|Unauthenticated", text) and is_remote(place):
        return OutputError(
            f"{place}: storage refuses; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy",
            stage="results",
        )
    if "ermission denied" in text or "Read-only file system" in text:
        return OutputError(f"{place}: no permission to write there", stage="results")
    if _NO_ANSWER.search(text):
        return StorageTimeout(f"{place}: no answer in time ({reason})", stage="results")
    return ResultsError(f"{place}: can't be read or written ({reason})")
