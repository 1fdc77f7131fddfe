"""The flow `render-manifest`: every row of a manifest becomes a task run, or a part of one if they are very many.

What a row takes to render is in `t2vz.render`, who renders it in `t2vz.workers`, and what is done in the results
table. Prefect starts and stops a run here, and shows it. Nothing goes through Prefect but names: neither frames nor
results are stored there, and a history that it loses costs no result.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from prefect import flow, runtime
from prefect.states import Completed, Failed
from pydantic import BaseModel, Field

from t2vz import claims, events, metrics, storage, workers
from t2vz.errors import UnexpectedError
from t2vz.manifest import origin, read
from t2vz.media.limits import Limits
from t2vz.media.provenance import Signing, check
from t2vz.models.policy import ModelPolicy
from t2vz.plan import ContentPolicy, Done, Job, Unready, plan
from t2vz.render import Retries, Settings, merge_results, opening, record_unready
from t2vz.results import ResultRow
from t2vz.workers import Feed, Outcome, Pool, placed
from t2vz_flows.lifecycle import begin
from t2vz_flows.limits import SourceLimits
from t2vz_flows.rows import RowTasks, ShardTasks
from t2vz_flows.shown import PICTURES, TOLD_ROWS, Progress, gallery_address, message, publish, publish_plots

_FLUSH_ROWS = 100  # a merge into the table costs 1 s, whatever its size
_FLUSH_S = 10.0
_STAGE_ROWS = 500  # more rows' stages are no task runs: of 8,000 the UI's graph is no answer any more
_TASKS_END_S = 3.0  # what the tasks of an interrupted run's rows get to end


class StageRetries(BaseModel):
    """How often a stage is tried again if its error can mend by itself (a device lost, storage too slow)."""

    decode: int = Field(default=2, title="Decode", ge=0, le=20)
    conditions: int = Field(default=1, title="Conditions", ge=0, le=20)
    generate: int = Field(default=2, title="Generate", ge=0, le=20)
    encode: int = Field(default=3, title="Encode", ge=0, le=20)
    backoff_s: float = Field(
        default=2.0, title="Backoff (s)", description="First delay; doubled each time, with jitter", ge=0, le=600
    )


def source_limits(options: Any) -> Limits:
    """Of RenderParameters or RenderOptions."""
    return Limits(**options.limits.model_dump())


def model_policy(options: Any) -> ModelPolicy:
    """Of RenderParameters or RenderOptions."""
    return ModelPolicy(options.allow_pickles, options.model_checksums)


class RenderParameters(BaseModel):
    """What to render, where to, and how carefully."""

    manifest: str = Field(title="Manifest", description="CSV or Parquet file with a row for each video")
    out: str = Field(title="Output folder", description="Gets the videos and the results table")
    defaults: dict[str, str] = Field(
        default={}, title="Defaults", description="Column → value for the cells that the manifest leaves empty"
    )
    device: str = Field(default="auto", title="Device", description="auto, cpu, cuda:0, …")
    executor: Literal["auto", "threads", "processes", "ray"] = Field(
        default="auto",
        title="Executor",
        description="Workers as processes or threads of the run's own, or on a Ray cluster; auto: processes on GPUs "
        "and for several",
    )
    workers: int | None = Field(
        default=None,
        title="Workers",
        description="Processes that hold models; empty: one for each GPU. On the CPU they share the cores",
        ge=1,
        le=256,
    )
    in_flight: int = Field(
        default=3,
        title="Rows in flight",
        description="Rows under way at once in each worker; bounds the clips in memory",
        ge=1,
        le=64,
    )
    max_attempts: int = Field(
        default=3, title="Attempts", description="At a row whose worker dies; then it has failed", ge=1, le=20
    )
    max_row_tasks: int = Field(
        default=2000,
        title="Rows with a task each",
        description="More rows to render are shown as shards: Prefect takes some 0.1 s for a row with its stages",
        ge=0,
    )
    shard_rows: int = Field(default=200, title="Rows in a shard", description="Rows of one task run then", ge=1)
    retries: StageRetries = Field(
        default=StageRetries(), title="Stage retries", description="Further tries of each stage"
    )
    max_failed: int | None = Field(
        default=None, title="Failed rows allowed", description="More make the run Failed; empty: any number", ge=0
    )
    verify: bool = Field(
        default=False, title="Verify", description="Check the checksums of the videos that are done, not only sizes"
    )
    limits: SourceLimits = Field(
        default=SourceLimits(), title="Source limits", description="What the rows' sources may be, and come from"
    )
    allow_pickles: bool = Field(
        default=False,
        title="Allow pickles",
        description="Read the weights of openpose, hed, lineart and normal, which are pickles (tensors only)",
    )
    model_checksums: str | None = Field(
        default=None, title="Model checksums", description="JSON file of {model: checksum}; only these are loaded"
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
    content: ContentPolicy = Field(
        default="flag",
        title="Content",
        description="What the model's safety checker flags is told in the row, or withheld: no video; off: don't ask",
    )
    sign_certificate: str | None = Field(
        default=None, title="Certificate", description="Chain in PEM: sign the files as made by AI (C2PA); empty: don't"
    )
    sign_key: str | None = Field(default=None, title="Key", description="File with the certificate's private key")
    sign_prompt: bool = Field(default=False, title="Sign the prompt", description="Tell the prompt in the signed claim")
    split: int = Field(
        default=1,
        title="Split",
        description="Processes that share the frames of each clip, one a device: for long clips; one row at a time",
        ge=1,
        le=64,
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
    gallery_url: str | None = Field(
        default=None,
        title="Gallery",
        description="Address of the output folder's gallery, for links; empty: as T2VZ_GALLERY_URL has it",
    )


def signing_of(parameters: Any) -> Signing | None:
    """Of RenderParameters or RenderOptions. Raises what `provenance.check` does, before anything is rendered."""
    certificate, key = parameters.sign_certificate, parameters.sign_key
    if (certificate is None) != (key is None):
        raise UnexpectedError("to sign, a certificate and its key are needed: give both", stage="settings")
    if certificate is None or key is None:
        return None
    signing = Signing(certificate, key, parameters.sign_prompt)
    check(signing)
    return signing


def _run_name() -> str:
    given = runtime.flow_run.parameters["parameters"]
    manifest, out = (given[name] if isinstance(given, dict) else getattr(given, name) for name in ("manifest", "out"))
    return f"{Path(manifest).name} → {Path(out).name}"


@flow(
    name="render-manifest",
    flow_run_name=_run_name,
    description="Render every row of a manifest that is not done yet.",
    persist_result=False,
)
def render_manifest(parameters: RenderParameters) -> Any:
    """Render the rows of `parameters.manifest` that are not done; returns counts by status and the run's id.

    A row that fails is recorded and shown as a Failed task run; it stops no other. Raises ManifestError if
    the manifest as a whole can't be used, OutputError if the output folder can't, WorkerDied if no worker can be kept
    alive.
    """
    if (end := begin()) is not None:
        return end
    settings = Settings(
        out=storage.normal(parameters.out),
        manifest=origin(parameters.manifest),
        run_id=str(runtime.flow_run.id),
        device=parameters.device,
        limits=source_limits(parameters),
        models=model_policy(parameters),
        quality=parameters.quality,
        clip_model=parameters.clip_model,
        compiled=parameters.compiled,
        split=parameters.split,
        content=parameters.content,
        signing=signing_of(parameters),
        retries=Retries(**parameters.retries.model_dump()),
    )
    if parameters.split > 1 and (parameters.executor in ("processes", "ray") or (parameters.workers or 1) > 1):
        raise UnexpectedError("split: the processes share each clip; leave executor and workers out", stage="settings")
    asked = "threads" if parameters.split > 1 else parameters.executor
    sharing: AbstractContextManager[None] = nullcontext()
    if parameters.split > 1:
        from t2vz.modes.split import leading  # which imports torch

        sharing = leading(parameters.split, parameters.device)
    counts = Counter(dict.fromkeys(("ok", "failed", "elsewhere", "skipped", "done"), 0))
    failures: list[ResultRow] = []
    finished: list[ResultRow] = []
    shown: RowTasks | ShardTasks = ShardTasks(parameters.shard_rows)
    port, folder = parameters.metrics_port, parameters.metrics_folder
    gallery = parameters.gallery_url or gallery_address(parameters.out)
    with (
        workers.connected(asked),
        metrics.exposing(settings.run_id, settings.manifest, port=port, folder=folder),
        opening(settings),
    ):
        executor, places = placed(asked, parameters.device, parameters.workers)
        pool = Pool(
            settings,
            executor,
            places,
            in_flight=parameters.in_flight,
            attempts=parameters.max_attempts,
            function=workers.RENDER,
        )
        try:
            with sharing, pool, _merging(settings) as merge:  # workers start while rows are planned
                items = plan(
                    parameters.manifest,
                    parameters.out,
                    parameters.defaults,
                    settings.limits,
                    parameters.verify,
                    settings.models,
                    parameters.content,
                )
                ahead, whole = _ahead(items, parameters.max_row_tasks, counts)
                progress, counted = Progress(), None
                if whole:
                    shown, progress.total = RowTasks(stages=len(ahead) <= _STAGE_ROWS), len(ahead) + counts["done"]
                    events.emit(events.Event("planned", total=len(ahead), done=counts["done"]))
                else:
                    rows = read(parameters.manifest, parameters.defaults)
                    threading.Thread(target=progress.count, args=(rows,), daemon=True).start()
                for outcome in _rendered(pool, _to_do(chain(ahead, items), settings), settings, shown.begin):
                    counts[outcome.status] += 1
                    if isinstance(outcome.item, Unready):
                        shown.unready(outcome.item)
                    if outcome.row is not None and outcome.status != "skipped":
                        merge()
                        first, limit = (finished, PICTURES) if outcome.status == "ok" else (failures, TOLD_ROWS)
                        first.extend([outcome.row][: limit - len(first)])
                    progress.tell(counts)
                    if counted is None and not whole and progress.total is not None:
                        counted = progress.total - counts["done"]
                        events.emit(events.Event("planned", total=counted, done=counts["done"]))
                if not whole:
                    to_do = counts.total() - counts["done"]
                    events.emit(events.Event("planned", total=to_do, done=counts["done"]))
        except BaseException:
            shown.end(_TASKS_END_S)
            raise
        shown.end()
    progress.tell(counts, now=True)
    publish(parameters.manifest, parameters.out, counts, failures, finished, gallery)
    if counts["ok"] or counts["failed"]:  # else there is nothing of this run in the table, which is read for it
        publish_plots(parameters.out, settings.run_id)
    summary = {status: number for status, number in counts.items() if number} | {"run_id": settings.run_id}
    if parameters.max_failed is not None and counts["failed"] > parameters.max_failed:
        return Failed(message=f"{message(counts)}; at most {parameters.max_failed} may fail", data=summary)
    return Completed(message=message(counts), data=summary)


def _ahead(
    items: Iterator[Job | Unready | Done], limit: int, counts: Counter[str]
) -> tuple[list[Job | Unready | Done], bool]:
    """At most `limit` + 1 planned rows that are to do, those done before being counted, and whether these are all."""
    ahead: list[Job | Unready | Done] = []
    for item in items:
        if isinstance(item, Done):
            counts["done"] += 1
            continue
        ahead.append(item)
        if len(ahead) > limit:
            return ahead, False
    return ahead, True


def _rendered(
    pool: Pool, items: Iterable[Job | Outcome], settings: Settings, begin: Callable[[Job], Feed]
) -> Iterator[Outcome]:
    """What becomes of the rows. Those that another run is at are looked at again in the end: done by then, or free as
    that run is dead, or still under way there.
    """
    elsewhere: list[Job] = []
    for outcome in pool.run(items, begin):
        if outcome.status == "skipped" and isinstance(outcome.item, Job):
            elsewhere.append(outcome.item)
        else:
            yield outcome
    if elsewhere:
        claims.await_others(settings.out, settings.run_id, settings.stopping, settings.lease_s)
        yield from pool.run(elsewhere, begin)


def _to_do(items: Iterable[Job | Unready | Done], settings: Settings) -> Iterator[Job | Outcome]:
    """The jobs, and of other rows what has become of them: those that can't be rendered are recorded here."""
    for item in items:
        if isinstance(item, Job):
            yield item
        elif isinstance(item, Done):
            yield Outcome(item, "done")
        else:
            yield Outcome(item, "failed", record_unready(item, settings))


@contextmanager
def _merging(settings: Settings) -> Iterator[Callable[[], None]]:
    """What to call for each result: they are merged into the table in batches, beside the rendering."""
    waiting, merged_at = 0, time.monotonic()
    merging: Future[None] | None = None

    def merge() -> None:
        nonlocal waiting, merged_at, merging
        waiting += 1
        if waiting < _FLUSH_ROWS and time.monotonic() - merged_at < _FLUSH_S:
            return
        if merging is not None:
            if not merging.done():
                return
            merging.result()
        waiting, merged_at = 0, time.monotonic()
        merging = thread.submit(merge_results, settings)

    with ThreadPoolExecutor(1, "merges results") as thread:
        yield merge
        if merging is not None:
            merging.result()
