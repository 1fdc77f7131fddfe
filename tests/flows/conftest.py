import csv
from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = {"width": "64", "height": "64", "video_length": "2", "num_inference_steps": "3", "guidance_scale": "1"}


@pytest.fixture
def manifest(tmp_path: Path) -> Callable[..., Path]:
    """Writes a manifest with the given rows, small ones where they don't say otherwise."""

    def write(*rows: dict[str, str], name: str = "manifest.csv") -> Path:
        path = tmp_path / name
        full = [{"prompt": "a boat", **SMALL, **row} for row in rows]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, sorted({column for row in full for column in row}))
            writer.writeheader()
            writer.writerows(full)
        return path

    return write
