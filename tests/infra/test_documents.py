"""The commands in README.md and RUNBOOK.md: those of t2vz and Prefect are parsed by these, some are run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from t2vz.cli import cli, main
from t2vz.errors import T2VZError

DOCUMENTS = ("README.md", "RUNBOOK.md")
# Programs of the host, of which only the names are known here.
FOREIGN = {"accelerate", "cp", "curl", "df", "dmesg", "du", "export", "kubectl", "nvidia-smi", "pip", "promtool", "set"}


def commands(infra: Path) -> list[list[str]]:
    """Each line of the documents' shell blocks as words, what goes before the program proper (env, exec) removed."""
    found = []
    for name in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", (infra / name).read_text(), re.S):
            for line in block.splitlines():
                words = shlex.split(line)
                if words[:2] == ["env", "--unset"]:
                    words = words[3:]
                found.append(words)
    return found


def inside(words: list[str]) -> list[str]:
    """The command that a `docker compose exec` or `kubectl exec` runs inside; the command itself if it is neither."""
    if words[0] == "docker" and "exec" in words:
        return words[words.index("exec") + 2 :]
    if words[0] == "kubectl" and "exec" in words:
        return words[words.index("--") + 1 :]
    return words


def of(program: str, infra: Path) -> list[list[str]]:
    inner = [inside(words) for words in commands(infra)]
    return [words[1:] for words in inner if words[0] == program]


def test_only_programs_that_are_known(infra: Path) -> None:
    programs = {inside(words)[0] for words in commands(infra)}
    assert programs <= FOREIGN | {"t2vz", "prefect", "ray", "docker", "psql", "pg_dump", "pg_restore"}


def test_t2vz_knows_its_commands(infra: Path) -> None:
    found = of("t2vz", infra)
    found += [shlex.split(text) for name in DOCUMENTS for text in re.findall(
        r"`t2vz ((?:plan|run|results) [A-Z][^`]+)`", (infra / name).read_text())]  # fmt: skip
    assert len(found) >= 10
    for name, *arguments in found:
        command = cli.commands[name]
        with command.make_context(name, list(arguments)) as context:  # raises for unknown options and bad values
            assert isinstance(context, click.Context)


def test_ray_knows_its_commands(infra: Path) -> None:
    scripts = pytest.importorskip("ray.scripts.scripts", reason="Ray is not installed: pip install 't2vz[ray]'")
    found = of("ray", infra)
    assert len(found) >= 2
    for name, *arguments in found:
        with scripts.cli.commands[name].make_context(name, list(arguments)) as context:
            assert isinstance(context, click.Context)


def test_defaults_name_columns(infra: Path) -> None:
    from t2vz.spec import JobSpec

    for words in of("t2vz", infra):
        for option, value in pairwise(words):
            if option == "--default":
                assert value.partition("=")[0] in JobSpec.model_fields


# Prefect's own command line, one command after the other in one process: starting it takes seconds.
RUN_ALL = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from prefect.cli import app

told = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["prefect", *words]
    code, shown = 0, io.StringIO()
    with redirect_stdout(shown), redirect_stderr(shown):
        try:
            app()
        except SystemExit as end:
            code = end.code or 0
    told.append((words, code, shown.getvalue()))
print(json.dumps(told))
"""


def test_prefect_knows_its_commands(infra: Path, prefect_api: str) -> None:
    """What harms nothing is run, against an empty server; of the others the options are looked up."""
    pools = [["work-pool", "create", pool, "--type", "process"] for pool in ("t2vz-gpu", "t2vz-control")]
    run = (["work-pool", "pause"], ["work-pool", "resume"], ["flow-run", "ls"])
    asked = list(pools)
    options = []
    for words in of("prefect", infra):
        if words[0] == "--no-prompt":
            words = words[1:]
        if words[:2] in run:
            asked.append(words)
        elif words not in pools:
            depth = {"deploy": 1, "server": 3 if words[1] == "database" else 2}.get(words[0], 2)
            asked.append([*words[:depth], "--help"])
            options.append((len(asked) - 1, [word for word in words if word.startswith("--")]))
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(asked)],
        capture_output=True,
        text=True,
        env={**os.environ, "PREFECT_API_URL": prefect_api, "COLUMNS": "200"},
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert not [one for one in told if one[1]]
    assert len(told) >= 12
    for at, named in options:
        missing = [option for option in named if option not in told[at][2]]
        assert not missing, told[at]


def test_docker_commands_name_services_that_exist(infra: Path) -> None:
    services = yaml.safe_load((infra / "compose.yaml").read_text())["services"]
    profiles = {profile for service in services.values() for profile in service.get("profiles", ())}
    seen = 0
    for words in commands(infra):
        if words[0] != "docker":
            continue
        assert words[:4] == ["docker", "compose", "--file", "infra/compose.yaml"]
        rest = words[4:]
        if rest[0] == "--profile":
            assert rest[1] in profiles
            rest = rest[2:]
        if rest[0] == "exec":
            assert rest[1] in services
        if rest[0] in ("stop", "logs"):
            named = [word for word in rest[1:] if not word.startswith("--") and not word.isdigit()]
            assert set(named) <= set(services)
        seen += 1
    assert seen >= 8


def test_the_files_that_are_named_exist(infra: Path) -> None:
    for name in DOCUMENTS:
        for path in re.findall(r"\binfra/[\w./-]+\w", (infra / name).read_text()):
            if path not in ("infra/.env", "infra/kubernetes/secrets.env", "infra/prefect.yaml"):
                assert (infra.parent / path).exists(), (name, path)


def test_every_error_has_its_line_in_the_runbook(infra: Path) -> None:
    def leaves(kind: type[T2VZError]) -> list[type[T2VZError]]:
        return [kind] if not kind.__subclasses__() else [leaf for sub in kind.__subclasses__() for leaf in leaves(sub)]

    text = (infra / "RUNBOOK.md").read_text()
    # An EncodeError says itself what is wrong with the row's options.
    missing = {kind.__name__ for kind in leaves(T2VZError)} - set(re.findall(r"`(\w+)`", text)) - {"EncodeError"}
    assert not missing


def test_failed_rows_are_found_as_the_runbook_says(tmp_path: Path) -> None:
    from datetime import UTC, datetime

    from t2vz.results import ResultRow, ResultStore

    now = datetime.now(UTC)
    ResultStore(tmp_path).commit(
        ResultRow(job_id="a", run_id="r", id="deer", status="failed", error_stage="decode", error_class="SourceMissing",
                  error_message="deer.mp4: no such file", retryable=False, started_at=now, finished_at=now)
    )  # fmt: skip
    told = CliRunner().invoke(cli, ["results", str(tmp_path), "--status", "failed", "--json"], standalone_mode=False)
    (row,) = json.loads(told.stdout)
    assert (row["error_class"], row["retryable"]) == ("SourceMissing", False)
    assert main(["results", str(tmp_path), "--export", str(tmp_path / "results.parquet")]) == 0
