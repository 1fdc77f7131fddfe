"""The rules of the house: who may import whom, what starts quickly, what is documented."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "diffusers", "transformers", "controlnet_aux", "decord", "accelerate", "prefect", "cv2", "ray")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )


def test_the_layers_hold():
    ran = python("-c", "import sys; from importlinter.cli import lint_imports_command as c; sys.exit(c())")
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize(
    "module",
    [
        *(
            "spec",
            "manifest",
            "plan",
            "results",
            "cli",
            "errors",
            "events",
            "clip",
            "render",
            "window",
            "workers",
            "ray_workers",
        ),
        *("conditions", "models.table"),
    ],
)
def test_light_modules_import_nothing_heavy(module):
    code = f"import sys, t2vz.{module}; print([name for name in {HEAVY} if name in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


def test_every_package_is_in_the_wheel():
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "t2vz").rglob("__init__.py")}
    assert found | {"t2vz_flows"} == declared
