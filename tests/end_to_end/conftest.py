"""`t2vz` in this process: the command line, the flow, a Prefect server, the stages and the model mini, all real."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

from t2vz.results import ResultRow, read


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


@pytest.fixture(scope="session")
def manifest(write_manifest: Callable[..., Path]) -> Callable[..., Path]:
    return write_manifest


def leftovers(out: Path) -> list[str]:
    """What lies in the output folder beside finished videos, the table and what keeps two runs apart."""
    named = {Path(row.output_uri).name for row in read(out) if row.output_uri}
    strays = [path for path in (out / "videos").iterdir() if path.name not in named]
    strays += [path for path in (out / ".work").iterdir() if path.name not in ("sweep.lock", "snapshots")]
    strays += (out / ".work" / "snapshots").glob("*")
    return [str(path.relative_to(out)) for path in strays]


@pytest.fixture(scope="session", name="leftovers")
def _leftovers() -> Callable[[Path], list[str]]:
    return leftovers
