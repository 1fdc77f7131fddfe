"""Loading the models that extract conditions, and keeping a few of them. Not for what generates frames."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from t2vz.errors import UnknownModel
from t2vz.media.local import shown
from t2vz.models import LOADING, hub
from t2vz.models.table import resolve

# Loaded models that a process keeps: a row of pose and depth needs three.
KEPT = 4

_TRANSFORMERS_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")


def load(loader: Callable[[str, str], Any], reference: str, device: str, column: str) -> Any:
    """`loader(reference, device)`, from the cache if it was called before with the same arguments.

    column: of the manifest, that names the model. Safe to call from several threads: a model is loaded once. What it
    raises is a ModelError (or one of its kinds), OutOfDeviceMemory or DeviceLost.
    """
    with LOADING, hub.loading(reference, column):
        try:
            return _load(loader, reference, device)
        except UnknownModel as error:  # of `fetch`, which doesn't know the column
            raise UnknownModel(f"{column}: {error.message}") from error


@lru_cache(maxsize=KEPT)
def _load(loader: Callable[[str, str], Any], reference: str, device: str) -> Any:
    return loader(reference, device)


def transformers_model(class_name: str, reference: str, device: str) -> tuple[Any, Any]:
    """(image processor, model) by a class of transformers: safetensors only, no remote code."""
    import transformers

    folder = fetch(reference, _TRANSFORMERS_FILES)
    # Said, as transformers would ask the terminal otherwise.
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = getattr(transformers, class_name).from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype="float32"
    )
    return processor, model.to(device).eval().requires_grad_(False)


def fetch(reference: str, files: tuple[str, ...]) -> Path:
    """The folder of a model: the one that `reference` names, or the hub's `files` in the local cache.

    It is the commit that the job_id was made of.
    Raises UnknownModel, ModelError.
    """
    path = Path(resolve(reference))
    if path.is_dir():
        return path
    if path.exists() or not hub.HUB_ID.fullmatch(reference):
        raise UnknownModel(f"{shown(reference)}: no such folder, and not a hub id either")

    from huggingface_hub import hf_hub_download

    revision = hub.commit(reference)
    paths = [hf_hub_download(reference, file, revision=revision) for file in files]
    return Path(paths[0]).parent
