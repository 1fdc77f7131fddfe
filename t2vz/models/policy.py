"""Which models an operator lets rows name, by format and checksum: anyone may have written a manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from t2vz.errors import ModelError, UnsupportedModel
from t2vz.media.local import shown
from t2vz.models import hub, table
from t2vz.spec import JobSpec


@dataclass(frozen=True)
class ModelPolicy:
    """What models may be. Code is never loaded from them, and weights only from .safetensors files, with one exception.

    allow_pickles: let controlnet-aux's annotators (openpose, hed, lineart, normal) read theirs, which are pickles;
    tensors only are read from them all the same (`conditions.annotators`).
    checksums: JSON file of {reference: checksum}; only models that are in it with the checksum that they have are
    loaded. None: any model. A checksum is `checksum`'s.
    """

    allow_pickles: bool = False
    checksums: str | None = None


def check(spec: JobSpec, policy: ModelPolicy) -> None:
    """Raise UnsupportedModel or ModelError if a model of the row is not let in; and what `table.revision` does."""
    allowed = None if policy.checksums is None else _read(policy.checksums)
    for column, reference, wanted in table.references(spec):
        if column == "annotators" and not policy.allow_pickles:
            raise UnsupportedModel(
                f"annotators {shown(reference)}: pickled weights, which could carry code; allow_pickles lets them "
                "be read (tensors only), or use the conditions edge, depth and pose"
            )
        if allowed is None:
            continue
        found = checksum(reference, wanted)
        if allowed.get(reference) != found:
            other = "has another for it" if reference in allowed else "does not have it"
            raise ModelError(
                f"{column} {shown(reference)}: its checksum is {found}, and {shown(policy.checksums or '')} {other}; "
                "add it there if you trust the model"
            )


def checksum(reference: str, wanted: str | None = None) -> str:
    """`sha256:…` over all of the files of a model on this machine, `commit:…` of one on the hub.

    Of a folder: of each configuration and weight file, sorted by name, its path in the folder, NUL, its own sha256 in
    hex, NUL. wanted: revision on the hub. Raises as `hub.commit`.
    """
    place = Path(table.resolve(reference))
    if place.is_file():
        return f"sha256:{_hashed(place)}"
    if place.is_dir():
        digest = hashlib.sha256()
        for file in table.model_files(place):
            digest.update(f"{file.relative_to(place).as_posix()}\0{_hashed(file)}\0".encode())
        return f"sha256:{digest.hexdigest()}"
    return f"commit:{hub.commit(reference, wanted)}"


def _read(path: str) -> Mapping[str, str]:
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{shown(path)}: can't be read as the file of model checksums ({error})") from error
    if not isinstance(found, dict):
        raise ModelError(f"{shown(path)}: a file of model checksums is one JSON object of {{reference: checksum}}")
    return found


def _hashed(path: Path) -> str:
    """All of it: `media.fingerprint` samples large files, which tells changes but no forgery."""
    found = path.stat()
    return _hashed_once(path, found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=1024)
def _hashed_once(path: Path, size_bytes: int, mtime_ns: int, inode: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
