"""What happens during a run, told to whoever listens in this process: the terminal's progress, a log.

A listener must not raise and must be quick: it is called in the thread that works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Event:
    """kind: `planned` (total: rows to render, done: rows done before) before the first row; of a large manifest once it
    is counted, and again in the end, when it is known which were done. For each row `row_started`, `stage` as each
    try of one begins and `stage_ended` with its status and, if failed, the message; `step` (done of total denoising
    steps), `warning` (message), `row_lost` (message) when the process that worked on it died and another goes on with
    it, and `row_finished` with its status, if failed the message, and the `ResultRow` unless another run did it.
    """

    kind: Literal["planned", "row_started", "stage", "stage_ended", "step", "warning", "row_lost", "row_finished"]
    id: str = ""
    stage: str = ""
    done: int = 0
    total: int = 0
    status: str = ""
    message: str = ""
    row: Any = None


_OUTCOMES = {
    "ok": "rendered",
    "failed": "failed",
    "elsewhere": "done by another run",
    "skipped": "left to another run that is at them",
    "done": "done before",
}


def outcomes(rows: Mapping[str, Any]) -> list[tuple[str, int]]:
    """How a run's rows ended, in words, each with their number; of those that there are."""
    return [(word, rows[status]) for status, word in _OUTCOMES.items() if rows.get(status)]


def counted(rows: Mapping[str, Any]) -> str:
    """`outcomes` as in `8 rendered, 1 failed`; empty if there are none."""
    return ", ".join(f"{number} {word}" for word, number in outcomes(rows))


Listener = Callable[[Event], None]
_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call `listener` with every event of this process while the block runs."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def emit(event: Event) -> None:
    for listener in tuple(_listeners):
        listener(event)
