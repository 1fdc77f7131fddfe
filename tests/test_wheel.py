"""An installed wheel works outside the clone: the command, the flow, the embedded model."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is unpacked, as pip would do it. Built in the present environment: no network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    source = folder / "source"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(source)], check=True)
    for changed in ("t2vz", "flows", "pyproject.toml"):  # the working tree's, committed or not
        subprocess.run(["cp", "-r", str(ROOT / changed), str(source)], check=True)
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_wheel_carries_the_packages_and_nothing_else(installed):
    assert sorted(p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")) == ["t2vz", "t2vz_flows"]
    assert (installed / "t2vz" / "py.typed").is_file()


def test_a_run_from_the_wheel(installed, tmp_path):
    (tmp_path / "manifest.csv").write_text(
        "id,prompt,width,height,video_length,num_inference_steps\none,a red ball,64,64,2,3\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed), "PREFECT_HOME": str(tmp_path / "prefect")}
    where = "import t2vz, t2vz_flows; print(t2vz.__file__, t2vz_flows.__file__)"
    places = subprocess.run(
        [sys.executable, "-c", where], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert places.stdout.count(str(installed)) == 2
    run = "from t2vz.cli import main; import sys; sys.exit(main(['run', 'manifest.csv', '--out', 'out']))"
    ran = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert "1 rendered" in ran.stdout
    assert len(list((tmp_path / "out" / "videos").glob("one-*.mp4"))) == 1
