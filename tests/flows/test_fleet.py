"""What deployments promise, with a real server and worker: schedules, limits, cancellation, crashes, docs' commands.

Stages that only take time stand in for rendering, except where what is cancelled is rendering itself.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from fleet import ROOT, Worker, await_, await_state, deploy, environment, is_running, run_of
from prefect import flow, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId, FlowRunFilter
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.events import emit_event
from prefect.exceptions import ObjectAlreadyExists
from prefect.flows import load_flow_from_entrypoint
from prefect.states import Cancelling, Crashed, Failed, Running

from t2vz.render import Settings, opening
from t2vz.results import read
from t2vz_flows.lifecycle import given_up
from t2vz_flows.render_library import LibraryParameters
from t2vz_flows.submit_shards import ShardParameters

Write = Callable[..., Path]
STUB = "stub_stages.py:render_manifest"
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


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ENQUEUE", "CANCEL_NEW"])
def test_a_second_run_of_a_deployment_waits_or_is_let_go(
    manifest: Write, pool: str, worker: Callable[..., Worker], tmp_path: Path, strategy: str
) -> None:
    id = deploy(STUB, pool, pool, concurrency_limit=1, concurrency_options={"collision_strategy": strategy})
    worker(pool, limit=2, STUB_STEP_S="1000")
    first = start(id, given(manifest({"id": "first"}, name="first.csv")))
    await_(lambda: begun(tmp_path / "out"))
    second = start(id, given(manifest({"id": "second"}, name="second.csv")))
    await_state(second, "AwaitingConcurrencySlot" if strategy == "ENQUEUE" else "Cancelled")
    assert begun(tmp_path / "out") == ["first"]
    if strategy == "ENQUEUE":
        set_state(first, Cancelling())
        await_(lambda: begun(tmp_path / "out") == ["first", "second"])


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
    assert took_s < 15, took_s
    assert machine.process.poll() is None  # the worker itself takes the next run
    assert list((out / "videos").iterdir()) == []
    # A process that had to end in the middle of a step could not tidy up; the next run does it, before all else.
    with opening(Settings(out, str(path), "the-next-run")):
        assert sorted(leftovers(out)) == ["the-next-run", "the-next-run.run"]
    assert leftovers(out) == []


@pytest.mark.slow
def test_what_was_cancelled_is_done_by_the_next_run(
    manifest: Write, pool: str, worker: Callable[..., Worker], tmp_path: Path
) -> None:
    out, path = tmp_path / "out", manifest(*({"id": f"r{i}"} for i in range(3)))
    id = deploy(STUB, pool, pool)
    worker(pool, STUB_STEP_S="0.3")
    run = start(id, given(path))
    await_(lambda: len(begun(out)) == 2)
    set_state(run, Cancelling())
    await_state(run, "Cancelled")
    assert [row.id for row in read(out)] == ["r0"]
    assert leftovers(out) == []
    await_state(start(id, given(path)), "Completed")
    assert sorted(row.id for row in read(out) if row.status == "ok") == ["r0", "r1", "r2"]
    assert begun(out) == ["r0", "r1", "r1", "r2"]


@pytest.mark.slow
def test_a_cancelled_submitter_cancels_its_shards(
    manifest: Write, pool: str, worker: Callable[..., Worker], tmp_path: Path
) -> None:
    deploy(STUB, pool, pool)  # no worker takes its runs
    control = f"{pool}-control"
    submitter = deploy("t2vz_flows.submit_shards.submit_shards", control, control)
    worker(control)
    more = {"deployment": f"render-manifest/{pool}", "shard_rows": 1}
    out = tmp_path / "out"
    run = start(
        submitter, {"parameters": {"manifest": str(manifest({"id": "a"}, {"id": "b"})), "out": str(out), **more}}
    )

    def shards() -> list[Any]:
        with get_client(sync_client=True) as client:
            runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id={"any_": [run]}))
        return [one.state.name for one in runs]

    await_(lambda: len(shards()) == 2)
    set_state(run, Cancelling())
    await_state(run, "Cancelled")
    await_(lambda: shards() == ["Cancelled", "Cancelled"])
    assert leftovers(out) == []


@pytest.fixture
def automation(fleet_api: str, tmp_path: Path) -> Iterator[Callable[[str, int], None]]:
    """Makes the one of infra/automations.yaml that has a word in its name, with another time to wait."""

    def make(word: str, within_s: int) -> None:
        every = yaml.safe_load((ROOT / "infra" / "automations.yaml").read_text())["automations"]
        (one,) = (one for one in every if word in one["name"].split())
        assert one["trigger"]["within"] > within_s
        one["trigger"]["within"] = within_s
        path = tmp_path / "automation.yaml"
        path.write_text(yaml.safe_dump(one))
        prefect("automation", "create", "--from-file", str(path), api=fleet_api)

    yield make
    forget_automations()


def forget_automations() -> None:
    """They are about all runs of the server, also those of the tests that follow."""
    with get_client(sync_client=True) as client:
        for one in client.read_automations():
            client.delete_automation(one.id)


def prefect(*arguments: str, api: str) -> str:
    """Run the command line; what it says."""
    ran = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        cwd=ROOT,
        env=environment(api, COLUMNS="200"),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_a_crashed_run_is_scheduled_again(pool: str, automation: Callable[[str, int], None]) -> None:
    automation("again", 10)
    runs = [start(deploy(STUB, f"{pool}-{tag}", pool, tags=[tag]), {}) for tag in ("retry-crashed", "other")]
    for state in (Running(), Crashed()):
        for run in runs:
            set_state(run, state)
    await_state(runs[0], "AwaitingRetry")
    assert run_of(runs[1]).state.name == "Crashed"


@pytest.mark.slow
def test_a_crashed_run_is_started_again_and_goes_on(
    manifest: Write,
    pool: str,
    worker: Callable[..., Worker],
    automation: Callable[[str, int], None],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    automation("again", 20)
    id = deploy(STUB, pool, pool, tags=["retry-crashed"])
    machine = worker(pool, STUB_STEP_S="0.2")
    run = start(id, given(manifest({"id": "a"}, {"id": "b"})))
    await_(lambda: begun(out) == ["a", "b"])
    for pid in machine.descendants():
        os.kill(pid, signal.SIGKILL)
    await_state(run, "Completed")
    assert machine.process.poll() is None
    assert run_of(run).run_count == 2
    assert begun(out) == ["a", "b", "b"]
    with get_client(sync_client=True) as client:
        names = [state.name for state in client.read_flow_run_states(run)]
    assert "Crashed" in names
    assert "AwaitingRetry" in names


def test_a_silent_run_is_taken_for_crashed(automation: Callable[[str, int], None]) -> None:
    automation("silent", 10)  # Prefect's least

    @flow(name="of a machine that is gone")
    def gone() -> None:
        pass

    with get_client(sync_client=True) as client:
        run = client.create_flow_run(gone, state=Running()).id
    emit_event(event="prefect.flow-run.heartbeat", resource={"prefect.resource.id": f"prefect.flow-run.{run}"})
    assert "no heartbeat" in str(await_state(run, "Crashed").state.message)


def test_a_run_that_crashes_again_and_again_is_given_up() -> None:
    ends: list[Any] = []

    @flow(name="crashes again and again", retries=1)
    def crashing() -> None:
        id = runtime.flow_run.id
        ends.append(given_up())
        if runtime.flow_run.run_count == 1:
            raise RuntimeError("to be begun a second time")
        with get_client(sync_client=True) as client:

            def been(*states: Any) -> None:
                for state in states:
                    client.set_flow_run_state(id, state, force=True)

            been(*[Crashed(), Running()] * 4)
            ends.append(given_up())
            been(Crashed(), Running())
            ends.append(given_up())
            been(Failed(), Running(), Crashed(), Running())  # it was begun anew by hand
            ends.append(given_up())

    crashing()
    assert [None if end is None else end.name for end in ends] == [None, None, None, "Failed", None]
    assert "crashed 5 times" in ends[3].message


def blocks(kind: str) -> list[str]:
    """The commands of the README's blocks of a kind."""
    text = (ROOT / "flows" / "README.md").read_text()
    return [line for block in re.findall(rf"```sh {kind}\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


def said(line: str, api: str) -> str:
    program, *arguments = shlex.split(line)
    assert program == "prefect"
    return prefect(*arguments, api=api)


def test_the_deployments_are_accepted_and_lead_to_flows(fleet_api: str) -> None:
    with get_client(sync_client=True) as client:
        for name in ("t2vz-gpu", "t2vz-control"):
            with suppress(ObjectAlreadyExists):
                client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        (line,) = (line for line in blocks("setup") if "deploy" in line)
        said(line, fleet_api)
        made = {f"{client.read_flow(one.flow_id).name}/{one.name}": one for one in client.read_deployments()}
    for name, pool in (
        ("render-manifest/manual", "t2vz-gpu"),
        ("render-manifest/shard", "t2vz-gpu"),
        ("render-library/watched", "t2vz-gpu"),
        ("submit-shards/fleet", "t2vz-control"),
        ("maintain/weekly", "t2vz-control"),
    ):
        assert made[name].work_pool_name == pool
        assert not made[name].pull_steps
        assert load_flow_from_entrypoint(str(made[name].entrypoint)).name == name.split("/")[0]
    watched = made["render-library/watched"]
    LibraryParameters.model_validate(watched.parameters["parameters"])
    assert ShardParameters.model_fields["deployment"].default in made


@pytest.mark.slow
def test_the_documented_commands_do_what_they_say(
    manifest: Write, worker: Callable[..., Worker], fleet_api: str, tmp_path: Path
) -> None:
    for line in blocks("setup"):
        said(line, fleet_api)
    for line in (*blocks("schedules"), *blocks("library"), *blocks("shards")):
        said(line, fleet_api)
    with get_client(sync_client=True) as client:
        made = {f"{client.read_flow(one.flow_id).name}/{one.name}": one for one in client.read_deployments()}
        watched = made["render-library/watched"]
        assert {str(one.slug) for one in watched.schedules} >= {"nightly", "quarter-hourly"}
        assert len(watched.schedules) == 3
        assert not any(one.active for one in watched.schedules)  # paused by the last of the commands
        assert watched.global_concurrency_limit is not None
        assert watched.global_concurrency_limit.limit == 1
        assert "retry-crashed" in made["render-manifest/manual"].tags
        assert "retry-crashed" not in made["render-manifest/shard"].tags
        for name in ("render-manifest/manual", "render-manifest/shard", "submit-shards/fleet"):
            assert made[name].parameter_openapi_schema["definitions"], name
        assert made["submit-shards/fleet"].work_pool_name == "t2vz-control"
        # Runs of the example's folders, which are not here, are not wanted.
        for run in client.read_flow_runs():
            if run.deployment_id in (made["render-library/watched"].id, made["submit-shards/fleet"].id):
                client.delete_flow_run(run.id)

        assert len(client.read_automations()) == 2

    # A worker as documented, and a real run of the first example, with the embedded model.
    (gpu, control) = blocks("worker")
    assert "prefect worker start --pool t2vz-gpu --limit 1" in gpu
    assert "prefect worker start --pool t2vz-control" in control
    worker("t2vz-gpu")
    path, out = manifest({"id": "one"}), tmp_path / "out"
    (line,) = blocks("manual")
    line = line.replace("/data/manifest.csv", str(path)).replace("/data/out", str(out))
    found = re.search(r"UUID: (\S+)", said(line, fleet_api))
    assert found
    await_state(UUID(found[1]), "Completed")
    assert [(row.id, row.status) for row in read(out)] == [("one", "ok")]
    assert next((out / "videos").iterdir()).stat().st_size > 0
    forget_automations()
