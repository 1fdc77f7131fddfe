"""Fixtures that several test folders share."""

from __future__ import annotations

import atexit
import csv
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything imports huggingface_hub, which reads them once: a cache of the tests' own, and no hub.
_CACHE = Path(tempfile.mkdtemp(prefix="t2vz-tests-"))
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(_CACHE / "hub"))
os.environ.update(T2VZ_CACHE_DIR=str(_CACHE / "t2vz"))
os.environ.update(PREFECT_HOME=str(_CACHE / "prefect"), DO_NOT_TRACK="1", PREFECT_SERVER_ANALYTICS_ENABLED="false")

import pytest  # noqa: E402
import torch  # noqa: E402
from s3 import S3  # noqa: E402

ROOT = Path(__file__).parents[1]

# The models here are tiny: a second thread costs more in waiting than it saves.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """A folder of real clips, which are not part of the project: T2VZ_TEST_CLIPS names it."""
    folder = Path(os.environ.get("T2VZ_TEST_CLIPS", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(
            f"no real clips at {folder} (T2VZ_TEST_CLIPS names their folder); generated clips are used elsewhere"
        )
    return folder


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[str]:
    """The URL of a Prefect server with an empty database, which flows of this process use, too."""
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(120), temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield PREFECT_API_URL.value()


TINY = {"width": 64, "height": 64, "video_length": 2, "num_inference_steps": 3, "guidance_scale": 1}


@pytest.fixture(scope="session")
def write_manifest() -> Callable[..., Path]:
    """Writes a manifest of the given rows to a path; tiny ones where they don't say otherwise (None: empty cell)."""

    def write(path: Path, *rows: dict[str, Any]) -> Path:
        full = [{"prompt": "a boat", **TINY, **row} for row in rows]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, sorted({column for row in full for column in row}))
            writer.writeheader()
            writer.writerows(full)
        return path

    return write


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a tiny Stable Diffusion with random weights."""
    from tiny import write_pipeline

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(1)
    write_pipeline(folder, in_channels=4)
    return folder


@pytest.fixture(scope="session")
def tiny_edit_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a tiny InstructPix2Pix with random weights."""
    from tiny import write_pipeline

    folder = tmp_path_factory.mktemp("models") / "tiny-edit"
    torch.manual_seed(2)
    write_pipeline(folder, in_channels=8)
    return folder


@pytest.fixture(scope="session")
def tiny_controlnets(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two ControlNets with random weights that fit `tiny_model`."""
    from tiny import write_controlnet

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("models")
    for name in ("one", "two"):
        write_controlnet(folder / name, base=tiny_model)
    return folder / "one", folder / "two"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    command = [sys.executable, str(Path(__file__).with_name("s3_server.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        server.communicate()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3:
    """An S3 server that this test's processes use by their environment."""
    found = S3(s3_server)
    found.fails()  # no more
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": S3.secret,
        "AWS_REGION": "us-east-1",
        "T2VZ_WORKSPACE": str(tmp_path / "workspace"),
        "T2VZ_CACHE_DIR": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    return found
