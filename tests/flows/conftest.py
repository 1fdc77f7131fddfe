from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from fleet import Worker, server, using
from postgres import binaries, postgres


@pytest.fixture
def manifest(write_manifest: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes a manifest with the given rows, small ones where they don't say otherwise."""

    def write(*rows: dict[str, str], name: str = "manifest.csv") -> Path:
        return write_manifest(tmp_path / name, *rows)

    return write


@pytest.fixture(scope="session")
def fleet_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that has what `prefect_api`'s has not: schedules, automations, late runs; on PostgreSQL where
    that is installed."""
    with ExitStack() as open:
        database = {}
        if binaries() is not None:
            url, _ = open.enter_context(postgres(tmp_path_factory.mktemp("postgres")))
            database = {"PREFECT_API_DATABASE_CONNECTION_URL": url}
        api, _ = open.enter_context(server(tmp_path_factory.mktemp("prefect-server"), **database))
        yield api


@pytest.fixture
def fleet_api(fleet_server: str) -> Iterator[str]:
    """That server's URL; the test's flows and clients use it."""
    with using(fleet_server):
        yield fleet_server


@pytest.fixture
def worker(fleet_server: str, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Starts a worker of a pool."""
    started: list[Worker] = []

    def start(pool: str, name: str = "machine", limit: int = 1, **env: str) -> Worker:
        started.append(Worker(fleet_server, pool, name, tmp_path / f"{name}.log", limit, **env))
        return started[-1]

    yield start
    for one in started:
        one.stop()
