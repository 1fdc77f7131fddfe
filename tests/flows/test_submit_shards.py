"""submit-shards with real workers, which are killed; stages that only take time stand in for rendering."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fleet import Worker, await_, deploy, environment, in_background
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelled, Crashed
from s3 import S3

from t2vz import storage
from t2vz.plan import Job, plan
from t2vz.results import read
from t2vz_flows.submit_shards import ShardParameters, submit_shards

Write = Callable[..., Path]
STUB = "stub_stages.py:render_manifest"
CLIP = Path(__file__).parents[2] / "manifests" / "clips" / "ball.mp4"


@pytest.fixture
def pool(fleet_api: str, tmp_path: Path) -> str:
    """A work pool with the deployment `render-manifest/NAME` of the stub; its name."""
    name = f"pool-{tmp_path.name}"
    deploy(STUB, name, name)
    return name


def parameters(manifest: Path, pool: str, **more: Any) -> ShardParameters:
    given = {
        "manifest": str(manifest),
        "out": str(manifest.parent / "out"),
        "deployment": f"render-manifest/{pool}",
        "shard_rows": 2,
        "poll_s": 0.5,
        "render": {"device": "cpu", "in_flight": 1},
    }
    return ShardParameters.model_validate(given | more)


def counted(state: Any) -> dict[str, int]:
    return dict(state.result(raise_on_failure=False))


def runs_tagged(prefix: str, out: Path) -> list[FlowRun]:
    """The runs of the shards in the output folder."""
    (place,) = (out / "manifests" / "shards").iterdir()
    with get_client(sync_client=True) as client:
        which = FlowRunFilter(tags=FlowRunFilterTags(all_=[f"{prefix}:{place.name}"]))
        return client.read_flow_runs(flow_run_filter=which)


def begun(out: Path) -> list[tuple[str, int]]:
    """(row, process) of each start of a row's generation."""
    path = out / "begun.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(line.split()[0], int(line.split()[1])) for line in lines]


@pytest.mark.slow
def test_two_workers_and_a_kill(manifest: Write, pool: str, worker: Callable[..., Worker], tmp_path: Path) -> None:
    path = manifest(*({"id": f"r{i}"} for i in range(6)), {"id": "bad", "crf": "99"})
    out = tmp_path / "out"
    machines = [worker(pool, f"machine-{i}", STUB_STEP_S="0.05") for i in range(2)]
    states: list[Any] = []
    submitter = in_background(lambda: states.append(submit_shards(parameters(path, pool), return_state=True)))
    victim = await_(lambda: begun(out))[0]
    os.kill(victim[1], signal.SIGKILL)
    submitter.join(150)

    assert states, [machine.log.read_text()[-2000:] for machine in machines]
    (state,) = states
    assert counted(state) == {"ok": 6, "failed": 1, "shards_completed": 3, "shards_retried": 1}, state.message
    assert state.is_completed()
    # The table is what one run without shards would have made of it.
    rows = {row.id: row for row in read(out, all=True)}
    assert len(list(read(out, all=True))) == 7
    assert {row.manifest for row in rows.values()} == {str(path)}
    for job in plan(path, None):
        if isinstance(job, Job):
            row = rows[job.row.id]
            assert (row.job_id, row.seed, row.row_number, row.status) == (job.job_id, job.seed, job.row.number, "ok")
            assert (out / str(row.output_uri)).read_text() == f"{job.job_id} {job.seed}"
    assert rows["bad"].status == "failed"
    # Both machines had a part, and only the killed row was begun twice.
    starts = begun(out)
    assert sorted(id for id, _ in starts) == sorted([f"r{i}" for i in range(6)] + [victim[0]])
    assert len({pid for _, pid in starts}) >= 3
    # Done is done: nothing is submitted for it, and the shards' files are gone.
    assert list((out / "manifests" / "shards").iterdir()) == []
    assert counted(submit_shards(parameters(path, pool), return_state=True)) == {"ok": 6, "failed": 1}
    assert begun(out) == starts


def test_machines_that_share_nothing_but_the_api_and_s3(
    manifest: Write, s3: S3, pool: str, worker: Callable[..., Worker], tmp_path: Path
) -> None:
    """The manifest, its source beside it, shards and videos are on S3; the worker has folders of its own."""
    bucket = s3.bucket()
    url, out = f"{bucket}/in/rows.csv", f"{bucket}/runs"
    control = {"mode": "control", "source": "clips/ball.mp4", "condition": "edge", "guidance_scale": "2"}
    local = manifest({"id": "a"}, {"id": "b", **control}, {"id": "c"}, {"id": "gone", **control, "source": "no.mp4"})
    storage.upload(local, bucket, "in/rows.csv")
    local.unlink()
    storage.upload(CLIP, bucket, "in/clips/ball.mp4")
    given = parameters(local, pool).model_copy(update={"manifest": url, "out": out})
    machine = worker(pool, T2VZ_WORKSPACE=str(tmp_path / "its-work"), T2VZ_CACHE_DIR=str(tmp_path / "its-cache"))

    state = submit_shards(given, return_state=True)
    log = machine.log.read_text()
    assert counted(state) == {"ok": 3, "failed": 1, "shards_completed": 2}, (state.message, log[-2000:])
    rows = {row.id: row for row in read(out)}
    assert {row.manifest for row in rows.values()} == {url}
    assert (rows["gone"].status, rows["gone"].error_class) == ("failed", "SourceMissing")
    assert rows["b"].source_uri == f"{bucket}/in/clips/ball.mp4"
    jobs = [item for item in plan(url, None) if isinstance(item, Job)]
    for job in jobs:
        row = rows[job.row.id]
        assert (row.job_id, row.seed, row.row_number) == (job.job_id, job.seed, job.row.number)
        assert storage.get(out, row.output_uri or "") == f"{job.job_id} {job.seed}".encode()
    assert not list(storage.entries(out, "manifests", deep=True)), "nothing is left to do with the shards"
    assert s3.secret not in log
    assert counted(submit_shards(given, return_state=True)) == {"ok": 3, "failed": 1}


def test_a_submitter_that_was_killed_finds_its_shards(
    manifest: Write, pool: str, worker: Callable[..., Worker], fleet_api: str, tmp_path: Path
) -> None:
    path, out = manifest(*({"id": f"r{i}"} for i in range(4))), tmp_path / "out"
    given = parameters(path, pool).model_dump_json()
    code = (
        "import sys; from t2vz_flows.submit_shards import *; "
        "submit_shards(ShardParameters.model_validate_json(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, given], env=environment(fleet_api))
    try:
        await_(lambda: (out / "manifests" / "shards").is_dir() and len(runs_tagged("shards", out)) == 2, alive=process)
    finally:
        process.kill()
        process.wait()
    worker(pool)
    state = submit_shards(parameters(path, pool), return_state=True)
    assert counted(state) == {"ok": 4, "shards_completed": 2}, state.message
    assert sorted(id for id, _ in begun(out)) == [f"r{i}" for i in range(4)]


def crash(out: Path, stopping: threading.Event, state: Any) -> None:
    """Give every run of a shard that state, as a server or a user would."""
    while not stopping.wait(0.1):
        if not (out / "manifests" / "shards").is_dir():
            continue
        with get_client(sync_client=True) as client:
            for run in runs_tagged("shards", out):
                if run.state is not None and not run.state.is_final():
                    client.set_flow_run_state(run.id, state, force=True)


@pytest.mark.parametrize(
    ("state", "expected", "runs"),
    [
        (Crashed(message="the machine is gone"), {"open": 3, "shards_retried": 4, "shards_given_up": 2}, 6),
        (Cancelled(message="not today"), {"open": 3, "shards_cancelled": 2}, 2),
    ],
    ids=["crashed", "cancelled"],
)
def test_shards_that_never_get_done_end_the_run_with_what_is_left(
    manifest: Write, pool: str, tmp_path: Path, state: Any, expected: dict[str, int], runs: int
) -> None:
    """Without a worker. Crashed ones are tried again so often, and what a user cancelled is not."""
    path, out = manifest(*({"id": f"r{i}"} for i in range(3))), tmp_path / "out"
    stopping = threading.Event()
    crasher = in_background(lambda: crash(out, stopping, state))
    try:
        end = submit_shards(parameters(path, pool, retries=2, poll_s=0.2), return_state=True)
    finally:
        stopping.set()
        crasher.join()
    assert counted(end) == expected
    assert end.is_failed()
    assert "3 not rendered" in end.message
    assert len(runs_tagged("shards", out)) == runs


def test_no_more_shards_are_under_way_than_allowed(manifest: Write, pool: str, tmp_path: Path) -> None:
    path, out = manifest(*({"id": f"r{i}"} for i in range(6))), tmp_path / "out"
    most, stopping = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not stopping.wait(0.1):
            if (out / "manifests" / "shards").is_dir():
                with get_client(sync_client=True) as client:
                    open_ = [run for run in runs_tagged("shards", out) if run.state and not run.state.is_final()]
                    most = max(most, len(open_))
                    if len(open_) == 2 or (len(runs_tagged("shards", out)) == 6 and open_):
                        client.set_flow_run_state(open_[0].id, Cancelled(), force=True)

    watcher = in_background(watch)
    try:
        end = submit_shards(parameters(path, pool, shard_rows=1, outstanding=2, poll_s=0.2), return_state=True)
    finally:
        stopping.set()
        watcher.join()
    assert counted(end) == {"open": 6, "shards_cancelled": 6}
    assert most == 2


def test_two_submitters_of_the_same_come_to_the_same_runs(manifest: Write, pool: str, tmp_path: Path) -> None:
    """And those of the same rows in another output folder do not."""
    path, out = manifest({"id": "one"}), tmp_path / "out"
    ends: list[Any] = []
    for place in (out, out, tmp_path / "other"):
        given = parameters(path, pool, out=str(place), poll_s=0.2)
        in_background(lambda given=given: ends.append(submit_shards(given, return_state=True)))
    await_(lambda: all((place / "manifests" / "shards").is_dir() for place in (out, tmp_path / "other")))
    await_(lambda: len(runs_tagged("shards", out)) == len(runs_tagged("shards", tmp_path / "other")) == 1)
    with get_client(sync_client=True) as client:
        for run in [*runs_tagged("shards", out), *runs_tagged("shards", tmp_path / "other")]:
            client.set_flow_run_state(run.id, Cancelled(), force=True)
    await_(lambda: len(ends) == 3)
    assert [counted(end) for end in ends] == [{"open": 1, "shards_cancelled": 1}] * 3
    assert len(runs_tagged("shards", out)) == 1


def test_a_deployment_that_is_not_there_is_told(manifest: Write, fleet_api: str) -> None:
    end = submit_shards(parameters(manifest({"id": "one"}), "nowhere"), return_state=True)
    assert end.is_failed()
    assert "there is no deployment 'render-manifest/nowhere'" in str(end.message)
