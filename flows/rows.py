"""The rows of a run as Prefect task runs: a task a row with its stages inside, or a task for a shard of rows.

Rows are rendered by the pool's workers. The tasks here follow what is told of them: they carry the logs, the progress
and the states that the UI shows. If Prefect loses some of that, no row is lost.
"""

import queue
import time
from collections import Counter
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, wait
from prefect.states import Cancelled, Completed, Crashed, Failed
from prefect.utilities.annotations import quote

from t2vz.events import Event
from t2vz.plan import Job, Unready
from t2vz.render import STAGES
from t2vz.results import ResultRow
from t2vz.workers import Feed as Told
from t2vz.workers import Log, Outcome

_PROGRESS_PARTS = 4  # a log line for each such part of the denoising …
_PROGRESS_S = 60.0  # … and after so long without one
_SHARD_PROGRESS_S = 10.0
_TOLD_FAILURES = 20  # of a shard, in its log


UNDONE = {"elsewhere": "done by another run", "skipped": "left to another run that is at it"}

Item = Event | Log | Outcome | int  # a number: so many rows a shard has


class Feed:
    """What becomes of a row, from the pool's thread to its task's."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._back: list[Item] = []
        self.put = self._queue.put

    def get(self) -> Item:
        return self._back.pop() if self._back else self._queue.get()

    def put_back(self, what: Item) -> None:
        """Have it got again by whoever asks next."""
        self._back.append(what)


class RowTasks:
    """A task run for each row that is begun, and with `stages` one for each try of its stages. To be used in the flow's
    thread.
    """

    def __init__(self, *, stages: bool = True) -> None:
        self._stages = stages
        self._futures: list[PrefectFuture[Any]] = []

    def begin(self, job: Job) -> Told:
        feed, spec = Feed(), job.row.spec
        row = render_row.with_options(tags=[f"mode: {spec.mode}", f"model: {Path(spec.model).name}"])
        self._futures.append(row.submit(job.row.id, self._stages, quote(feed)))
        return feed.put

    def unready(self, item: Unready) -> None:
        """Show a row that can't be rendered as it stands."""
        self._futures.append(refuse_row.submit(item.id, f"{item.error.stage}: {item.error.message}"))

    def end(self, timeout_s: float | None = None) -> None:
        """Wait for the tasks of rows that have ended."""
        wait(self._futures, timeout=timeout_s)


class ShardTasks:
    """A task run for each `size` rows, in the order in which they are begun. To be used in the flow's thread."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._futures: list[PrefectFuture[Any]] = []
        self._feed = Feed()
        self._rows = 0  # of the present shard

    def begin(self, job: Job) -> Told:
        if self._rows == self._size:
            self._close()
        if self._rows == 0:
            self._feed = Feed()
            first = len(self._futures) * self._size + 1
            self._futures.append(render_shard.submit(first, first + self._size - 1, quote(self._feed)))
        self._rows += 1
        return self._feed.put

    def unready(self, item: Unready) -> None:
        """They are many: the results table and the summary tell of them."""

    def end(self, timeout_s: float | None = None) -> None:
        """Wait for the tasks of shards that have ended."""
        self._close()
        wait(self._futures, timeout=timeout_s)

    def _close(self) -> None:
        self._feed.put(self._rows)
        self._rows = 0


@task(
    name="row",
    task_run_name="{row}",
    description="One row of the manifest, from its source to its video.",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def render_row(row: str, stages: bool, feed: Any) -> Any:
    """Follow one row to its end: Completed, Failed with its plain message, or Cancelled if the run was stopped."""
    logger, tries = get_run_logger(), Counter[str]()
    while not isinstance(what := feed.get(), Outcome):
        if isinstance(what, Event) and what.kind == "stage":
            tries[what.stage] += 1
            again = f" (try {tries[what.stage]})" if tries[what.stage] > 1 else ""
            if not stages:
                logger.info("%s%s", what.stage, again)
                continue
            _STAGE_TASKS[what.stage](row, what.stage, again, quote(feed), return_state=True)
        else:
            _log(logger, what)
    return _row_state(what)


@task(
    name="row",
    task_run_name="{row}",
    description="A row of the manifest that can't be rendered as it stands.",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def refuse_row(row: str, reason: str) -> Any:
    """Failed, with the reason."""
    return Failed(message=reason)


@task(name="stage", task_run_name="{stage} {row}{again}", cache_policy=NO_CACHE, persist_result=False)
def render_stage(row: str, stage: str, again: str, feed: Any) -> Any:
    """Follow one try of a stage to its end. Crashed if its worker died."""
    logger, progress = get_run_logger(), _Progress()
    while True:
        what = feed.get()
        if isinstance(what, Event) and what.kind == "stage_ended":
            return Completed() if what.status == "ok" else Failed(message=what.message)
        if isinstance(what, Event) and what.kind == "row_lost":
            feed.put_back(what)
            return Crashed(message=what.message)
        if isinstance(what, Outcome):
            feed.put_back(what)
            return Crashed(message="its worker died") if what.status == "failed" else Cancelled(message="stopped")
        if isinstance(what, Event) and what.kind == "step":
            if progress.due(what):
                logger.info("%d of %d UNet evaluations, %d %%", what.done, what.total, 100 * what.done // what.total)
        else:
            _log(logger, what)


_STAGE_TASKS = {
    stage: render_stage.with_options(name=stage, description=description)
    for stage, description in zip(
        STAGES,
        (
            "Read the frames of the source.",
            "Make the condition frames that control the model.",
            "Denoise the frames.",
            "Write the frames to a video.",
        ),
        strict=True,
    )
}


@task(
    name="shard",
    task_run_name="rows {first} to {last}",
    description="A part of a big manifest's rows, counted in the order in which they are begun.",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def render_shard(first: int, last: int, feed: Any) -> Any:
    """Follow the rows of a shard to their ends: Completed with counts, Cancelled if the run was stopped."""
    logger, counts = get_run_logger(), Counter[str]()
    rows, told_at = None, time.monotonic()
    while rows is None or counts.total() < rows:
        what = feed.get()
        if isinstance(what, int):
            rows = what
        elif isinstance(what, Outcome):
            counts[what.status] += 1
            if what.status == "failed" and counts["failed"] <= _TOLD_FAILURES:
                logger.error("%s: %s", what.id, _reason(what.row))
        else:
            _log(logger, what)
        if time.monotonic() - told_at > _SHARD_PROGRESS_S:
            told_at = time.monotonic()
            logger.info("%s", _counted(counts))
    if counts["stopped"]:
        return Cancelled(message=_counted(counts))
    return Completed(message=_counted(counts))


class _Progress:
    """Which denoising steps are worth a log line."""

    def __init__(self) -> None:
        self._part, self._at = 0, time.monotonic()

    def due(self, step: Event) -> bool:
        part = _PROGRESS_PARTS * step.done // max(1, step.total)
        if part == self._part and time.monotonic() - self._at < _PROGRESS_S:
            return False
        self._part, self._at = part, time.monotonic()
        return True


def _log(logger: Any, what: Item) -> None:
    if isinstance(what, Log):
        logger.log(what.level, "%s", what.message)
    elif isinstance(what, Event) and what.kind in ("warning", "row_lost"):
        logger.warning("%s", what.message)


def _row_state(outcome: Outcome) -> Any:
    row = outcome.row
    if outcome.status == "stopped":
        return Cancelled(message="stopped") if outcome.error is None else Failed(message=outcome.error.message)
    if row is not None and row.status == "failed":
        return Failed(message=_reason(row))
    if outcome.status in UNDONE:
        return Completed(message=UNDONE[outcome.status])
    if row is None:
        return Completed(message=outcome.status)
    return Completed(message=f"{row.output_uri} in {row.wall_s or 0:.1f} s")


def _reason(row: ResultRow | None) -> str:
    return "" if row is None else f"{row.error_stage}: {row.error_message}"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {status}" for status, number in counts.items()) or "no rows"
