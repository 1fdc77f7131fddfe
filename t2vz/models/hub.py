"""Models on the hub: pinned to a commit before anything is made of them; and the errors of loading, told plainly."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from t2vz.errors import DeviceLost, ModelError, OutOfDeviceMemory, T2VZError, UnknownModel, translate
from t2vz.media.local import shown

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PROBE_TIMEOUT_S = 10.0

_commits: dict[tuple[str, str | None], str | T2VZError] = {}


def commit(reference: str, wanted: str | None = None) -> str:
    """The commit of a hub model: `wanted` if it is one, the one in the local cache, else the hub's present one.

    Every later step of a run uses it, so that what is loaded is what `job_id` was made of. Asked once a
    process and model. Raises UnknownModel; ModelError if it is not in the cache and the hub can't be reached.
    """
    if wanted and _COMMIT.fullmatch(wanted):
        return wanted
    key = reference, wanted
    if key not in _commits:
        try:
            _commits[key] = _cached_commit(reference, wanted) or _present_commit(reference, wanted)
        except T2VZError as error:
            _commits[key] = error
    found = _commits[key]
    if isinstance(found, T2VZError):
        raise type(found)(found.message)
    return found


def _cached_commit(reference: str, wanted: str | None) -> str | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    ref = Path(HF_HUB_CACHE) / f"models--{reference.replace('/', '--')}" / "refs" / (wanted or "main")
    return ref.read_text().strip() if ref.is_file() else None


def _present_commit(reference: str, wanted: str | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        # One request without retries: a download would try for a minute and a half when there is no network.
        return str(HfApi().model_info(reference, revision=wanted, timeout=_PROBE_TIMEOUT_S).sha)
    except RepositoryNotFoundError as error:
        raise UnknownModel(f"model {shown(reference)}: not on the hub, or not open to you") from error
    except RevisionNotFoundError as error:
        raise UnknownModel(f"model {shown(reference)}: the hub has no revision {shown(wanted or '')} of it") from error
    except Exception as error:
        raise ModelError(
            f"model {shown(reference)}: not in the local cache, and the hub can't be reached ({one_line(error)}); "
            "download it beforehand or name a folder"
        ) from error


@contextmanager
def loading(reference: str, column: str = "model") -> Iterator[None]:
    """Whatever a library raises over a model's files, as one ModelError that names the model and its column. Raises
    OutOfDeviceMemory and DeviceLost too."""
    try:
        yield
    except T2VZError:
        raise
    except Exception as error:
        ours = translate(error, "model", reference)
        if isinstance(ours, (OutOfDeviceMemory, DeviceLost)):
            raise ours from error
        raise ModelError(
            f"{column} {shown(reference)}: can't be loaded ({type(error).__name__}: {one_line(error)}); "
            "check its files or name another"
        ) from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
