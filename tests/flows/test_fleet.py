"""What the deployments promise, with a real server and worker: schedules, limits, cancellation, crashes, the docs' commands.

Stages that only take time stand in for rendering, except where what is cancelled is rendering itself.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from fleet import Worker, await_, await_state, deploy, is_running
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.states import Cancelling

from t2vz.results import read

Write = Callable[..., Path]
STUB = "tests/flows/stub_stages.py:render_manifest"
REAL = "t2vz_flows.render_manifest.render_manifest"
SLOW_ROW = {"num_inference_steps": "900", "video_length": "64"}


@pytest.fixture(autouse=True)
def _server(fleet_api: str) -> None:
    pass


@pytest.fixture
def pool(tmp_path: Path) -> str:
    return f"pool-{tmp_path.name}"


def given(manifest: Path, **more: Any) -> dict[str, Any]:
    out = str(manifest.parent / "out")
    return {"parameters": {"manifest": str(manifest), "out": out, "device": "cpu", "in_flight": 1, **more}}


def start(deployment: UUID, parameters: dict[str, Any]) -> UUID:
    with get_client(sync_client=True) as client:
        return client.create_flow_run_from_deployment(deployment, parameters=parameters).id


def set_state(run: UUID, state: Any) -> None:
    """As the UI does it."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run, state)


def begun(out: Path) -> list[str]:
    path = out / "begun.txt"
    return path.read_text().split()[::2] if path.exists() else []


def leftovers(out: Path) -> list[str]:
    return [path.name for path in (out / ".work").iterdir() if path.name != "sweep.lock"]


def test_a_schedule_starts_runs_by_itself(
    manifest: Write, pool: str, worker: Callable[..., Worker], tmp_path: Path
) -> None:
    every = DeploymentScheduleCreate(schedule=IntervalSchedule(interval=timedelta(seconds=1)), active=True)
    id = deploy(STUB, pool, pool, schedules=[every], parameters=given(manifest({"id": "one"})))
    worker(pool)
    await_(lambda: (tmp_path / "out" / "results").is_dir())
    with get_client(sync_client=True) as client:
        client.pause_deployment(id)
        await_(lambda: [row.id for row in read(tmp_path / "out") if row.status == "ok"] == ["one"])
        which = DeploymentFilter(id=DeploymentFilterId(any_=[id]))
        runs = client.read_flow_runs(deployment_filter=which)
    assert all(run.auto_scheduled for run in runs)
    assert begun(tmp_path / "out") == ["one"]  # the runs after the first found it done


def test_a_run_waits_for_another_of_its_deployment_or_is_let_go(
    manifest: Write, pool: str, worker: Callable[..., Worker], tmp_path: Path
) -> None:
    limits = {
        name: deploy(STUB, f"{pool}-{name}", pool, concurrency_limit=1,
                     concurrency_options=ConcurrencyLimitConfig(limit=1, collision_strategy=name))
        for name in ("ENQUEUE", "CANCEL_NEW")
    }  # fmt: skip
    worker(pool, STUB_STEP_S="0.5")
    assert limits


@pytest.mark.parametrize("what", ["stub", pytest.param("real", marks=pytest.mark.slow)])
def test_cancelling_ends_the_work_and_leaves_nothing(
    manifest: Write, pool: str, worker: Callable[..., Worker], tmp_path: Path, what: str
) -> None:
    out = tmp_path / "out"
    id = deploy(STUB if what == "stub" else REAL, pool, pool)
    machine = worker(pool, STUB_STEP_S="1000")
    path = manifest(*({"id": f"r{i}", **SLOW_ROW} for i in range(3)))
    run = start(id, given(path, in_flight=2))
    if what == "stub":
        await_(lambda: begun(out))
    else:
        await_state(run, "Running")
        await_(lambda: list(out.glob(".work/*/*/")), 120)
        time.sleep(15)  # into the middle of denoising, which nothing outside shows
    processes = machine.descendants()
    assert processes
    asked_at = time.monotonic()
    set_state(run, Cancelling())
    await_(lambda: not any(map(is_running, processes)), 40)
    took_s = time.monotonic() - asked_at
    await_state(run, "Cancelled", seconds=30)
    print(f"cancelled within {took_s:.1f} s")
    assert took_s < 15
    assert machine.process.poll() is None  # the worker itself takes the next run
    assert list((out / "videos").iterdir()) == []
    assert leftovers(out) == []
