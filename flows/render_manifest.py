"""The flow `render-manifest`: every row of a manifest becomes a task run, every stage of it a task run inside.

What a row takes to render is in `t2vz.render`; what is done, in the results table. Prefect decides here how
many rows are under way and which stage is tried again, and shows it. Nothing goes through Prefect but names:
neither frames nor results are stored there, and a history that it loses costs no result.
"""

import logging
import os
import queue
import time
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain, islice
from typing import Any

from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture, wait
from prefect.states import Completed, Failed
from prefect.tasks import Task, exponential_backoff
from prefect.utilities.annotations import quote
from pydantic import BaseModel, Field

from t2vz import claims, events, metrics, storage
from t2vz.errors import DeviceLost, T2VZError, UnexpectedError
from t2vz.plan import Done, Job, Unready, plan
from t2vz.render import STAGES, Render, Settings, merge_results, opening, record_unready, render

_FLUSH_ROWS = 100  # a merge into the table costs 1 s, whatever its size
_FLUSH_S = 10.0
_STOP_S = 5.0  # what an interrupted run gives its rows to end
_LOOK_AHEAD = 100  # rows planned before the first is begun, so that progress knows the total of most runs
_TOLD_ROWS = 100  # failed rows in the summary artifact; the table has them all


class StageRetries(BaseModel):
    """How often a stage is tried again if its error can mend by itself (a device lost, storage too slow)."""

    decode: int = Field(default=2, title="Decode", ge=0, le=20)
    conditions: int = Field(default=1, title="Conditions", ge=0, le=20)
    generate: int = Field(default=2, title="Generate", ge=0, le=20)
    encode: int = Field(default=3, title="Encode", ge=0, le=20)
    backoff_s: float = Field(
        default=2.0, title="Backoff (s)", description="First delay; doubled each time, with jitter", ge=0, le=600
    )


class RenderParameters(BaseModel):
    """What to render, where to, and how carefully."""

    manifest: str = Field(title="Manifest", description="CSV or Parquet file with a row for each video")
    out: str = Field(title="Output folder", description="Gets the videos and the results table")
    defaults: dict[str, str] = Field(
        default={}, title="Defaults", description="Column → value for the cells that the manifest leaves empty"
    )
    device: str = Field(default="auto", title="Device", description="auto, cpu, cuda:0, …")
    in_flight: int = Field(
        default=3, title="Rows in flight", description="Rows under way at once; bounds the clips in memory", ge=1, le=64
    )
    retries: StageRetries = Field(
        default=StageRetries(), title="Stage retries", description="Further tries of each stage"
    )
    max_failed: int | None = Field(
        default=None, title="Failed rows allowed", description="More make the run Failed; empty: any number", ge=0
    )
    verify: bool = Field(
        default=False, title="Verify", description="Check the checksums of the videos that are done, not only sizes"
    )
    quality: bool = Field(
        default=False, title="Quality", description="Measure the frames of every row: flicker, warp error, seams, drift"
    )
    clip_model: str | None = Field(
        default=None, title="CLIP model", description="Folder or hub id of one that measures the frames, too"
    )
    compiled: bool = Field(
        default=False,
        title="Compile",
        description="torch.compile the UNet's blocks: minutes once, then faster on a GPU",
    )
    metrics_port: int | None = Field(
        default=None,
        title="Metrics port",
        description="Serve Prometheus metrics there; 0: any free one",
        ge=0,
        le=65535,
    )
    metrics_folder: str | None = Field(
        default=None, title="Metrics folder", description="Write them there, for node-exporter's textfile collector"
    )


@flow(
    name="render-manifest",
    flow_run_name="{parameters.manifest}",
    description="Render every row of a manifest that is not done yet.",
    persist_result=False,
)
def render_manifest(parameters: RenderParameters) -> Any:
    """Render the rows of `parameters.manifest` that are not done; returns counts by status and the run's id.

    A row that fails is recorded and shown as a Failed task run; it stops no other. Raises ManifestError if
    the manifest as a whole can't be used, OutputError if the output folder can't.
    """
    hide_tracebacks()
    settings = Settings(
        out=storage.normal(parameters.out),
        manifest=os.path.abspath(parameters.manifest),
        run_id=str(runtime.flow_run.id),
        device=parameters.device,
        quality=parameters.quality,
        clip_model=parameters.clip_model,
        compiled=parameters.compiled,
    )
    call = _stage_caller(parameters.retries)
    finished: queue.SimpleQueue[PrefectFuture[Any]] = queue.SimpleQueue()
    under_way: set[PrefectFuture[Any]] = set()
    counts: Counter[str] = Counter()
    failures: list[tuple[str, str, str]] = []
    planned, unflushed, flushed_at = 0, 0, time.monotonic()
    jobs: dict[str, Job] = {}  # under way, by row
    elsewhere: list[Job] = []  # rows that another run was at
    looking_again = False

    def flush() -> None:
        nonlocal unflushed, flushed_at
        merge_results(settings)
        unflushed, flushed_at = 0, time.monotonic()

    def collect() -> None:
        """Wait for a row to end and count it; merge the table when it is due."""
        nonlocal unflushed
        while True:
            if unflushed >= _FLUSH_ROWS or (unflushed and time.monotonic() - flushed_at > _FLUSH_S):
                flush()
            try:
                future = finished.get(timeout=_FLUSH_S)
                break
            except queue.Empty:
                continue
        under_way.discard(future)
        row = _awaited(future)
        if row["status"] == "skipped" and not looking_again:
            elsewhere.append(jobs.pop(row["id"]))
            return
        jobs.pop(row["id"], None)
        counts[row["status"]] += 1
        unflushed += 1
        if row["status"] == "failed" and len(failures) < _TOLD_ROWS:
            failures.append((row["id"], row["stage"], row["message"]))

    def submit(item: Job | Unready) -> None:
        if len(under_way) == parameters.in_flight:
            collect()
        id = item.row.id if isinstance(item, Job) else item.id
        if isinstance(item, Job):
            jobs[id] = item
        future = render_row.submit(id, quote(item), quote(settings), quote(call))
        future.add_done_callback(finished.put)
        under_way.add(future)

    port, folder = parameters.metrics_port, parameters.metrics_folder
    with metrics.exposing(settings.run_id, settings.manifest, port=port, folder=folder), opening(settings):
        try:
            items = plan(parameters.manifest, parameters.out, defaults=parameters.defaults, verify=parameters.verify)
            ahead = list(islice(items, _LOOK_AHEAD))
            if len(ahead) < _LOOK_AHEAD:
                _tell_plan(ahead)
            for item in chain(ahead, items):
                if isinstance(item, Done):
                    counts["done"] += 1
                    continue
                planned += 1
                submit(item)
            if len(ahead) == _LOOK_AHEAD:
                events.emit(events.Event("planned", total=planned, done=counts["done"]))
            while under_way:
                collect()
            if elsewhere:  # done by now, or free as the run that was at them is dead, or still under way there
                claims.await_others(settings.out, settings.run_id, settings.stopping, settings.lease_s)
                looking_again = True
                for job in elsewhere:
                    submit(job)
                while under_way:
                    collect()
        except BaseException:
            settings.stopping.set()  # rows under way end before their next step, frame or stage
            wait(list(under_way), timeout=_STOP_S)
            raise

    message = _message(counts)
    _publish(parameters, counts, failures)
    summary = {**counts, "run_id": settings.run_id}
    if parameters.max_failed is not None and counts["failed"] > parameters.max_failed:
        return Failed(message=f"{message}; at most {parameters.max_failed} may fail", data=summary)
    return Completed(message=message, data=summary)


@task(name="row", task_run_name="{row}", cache_policy=NO_CACHE, persist_result=False, retries=0)
def render_row(row: str, item: Any, settings: Any, call: Any) -> Any:
    """One manifest row, whole. Ends Completed, or Failed with the row's plain message."""
    done = record_unready(item, settings) if isinstance(item, Unready) else render(item, settings, call)
    if done is None:  # another run was faster
        return Completed(message="done by another run", data=_outcome(row, "elsewhere"))
    outcome = _outcome(row, done.status, done.error_stage or "", done.error_message or "", done.error_class or "")
    if done.status == "failed":
        return Failed(message=f"{done.error_stage}: {done.error_message}", data=outcome)
    return Completed(message=done.status, data=outcome)


@task(name="stage", task_run_name="{stage} {row}", cache_policy=NO_CACHE, persist_result=False)
def render_stage(row: str, stage: str, work: Any) -> None:
    """One stage of a row."""
    work.run(stage)


def _stage_caller(retries: StageRetries) -> Callable[[Render, str], None]:
    """What `render` calls for each stage: a Prefect task with the stage's own retry rule."""
    stages = {
        stage: render_stage.with_options(
            name=stage,
            retries=getattr(retries, stage),
            retry_delay_seconds=exponential_backoff(backoff_factor=retries.backoff_s),
            retry_jitter_factor=0.5,
            retry_condition_fn=can_mend,
        )
        for stage in STAGES
    }

    def call(work: Render, stage: str) -> None:
        work.settings.check_stopping()
        stages[stage](work.job.row.id, stage, quote(work))

    return call


def can_mend(task: "Task[Any, Any]", run: TaskRun, state: State[Any]) -> bool:
    """Prefect's question before it tries again: is the error one that may be gone next time?

    A lost device may, but not in the process that lost it.
    """
    return isinstance(state.data, T2VZError) and state.data.retryable and not isinstance(state.data, DeviceLost)


def hide_tracebacks() -> None:
    """Let Prefect's logs tell an error of ours by its message: it is expected, and says what to do."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    if error is None or isinstance(error, T2VZError):
        record.exc_info = None
    return True


def _outcome(id: str, status: str, stage: str = "", message: str = "", error: str = "") -> dict[str, str]:
    return {"id": id, "status": status, "stage": stage, "message": message, "error": error}


def _awaited(future: "PrefectFuture[Any]") -> dict[str, str]:
    """The outcome of an ended row. Raises what no other row could do without: its result could not be kept, or the
    device is lost, and this process's hold on it with it."""
    result = future.result(raise_on_failure=False)
    if not isinstance(result, dict):
        raise result if isinstance(result, T2VZError) else UnexpectedError(str(future.state.message or result))
    if result["error"] == DeviceLost.__name__:
        raise DeviceLost(f"{result['message']}; run again: finished rows are kept")
    return result


def _tell_plan(items: Iterable[Job | Unready | Done]) -> None:
    done = sum(isinstance(item, Done) for item in items)
    events.emit(events.Event("planned", total=sum(1 for _ in items) - done, done=done))


def _message(counts: Counter[str]) -> str:
    said = {
        "ok": "rendered",
        "failed": "failed",
        "elsewhere": "done by another run",
        "skipped": "left to another run that is at them",
        "done": "done before",
    }
    return ", ".join(f"{counts[status]} {word}" for status, word in said.items() if counts[status]) or "no rows"


def _publish(parameters: RenderParameters, counts: Counter[str], failures: list[tuple[str, str, str]]) -> None:
    """The run's summary in Prefect's UI."""
    lines = [f"**{_message(counts)}**", "", f"Manifest: `{parameters.manifest}`", ""]
    lines += [f"Videos and results table: `{parameters.out}`"]
    if failures:
        lines += ["", "| failed row | stage | reason |", "| --- | --- | --- |"]
        lines += ["| " + " | ".join(map(_cell, failure)) + " |" for failure in failures]
    if counts["failed"] > len(failures):
        lines += ["", f"… and {counts['failed'] - len(failures)} more in the table."]
    try:
        create_markdown_artifact("\n".join(lines), key="render-manifest", description="Summary of the run")
    except Exception as error:  # a picture of the results, which are safe: no reason to fail
        get_run_logger().warning("Prefect did not take the summary artifact: %s", error)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
