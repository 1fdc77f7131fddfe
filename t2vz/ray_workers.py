"""Warm workers on a Ray cluster: the same `serve` in an actor a GPU, placed by Ray on whichever machine has room.

Every node needs this release of t2vz, and must see the manifest's files, the models and the output folder under the
same paths (or on S3). What workers read from the environment is what `ray start` had there.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from t2vz import claims
from t2vz.errors import OutputError, UnexpectedError, translate
from t2vz.render import Settings
from t2vz.workers import Answer, Deliver, Gone, Order, Place, serve

_ROOM_S = 300.0  # what the cluster gets to place a worker: an autoscaler makes a machine in that time
_ANSWER_S = 10.0
_GPU = "cuda:0"  # the first of those that an actor sees, and Ray shows it one

_log = logging.getLogger(__name__)


@contextmanager
def connected() -> Iterator[None]:
    """Ray's connection of this process while the block runs; one that is there already is used, and left.

    The cluster is RAY_ADDRESS's, else the one that `ray start` began on this machine, else one of this process's own,
    which ends with the block. Raises UnexpectedError if there is no Ray, or the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read by the import
    try:
        import ray
    except ImportError as error:
        raise UnexpectedError(
            "executor ray: Ray is not installed; pip install 't2vz[ray]'", stage="settings"
        ) from error
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if "://" in address and not address.startswith("local"):
        raise UnexpectedError(
            f"RAY_ADDRESS={address}: workers' answers don't come through Ray's client; run on a machine of the "
            "cluster, with RAY_ADDRESS=HOST:6379 or none",
            stage="settings",
        )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdecimal():  # Ray itself tries for minutes
            socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        where = f"at RAY_ADDRESS={address}" if address else "that `ray start` began here"
        raise UnexpectedError(
            f"no Ray cluster answers {where} ({error}); `ray start` one, or `ray stop` and unset RAY_ADDRESS for one "
            "of the run's own",
            stage="settings",
        ) from error
    try:
        # Ray (2.60) takes SIGTERM for a crash and ends the process on the spot: what was to be done then is ours.
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:
                    signal.signal(number, handler)
        yield
    finally:
        ray.shutdown()


def placed(device: str, workers: int | None) -> tuple[Place, ...]:
    """The places of a run's workers on the cluster that this process is connected to.

    device: auto: GPUs if the cluster has any; cuda; cpu. workers: None: one for each GPU, or each node. More than
    there is room for wait for it. Raises UnexpectedError.
    """
    import ray

    if device not in ("auto", "cuda", "cpu"):
        raise UnexpectedError(
            f"device {device}: Ray chooses which GPU a worker gets; say auto, cuda or cpu", stage="settings"
        )
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = [(int(node["GPU"]), int(node.get("CPU", 0))) for node in nodes if node.get("GPU", 0) >= 1]
    if device == "cuda" and not gpus and workers is None:
        raise UnexpectedError(
            "device cuda: the Ray cluster has no GPU; if it makes machines when they are asked for, say how many "
            "workers",
            stage="settings",
        )
    if device == "cuda" or (device == "auto" and gpus):
        # A GPU's share of its machine's cores, as small as the smallest: so that Ray can use every GPU.
        threads = min((cores // number for number, cores in gpus), default=1)
        return (Place(_GPU, threads=threads),) * (workers or sum(number for number, _ in gpus))
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1] or [1]
    number = workers or len(cores)
    return (Place("cpu", threads=max(1, min(cores) // -(-number // len(cores)))),) * number


class RayWorker:
    """A worker in an actor, which ends when this process does, however that ends."""

    in_process = False

    def __init__(
        self,
        name: str,
        place: Place,
        settings: Settings,
        function: str,
        deliver: Deliver,
        *,
        room_s: float = _ROOM_S,
    ) -> None:
        import ray

        self._name, self._deliver, self._room_s = name, deliver, room_s
        on_gpu = place.device == _GPU
        # Two threads: one answers, one takes orders, so that these keep their order. Ray starts nothing again by
        # itself: what a worker's end means is the pool's to decide. OMP_NUM_THREADS becomes num_cpus.
        self._actor: Any = (
            ray.remote(_Actor)
            .options(
                num_cpus=place.threads,
                num_gpus=1 if on_gpu else 0,
                max_concurrency=2,
                max_restarts=0,
                scheduling_strategy="SPREAD",
            )
            .remote()
        )
        level = logging.getLogger("t2vz").getEffectiveLevel()
        self._work = replace(settings, device=place.device), function, level
        self._reader = threading.Thread(target=self._read, name=f"{name} answers", daemon=True)
        self._reader.start()

    def send(self, order: Order) -> None:
        self._actor.order.remote(order)  # a worker that is gone is told by the reader

    def kill(self) -> None:
        import ray

        with suppress(ray.exceptions.RayError):
            ray.kill(self._actor)

    def join(self, timeout_s: float) -> bool:
        self._reader.join(timeout_s)
        return not self._reader.is_alive()

    def _read(self) -> None:
        import ray

        where = self._name
        gone = Gone(f"{where} left")
        try:
            where = f"{where} ({ray.get(self._actor.where.remote(), timeout=self._room_s)})"
            for answer in self._actor.serve.options(num_returns="streaming").remote(*self._work):
                told = ray.get(answer)
                if isinstance(told, Gone):
                    gone = Gone(f"{where}: {told.reason}")
                else:
                    self._deliver(self, told)
        except ray.exceptions.GetTimeoutError:
            gone = Gone(f"{where}: the Ray cluster had no room for it in {self._room_s:.0f} s (`ray status` tells why)")
        except ray.exceptions.RayError as error:
            gone = Gone(f"{where} is gone: {_first(error)}")
        self.kill()
        self._deliver(self, gone)


def _first(error: BaseException) -> str:
    """What of Ray's pages on a death tells how."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if "exit detail" in line or "is dead because" in line), lines[0])
    return re.split(r"\s*(?:Some common causes|There are some potential)", told)[0][:300]


class _Actor:
    """The worker's side: a process of its own on some node."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()

    def where(self) -> str:
        import ray

        return f"process {os.getpid()} on Ray node {ray.util.get_node_ip_address()}"

    def order(self, order: Order) -> None:
        self._orders.put(order)

    def serve(self, settings: Settings, function: str, level: int) -> Iterator[Answer]:
        """The worker's answers; a `Gone` last."""
        logging.getLogger("t2vz").setLevel(level)
        answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()

        def live() -> None:
            reason = "it left"
            try:
                _check(settings)
                serve(self._orders.get, answers.put, settings, function)
            except Exception as error:
                reason = translate(error, "unknown").message
            answers.put(Gone(reason))

        threading.Thread(target=live, name="serves", daemon=True).start()
        while not isinstance(answer := answers.get(), Gone):
            yield answer
        yield answer


def _check(settings: Settings) -> None:
    """Raises OutputError if this machine does not see what the run writes to, and what torch does if it has no GPU."""
    if settings.run_id not in claims.living_runs(settings.out):
        raise OutputError(
            f"{settings.out}: this machine does not see the run's output folder; let all nodes share it under the same "
            "path, or choose an s3:// one"
        )
    if settings.device == _GPU:
        import torch

        torch.zeros(1, device=settings.device)
