"""Sandbox: foreign media is read in a child process, so that a file which crashes, hangs or blows up its reader takes
only its row. Same functions as where the reading is done, with the same results.

The child has a limit of memory and a deadline (`Limits`), none of this process's secrets in its environment, and is
kept warm for the next source; one that died or was killed is replaced. Pictures come back through a file without a
name that both map. It is a guard against broken files, not a prison: the child is the same user's.
"""

from __future__ import annotations

import atexit
import importlib
import io
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from socket import socketpair
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from t2vz import storage
from t2vz.clip import AudioReference, Clip, mapped
from t2vz.errors import (
    SourceCorrupt,
    SourceError,
    SourceTooLarge,
    SourceTooSlow,
    T2VZError,
    UnexpectedError,
    WorkerDied,
    is_out_of_memory,
    translate,
    translating,
)
from t2vz.media.limits import SCHEMES, Limits
from t2vz.media.local import local_source, reading, shown
from t2vz.processes import die_with_parent

if TYPE_CHECKING:  # whose modules import what decodes
    from t2vz.media.probe import Probe
    from t2vz.media.soundtrack import Track

_MOST = 2  # children of a process: a long decoding shall not hold up the planning beside it
_START_S = 120.0
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "TZ", "OMP_NUM_THREADS")
# What a child may send: records, numbers, arrays and errors; unpickling anything else could run code here.
_RECORDS = {
    ("fractions", "Fraction"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("t2vz.clip", "AudioReference"),
    ("t2vz.media.probe", "Probe"),
}


def probe(path: str | os.PathLike[str], limits: Limits = Limits()) -> Probe:  # noqa: B008 (frozen)
    """`media.probe.probe`, in a child. Errors: its own, and those of `_call`."""
    return _call("probe", path, limits)[0]


def decode(
    path: str | os.PathLike[str],
    *,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    workspace: Path | None = None,
    **options: Any,
) -> Clip:
    """`media.decode.decode`, in a child; its options. Errors: its own, and those of `_call`."""
    values, frames = _call("decode", path, limits, options, workspace)
    return Clip(frames=frames, **values)


def read_image(path: str | os.PathLike[str], limits: Limits = Limits()) -> NDArray[np.uint8]:  # noqa: B008 (frozen)
    """`media.images.read_image`, in a child, of a picture within the limits. Errors: its own, and those of `_call`."""
    return _call("read_image", path, limits)[1]


def image_size(path: str | os.PathLike[str], limits: Limits = Limits()) -> tuple[int, int]:  # noqa: B008 (frozen)
    """`media.images.image_size`, in a child. Errors: its own, and those of `_call`."""
    return _call("image_size", path, limits)[0]


def comment(path: str | os.PathLike[str], limits: Limits = Limits()) -> str:  # noqa: B008 (frozen)
    """The comment in a container's metadata; empty if it has none. Errors: SourceCorrupt, and those of `_call`."""
    return _call("comment", path, limits)[0]


def soundtrack(
    audio: AudioReference,
    format: str,
    warnings: list[str],
    workspace: Path,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> Track | None:
    """The sound for a container of `format`, through a file in the workspace; None and a warning if the source's can't
    be read. Errors: WorkerDied, OutputError.
    """
    from t2vz.media.soundtrack import Track, unreadable

    limits = replace(limits, schemes=SCHEMES, roots=())  # the frames of that file are there already
    path = workspace / f"sound-{uuid.uuid4().hex}.{format}"
    try:
        options = {"audio": audio, "to": path, "format": format}
        (written, told), _ = _call("write_soundtrack", audio.path, limits, options)
        warnings += told
        return Track(path) if written else None
    except SourceError as error:
        warnings.append(unreadable(error))
        return None
    finally:
        path.unlink(missing_ok=True)  # a track holds it open


def _call(
    function: str,
    path: str | os.PathLike[str],
    limits: Limits,
    options: dict[str, Any] | None = None,
    workspace: Path | None = None,
) -> tuple[Any, Any]:
    """What the function makes of the source: (a value, an array or None).

    Errors: the function's; those of `local_source`; SourceCorrupt (the file crashes its reader), SourceTooLarge (it
    needs more memory than it may), SourceTooSlow; WorkerDied, retryable: something outside killed the child.
    """
    text = os.fspath(path)
    with reading(text):
        here = local_source(text, limits)
        here = Path(os.path.realpath(here) if limits.roots else os.path.abspath(here))
    # It was let in; and a copy from S3 lies elsewhere.
    inside = replace(limits, schemes=SCHEMES, roots=())
    request = function, str(here), inside, options or {}, workspace
    with _lane:
        while True:
            child = _taken()
            fresh = child.calls == 0
            try:
                answer = child.call(request, limits.max_decode_s)
            except _Dead as dead:
                if fresh or dead.code is None:  # a deadline is one, not two
                    raise dead.error(shown(text), limits) from None
                continue  # of what an earlier file left in it, or killed while it was idle
            except BaseException:
                child.end()
                raise
            if isinstance(answer, _Failed):
                if answer.spent:
                    child.end()
                    if not fresh:
                        continue
                else:
                    _idle.append(child)
                if storage.is_remote(text):
                    raise type(answer.error)(
                        answer.error.message.replace(str(here), shown(text)), stage=answer.error.stage
                    )
                raise answer.error
            _idle.append(child)
            return answer


def _taken() -> _Child:
    """An idle child, or a new one. Not `if _idle`: another thread may take it in between."""
    try:
        return _idle.pop()
    except IndexError:
        return _Child()


class _Dead(Exception):
    """A child that is no more. code: its exit code, None if it was killed for being late."""

    def __init__(self, code: int | None, said: str = "") -> None:
        super().__init__(code)
        self.code, self.said = code, said

    def error(self, path: str, limits: Limits) -> T2VZError:
        if self.code is None:
            return SourceTooSlow(
                f"{path}: not read within {limits.max_decode_s:g} s; it may be made to hang its reader: re-encode it, "
                "or raise max_decode_s"
            )
        if self.code == -signal.SIGKILL:
            return WorkerDied(
                f"{path}: the process that read it was killed, perhaps for lack of memory", stage="decode"
            )
        if self.code < 0:
            with suppress(ValueError):
                return SourceCorrupt(
                    f"{path}: crashes its reader ({signal.Signals(-self.code).name}); it is damaged, or made to: "
                    "re-encode it"
                )
        return UnexpectedError(f"{path}: the process that read it ended ({self.code}): {self.said}", stage="decode")


@dataclass(frozen=True)
class _Failed:
    """spent: the child had no memory left, and is of no more use."""

    error: T2VZError
    spent: bool


class _Child:
    """A process that reads sources, one at a time."""

    def __init__(self) -> None:
        self.calls = 0
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (its end tells why a child ended)
        ours, theirs = socketpair()
        try:
            # By a thread that lives as long as this process: the child dies with the thread that started it.
            self._process = _starter.submit(self._start, theirs.fileno()).result()
        finally:
            theirs.close()
        self._connection = Connection(ours.detach())
        try:
            with suppress(OSError):  # it has ended: why is read below
                self._connection.send(os.getpid())
            self._received(_START_S)
        except (_Dead, OSError) as error:
            dead = error if isinstance(error, _Dead) else self._gone()
            if dead.code == -signal.SIGKILL:
                raise WorkerDied(
                    "the process that reads sources was killed as it started; run again", stage="decode"
                ) from None
            raise UnexpectedError(
                f"the process that reads sources did not start ({dead.code}): {dead.said}", stage="decode"
            ) from None

    def _start(self, descriptor: int) -> subprocess.Popen[bytes]:
        main = "import sys; from t2vz.media.sandbox import main; main(int(sys.argv[1]))"
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        return subprocess.Popen(
            [sys.executable, "-P", "-c", main, str(descriptor)],
            pass_fds=(descriptor,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._output,
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def call(self, request: tuple[Any, ...], timeout_s: float) -> tuple[Any, Any] | _Failed:
        """Raises _Dead."""
        self.calls += 1
        self._output.truncate(0)  # what libraries print must not fill the disk
        try:
            self._connection.send(request)
        except OSError:
            raise self._gone() from None
        kind, value, shape = self._received(timeout_s)
        if kind != "made":
            return _Failed(value, spent=kind == "spent")
        if shape is None:
            return value, None
        with self._file() as file:
            return value, np.memmap(file, np.uint8, "r+", shape=shape).view(np.ndarray)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()
        self._output.close()

    def _received(self, timeout_s: float) -> Any:
        try:
            if not self._connection.poll(timeout_s):
                self.end()
                raise _Dead(None)
            return _Unpickler(io.BytesIO(self._connection.recv_bytes())).load()
        except (EOFError, OSError):
            raise self._gone() from None

    def _file(self) -> Any:
        try:
            return os.fdopen(recv_handle(self._connection), "r+b")
        except (EOFError, OSError, RuntimeError):
            raise self._gone() from None

    def _gone(self) -> _Dead:
        """It closed its end: it has ended, or is about to."""
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, self._output.tell() - 2000))
        lines = self._output.read().decode(errors="replace").split("\n")
        self.end()
        return _Dead(code, next((line.strip()[:300] for line in reversed(lines) if line.strip()), ""))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "t2vz.errors":
            found = super().find_class(module, name)
            if isinstance(found, type) and issubclass(found, T2VZError):
                return found
        if (module, name) in _RECORDS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} from the process that reads sources")


_idle: list[_Child] = []
_lane = threading.Semaphore(_MOST)
_starter = ThreadPoolExecutor(1, "starts what reads sources")


def _forget() -> None:
    """In a forked process: the children are the other's, and so is the thread."""
    global _lane, _starter
    _idle.clear()
    _lane, _starter = threading.Semaphore(_MOST), ThreadPoolExecutor(1, "starts what reads sources")


def _end_all() -> None:
    with suppress(IndexError):
        while True:
            _idle.pop().end()


os.register_at_fork(after_in_child=_forget)
atexit.register(_end_all)


# In the child


def main(descriptor: int) -> None:
    """The child's whole life. descriptor: of the socket to its parent."""
    for interruption in (signal.SIGINT, signal.SIGTERM):  # they reach all processes of a group; the parent decides
        signal.signal(interruption, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = Connection(descriptor)
    parent = connection.recv()
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    for library in ("av", "cv2", "PIL.Image", "t2vz.media.decode", "t2vz.media.soundtrack"):
        importlib.import_module(library)  # now, and not in the first source's time
    own_bytes = _data_bytes()
    connection.send(("ready", None, None))
    with suppress(EOFError, OSError):
        while True:
            function, path, limits, options, workspace = connection.recv()
            _bound_memory(own_bytes + limits.max_decode_bytes)
            try:
                value, frames = _FUNCTIONS[function](path, limits, workspace, **options)
            except Exception as error:
                connection.send(_failure(error, path, limits))
            else:
                connection.send(("made", value, None if frames is None else frames.shape))
                if frames is not None:
                    with frames.file:
                        send_handle(connection, frames.file.fileno(), parent)
                    del frames
    os._exit(0)


def _bound_memory(most_bytes: int) -> None:
    """Of what a process allocates; what it maps of a shared file (a clip's frames) does not count."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(
        resource.RLIMIT_DATA, (most_bytes if hard == resource.RLIM_INFINITY else min(hard, most_bytes), hard)
    )


def _data_bytes() -> int:
    """What of this process's memory counts as RLIMIT_DATA has it."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    return 2**29


def _failure(error: Exception, path: str, limits: Limits) -> tuple[str, T2VZError, None]:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or is_out_of_memory(cause) or "nsufficient memory" in str(cause):  # OpenCV's
            told = (
                f"{path}: reading it takes more than the {limits.max_decode_bytes / 1e6:,.4g} MB of memory that it "
                "may; scale it down first, or raise max_decode_bytes"
            )
            return "spent", SourceTooLarge(told), None
        cause = cause.__cause__
    return "failed", translate(error, "decode", path), None


@dataclass(frozen=True)
class _Pictures:
    """An array's shape, uint8, and the file that it is in."""

    shape: tuple[int, ...]
    file: BinaryIO


def _probe(path: str, limits: Limits, workspace: Path | None) -> tuple[Probe, None]:
    from t2vz.media.probe import probe

    return probe(path, limits), None


def _decode(path: str, limits: Limits, workspace: Path | None, **options: Any) -> tuple[dict[str, Any], _Pictures]:
    from t2vz.media.decode import decode

    files: list[BinaryIO] = []

    def room(shape: tuple[int, ...], workspace: Path | None) -> NDArray[np.uint8]:
        frames, file = mapped(shape, workspace)
        files.append(file)
        return frames

    clip = decode(path, limits=limits, workspace=workspace, room=room, **options)
    values = {field.name: getattr(clip, field.name) for field in fields(clip) if field.name != "frames"}
    return values, _Pictures(clip.frames.shape, files[-1])


def _read_image(path: str, limits: Limits, workspace: Path | None) -> tuple[None, _Pictures]:
    from t2vz.media import images
    from t2vz.media.probe import check_picture

    with reading(path):
        check_picture(Path(path), limits)
        read = images.read_image(Path(path))
        picture, file = mapped(read.shape, workspace)
        picture[:] = read
    return None, _Pictures(read.shape, file)


def _image_size(path: str, limits: Limits, workspace: Path | None) -> tuple[tuple[int, int], None]:
    from t2vz.media.probe import check_picture

    with reading(path):
        return check_picture(Path(path), limits), None


def _comment(path: str, limits: Limits, workspace: Path | None) -> tuple[str, None]:
    from t2vz.media.av_source import open_source

    with open_source(path) as container:
        return {name.lower(): value for name, value in container.metadata.items()}.get("comment", ""), None


def _write_soundtrack(
    path: str, limits: Limits, workspace: Path | None, *, audio: AudioReference, to: Path, format: str
) -> tuple[tuple[bool, tuple[str, ...]], None]:
    from t2vz.media.soundtrack import write

    with translating("encode", path):
        return write(replace(audio, path=path), to, format), None


_FUNCTIONS: dict[str, Callable[..., tuple[Any, _Pictures | None]]] = {
    "probe": _probe,
    "decode": _decode,
    "read_image": _read_image,
    "image_size": _image_size,
    "comment": _comment,
    "write_soundtrack": _write_soundtrack,
}
