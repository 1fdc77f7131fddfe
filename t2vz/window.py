"""The order in which rows are pulled: the next for a worker is chosen among some hundred that are read ahead."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Collection
from typing import NamedTuple

from t2vz.plan import Job

_NATIVE_PX = 512  # for the order's sake only: of rows that leave their size to the model


class Group(NamedTuple):
    """What a process has to load for a job. Rows of one base share the bigger part of it."""

    base: tuple[str, bool, str, bool]
    whole: tuple[str, str]

    @classmethod
    def of(cls, job: Job) -> Group:
        spec = job.row.spec
        # The revision of a job begins with its model's, then come adapters, ControlNets and annotators.
        base = job.model_revision.partition(" ")[0], spec.mode == "edit", spec.dtype, spec.offload
        return cls(base, (job.model_revision, spec.mode))


def cost(job: Job) -> int:
    """What a job takes, in UNet evaluations times pixels."""
    spec = job.row.spec
    return job.unet_evaluations * (spec.width or _NATIVE_PX) * (spec.height or _NATIVE_PX)


class Closed(Exception):
    """Nobody takes jobs any more."""


class Window:
    """Jobs that one thread reads ahead and another hands out.

    size: how many are held at most. Reading also waits while the oldest of them has been passed over by 2 × `size`
    later ones: so no row waits for ever, and the order is kept to that distance.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._groups: dict[Group, list[tuple[int, int, Job]]] = {}  # heaps: longest first, then as read
        self._waiting: dict[int, None] = {}  # places of the jobs held, in the order of reading
        self._read = 0
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, job: Job) -> None:
        """Add a job; waits for room. Raises Closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room())
            if self._closed:
                raise Closed
            heapq.heappush(self._groups.setdefault(Group.of(job), []), (-cost(job), self._read, job))
            self._waiting[self._read] = None
            self._read += 1

    def take(self, loaded: Group | None = None, elsewhere: Collection[Group] = ()) -> Job | None:
        """The next job for a worker that has `loaded`, while other workers have `elsewhere`; None if there is none.

        The longest of those that need nothing loaded; else of another group, rather of the same base model and
        rather one that no other worker has, and then of the one with the most to do.
        """
        with self._changed:
            if not self._groups:
                return None
            if loaded is None or loaded not in self._groups:
                base = None if loaded is None else loaded.base
                loaded = min(
                    self._groups,
                    key=lambda group: (
                        group in elsewhere,
                        group.base != base,
                        sum(cost for cost, _, _ in self._groups[group]),
                    ),
                )
            jobs = self._groups[loaded]
            _, place, job = heapq.heappop(jobs)
            if not jobs:
                del self._groups[loaded]
            del self._waiting[place]
            self._changed.notify_all()
            return job

    def close(self) -> None:
        """Let whoever puts go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _has_room(self) -> bool:
        oldest = next(iter(self._waiting), self._read)
        return len(self._waiting) < self._size and self._read - oldest < 2 * self._size
