"""Models on disk that the tests may break, and a hub that is only its local cache."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t2vz.models import hub, loading


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, no network, and nothing loaded yet.

    The environment variables alone would come too late: huggingface_hub reads them when it is imported.
    """
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_commits", {})
    monkeypatch.setattr(loading, "_cache", OrderedDict())
    return folder


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_model` for the test alone."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Change entries of a JSON file."""

    def change(path: Path, **entries: Any) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change
