"""`t2vz` in this process: the command line, the flow, a Prefect server, the stages and the model mini, all real."""

from __future__ import annotations

import csv
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from t2vz.results import ResultRow, read

TINY = {"width": 64, "height": 64, "video_length": 2, "num_inference_steps": 3, "guidance_scale": 1}


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code, standard output, standard error, and the rows by their ids."""

    code: int
    told: str
    log: str
    out: Path

    @property
    def rows(self) -> dict[str, ResultRow]:
        found = list(read(self.out))
        assert len({row.id for row in found}) == len(found), "a manifest row has two current results"
        return {row.id: row for row in found}


@pytest.fixture(scope="session")
def t2vz(prefect_api: str) -> Callable[..., Ran]:
    """Runs `t2vz COMMAND MANIFEST --out OUT …` in this process."""
    from t2vz.cli import main

    def run(command: str, manifest: Path, out: Path, *options: str) -> Ran:
        told, log = StringIO(), StringIO()
        device = ["--device", "cpu"] if command == "run" else []
        with redirect_stdout(told), redirect_stderr(log):
            code = main([command, str(manifest), "--out", str(out), *device, *options])
        return Ran(code, told.getvalue(), log.getvalue(), out)

    return run


def write_manifest(path: Path, *rows: dict[str, Any]) -> Path:
    """A manifest of these rows; tiny ones where they don't say otherwise (None leaves a cell empty)."""
    full = [{"prompt": "a boat", **TINY, **row} for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, sorted({column for row in full for column in row}))
        writer.writeheader()
        writer.writerows(full)
    return path


@pytest.fixture(scope="session")
def manifest() -> Callable[..., Path]:
    return write_manifest


def leftovers(out: Path) -> list[str]:
    """What lies in the output folder beside finished videos, the table and what keeps two runs apart."""
    named = {Path(row.output_uri).name for row in read(out) if row.output_uri}
    strays = [path for path in (out / "videos").iterdir() if path.name not in named]
    strays += [path for path in (out / ".work").iterdir() if path.name != "sweep.lock"]
    return [str(path.relative_to(out)) for path in strays]


@pytest.fixture(scope="session", name="leftovers")
def _leftovers() -> Callable[[Path], list[str]]:
    return leftovers
