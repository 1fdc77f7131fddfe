"""A run's figures for Prometheus, fed by the events of this process: over HTTP while it runs, or as a text file.

Which of the two? Where one run at a time has the machine to itself (a container), a port is simplest: Prometheus
scrapes it, and sees a run that died vanish. Scheduled runs are batch jobs, several on a machine, some shorter than
the time between two scrapes: each writes a file of its own into a folder that node-exporter's textfile collector
reads. It needs no free port, and the final counts stay to be read when the run is over.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import start_http_server, write_to_textfile

from t2vz.events import Event, listening

if TYPE_CHECKING:
    from t2vz.results import ResultRow

_log = logging.getLogger(__name__)

PORT, ADDRESS, FOLDER = "T2VZ_METRICS_PORT", "T2VZ_METRICS_ADDRESS", "T2VZ_METRICS_FOLDER"
STAGES = ("decode", "conditions", "model", "generate", "encode")

_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)  # a decode … an hour-long generation
_WRITE_S = 10.0
_FILE_KEPT_S = 24 * 3600  # time enough to be scraped; the results table is what keeps


class Metrics:
    """The figures of one run. Every series carries `run`, the flow run's id: files of several runs lie in one
    folder, and no two of them may have the same series.

    An instance is the listener of the run's events. What a finished row took is in its results row, which
    `row_finished` carries; figures that only such a row knows grow when the row ends.
    """

    def __init__(self, run: str, manifest: str = "") -> None:
        disable_created_metrics()  # a second series beside every counter, which nothing here asks for
        self.registry = registry = CollectorRegistry()
        self.run = run
        self._lock = threading.Lock()
        self._begun: dict[str, set[str]] = {}  # row in flight → stages that it has begun
        self._peaks: dict[str, int] = {}

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"t2vz_{name}", text, ("run", *labels), registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"t2vz_{name}", text, ("run", *labels), registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"t2vz_{name}", text, ("run", *labels), registry=registry, buckets=_SECONDS)

        self.rows = counter(
            "rows", "Rows ended: ok, failed (with the error's class), done (by another run)", "status", "error_class"
        )
        self.frames = counter("frames", "Frames of the videos written").labels(run)
        self.output_bytes = counter("output_bytes", "Bytes of the videos written").labels(run)
        self.unet_evaluations = counter("unet_evaluations", "UNet evaluations of the rows that were generated").labels(
            run
        )
        self.stage_seconds = histogram("stage_seconds", "Seconds of a row in a stage; model: its loading", "stage")
        self.row_seconds = histogram("row_seconds", "Seconds from a row's start to its result").labels(run)
        self.stage_retries = counter("stage_retries", "Stages begun again, after an error that can mend", "stage")
        self.worker_restarts = counter("worker_restarts", "Worker processes that died and were replaced").labels(run)
        self.rows_planned = gauge("rows_planned", "Rows that this run has to render").labels(run)
        self.rows_done_before = gauge("rows_done_before", "Rows that were done when the run began").labels(run)
        self.rows_in_flight = gauge("rows_in_flight", "Rows under way").labels(run)
        self.peak_memory_bytes = gauge(
            "peak_memory_bytes", "Most memory that a row's process used: of the device, on cpu of the host", "device"
        )
        self.last_progress = gauge("last_progress_timestamp_seconds", "When anything last went on").labels(run)
        self.heartbeat = gauge("heartbeat_timestamp_seconds", "When these figures were taken").labels(run)
        self.started = gauge("run_started_timestamp_seconds", "When the run began").labels(run)
        self.ended = gauge("run_ended_timestamp_seconds", "When the run ended; 0 while it runs").labels(run)
        self.failed = gauge("run_failed", "1 if the run ended with an error of the run as a whole").labels(run)
        gauge("run_info", "1; what the run is", "manifest", "version").labels(run, manifest, version("t2vz")).set(1)

        for status in ("ok", "failed", "done"):  # a rate needs the 0 before the first
            self.rows.labels(run, status, "")
        for stage in STAGES:
            self.stage_seconds.labels(run, stage)
            self.stage_retries.labels(run, stage)
        self.heartbeat.set_function(time.time)
        self.started.set_to_current_time()
        self.last_progress.set_to_current_time()
        registry.register(_DeviceMemory(run))

    def __call__(self, event: Event) -> None:
        if event.kind == "planned":
            self.rows_planned.set(event.total)
            self.rows_done_before.set(event.done)
        elif event.kind == "row_started":
            with self._lock:
                self._begun.setdefault(event.id, set())
        elif event.kind == "stage":
            with self._lock:
                begun = self._begun.setdefault(event.id, set())
                again = event.stage in begun
                begun.add(event.stage)
            if again:
                self.stage_retries.labels(self.run, event.stage).inc()
        elif event.kind == "row_lost":
            self.worker_restarts.inc()
            with self._lock:  # its stages begin again with the next worker, which is no retry of theirs
                self._begun[event.id] = set()
        elif event.kind == "row_finished":
            with self._lock:
                self._begun.pop(event.id, None)
            row: ResultRow | None = event.row
            self.rows.labels(self.run, event.status, (row and row.error_class) or "").inc()
            if row is not None:
                self._add(row)
        if event.kind != "row_lost":  # a worker that dies again and again is no progress
            self.last_progress.set_to_current_time()
        with self._lock:
            self.rows_in_flight.set(len(self._begun))

    def _add(self, row: ResultRow) -> None:
        for stage in STAGES:
            seconds = getattr(row, f"{stage}_s")
            if seconds is not None:
                self.stage_seconds.labels(self.run, stage).observe(seconds)
        if row.wall_s is not None:
            self.row_seconds.observe(row.wall_s)
        self.frames.inc(row.frames or 0)
        self.output_bytes.inc(row.output_bytes or 0)
        self.unet_evaluations.inc(row.unet_evaluations or 0)
        if row.device and row.peak_memory_bytes is not None:
            with self._lock:
                peak = self._peaks[row.device] = max(self._peaks.get(row.device, 0), row.peak_memory_bytes)
                self.peak_memory_bytes.labels(self.run, row.device).set(peak)

    def end(self, *, failed: bool) -> None:
        with self._lock:
            self._begun.clear()
        self.rows_in_flight.set(0)
        self.failed.set(failed)
        self.ended.set_to_current_time()


class _DeviceMemory:
    """Memory in use on the machine's GPUs, by whomever, read when it is asked for; nothing without a driver.

    From NVML: asking torch would take hundreds of MB of each GPU for this process, which computes nothing there.
    """

    def __init__(self, run: str) -> None:
        self._run = run

    def collect(self) -> Iterator[GaugeMetricFamily]:
        labels = ("run", "gpu", "name")
        used = GaugeMetricFamily("t2vz_device_memory_used_bytes", "Memory in use on a GPU", labels=labels)
        total = GaugeMetricFamily("t2vz_device_memory_total_bytes", "Memory of a GPU", labels=labels)
        for gpu, name, used_bytes, total_bytes in gpu_memory():
            used.add_metric((self._run, str(gpu), name), used_bytes)
            total.add_metric((self._run, str(gpu), name), total_bytes)
        yield used
        yield total


def gpu_memory() -> list[tuple[int, str, int, int]]:
    """Of each GPU that the driver shows: index, name, bytes in use, bytes in all. Empty where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    found = []
    try:
        for gpu in range(pynvml.nvmlDeviceGetCount()):
            with suppress(pynvml.NVMLError):  # one fallen off the bus; the others are there
                handle = pynvml.nvmlDeviceGetHandleByIndex(gpu)
                memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
                found.append((gpu, pynvml.nvmlDeviceGetName(handle), memory.used, memory.total))
    except pynvml.NVMLError:
        return found
    finally:
        pynvml.nvmlShutdown()
    return found


@contextmanager
def exposing(
    run: str, manifest: str = "", *, port: int | None = None, folder: str | os.PathLike[str] | None = None
) -> Iterator[Metrics | None]:
    """Count the events of the block, and show the figures: at http://ADDRESS:`port`/metrics, as
    `folder`/t2vz-RUN.prom, both or, if neither is given, not at all (None).

    port: 0 takes any free one; which, is logged. What is None is taken from the environment, since it is the
    machine that has ports and folders, not the job: T2VZ_METRICS_PORT, T2VZ_METRICS_FOLDER; and
    T2VZ_METRICS_ADDRESS, the address to listen at (127.0.0.1). A port that is taken or a folder that can't be
    written is logged as a warning: figures are no reason to stop a run.
    """
    if port is None:
        port = _port_of_environment()
    folder = folder or os.environ.get(FOLDER) or None
    if port is None and folder is None:
        yield None
        return
    metrics = Metrics(run, manifest)
    with ExitStack() as shown:
        if port is not None:
            shown.enter_context(_served(metrics, port))
        if folder is not None:
            shown.enter_context(_written(metrics, Path(folder)))
        failed = True
        try:
            with listening(metrics):
                yield metrics
            failed = False
        finally:
            metrics.end(failed=failed)


def _port_of_environment() -> int | None:
    text = os.environ.get(PORT, "").strip()
    if not text:
        return None
    if re.fullmatch(r"\d{1,5}", text) and int(text) < 65536:
        return int(text)
    _log.warning("%s=%s is not a port; this run's metrics are not served", PORT, text)
    return None


@contextmanager
def _served(metrics: Metrics, port: int) -> Iterator[None]:
    address = os.environ.get(ADDRESS) or "127.0.0.1"
    try:
        server, thread = start_http_server(port, address, metrics.registry)
    except (OSError, OverflowError) as error:
        _log.warning("the metrics can't be served at %s:%s (%s); give this run another port", address, port, error)
        yield
        return
    _log.info("metrics at http://%s:%s/metrics", address, server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def _written(metrics: Metrics, folder: Path) -> Iterator[None]:
    path = folder / f"t2vz-{re.sub('[^A-Za-z0-9_-]', '_', metrics.run)}.prom"
    over = threading.Event()
    told: list[str] = []

    def write() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_to_textfile(str(path), metrics.registry)  # renamed into place: whole or not at all
        except OSError as error:
            if str(error) not in told:  # once, not every ten seconds
                told.append(str(error))
                _log.warning("the metrics can't be written to %s (%s)", path, error.strerror or error)

    def keep_writing() -> None:
        while not over.wait(_WRITE_S):
            write()

    _sweep(folder)
    write()
    writer = threading.Thread(target=keep_writing, name="t2vz-metrics", daemon=True)
    writer.start()
    try:
        yield
    finally:
        over.set()
        writer.join()
        write()


def _sweep(folder: Path) -> None:
    """Remove the files of runs that ended long ago; what still runs rewrites its own."""
    for old in folder.glob("t2vz-*.prom"):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > _FILE_KEPT_S:
                old.unlink()
