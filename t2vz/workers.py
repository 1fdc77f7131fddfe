"""Warm workers: long-living processes, one a device, that hold loaded models and pull rows; what dies is replaced.

`Pool` is the parent's side: it reads jobs ahead, hands each worker the next that suits it, passes on what the
workers tell, and gives the rows of a dead worker to another. `serve` is the worker's side, whatever carries its
messages: `EXECUTORS` has the ways. Between the two go jobs, settings, events and result rows, never frames.
"""

from __future__ import annotations

import importlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import count
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from t2vz.errors import DeviceLost, T2VZError, UnexpectedError, WorkerDied, translate
from t2vz.events import Event, emit, listening
from t2vz.plan import Done, Job, Unready
from t2vz.processes import die_with_parent
from t2vz.render import Settings, record_lost, resolve_device
from t2vz.results import ResultRow
from t2vz.window import Closed, Group, Window

RENDER = "t2vz.render:render"  # the function of (job, settings, attempts lost) that does a row
STOP_S = 8.0  # what rows under way get to end at a step, before their worker is killed

_LOOK_AHEAD = 1000  # jobs; a few MB, and enough for a model's rows to be done together
_ATTEMPTS = 3  # at a row whose worker dies
_RESTARTS = 5  # of a worker that finishes no row in between; a row alone in it may kill it besides
_BACKOFF_S = 1.0  # before its second restart; doubled each time
_STEP_EVENT_S = 0.25  # apart, of one row
_LEAVE_S = 5.0
_HOPE_S = 60.0  # what a place gets to have a worker, before rows that need one they did not die in do without

_log = logging.getLogger(__name__)


# To a worker


@dataclass(frozen=True, slots=True)
class Assignment:
    """A job to do. number: of this attempt, in answers. lost: attempts at the job before this one."""

    number: int
    job: Job
    lost: int


Order = Assignment | Literal["stop", "leave"]  # stop: rows under way at their next step; leave: once they ended


# From a worker


@dataclass(frozen=True, slots=True)
class Ready:
    """It can take rows. device: as accelerate names it."""

    device: str


@dataclass(frozen=True, slots=True)
class Log:
    """A log record of the row's thread."""

    name: str
    level: int
    message: str


@dataclass(frozen=True, slots=True)
class Told:
    """Something happened to a row; number: the attempt's."""

    number: int
    what: Event | Log


@dataclass(frozen=True, slots=True)
class Ended:
    """An attempt is over. row: None if another run finished the job, or with `error` or `stopped`."""

    number: int
    row: ResultRow | None = None
    error: T2VZError | None = None
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class Gone:
    """The worker is no more."""

    reason: str


Answer = Ready | Told | Ended | Gone


def serve(receive: Callable[[], Order], send: Callable[[Answer], None], settings: Settings, function: str) -> None:
    """A worker's whole life: each row that it receives is done in a thread of its own, until it is told to leave.

    What rows emit and log is sent on under their number. function: "module:name" of what does a row. Raises what
    `receive` raises, EOFError if the parent is gone. Raises UnexpectedError if there is no such function.
    """
    body: Callable[[Job, Settings, int], ResultRow | None] = _imported(function)
    numbers: dict[int, int] = {}  # of the rows under way, by thread
    stepped: dict[int, float] = {}

    def tell(event: Event) -> None:
        number = numbers.get(threading.get_ident())
        if number is None:
            return
        if event.kind == "step" and event.done < event.total:
            if time.monotonic() - stepped.get(number, 0.0) < _STEP_EVENT_S:
                return
            stepped[number] = time.monotonic()
        send(Told(number, event))

    def work(given: Assignment) -> None:
        numbers[threading.get_ident()] = given.number
        try:
            ended = Ended(given.number, body(given.job, settings, given.lost))
        except KeyboardInterrupt:
            ended = Ended(given.number, stopped=True)
        except BaseException as error:
            ended = Ended(given.number, error=translate(error, "unknown"))
        finally:
            del numbers[threading.get_ident()]
            stepped.pop(given.number, None)
        send(ended)

    threads: list[threading.Thread] = []
    with listening(tell), _logs_sent(numbers, send):
        send(Ready(settings.device))
        while (order := receive()) != "leave":
            if isinstance(order, Assignment):
                threads = [thread for thread in threads if thread.is_alive()]
                threads.append(threading.Thread(target=work, args=(order,), name=order.job.row.id, daemon=True))
                threads[-1].start()
            else:
                settings.stopping.set()
        for thread in threads:
            thread.join()


def _imported(name: str) -> Any:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnexpectedError(f"{name}: there is no such function to do rows with ({error})") from error


@contextmanager
def _logs_sent(numbers: Mapping[int, int], send: Callable[[Answer], None]) -> Iterator[None]:
    class Sending(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            number = numbers.get(record.thread or 0)
            if number is not None:
                send(Told(number, Log(record.name, record.levelno, record.getMessage())))

    handler = Sending()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


# Where workers live


@dataclass(frozen=True)
class Place:
    """A device for a worker. device: as in Settings, asked within it. gpu: as CUDA_VISIBLE_DEVICES has it, for the one
    that accelerate shall find there. threads: of its arithmetic, None: as many as there are cores.
    """

    device: str
    gpu: str | None = None
    threads: int | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What has to be set before a process that works there imports anything."""
        found = {} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": self.gpu}
        if self.threads is not None and "OMP_NUM_THREADS" not in os.environ:
            found["OMP_NUM_THREADS"] = str(self.threads)
        return found


def placed(executor: str, device: str, workers: int | None) -> tuple[str, tuple[Place, ...]]:
    """The executor's name and the places of a run's workers.

    executor: "auto": processes on GPUs and for several workers, else threads; or a name in EXECUTORS; within
    `connected` for "ray". workers: None: one for each GPU, or one. On the CPU so many share its cores.
    """
    if executor == "ray":
        return executor, _imported("t2vz.ray_workers:placed")(device, workers)
    gpus = _gpus(device)
    number = max(1, len(gpus)) if workers is None else workers
    if executor == "auto":
        executor = "processes" if gpus or number > 1 else "threads"
    if executor == "threads":
        if number > 1 and workers is not None:
            raise UnexpectedError("threads are one worker: leave workers out, or choose processes", stage="settings")
        return executor, (Place(device),)
    if gpus:
        return executor, tuple(Place("auto", gpu=gpus[i % len(gpus)]) for i in range(number))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return executor, (Place(device, threads=max(1, cores // number)),) * number


def connected(executor: str) -> AbstractContextManager[None]:
    """What an executor needs from before its workers are placed until they are gone: with Ray its cluster."""
    return _imported("t2vz.ray_workers:connected")() if executor == "ray" else nullcontext()


def _gpus(device: str) -> tuple[str, ...]:
    """The NVIDIA GPUs that `device` means, as CUDA_VISIBLE_DEVICES names them. Asks the driver only: a process that
    has begun to compute on a GPU holds some of its memory.
    """
    if device not in ("auto", "cuda") and not device.startswith("cuda:"):
        return ()
    import torch

    number = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = tuple(map(str, range(number))) if visible is None else tuple(visible.split(","))[:number]
    if device.startswith("cuda:"):
        which = device.removeprefix("cuda:")
        return names[int(which) : int(which) + 1] if which.isdecimal() else ()
    return names


class Worker(Protocol):
    """The parent's hold on one worker. Made with (name, place, settings, function, deliver); what it answers is
    delivered in any thread, a `Gone` last.
    """

    in_process: bool

    def send(self, order: Order) -> None: ...

    def kill(self) -> None: ...

    def join(self, timeout_s: float) -> bool: ...


Deliver = Callable[[Worker, Answer], None]


class ThreadWorker:
    """A worker in this process: for tests and debugging, and as good where one device is all there is.

    It can't be killed, nor can another take over a device that this process has lost.
    """

    in_process = True

    def __init__(self, name: str, place: Place, settings: Settings, function: str, deliver: Deliver) -> None:
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()

        def live() -> None:
            reason = "it left"
            try:
                serve(self._orders.get, lambda answer: deliver(self, answer), settings, function)
            except T2VZError as error:
                reason = error.message
            deliver(self, Gone(reason))

        self._thread = threading.Thread(target=live, name=name, daemon=True)
        self._thread.start()

    def send(self, order: Order) -> None:
        self._orders.put(order)

    def kill(self) -> None:
        self._orders.put("stop")
        self._orders.put("leave")

    def join(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


class ProcessWorker:
    """A worker in a process of its own, which ends when the thread that made it does, however that ends.

    A fresh interpreter, not multiprocessing's: that one would import the program's main module again, and the
    variables that place CUDA must be set before anything is imported.
    """

    in_process = False

    def __init__(self, name: str, place: Place, settings: Settings, function: str, deliver: Deliver) -> None:
        self._name, self._deliver = name, deliver
        ours, theirs = socket.socketpair()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (what is printed; its end tells why a worker died)
        child = "import sys; from t2vz.workers import main; main(int(sys.argv[1]))"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", child, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **place.environment},
            )
        self.pid = self._process.pid
        self._connection = Connection(ours.detach())
        self._sending = threading.Lock()
        level = logging.getLogger("t2vz").getEffectiveLevel()
        self.send((os.getpid(), place, replace(settings, device=place.device), function, level))
        self._reader = threading.Thread(target=self._read, name=f"{name} answers", daemon=True)
        self._reader.start()

    def send(self, order: Any) -> None:
        with suppress(OSError), self._sending:  # a worker that is gone is told by the reader
            self._connection.send(order)

    def kill(self) -> None:
        self._process.kill()

    def join(self, timeout_s: float) -> bool:
        self._reader.join(timeout_s)
        return not self._reader.is_alive()

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._deliver(self, self._connection.recv())
        try:
            code = self._process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._deliver(self, Gone(f"{self._name} (process {self.pid}) {self._said(code)}"))
        with self._sending:
            self._connection.close()
        self._output.close()

    def _said(self, code: int) -> str:
        self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, self._output.tell() - 2000))
        lines = self._output.read().decode(errors="replace").split("\n")
        last = next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
        with suppress(ValueError):
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return f"{how}: {last}" if last else how
        return f"was killed by signal {-code}"


# Where the `Worker` of each is; Ray's module is loaded when it is chosen.
EXECUTORS = {
    "threads": "t2vz.workers:ThreadWorker",
    "processes": "t2vz.workers:ProcessWorker",
    "ray": "t2vz.ray_workers:RayWorker",
}


def main(descriptor: int) -> None:
    """A worker's process. descriptor: of the socket to its parent."""
    connection = Connection(descriptor)
    for interruption in (signal.SIGINT, signal.SIGTERM):  # a terminal's Ctrl-C and a group's end reach all processes
        signal.signal(interruption, signal.SIG_IGN)  # at once; how the run ends is its parent's business
    parent, place, settings, function, level = connection.recv()
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    logging.getLogger("t2vz").setLevel(level)
    device = resolve_device(settings.device)
    if place.gpu is not None:
        _try_gpu(place.gpu, device)
    sending = threading.Lock()

    def send(answer: Answer) -> None:
        try:
            with sending:
                connection.send(answer)
        except OSError:  # nobody is there to hear of it
            os._exit(1)

    with suppress(EOFError, OSError):
        serve(connection.recv, send, replace(settings, device=device), function)
        os._exit(0)  # not through the ends of libraries' threads, which may abort
    os._exit(1)


def _try_gpu(gpu: str, device: str) -> None:
    """End this process if its GPU can't be used: accelerate would quietly take the CPU for it."""
    import torch

    if device == "cpu":
        sys.exit(f"CUDA finds no GPU {gpu}")
    torch.zeros(1, device=device)


# The pool


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a row. status: of its result, or "stopped"; "elsewhere" if another run has done it meanwhile,
    "skipped" if one is at it, "done" before this one. row: its result, if this run made it, or an unkept one of a
    skipped row. error: why it could not be kept.
    """

    item: Job | Unready | Done
    status: str
    row: ResultRow | None = None
    error: T2VZError | None = None

    @property
    def id(self) -> str:
        return self.item.row.id if isinstance(self.item, Job) else self.item.id


Feed = Callable[[Event | Log | Outcome], None]


@dataclass(eq=False)
class _Row:
    job: Job
    feed: Feed
    lost: int = 0
    lost_in: set[int] = field(default_factory=set)
    suspected: bool = False
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass(eq=False)
class _Slot:
    """A place and the worker in it, if there is one."""

    number: int
    place: Place
    worker: Worker | None = None
    ready: bool = False
    rows: dict[int, _Row] = field(default_factory=dict)
    loaded: Group | None = None
    failures: int = 0  # since it finished a row
    start_at: float | None = 0.0  # monotonic; None: there is a worker, or there shall be none any more
    missed_since: float = field(default_factory=time.monotonic)  # if it is not ready
    fault: T2VZError | None = None  # why its worker was killed; it is not gone yet

    @property
    def hoped_for(self) -> bool:
        """True if its worker is ready, or will be soon: a cluster may have no room for it any more."""
        return self.ready or (not self.given_up and time.monotonic() - self.missed_since < _HOPE_S)

    @property
    def given_up(self) -> bool:
        return self.worker is None and self.start_at is None

    @property
    def has_suspect(self) -> bool:
        return any(row.suspected for row in self.rows.values())


def _retell(what: Event | Log) -> None:
    """Let this process's listeners and log handlers have it. Under a name of its own, so that what listens to "t2vz"
    here does not take it for said here.
    """
    if isinstance(what, Event):
        emit(what)
    else:
        logging.getLogger(f"worker.{what.name}").log(what.level, "%s", what.message)


def _no_feed(job: Job) -> Feed:
    return lambda what: None


class Pool:
    """Workers for a run. A context manager: leaving it ends them, after the rows under way were stopped.

    executor, places: see `placed`. in_flight: rows under way at once in each worker; while one is at the device, the
    others decode and encode. function: "module:name" of what does a row.

    To be used from one thread that lives as long as the pool: its end is the workers', too.
    """

    def __init__(
        self,
        settings: Settings,
        executor: str = "threads",
        places: tuple[Place, ...] = (Place("auto"),),
        *,
        in_flight: int = 3,
        function: str = RENDER,
        look_ahead: int = _LOOK_AHEAD,
        attempts: int = _ATTEMPTS,
        restarts: int = _RESTARTS,
        backoff_s: float = _BACKOFF_S,
        stop_s: float = STOP_S,
    ) -> None:
        self._settings = settings
        self._start: Callable[[str, Place, Settings, str, Deliver], Worker] = _imported(EXECUTORS[executor])
        self._slots = [_Slot(number, place) for number, place in enumerate(places)]
        self._in_flight = in_flight
        self._function = function
        self._look_ahead = look_ahead
        self._attempts = attempts
        self._restarts = restarts
        self._backoff_s = backoff_s
        self._stop_s = stop_s
        self._answers: queue.SimpleQueue[tuple[Worker, Answer] | Outcome | None] = queue.SimpleQueue()
        self._suspects: deque[_Row] = deque()
        self._numbers = count()
        self._reason = ""  # of the last worker's death

    def __enter__(self) -> Self:
        self._start_due()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._under_way():
            self._stop()
        workers = [slot.worker for slot in self._slots if slot.worker is not None]
        for slot in self._slots:
            if slot.worker is not None and (slot.rows or not slot.ready):
                slot.worker.kill()
        for worker in workers:
            worker.send("leave")
        deadline = time.monotonic() + _LEAVE_S
        for worker in workers:
            if not worker.join(max(0.0, deadline - time.monotonic())):
                worker.kill()
                worker.join(_LEAVE_S)

    @property
    def workers(self) -> list[Worker]:
        """Those that there are now."""
        return [slot.worker for slot in self._slots if slot.worker is not None]

    def run(self, jobs: Iterable[Job | Outcome], begin: Callable[[Job], Feed] = _no_feed) -> Iterator[Outcome]:
        """Do the jobs; their outcomes as they end. `jobs` is read ahead, in another thread; an outcome that stands
        among them, of a row that needs no worker, is handed on.

        begin: called as a job is given to a worker for the first time; what it returns is then called with what
        becomes of the row: events, log records, and its outcome.

        A worker that dies takes its rows' attempts: they are done again, each alone in a worker, and one that was
        lost too often has failed. Raises what reading raises; WorkerDied if no worker can be kept alive; DeviceLost
        if this process, being the worker, lost it; what kept a result from being kept; KeyboardInterrupt if the
        run is stopping.
        """
        window, finished = Window(self._look_ahead), threading.Event()
        failed: list[BaseException] = []

        def read() -> None:
            try:
                for job in jobs:
                    if isinstance(job, Job):
                        window.put(job)
                        self._answers.put(None)
                    else:
                        self._answers.put(job)
            except Closed:
                pass
            except BaseException as error:
                failed.append(error)
            finished.set()
            self._answers.put(None)

        reader = threading.Thread(target=read, name="reads ahead", daemon=True)
        reader.start()
        try:
            while True:
                self._settings.check_stopping()
                self._start_due()
                self._hand_out(window, begin)
                # `finished` first: what was read just before it, or failed, is then seen.
                over = finished.is_set()
                if failed:
                    raise failed[0]
                if over and not len(window) and not self._under_way() and self._answers.empty():
                    return
                if all(slot.given_up for slot in self._slots):
                    raise WorkerDied(f"no worker can be kept alive: {self._reason}; run again when that is mended")
                yield from self._answered()
        finally:
            window.close()
            reader.join(_LEAVE_S)

    def _under_way(self) -> bool:
        return bool(self._suspects) or any(slot.rows for slot in self._slots)

    def _start_due(self) -> None:
        for slot in self._slots:
            if slot.start_at is not None and slot.start_at <= time.monotonic():
                slot.start_at = None
                settings = replace(self._settings, device=slot.place.device)
                deliver: Deliver = lambda worker, answer: self._answers.put((worker, answer))  # noqa: E731
                slot.worker = self._start(f"worker {slot.number}", slot.place, settings, self._function, deliver)

    def _hand_out(self, window: Window, begin: Callable[[Job], Feed]) -> None:
        """Give rows to workers with room for them, one each in turn."""
        given = True
        while given:
            given = False
            for slot in self._slots:
                if slot.worker is None or not slot.ready:
                    continue
                row = self._next(slot, window, begin)
                if row is not None:
                    given = True
                    number = next(self._numbers)
                    slot.rows[number], slot.loaded = row, Group.of(row.job)
                    row.started_at = datetime.now(UTC)
                    slot.worker.send(Assignment(number, row.job, row.lost))

    def _next(self, slot: _Slot, window: Window, begin: Callable[[Job], Feed]) -> _Row | None:
        if slot.has_suspect or len(slot.rows) >= self._in_flight:
            return None
        if slot is self._quarantine():
            return None if slot.rows else self._suspects.popleft()
        job = window.take(slot.loaded, [other.loaded for other in self._slots if other is not slot and other.loaded])
        return None if job is None else _Row(job, begin(job))

    def _quarantine(self) -> _Slot | None:
        """The worker that the next suspect waits for, to be alone in it: one in which it did not die yet, if there is
        or will soon be one. One suspect at a time: the other workers go on.
        """
        if not self._suspects or any(slot.has_suspect for slot in self._slots):
            return None
        fresh = [slot for slot in self._slots if slot.hoped_for and slot.number not in self._suspects[0].lost_in]
        return min((slot for slot in fresh or self._slots if slot.ready), key=lambda slot: len(slot.rows), default=None)

    def _answered(self) -> Iterator[Outcome]:
        """Wait for an answer, a job to hand out, or the time of a restart."""
        due = [slot.start_at - time.monotonic() for slot in self._slots if slot.start_at is not None]
        for slot in self._slots:
            if slot.fault is not None and time.monotonic() - slot.missed_since > _LEAVE_S:
                yield from self._lost(slot, slot.fault)  # the driver may hold a process whose device is lost for ever
        try:
            answered = self._answers.get(timeout=min([1.0, *(max(0.0, wait_s) for wait_s in due)]))
        except queue.Empty:
            return
        if isinstance(answered, Outcome):
            yield answered
        if answered is None or isinstance(answered, Outcome):
            return
        worker, answer = answered
        for slot in self._slots:
            if slot.worker is worker:  # else one that was given up already
                yield from self._take(slot, answer)
                break

    def _take(self, slot: _Slot, answer: Answer) -> Iterator[Outcome]:
        if isinstance(answer, Ready):
            slot.ready = True
        elif isinstance(answer, Told):
            row = slot.rows.get(answer.number)
            if row is not None:
                row.feed(answer.what)
            if slot.worker is not None and not slot.worker.in_process:
                _retell(answer.what)
        elif isinstance(answer, Ended):
            yield from self._ended(slot, answer)
        else:
            yield from self._lost(slot, slot.fault or WorkerDied(answer.reason))

    def _ended(self, slot: _Slot, ended: Ended) -> Iterator[Outcome]:
        assert slot.worker is not None
        row = slot.rows[ended.number]
        if isinstance(ended.error, DeviceLost):
            if not slot.worker.in_process:  # what else it has told, and what it still finishes, counts
                slot.fault, slot.ready, slot.missed_since = ended.error, False, time.monotonic()
                slot.worker.kill()
                return
            del slot.rows[ended.number]
            yield self._failed(row, ended.error, lost=row.lost + 1)
            raise DeviceLost(f"{ended.error.message}; run again: finished rows are kept")
        del slot.rows[ended.number]
        slot.failures = 0
        if ended.error is not None or ended.stopped:
            self._fed(row, Outcome(row.job, "stopped", error=ended.error))
            raise ended.error or KeyboardInterrupt
        # That it is done after a lost attempt was that attempt's doing: its worker died between result and answer.
        status = ended.row.status if ended.row is not None else "ok" if row.lost else "elsewhere"
        yield self._fed(row, Outcome(row.job, status, ended.row))

    def _lost(self, slot: _Slot, error: T2VZError) -> Iterator[Outcome]:
        """The worker is dead or of no more use: its rows go to others, and another takes its place."""
        assert slot.worker is not None
        worker = slot.worker
        worker.kill()
        self._reason = error.message
        if slot.ready:
            slot.missed_since = time.monotonic()
        slot.worker, slot.ready, slot.loaded, slot.fault = None, False, None, None
        # What a row does that is alone in it is the row's fault; not without end, as the device may be broken.
        slot.failures += not any(row.suspected and row.lost < _ATTEMPTS for row in slot.rows.values())
        if slot.failures <= self._restarts and not worker.in_process:
            pause_s = 0.0 if slot.failures == 1 else self._backoff_s * 2.0 ** (slot.failures - 2)
            slot.start_at = time.monotonic() + pause_s
        _log.warning("%s", error.message)
        while slot.rows:
            row = slot.rows.pop(min(slot.rows))
            row.lost += 1
            row.lost_in.add(slot.number)
            row.suspected = True
            if row.lost < self._attempts:
                event = Event("row_lost", row.job.row.id, message=f"{error.message}; trying again, with nothing beside")
                row.feed(event)
                emit(event)
                self._suspects.append(row)
            else:
                yield self._failed(row, error, row.lost)

    def _failed(self, row: _Row, error: T2VZError, lost: int) -> Outcome:
        try:
            result = record_lost(row.job, self._settings, error, lost, row.started_at)
        except T2VZError as why:
            self._fed(row, Outcome(row.job, "stopped", error=why))
            raise
        return self._fed(row, Outcome(row.job, "ok" if result is None else "failed", result))

    def _fed(self, row: _Row, outcome: Outcome) -> Outcome:
        row.feed(outcome)
        return outcome

    def _stop(self) -> None:
        """End the rows under way, without results; what does not end in time is killed."""
        self._settings.stopping.set()
        for slot in self._slots:
            if slot.worker is not None:
                slot.worker.send("stop")
        deadline = time.monotonic() + self._stop_s
        while any(slot.rows for slot in self._slots) and (left_s := deadline - time.monotonic()) > 0:
            try:
                answered = self._answers.get(timeout=left_s)
            except queue.Empty:
                break
            if answered is None or isinstance(answered, Outcome):
                continue
            worker, answer = answered
            for slot in self._slots:
                if slot.worker is worker and isinstance(answer, Ended) and answer.number in slot.rows:
                    row = slot.rows.pop(answer.number)
                    status = answer.row.status if answer.row is not None else "stopped"
                    row.feed(Outcome(row.job, status, answer.row, answer.error))
                elif slot.worker is worker and isinstance(answer, Gone):
                    self._give_up(slot)
        for slot in self._slots:
            if slot.rows and slot.worker is not None:
                slot.worker.kill()
            self._give_up(slot)
        for row in self._suspects:
            row.feed(Outcome(row.job, "stopped"))

    def _give_up(self, slot: _Slot) -> None:
        for row in slot.rows.values():
            row.feed(Outcome(row.job, "stopped"))
        slot.rows.clear()
