"""The files that set up Prefect, accelerate and pip, held against the releases that are installed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def settings_in(path: Path) -> dict[str, str]:
    lines = [line.strip() for line in path.read_text().splitlines()]
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_every_prefect_setting_exists(infra: Path) -> None:
    from prefect.settings import Settings
    from prefect.settings.legacy import _get_settings_fields

    names = set(settings_in(infra / "prefect.env"))
    assert names - {"DO_NOT_TRACK"} <= set(_get_settings_fields(Settings))


def test_prefect_takes_the_settings_as_meant(infra: Path) -> None:
    told = (
        "from prefect.settings import get_current_settings as current; s = current(); "
        "services = s.server.services; recorder = services.task_run_recorder; "
        "print(recorder.batch_size, recorder.read_batch_size, recorder.flush_interval, s.server.ui.v2_enabled, "
        "s.server.analytics_enabled, s.flows.heartbeat_frequency, s.logging.extra_loggers, "
        "s.server.events.retention_period.days, services.db_vacuum.retention_period.days, "
        "sorted(services.db_vacuum.enabled_vacuum_types), s.results.persist_by_default)"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-c", told],
        capture_output=True,
        text=True,
        check=True,
        env={**clean, "PREFECT_HOME": os.environ["PREFECT_HOME"], **settings_in(infra / "prefect.env")},
    )
    assert done.stdout.strip() == ("200 50 1.0 False False 30 ['t2vz'] 3 30 ['events', 'flow_runs', 'orphans'] False")


@pytest.mark.parametrize(
    ("name", "processes", "distributed"),
    [("one_gpu", 1, "NO"), ("n_gpus", 2, "MULTI_GPU"), ("machines", 4, "MULTI_GPU"), ("cpu", 2, "MULTI_GPU")],
)
def test_accelerate_loads_its_files(infra: Path, name: str, processes: int, distributed: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(infra / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == processes
    assert config.distributed_type == distributed
    assert config.mixed_precision == "no"


@pytest.mark.parametrize("machines", [1, 2])
def test_accelerate_launches_processes_that_find_each_other(infra: Path, tmp_path: Path, machines: int) -> None:
    """On the CPU, in place of GPUs; the two machines are this one, twice."""
    script = tmp_path / "who.py"
    script.write_text(
        "import os\n"
        "from accelerate import PartialState\n"
        "from accelerate.utils import gather_object\n"
        "state = PartialState(cpu=True)\n"
        "everyone = gather_object([state.process_index])\n"
        "if state.is_main_process:\n"
        "    print('processes', everyone, state.device, flush=True)\n"
        "os._exit(0)\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    name = "cpu" if machines == 1 else "machines"
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        infra / "accelerate" / f"{name}.yaml",
    ]
    own = [[], []] if machines == 1 else [["--machine_rank", rank, "--main_process_port", port] for rank in (0, 1)]
    launched = [
        subprocess.Popen(
            [*map(str, launch), "--num_processes", "2", *map(str, own[rank]), str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(machines)
    ]
    told = [process.communicate(timeout=200) for process in launched]
    assert "processes [0, 1] cpu" in told[0][0], told


def constraints(infra: Path) -> dict[str, Requirement]:
    lines = [line.split("#")[0].strip() for line in (infra / "constraints.txt").read_text().splitlines()]
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(one.name): one for one in found}


def test_what_is_installed_satisfies_the_constraints(infra: Path) -> None:
    installed = {canonicalize_name(one.metadata["Name"]): one.version for one in distributions()}
    wrong = {
        str(one): installed[name]
        for name, one in constraints(infra).items()
        if name in installed and not one.specifier.contains(installed[name], prereleases=True)
    }
    assert not wrong


def test_every_dependency_has_a_constraint_and_no_constraint_is_left_over(infra: Path) -> None:
    import tomllib

    project = tomllib.loads((infra.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    declared = {
        canonicalize_name(Requirement(line).name)
        for lines in (project["dependencies"], *extras)
        for line in lines
        if not line.startswith("t2vz")
    }
    constrained = set(constraints(infra))
    # Old and not likely to change: what there is of them is what was tested.
    assert declared - constrained <= {"decord", "matplotlib", "pytest-timeout"}
    assert constrained <= declared


def test_every_dependency_is_installed(infra: Path) -> None:
    import tomllib

    project = tomllib.loads((infra.parent / "pyproject.toml").read_text())["project"]
    for line in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            assert requirement.specifier.contains(version(requirement.name), prereleases=True), line
        except PackageNotFoundError:
            pytest.fail(f"{requirement.name} is declared, but not installed: make setup")
