from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def manifest(write_manifest: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes a manifest with the given rows, small ones where they don't say otherwise."""

    def write(*rows: dict[str, str], name: str = "manifest.csv") -> Path:
        return write_manifest(tmp_path / name, *rows)

    return write
