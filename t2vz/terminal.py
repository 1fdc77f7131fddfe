"""The terminal's view of a run: progress from the events of this process, log lines that don't break it, and in the
end a table.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from t2vz.events import Event, Listener, counted, listening

if TYPE_CHECKING:
    from rich.console import Console

    from t2vz.results import ResultRow

_PLAIN_INTERVAL_S = 30.0
_MOST_BARS = 16  # of rows under way: 8 GPUs with their rows in flight would fill the screen


class Tally:
    """How far a run is, from its events: how many rows ended how, frames, speed and the time that is left.

    clock: seconds, from any beginning. total is None as long as nobody knows how many rows there are to render.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = clock()
        self._under_way: dict[str, float] = {}  # the part of each row that is done
        self._rendered = 0  # rows that took time: those that could not be begun say nothing of the speed
        self.total: int | None = None
        self.rows: Counter[str] = Counter()
        self.frames = 0

    def add(self, event: Event) -> None:
        if event.kind == "planned":
            self.total = event.total
        elif event.kind == "row_started":
            self._under_way[event.id] = 0.0
        elif event.kind == "step":
            self._under_way[event.id] = event.done / max(1, event.total)
        elif event.kind == "row_lost":
            self._under_way.pop(event.id, None)
        elif event.kind == "row_finished":
            self.rows[event.status] += 1
            self._rendered += self._under_way.pop(event.id, None) is not None
            if event.status == "ok" and event.row is not None:
                self.frames += event.row.frames or 0

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._began_s

    @property
    def frames_per_s(self) -> float:
        return self.frames / max(self.elapsed_s, 1e-9)

    @property
    def left_s(self) -> float | None:
        """Seconds until the end if rows go on as they did; None if that can't be told yet."""
        begun = self._rendered + sum(self._under_way.values())
        if self.total is None or begun <= 0:
            return None
        left = self.total - self.rows.total() - sum(self._under_way.values())
        return max(0.0, self.elapsed_s * left / begun)

    def __str__(self) -> str:
        """As in `12 of 40 rows, 1 failed, 3.1 frames/s, 0:04:10 left`."""
        said = [f"{self.rows.total()}{'' if self.total is None else f' of {self.total}'} rows"]
        said.append(f"{self.rows['failed']} failed")
        if self.frames:
            said.append(f"{self.frames_per_s:.2g} frames/s")
        if self.left_s is not None:
            said.append(f"{duration(self.left_s)} left")
        return ", ".join(said)


def duration(seconds: float) -> str:
    """As in `0:04:10`."""
    minutes, whole = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{whole:02}"


@contextmanager
def following(console: Console, quiet: bool = False) -> Iterator[None]:
    """Show the progress of what runs in the block: bars on a terminal, else a line now and then."""
    if quiet:
        yield
    elif console.is_terminal:
        with _bars(console) as listener, listening(listener):
            yield
    else:
        with listening(_Lines(console)):
            yield


@contextmanager
def quiet_logs(console: Console) -> Iterator[None]:
    """Log warnings and errors through `console`, so that they appear above the bars, and nothing else.

    Prefect's logs of task runs and errors of flow runs are left out: they say again what the row's line or its own
    log says. They still go to its server. So are its workers' words while they send the last of that.
    """
    from rich.logging import RichHandler

    handler = RichHandler(logging.WARNING, console, show_time=False, show_path=False)
    handler.addFilter(
        lambda record: (
            record.name not in ("EventsWorker", "APILogWorker", "prefect.task_runs")
            and (record.levelno < logging.ERROR or record.name != "prefect.flow_runs")
        )
    )
    root = logging.getLogger()
    before = root.handlers[:]
    root.handlers[:] = [handler]
    try:
        yield
    finally:
        root.handlers[:] = before


class _Lines:
    """A line for every failed row at once, and one with the counts every half a minute."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._tally = Tally()
        self._told_at = time.monotonic()

    def __call__(self, event: Event) -> None:
        with self._lock:
            known = self._tally.total
            self._tally.add(event)
            if event.kind == "planned" and known is None:
                self._say(f"{event.total} rows to render, {event.done} done before")
            elif event.kind in ("warning", "row_lost"):
                self._say(f"{event.id}: warning: {event.message}")
            elif event.kind == "row_finished":
                if event.status == "failed":
                    self._say(f"{event.id}: failed: {event.message}")
                if time.monotonic() - self._told_at >= _PLAIN_INTERVAL_S:
                    self._told_at = time.monotonic()
                    self._say(str(self._tally))

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _bars(console: Console) -> Iterator[Listener]:
    """One bar for all rows, with speed, time left and failures so far, and one for the denoising steps of each row
    under way.
    """
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[said]}", style="progress.remaining"),
        console=console,
        transient=True,  # the closing summary says it again
    )
    rows: dict[str, TaskID] = {}
    tally, lock = Tally(), threading.Lock()

    def say_all() -> None:
        failed, left = tally.rows["failed"], tally.left_s
        said = [f"{tally.frames_per_s:.2g} frames/s"] if tally.frames else []
        said += [f"{duration(left)} left"] if left is not None else []
        description = f"rows, [red]{failed} failed[/]" if failed else "rows"
        progress.update(
            everything,
            total=tally.total,
            completed=tally.rows.total(),
            description=description,
            said=", ".join(said),
        )

    def drop(id: str) -> None:
        if id in rows:
            progress.remove_task(rows.pop(id))

    def listener(event: Event) -> None:
        with lock:
            tally.add(event)
            row = rows.get(event.id)
            if event.kind == "row_started" and len(rows) < _MOST_BARS:
                rows[event.id] = progress.add_task(f"  {escape(event.id)} waiting", total=None, said="")
            elif event.kind == "stage" and row is not None:
                progress.update(row, description=f"  {escape(event.id)} {event.stage}")
            elif event.kind == "step" and row is not None:
                progress.update(row, completed=event.done, total=event.total)
            elif event.kind in ("warning", "row_lost"):
                if event.kind == "row_lost":  # it will be started again
                    drop(event.id)
                progress.console.print(f"{escape(event.id)}: [yellow]warning[/]: {escape(event.message)}")
            elif event.kind == "row_finished":
                drop(event.id)
                if event.status == "failed":
                    progress.console.print(f"{escape(event.id)}: [red]failed[/]: {escape(event.message)}")
            say_all()

    with progress:
        everything = progress.add_task("rows", total=None, said="")
        yield listener


def closing_table(console: Console, rows: Sequence[ResultRow], counts: Counter[str], elapsed_s: float) -> None:
    """Print a run's end: a line for each of `rows`, those that failed with their reason, and what it all took.

    counts: all rows of the run by how they ended. rows may be fewer.
    """
    from rich.table import Table
    from rich.text import Text

    if rows:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("row", "mode"):
            table.add_column(name, overflow="fold")
        for name in ("frames", "time"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("video, or why there is none", overflow="fold")
        for row in rows:
            ok = row.status == "ok"
            told = row.output_uri or "" if ok else f"{row.error_stage}: {row.error_message}"
            table.add_row(
                Text(row.id, "" if ok else "red"),
                row.mode or "",
                str(row.frames or "") if ok else Text(row.status, "red"),
                "" if row.wall_s is None else f"{row.wall_s:.1f} s",
                Text(told, "" if ok else "red"),
            )
        console.print(table)
    frames = sum(row.frames or 0 for row in rows if row.status == "ok")
    said = [counted(counts), f"in {duration(elapsed_s)}"]
    if frames and counts["ok"] <= len(rows):
        said.append(f"({frames} frames, {frames / max(elapsed_s, 1e-9):.2g} frames/s)")
    console.print(Text(" ".join(filter(None, said)), "bold"), highlight=False)
