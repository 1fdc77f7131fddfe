"""The terminal's view of a run: progress from the events of this process, and log lines that don't break it."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from t2vz.events import Event, Listener, listening

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_INTERVAL_S = 30.0


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
        self._rows: Counter[str] = Counter()
        self._total: int | None = None
        self._told_at = time.monotonic()

    def __call__(self, event: Event) -> None:
        with self._lock:
            if event.kind == "planned":
                self._total = event.total
                self._say(f"{event.total} rows to render, {event.done} done before")
            elif event.kind in ("warning", "row_lost"):
                self._say(f"{event.id}: warning: {event.message}")
            elif event.kind == "row_finished":
                self._rows[event.status] += 1
                if event.status == "failed":
                    self._say(f"{event.id}: failed: {event.message}")
                self._say_counts()

    def _say_counts(self) -> None:
        if time.monotonic() - self._told_at >= _PLAIN_INTERVAL_S:
            self._told_at = time.monotonic()
            of = "" if self._total is None else f" of {self._total}"
            self._say(f"{self._rows.total()}{of} rows, {self._rows['failed']} failed")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _bars(console: Console) -> Iterator[Listener]:
    """One bar for all rows, and one for the denoising steps of each row under way."""
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,  # the closing summary says it again
    )
    rows: dict[str, TaskID] = {}
    lock = threading.Lock()
    failed = 0

    def listener(event: Event) -> None:
        nonlocal failed
        with lock:
            row = rows.get(event.id)
            if event.kind == "planned":
                progress.update(everything, total=event.total)
            elif event.kind == "row_started":
                rows[event.id] = progress.add_task(f"  {escape(event.id)} waiting", total=None)
            elif event.kind == "stage" and row is not None:
                progress.update(row, description=f"  {escape(event.id)} {event.stage}")
            elif event.kind == "step" and row is not None:
                progress.update(row, completed=event.done, total=event.total)
            elif event.kind == "warning":
                progress.console.print(f"{escape(event.id)}: [yellow]warning[/]: {escape(event.message)}")
            elif event.kind == "row_lost":
                if row is not None:  # it will be started again
                    progress.remove_task(rows.pop(event.id))
                progress.console.print(f"{escape(event.id)}: [yellow]warning[/]: {escape(event.message)}")
            elif event.kind == "row_finished":
                if row is not None:
                    progress.remove_task(rows.pop(event.id))
                if event.status == "failed":
                    failed += 1
                    progress.console.print(f"{escape(event.id)}: [red]failed[/]: {escape(event.message)}")
                progress.update(everything, advance=1, description=f"rows, {failed} failed" if failed else "rows")

    with progress:
        everything = progress.add_task("rows", total=None)
        yield listener
