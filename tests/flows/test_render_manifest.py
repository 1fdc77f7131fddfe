"""The flow, run in this process against a real Prefect server with the real stages and the model mini."""

import base64
import json
import logging
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.flows import load_flow_from_entrypoint

from t2vz import claims
from t2vz.errors import DeviceLost, SourceCorrupt, StorageTimeout
from t2vz.events import Event, listening
from t2vz.plan import Job, plan
from t2vz.render import Render
from t2vz.results import ResultRow, ResultStore, read
from t2vz.workers import Pool, ProcessWorker
from t2vz_flows.render_manifest import RenderParameters, StageRetries, render_manifest
from t2vz_flows.shown import gallery_address

Write = Callable[..., Path]

GOOD = {"id": "good", "seed": "1"}
MISSING = {"id": "missing", "mode": "control", "condition": "edge", "source": "nowhere.mp4"}
TINY_FRAMES = 2
NO_DELAY = StageRetries(backoff_s=0)


@pytest.fixture(autouse=True)
def _server(prefect_api: str) -> None:
    pass


@pytest.fixture
def flow_run(tmp_path: Path) -> Callable[..., Any]:
    """Runs the flow on a manifest; returns the final state."""

    def run(manifest: Path, **parameters: Any) -> Any:
        parameters = {"retries": NO_DELAY, "device": "cpu", "out": str(tmp_path / "out"), **parameters}
        return render_manifest(RenderParameters(manifest=str(manifest), **parameters), return_state=True)

    return run


def rows_of(out: Path) -> dict[str, ResultRow]:
    return {row.id: row for row in read(out)}


def counts(state: Any) -> dict[str, int]:
    summary = dict(state.result(raise_on_failure=False))
    assert summary.pop("run_id")
    return summary


def task_runs(run_id: str, complete: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The task runs by name, once the server, which learns of them by events, knows enough of them."""
    deadline = time.monotonic() + 30
    with get_client(sync_client=True) as client:
        while True:
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])))
            found = {run.name: run for run in runs}
            if complete(found):
                return found
            assert time.monotonic() < deadline, f"the server knows of {found} only"
            time.sleep(0.2)


def test_bad_row_beside_good_one_is_recorded_and_shown(
    manifest: Write, flow_run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("T2VZ_GALLERY_URL", "http://gallery.example/all")
    monkeypatch.setenv("T2VZ_GALLERY_ROOT", str(tmp_path))
    logging.getLogger("prefect").propagate = True
    with caplog.at_level(logging.INFO):
        state = flow_run(manifest(MISSING, GOOD))

    assert state.is_completed()
    assert counts(state) == {"ok": 1, "failed": 1}
    assert state.message == "1 rendered, 1 failed"
    rows = rows_of(tmp_path / "out")
    assert rows["good"].status == "ok"
    assert (tmp_path / "out" / rows["good"].output_uri).stat().st_size == rows["good"].output_bytes
    assert (rows["missing"].status, rows["missing"].error_class) == ("failed", "SourceMissing")

    names = {"good", "missing", "generate good", "encode good"}
    runs = task_runs(
        rows["good"].run_id,
        lambda found: names <= found.keys() and all(run.state.is_final() for run in found.values()),
    )
    assert runs["good"].state.is_completed()
    assert runs["missing"].state.is_failed()
    assert "nowhere.mp4" in runs["missing"].state.message
    assert runs["generate good"].total_run_time.total_seconds() > 0

    shown = artifacts(rows["good"].run_id)
    assert set(shown) == {
        *("render-manifest", "render-progress", "row-counts", "failed-rows", "contact-sheet", "gallery", "plots")
    }
    assert "(http://gallery.example/all/out/)" in shown["gallery"].data
    assert "(http://gallery.example/all/out/)" in shown["render-manifest"].data
    assert f"(http://gallery.example/all/out/{rows['good'].output_uri})" in shown["contact-sheet"].data
    assert json.loads(shown["row-counts"].data) == [{"rows": 1, "ended": "rendered"}, {"rows": 1, "ended": "failed"}]
    assert "1 rendered, 1 failed" in shown["render-manifest"].data
    assert "| missing | decode |" in shown["render-manifest"].data
    assert shown["render-progress"].data == 100
    (failed,) = json.loads(shown["failed-rows"].data)
    assert (failed["row"], failed["stage"], failed["attempts"]) == ("missing", "decode", 0)
    assert "nowhere.mp4" in failed["reason"]
    assert moving_pictures(shown["contact-sheet"].data) == [(TINY_FRAMES, (64, 64))]
    (times,) = re.findall(r"data:image/svg\+xml;base64,([^)]*)\)", shown["plots"].data)
    assert "generate" in base64.b64decode(times).decode()

    assert "Task run" in caplog.text  # Prefect's log was heard
    assert "Traceback" not in caplog.text
    assert "NoneType" not in caplog.text


@pytest.mark.parametrize(
    ("root", "out", "address"),
    [
        (None, "/data/out", "http://host:8080"),
        ("/data", "/data/a/my out", "http://host:8080/a/my%20out/"),
        ("/data/", "/data", "http://host:8080/"),
        ("/data", "/database/out", None),
        ("/data", "s3://bucket/data", None),
    ],
)
def test_the_gallery_of_an_output_folder(
    root: str | None, out: str, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("T2VZ_GALLERY_URL", "http://host:8080")
    if root is not None:
        monkeypatch.setenv("T2VZ_GALLERY_ROOT", root)
    assert gallery_address(out) == address


def artifacts(run_id: str) -> dict[str, Any]:
    """The run's artifacts by key."""
    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
    with get_client(sync_client=True) as client:
        return {artifact.key: artifact for artifact in client.read_artifacts(artifact_filter=of_run)}


def moving_pictures(markdown: str) -> list[tuple[int, tuple[int, int]]]:
    """Frames and size of the animated pictures in it."""
    found = []
    for text in re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", markdown):
        with Image.open(BytesIO(base64.b64decode(text))) as picture:
            found.append((picture.n_frames, picture.size))
    return found


def logged(run_id: str, complete: Callable[[dict[str, list[str]]], bool]) -> dict[str, list[str]]:
    """The log lines by the name of their task run, "" for the flow's own, once the server has enough of them."""
    deadline = time.monotonic() + 30
    of_run = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id]))
    with get_client(sync_client=True) as client:
        while True:
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])))
            names = {run.id: run.name for run in runs}
            found: dict[str, list[str]] = {}
            for log in client.read_logs(of_run):
                found.setdefault(names.get(log.task_run_id, ""), []).append(log.message)
            if complete(found):
                return found
            assert time.monotonic() < deadline, f"the server knows of {found} only"
            time.sleep(0.2)


def test_rerun_renders_nothing(manifest: Write, flow_run: Any, tmp_path: Path) -> None:
    path = manifest(GOOD)
    assert counts(flow_run(path)) == {"ok": 1}
    video = tmp_path / "out" / rows_of(tmp_path / "out")["good"].output_uri
    before = video.stat().st_mtime_ns
    heard: list[Event] = []
    with listening(heard.append):
        assert counts(flow_run(path)) == {"done": 1}
    assert [(event.kind, event.total, event.done) for event in heard] == [("planned", 0, 1)]
    assert video.stat().st_mtime_ns == before


def failing(stage: str, errors: list[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a stage raise the given errors, one a try, before it works."""
    works = getattr(Render, f"_{stage}")

    def fails_first(self: Render) -> None:
        if errors:
            raise errors.pop(0)
        works(self)

    monkeypatch.setattr(Render, f"_{stage}", fails_first)


def test_error_that_can_mend_is_tried_again(
    manifest: Write, flow_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing("encode", [StorageTimeout("slow"), StorageTimeout("still slow")], monkeypatch)
    assert counts(flow_run(manifest(GOOD))) == {"ok": 1}
    assert rows_of(tmp_path / "out")["good"].attempts == 3


def test_retries_end(manifest: Write, flow_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing("encode", [StorageTimeout("slow")] * 9, monkeypatch)
    state = flow_run(manifest(GOOD), retries=StageRetries(encode=1, backoff_s=0))
    assert counts(state) == {"failed": 1}
    row = rows_of(tmp_path / "out")["good"]
    assert (row.attempts, row.error_class, row.retryable) == (2, "StorageTimeout", True)


def test_error_that_stays_is_not_tried_again(
    manifest: Write, flow_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing("generate", [SourceCorrupt("broken")], monkeypatch)
    assert counts(flow_run(manifest(GOOD))) == {"failed": 1}
    assert rows_of(tmp_path / "out")["good"].attempts == 1


@pytest.mark.parametrize(("allowed", "failed"), [(None, False), (1, False), (0, True)])
def test_max_failed_decides_the_final_state(manifest: Write, flow_run: Any, allowed: int | None, failed: bool) -> None:
    state = flow_run(manifest(MISSING), max_failed=allowed)
    assert state.is_failed() == failed
    assert counts(state) == {"failed": 1}
    assert "1 failed" in state.message


def test_in_flight_bounds_the_rows_under_way(manifest: Write, flow_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way: set[str] = set()
    most = 0
    both = threading.Barrier(2)  # broken if the rows don't run beside each other

    def watch(event: Event) -> None:
        nonlocal most
        if event.kind == "row_started":
            under_way.add(event.id)
            most = max(most, len(under_way))
            both.wait(30)
        elif event.kind == "row_finished":
            under_way.discard(event.id)

    with listening(watch):
        state = flow_run(manifest(*({"id": str(i), "seed": str(i)} for i in range(6))), in_flight=2)
    assert counts(state) == {"ok": 6}
    assert most == 2


def test_other_rows_are_decoded_and_encoded_while_one_generates(
    manifest: Write, flow_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first to generate is held until the other is decoded, the second until the first is encoded."""
    decoded = {"a": threading.Event(), "b": threading.Event()}
    encoded = {"a": threading.Event(), "b": threading.Event()}
    order: list[str] = []
    generate, decode, encode = Render._generate, Render._decode, Render._encode

    def held(work: Render) -> None:
        other = "b" if work.job.row.id == "a" else "a"
        awaited = encoded[order[0]] if order else decoded[other]
        order.append(work.job.row.id)
        assert awaited.wait(60)
        generate(work)

    def told(stage: Callable[[Render], None], done: dict[str, threading.Event]) -> Callable[[Render], None]:
        def run(work: Render) -> None:
            stage(work)
            done[work.job.row.id].set()

        return run

    monkeypatch.setattr(Render, "_generate", held)
    monkeypatch.setattr(Render, "_decode", told(decode, decoded))
    monkeypatch.setattr(Render, "_encode", told(encode, encoded))
    clip = Path(__file__).parents[2] / "manifests" / "clips" / "ball.mp4"
    edit = {"mode": "edit", "source": str(clip), "seed": "1"}
    state = flow_run(manifest({"id": "a", **edit}, {"id": "b", **edit}), in_flight=2)
    assert counts(state) == {"ok": 2}


def test_a_lost_device_ends_the_run_and_keeps_what_is_finished(
    manifest: Write, flow_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, tried = Render._generate, []

    def lose(work: Render) -> None:
        tried.append(work.job.row.id)
        if work.job.row.id != "good":
            raise DeviceLost("the device is gone")
        generate(work)

    monkeypatch.setattr(Render, "_generate", lose)
    state = flow_run(manifest(GOOD, *({"id": str(i)} for i in range(6))), in_flight=1)
    assert state.is_failed()
    assert "run again" in state.message
    assert tried == ["good", "0"]  # not tried again in the process that lost it, nor with the other rows
    rows = rows_of(tmp_path / "out")
    assert {id: row.status for id, row in rows.items()} == {"good": "ok", "0": "failed"}
    assert rows["0"].retryable


@pytest.mark.parametrize("still_there", [False, True])
def test_rows_that_another_run_is_at_are_looked_at_again(
    manifest: Write, flow_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, still_there: bool
) -> None:
    path, out = manifest(GOOD, {"id": "taken", "seed": "2"}), tmp_path / "out"
    (taken,) = (item for item in plan(path, out) if isinstance(item, Job) and item.row.id == "taken")
    asked: list[str] = []

    def others_end(*about: Any) -> None:
        asked.append(read(out).where(status="ok").arrow()["id"].to_pylist()[0])
        if not still_there:
            claims.release(out, taken.job_id, "other")

    monkeypatch.setattr(claims, "await_others", others_end)
    with claims.living(out, "other"):
        assert claims.take(out, taken.job_id, "other")
        state = flow_run(path)
    assert asked == ["good"]  # once, when all else was done
    assert counts(state) == ({"ok": 1, "skipped": 1} if still_there else {"ok": 2})
    assert set(rows_of(out)) == ({"good"} if still_there else {"good", "taken"})


def test_unusable_manifest_fails_the_flow_plainly(
    manifest: Write, flow_run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("prefect").propagate = True
    state = flow_run(manifest({"promt": "a typo"}))
    assert state.is_failed()
    assert "did you mean 'prompt'" in state.message
    assert "Traceback" not in caplog.text


def test_every_parameter_has_a_title_in_the_ui() -> None:
    schema = render_manifest.parameters.model_dump()
    models = {name: schema["definitions"][name] for name in ("RenderParameters", "StageRetries")}
    for model in models.values():
        for name, field in model["properties"].items():
            assert field.get("title"), name
    for name, field in models["RenderParameters"]["properties"].items():
        assert field.get("description"), name
    assert set(models["RenderParameters"]["required"]) == {"manifest", "out"}


def test_prefect_can_load_the_flow_by_its_path() -> None:
    path = Path(__file__).parents[2] / "flows" / "render_manifest.py"
    assert load_flow_from_entrypoint(f"{path}:render_manifest").name == "render-manifest"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are done by stand-ins for the stages, in processes that know the tests' folder."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.setattr("t2vz.workers.RENDER", "stub:render")
    monkeypatch.setattr("t2vz_flows.render_manifest.Pool", partial(Pool, backoff_s=0.05))


@pytest.mark.usefixtures("stub")
def test_what_a_worker_tells_arrives_at_the_task_runs_of_its_row(
    manifest: Write, flow_run: Any, tmp_path: Path
) -> None:
    path = manifest(
        {"id": "good", "prompt": "say a boat", "seed": "1"},
        {"id": "dies", "prompt": "kill-once a boat", "seed": "2"},
        {"id": "mends", "prompt": "slow a boat", "seed": "3"},
        {"id": "bad", "prompt": "fail a boat", "seed": "4"},
    )
    state = flow_run(path, executor="processes", in_flight=1)
    assert counts(state) == {"ok": 3, "failed": 1}
    rows = rows_of(tmp_path / "out")
    assert {id: row.attempts for id, row in rows.items()} == {"good": 1, "dies": 2, "mends": 3, "bad": 1}

    names = {"good", "decode good", "generate good", "encode good", "dies", "generate dies", "generate dies (try 2)"}
    names |= {"mends", "generate mends", "generate mends (try 2)", "generate mends (try 3)", "bad", "generate bad"}
    run_id = rows["good"].run_id
    runs = task_runs(
        run_id, lambda found: names <= found.keys() and all(run.state.is_final() for run in found.values())
    )
    assert runs["good"].state.is_completed()
    assert {"mode: text", "model: mini"} <= set(runs["good"].tags)
    assert runs["generate dies"].state.is_crashed()
    assert "SIGKILL" in runs["generate dies"].state.message
    assert runs["generate dies (try 2)"].state.is_completed()
    assert runs["dies"].state.is_completed()
    assert runs["generate mends (try 2)"].state.is_failed()
    assert runs["generate mends (try 3)"].state.is_completed()
    assert runs["bad"].state.message == "generate: NaN values in the frames"
    assert "generate bad (try 2)" not in runs

    logs = logged(run_id, lambda found: {"generate good", "dies"} <= found.keys())
    assert any("good is in process" in line for line in logs["generate good"])
    assert "8 of 8 UNet evaluations, 100 %" in logs["generate good"]
    assert 1 <= sum("UNet evaluations" in line for line in logs["generate good"]) <= 5  # not one a step
    assert any("SIGKILL" in line and "trying again" in line for line in logs["dies"])


@pytest.mark.usefixtures("stub")
def test_the_stages_of_many_rows_are_log_lines(manifest: Write, flow_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2vz_flows.render_manifest._STAGE_ROWS", 2)
    state = flow_run(manifest(*({"id": f"row-{i}", "seed": str(i)} for i in range(3))))
    run_id, names = state.result()["run_id"], {"row-0", "row-1", "row-2"}
    runs = task_runs(run_id, lambda found: names <= found.keys() and all(r.state.is_final() for r in found.values()))
    assert set(runs) == names


@pytest.mark.usefixtures("stub")
def test_a_big_manifest_may_have_its_prompt_by_default(flow_run: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("id,seed\none,1\ntwo,2\n", encoding="utf-8")
    state = flow_run(path, defaults={"prompt": "a boat"}, max_row_tasks=1)
    assert counts(state) == {"ok": 2}, state.message


@pytest.mark.usefixtures("stub")
def test_shards_give_the_same_table_as_tasks(manifest: Write, flow_run: Any, tmp_path: Path) -> None:
    prompts = ["a boat"] * 20 + ["fail a boat", "kill a boat", "slow a boat"]
    path = manifest(*({"id": f"row-{i}", "prompt": p, "seed": str(i)} for i, p in enumerate(prompts)), MISSING)
    in_tasks = flow_run(path, out=str(tmp_path / "tasks"), executor="processes", workers=2)
    in_shards = flow_run(
        path, out=str(tmp_path / "shards"), executor="processes", workers=2, max_row_tasks=20, shard_rows=10
    )
    assert counts(in_tasks) == counts(in_shards) == {"ok": 21, "failed": 3}

    def told(folder: str) -> dict[str, tuple[Any, ...]]:
        rows = rows_of(tmp_path / folder)
        return {
            id: (row.job_id, row.status, row.error_class, row.output_sha256, row.parameters, row.seed)
            for id, row in rows.items()
        }

    assert told("tasks") == told("shards")
    assert len(told("tasks")) == 24

    run_id = in_shards.result(raise_on_failure=False)["run_id"]
    names = {"rows 1 to 10", "rows 11 to 20", "rows 21 to 30"}
    runs = task_runs(run_id, lambda found: names <= found.keys() and all(r.state.is_final() for r in found.values()))
    assert set(runs) == names
    assert all(run.state.is_completed() for run in runs.values())
    said = "; ".join(run.state.message for run in runs.values())
    assert sum(map(int, re.findall(r"(\d+) ok", said))) == 21
    assert sum(map(int, re.findall(r"(\d+) failed", said))) == 2  # what can't be planned is in no shard
    assert "3 failed" in artifacts(run_id)["render-manifest"].data


@pytest.mark.usefixtures("stub")
def test_a_stopped_run_cancels_its_rows_and_leaves_no_worker(
    manifest: Write, flow_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an interruption or a termination reaches the flow: an exception in its thread, here at the first step."""
    pids: list[int] = []
    started = ProcessWorker.__init__

    def noted(worker: ProcessWorker, *arguments: Any) -> None:
        started(worker, *arguments)
        pids.append(worker.pid)

    def terminate(event: Event) -> None:
        if event.kind == "step":
            raise KeyboardInterrupt

    monkeypatch.setattr(ProcessWorker, "__init__", noted)
    path = manifest(*({"id": f"row-{i}", "prompt": "long a boat", "seed": str(i)} for i in range(3)))
    with listening(terminate), pytest.raises(KeyboardInterrupt):
        flow_run(path, executor="processes", workers=2, in_flight=1)
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not ResultStore(tmp_path / "out").done()
    assert [path.name for path in (tmp_path / "out" / ".work").iterdir()] == ["sweep.lock"]


@pytest.mark.usefixtures("stub")
def test_workers_that_all_die_fail_the_run_plainly(manifest: Write, flow_run: Any) -> None:
    path = manifest(*({"id": f"row-{i}", "prompt": "kill a boat", "seed": str(i)} for i in range(4)))
    state = flow_run(path, executor="processes", max_attempts=20, in_flight=1)
    assert state.is_failed()
    assert "no worker can be kept alive" in state.message
    assert "SIGKILL" in state.message
