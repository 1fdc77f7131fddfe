"""Fixtures that several test folders share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tests' own cache of the embedded models, and no hub: nothing outside is read or written."""
    folder = tmp_path_factory.mktemp("cache")
    before = {name: os.environ.get(name) for name in ("T2VZ_CACHE", "HF_HUB_OFFLINE", "HF_HUB_CACHE")}
    os.environ.update(T2VZ_CACHE=str(folder), HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(folder / "hub"))
    yield folder
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a tiny Stable Diffusion with random weights."""
    from t2vz.models.mini import write_pipeline

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(1)
    write_pipeline(folder, in_channels=4)
    return folder


@pytest.fixture(scope="session")
def tiny_edit_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a tiny InstructPix2Pix with random weights."""
    from t2vz.models.mini import write_pipeline

    folder = tmp_path_factory.mktemp("models") / "tiny-edit"
    torch.manual_seed(2)
    write_pipeline(folder, in_channels=8)
    return folder


@pytest.fixture(scope="session")
def tiny_controlnets(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two ControlNets with random weights that fit `tiny_model`."""
    from t2vz.models.mini import write_controlnet

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("models")
    for name in ("one", "two"):
        write_controlnet(folder / name, base=tiny_model)
    return folder / "one", folder / "two"
