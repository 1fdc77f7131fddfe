import csv
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("DO_NOT_TRACK", "1")

SMALL = {"width": "64", "height": "64", "video_length": "2", "num_inference_steps": "3", "guidance_scale": "1"}


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Prefect server with an empty database, which flows of this process use, too."""
    os.environ["PREFECT_HOME"] = str(tmp_path_factory.mktemp("prefect"))
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(120), temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield PREFECT_API_URL.value()


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
