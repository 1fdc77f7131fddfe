"""The tree of errors: all survive pickling, foreign ones are translated, none is lost."""

from __future__ import annotations

import errno
import pickle

import pytest
import torch

from t2vz import errors


def tree(kind: type) -> list[type]:
    return [kind, *(leaf for sub in kind.__subclasses__() for leaf in tree(sub))]


@pytest.mark.parametrize("kind", tree(errors.T2VZError))
def test_every_class_survives_pickling_with_its_stage(kind):
    error = pickle.loads(pickle.dumps(kind("what is wrong", stage="encode")))
    assert (type(error), error.message, error.stage, error.retryable) == (
        kind,
        "what is wrong",
        "encode",
        kind.retryable,
    )


def test_the_docstring_shows_the_whole_tree():
    for kind in tree(errors.T2VZError):
        assert kind.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize(
    ("foreign", "ours", "retryable"),
    [
        (OSError(errno.ENOSPC, "No space left", "out/x.mp4"), errors.OutputError, False),
        (PermissionError(errno.EACCES, "denied", "out/x.mp4"), errors.OutputError, False),
        (OSError(errno.EFBIG, "too large", "out/x.mp4"), errors.OutputError, False),
        (TimeoutError("no answer"), errors.StorageTimeout, True),
        (MemoryError(), errors.GenerationError, False),
        (torch.OutOfMemoryError("CUDA out of memory"), errors.OutOfDeviceMemory, False),
        (RuntimeError("CUDA error: out of memory"), errors.OutOfDeviceMemory, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), errors.OutOfDeviceMemory, False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), errors.OutOfDeviceMemory, False),
        (RuntimeError("CUDA error: device-side assert triggered"), errors.DeviceLost, True),
        (ZeroDivisionError("by zero"), errors.UnexpectedError, False),
    ],
)
def test_foreign_errors_are_translated(foreign, ours, retryable):
    error = errors.translate(foreign, "encode", "x.mp4")
    assert type(error) is ours
    assert error.retryable is retryable
    assert error.stage == "encode"
    assert "\n" not in error.message


def test_a_source_that_may_not_be_read_is_not_blamed_on_the_output():
    error = errors.translate(PermissionError(errno.EACCES, "denied", "a.mp4"), "decode", "a.mp4")
    assert type(error) is errors.SourceError
    assert error.message == "a.mp4: no permission to read it"


def test_ours_pass_unchanged():
    ours = errors.SourceMissing("a.mp4: no such file")

    def raise_it():
        with errors.translating("generate"):
            raise ours

    with pytest.raises(errors.SourceMissing) as caught:
        raise_it()
    assert caught.value is ours
    assert ours.stage == "decode"
