"""The errors of t2vz: one tree, each class with a stage and whether trying again can help.

    T2VZError
    ├── ManifestError            the manifest as a whole, or a row of it, can't be read        manifest
    ├── SourceError              a source or condition video                                   decode
    │   ├── SourceMissing
    │   ├── SourceCorrupt
    │   ├── SourceEmpty          no frames: audio only, zero frames, or none in the range
    │   ├── SourceTooLarge       over a limit (Limits); refused before it is read, or when decoding takes too much
    │   ├── SourceTooSlow        not decoded within the limit: it may never end
    │   └── SourceForbidden      not from where sources may come from (Limits)
    ├── ConditionError           condition frames can't be made or do not fit                  conditions
    ├── ModelError               a model can't be loaded                                       model
    │   ├── UnknownModel
    │   └── UnsupportedModel     known, but not of a kind that the engine covers
    ├── GenerationError          the frames can't be made                                      generate
    │   ├── OutOfDeviceMemory    even with one frame a chunk
    │   ├── InvalidFrames        NaN or infinite values
    │   └── DeviceLost           the device went away                                          (retryable)
    ├── ContentWithheld          the model's safety checker flagged the frames                 content
    ├── EncodeError              the frames can't be written as asked                          encode
    ├── OutputError              the output folder refuses: no space, no permission            encode
    ├── ResultsError             the results table can't be read or written                    results
    │   └── ResultsBusy          other writers won every try                                   (retryable)
    ├── StorageTimeout           storage did not answer in time                                (retryable)
    ├── WorkerDied               the process that worked on the row was killed                 (retryable)
    └── UnexpectedError          anything that none of the above foresaw: a defect of ours

Errors of other libraries are translated once, where they enter, by `translating`. No message has secrets in it, or
control characters, which would play with the terminal (`harmless`).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

# Of variables in the environment; values that are shorter would be found inside of words.
_SECRET_NAMES = re.compile(
    r"(^|_)(TOKEN|SECRET|(PG)?PASSWORD|PASSWD|CREDENTIALS?|AUTH_STRING|(API|ACCESS|PRIVATE|ACCOUNT|STORAGE)_KEY)(_|$)"
)
_SHORTEST_SECRET = 8
# Of an address: user:password@, which may have any of these signs in it; host:port/ is none.
_USER_INFO = re.compile(r"(?<=://)(?:[^/\s'\"]*|[^/\s:'\"]+:(?!\d+/)[^\s'\"]*)@")
_SIGNED = re.compile(
    r"((?:x-amz-(?:signature|credential|security-token)|signature|sig|[a-z_-]*(?:token|secret|password|key))=)[^&\s'\"]+",
    re.IGNORECASE,
)
# Those that turn the direction of text, too: they hide what a name ends in.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
HIDDEN = "***"


def harmless(text: str) -> str:
    """The text as a message may have it: without secrets, on one line, without control characters."""
    text = without_secrets(text)
    if _CONTROL.search(text):
        text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", re.sub("[\t-\r\u2028\u2029]+", " ", text))
    return text


def without_secrets(text: str) -> str:
    """The text without those in the environment, and passwords and signatures in addresses."""
    for name, value in sorted(os.environ.items(), key=lambda item: -len(item[1])):  # one may be a part of another
        if len(value) >= _SHORTEST_SECRET and value in text and _SECRET_NAMES.search(name.upper()):
            text = text.replace(value, HIDDEN)
    if "://" in text:
        text = _SIGNED.sub(rf"\1{HIDDEN}", _USER_INFO.sub(f"{HIDDEN}@", text))
    return text


class T2VZError(Exception):
    """Base of all errors of t2vz.

    message: one plain line that says what is wrong and what to do, naming the file or column.
    stage: where in the way of the data it happened; the class's own unless given.
    retryable: True if the same attempt may succeed later.
    """

    stage: str = "unknown"
    retryable: bool = False

    def __init__(self, message: str, *, stage: str | None = None) -> None:
        super().__init__(harmless(message))
        if stage is not None:
            self.stage = stage

    @property
    def message(self) -> str:
        return str(self.args[0])


class ManifestError(T2VZError):
    stage = "manifest"


class SourceError(T2VZError):
    stage = "decode"


class SourceMissing(SourceError):
    pass


class SourceCorrupt(SourceError):
    pass


class SourceEmpty(SourceError):
    pass


class SourceTooLarge(SourceError):
    pass


class SourceTooSlow(SourceError):
    pass


class SourceForbidden(SourceError):
    pass


class ConditionError(T2VZError):
    stage = "conditions"


class ModelError(T2VZError):
    stage = "model"


class UnknownModel(ModelError):
    pass


class UnsupportedModel(ModelError):
    pass


class GenerationError(T2VZError):
    stage = "generate"


class OutOfDeviceMemory(GenerationError):
    pass


class InvalidFrames(GenerationError):
    pass


class DeviceLost(GenerationError):
    retryable = True


class ContentWithheld(T2VZError):
    stage = "content"


class EncodeError(T2VZError):
    stage = "encode"


class OutputError(T2VZError):
    stage = "encode"


class ResultsError(T2VZError):
    stage = "results"


class ResultsBusy(ResultsError):
    retryable = True


class StorageTimeout(T2VZError):
    retryable = True


class WorkerDied(T2VZError):
    retryable = True


class UnexpectedError(T2VZError):
    pass


_OUTPUT_ERRNOS = {
    errno.ENOSPC: "no space left on the device; free some and run again",
    errno.EDQUOT: "the disk quota is used up; free some space and run again",
    errno.EFBIG: "the file is larger than this process or file system may write",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.EROFS: "the file system is read-only",
}


def translate(error: BaseException, stage: str, subject: str = "") -> T2VZError:
    """The t2vz error for `error`, which was met in `stage` while working on `subject` (a file, a model).

    What is already ours is handed back unchanged. What nobody foresaw becomes `UnexpectedError` with the
    foreign class's name, so that a results row still says what happened.
    """
    if isinstance(error, T2VZError):
        return error
    about = f"{subject}: " if subject else ""
    if isinstance(error, OSError) and error.errno in _OUTPUT_ERRNOS:
        where = f"{str(error.filename).removeprefix('file:')}: " if error.filename else about
        if stage == "decode" and error.errno in (errno.EACCES, errno.EPERM):
            return SourceError(f"{where}no permission to read it", stage=stage)
        return OutputError(f"{where}{_OUTPUT_ERRNOS[error.errno]}", stage=stage)
    if isinstance(error, TimeoutError):
        return StorageTimeout(f"{about}no answer in time ({_one_line(error)})", stage=stage)
    if isinstance(error, MemoryError):
        return GenerationError(f"{about}out of host memory; lower the size or the frame count", stage=stage)
    name = type(error).__name__
    if is_out_of_memory(error):
        return OutOfDeviceMemory(f"{about}out of device memory: {_one_line(error)}", stage=stage)
    if name == "AcceleratorError" or "CUDA error" in str(error):
        return DeviceLost(f"{about}device lost: {_one_line(error)}", stage=stage)
    return UnexpectedError(f"{about}{name}: {_one_line(error)}", stage=stage)


def is_out_of_memory(error: BaseException) -> bool:
    """True for torch's error of that name and for the clothes that cuBLAS, cuDNN and the CPU's allocator put it in."""
    text = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError)
        and any(words in text for words in ("out of memory", "alloc_failed", "can't allocate memory"))
    )


@contextmanager
def translating(stage: str, subject: str = "") -> Iterator[None]:
    """Raise what leaves the block as a `T2VZError` (see `translate`)."""
    try:
        yield
    except Exception as error:
        ours = translate(error, stage, subject)
        if ours is error:
            raise
        raise ours from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
