"""A fleet for tests: a Prefect server with all its services, process workers, and states waited for."""

from __future__ import annotations

import contextvars
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    temporary_settings,
)

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
T = TypeVar("T")

# Everything that a server does now and then, often: tests wait for it.
_SERVER = {
    "PREFECT_UI_ENABLED": "false",
    "PREFECT_SERVER_UI_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1",
    "PREFECT_SERVER_SERVICES_SCHEDULER_MAX_RUNS": "3",
    "PREFECT_SERVER_SERVICES_SCHEDULER_MIN_RUNS": "1",
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_LOOP_SECONDS": "1",
    "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT1S",
}
_WORKER = {
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "PREFECT_WORKER_PREFETCH_SECONDS": "1",
    "PREFECT_CLIENT_MAX_RETRIES": "2",
}


def environment(api: str, **more: str) -> dict[str, str]:
    return {**os.environ, **_WORKER, "PREFECT_API_URL": api, "PYTHONUNBUFFERED": "1", **more}


@contextmanager
def server(home: Path, **more: str) -> Iterator[tuple[str, int]]:
    """A server, with a database of its own if `more` of its environment names none; the URL of its API, its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = (home / "server.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, **_SERVER, "PREFECT_HOME": str(home), "PREFECT_SERVER_API_PORT": str(port), **more},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    api = f"http://127.0.0.1:{port}/api"
    try:
        await_(lambda: _answers(api), 120, alive=process)
        yield api, process.pid
    finally:
        kill_group(process)
        log.close()


@contextmanager
def using(api: str) -> Iterator[None]:
    """This thread's flows and clients use the server; what sends their events and logs, too, for as long."""
    _forget_senders()
    with temporary_settings({PREFECT_API_URL: api, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield
        _forget_senders()


def _forget_senders() -> None:
    """They are one a process, and stay with the server that they began with."""
    APILogWorker.drain_all(timeout=10)
    EventsWorker.drain_all(timeout=10)


def in_background(what: Callable[[], Any]) -> threading.Thread:
    """A started thread that uses the same server as this one."""
    thread = threading.Thread(target=contextvars.copy_context().run, args=(what,), daemon=True)
    thread.start()
    return thread


def _answers(api: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def deploy(entrypoint: str, name: str, pool: str, **options: Any) -> Any:
    """Make a deployment of the flow at `entrypoint` in a process work pool; its id. entrypoint: of a module, or of a
    file in this folder: a worker copies the whole of a file's folder for each run, which must not be the project's with
    the environment in it."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.flows import load_flow_from_entrypoint
    from prefect.utilities.callables import parameter_schema

    flow = load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False) if ":" not in entrypoint else None
    flow_name = options.pop("flow_name", "render-manifest") if flow is None else flow.name
    with get_client(sync_client=True) as client:
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        flow_id = client.create_flow_from_name(flow_name)
        if flow is not None:
            options["parameter_openapi_schema"] = parameter_schema(flow).model_dump()
        return client.create_deployment(
            flow_id, name, entrypoint=entrypoint, path=str(HERE), work_pool_name=pool, **options
        )


class Worker:
    """A process worker of a pool, in a process group of its own: a machine."""

    def __init__(self, api: str, pool: str, name: str, log: Path, limit: int = 1, **env: str) -> None:
        self.name, self.log = name, log
        self._file = log.open("ab")
        start = ["worker", "start", "--pool", pool, "--type", "process", "--name", name, "--limit", str(limit)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *start],
            env=environment(api, **env),
            cwd=ROOT,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def descendants(self) -> list[int]:
        """Ids of the processes below the worker: what it has started and they have."""
        children: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rsplit(")", 1)[1].split()
            except (OSError, IndexError):
                continue
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
        found, todo = [], [self.process.pid]
        while todo:
            below = children.get(todo.pop(), [])
            found += below
            todo += below
        return found

    def stop(self) -> None:
        """At once, with all that it started, as a machine that loses its power."""
        for pid in [*self.descendants(), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        self._file.close()


def is_running(pid: int) -> bool:
    """False for a process that is gone, and for a dead one that nobody has asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def await_(what: Callable[[], T], seconds: float = 90, *, alive: Any = None) -> T:
    """Return the first value of `what` that is true."""
    deadline = time.monotonic() + seconds
    while True:
        value = what()
        if value:
            return value
        assert alive is None or alive.poll() is None, "it has ended"
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def run_of(id: Any) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(id)


def await_state(id: Any, *names: str, seconds: float = 90) -> FlowRun:
    """The run, once it is in a state of one of these names."""

    def there() -> FlowRun | None:
        run = run_of(id)
        return run if run.state is not None and run.state.name in names else None

    try:
        return await_(there, seconds)
    except AssertionError:
        raise AssertionError(f"{run_of(id).state!r} is not in {names}") from None


def kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
