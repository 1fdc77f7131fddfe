"""Workers on a Ray cluster of two nodes on this machine: one of them killed, rooms that never come, plain errors."""

from __future__ import annotations

import queue
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_workers import await_, running

from t2vz import workers
from t2vz.errors import UnexpectedError, WorkerDied
from t2vz.events import Event
from t2vz.plan import Job, plan
from t2vz.ray_workers import RayWorker, connected, placed
from t2vz.render import Retries, Settings, opening
from t2vz.results import ResultStore, read
from t2vz.workers import Answer, Gone, Log, Place, Pool

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 't2vz[ray]'")

BENCHMARKS = Path(__file__).parent / "benchmarks"
ONE_CPU = Place("cpu", threads=1)


class Nodes(NamedTuple):
    """Ray's cluster, with two CPUs a node: that of this process, and one that may be lost."""

    cluster: Any
    here: Any
    away: Any


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(BENCHMARKS))  # which nodes give to their workers
        # Dead nodes are noticed in 2 s instead of 15: until then Ray may place workers there.
        health = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
        cluster = Cluster(initialize_head=True, head_node_args={**options, "_system_config": health})
        away = cluster.add_node(**options)
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield Nodes(cluster, cluster.head_node, away)
        cluster.shutdown()


@pytest.fixture
def connection(nodes: Nodes) -> Iterator[Nodes]:
    with connected():
        yield nodes


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path / "out", "manifest.csv", "run", device="cpu", retries=Retries(backoff_s=0))


@pytest.fixture
def jobs(write_manifest: Callable[..., Path], tmp_path: Path) -> Callable[..., list[Job]]:
    def planned(*prompts: str) -> list[Job]:
        rows = [{"id": str(i), "seed": i, "prompt": prompt} for i, prompt in enumerate(prompts)]
        return list(plan(write_manifest(tmp_path / "manifest.csv", *rows), None))

    return planned


def pool(settings: Settings, places: tuple[Place, ...] = (ONE_CPU, ONE_CPU), **options: Any) -> Pool:
    return Pool(settings, "ray", places, **{"function": "stub:render", "backoff_s": 0.05, "in_flight": 1, **options})


def raylet(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_killed_node_s_rows_go_on_and_nothing_is_done_twice(connection, jobs, settings):
    """Four rows are done, one is held on each node; then one node is killed. The rows are let go when another worker
    has taken the place of its own.
    """
    processes: dict[str, int] = {}  # where each row was first
    homes: dict[int, int] = {}  # the nodes of the workers' processes
    starts: Counter[str] = Counter()
    ended: set[str] = set()
    done_before: set[str] = set()
    lost: set[str] = set()

    def begin(job: Job) -> Callable[[Any], None]:
        id = job.row.id

        def feed(what: Any) -> None:
            if isinstance(what, Log):
                pid = int(what.message.rpartition(" ")[2])
                processes.setdefault(id, pid)
                homes[pid] = parent(pid)
                held = {id for id in processes if int(id) >= 4} - ended
                if len(held) == 2 and not done_before:
                    done_before.update(ended)
                    lost.update(id for id in held if homes[processes[id]] == raylet(connection.away))
                    assert lost, "Ray put both workers on one node"
                    connection.cluster.remove_node(connection.away, allow_graceful=False)  # SIGKILL
                elif len(homes) == 3:
                    (settings.out / "go").touch()
            elif isinstance(what, Event):
                starts[id] += what.kind == "row_started"
                if what.kind == "row_finished":
                    ended.add(id)

        return feed

    with opening(settings), pool(settings) as workers_:
        outcomes = list(workers_.run(jobs(*["say a boat"] * 4, *["say wait a boat"] * 5), begin))
    assert Counter(outcome.id for outcome in outcomes) == Counter(map(str, range(9)))
    assert {outcome.status for outcome in outcomes} == {"ok"}
    assert len(lost) == 1
    assert done_before == {"0", "1", "2", "3"}
    assert starts == {str(i): 2 if str(i) in lost else 1 for i in range(9)}
    assert {row.id: row.attempts for row in read(settings.out)} == starts
    assert len(read(settings.out, all=True)) == 9
    assert list(homes.values()).count(raylet(connection.here)) == 2  # the other worker, and the one in its place
    connection.cluster.wait_for_nodes(timeout=30)  # the one that is left


def test_a_killed_worker_is_told_as_such_and_replaced(connection, jobs, settings):
    told: list[str] = []

    def begin(job: Job) -> Callable[[Any], None]:
        def feed(what: Any) -> None:
            if isinstance(what, Event) and what.kind == "row_lost":
                told.append(what.message)

        return feed

    with opening(settings), pool(settings, (ONE_CPU,)) as workers_:
        outcomes = list(workers_.run(jobs("kill-once a boat", "fail a boat", "a boat"), begin))
    rows = {outcome.id: (outcome.row.status, outcome.row.attempts) for outcome in outcomes}
    assert rows == {"0": ("ok", 2), "1": ("failed", 1), "2": ("ok", 1)}
    assert len(told) == 1
    assert re.match(r"worker 0 \(process \d+ on Ray node [\d.]+\) is gone: .*died.*; trying again", told[0]), told
    assert "\n" not in told[0]


def test_a_run_that_stops_leaves_no_worker(connection, jobs, settings):
    pids: list[int] = []

    def begin(job: Job) -> Callable[[Any], None]:
        def feed(what: Any) -> None:
            if isinstance(what, Log):
                pids.append(int(what.message.rpartition(" ")[2]))
                settings.stopping.set()

        return feed

    def stopped() -> None:
        with opening(settings), pool(settings, (ONE_CPU,), stop_s=60) as workers_:
            list(workers_.run(jobs("say long a boat"), begin))

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert len(pids) == 1
    await_(lambda: not running(*pids))  # Ray tells of an end that is certain, and then ends it
    assert not ResultStore(settings.out).done()


def test_a_worker_without_room_is_given_up_and_the_others_go_on(connection, jobs, settings, monkeypatch):
    answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    huge = Place("cpu", threads=64)
    with opening(settings):
        RayWorker("worker 9", huge, settings, "stub:render", lambda _, answer: answers.put(answer), room_s=0.1)
        gone = answers.get(timeout=30)
        assert isinstance(gone, Gone)
        assert "worker 9: the Ray cluster had no room for it" in gone.reason
        with pool(settings, (huge, ONE_CPU)) as workers_:  # waits for room while the other works, and leaves at the end
            outcomes = list(workers_.run(jobs("a boat", "a boat")))
    assert [outcome.status for outcome in outcomes] == ["ok", "ok"]


def test_a_node_that_does_not_see_the_output_folder_does_no_rows(connection, jobs, settings):
    """Nothing that a run does to its output folder is there: as on a machine with a folder of the same name."""
    with (
        pytest.raises(WorkerDied, match="does not see the run's output folder"),
        pool(settings, restarts=0) as workers_,
    ):
        list(workers_.run(jobs("a boat")))
    assert not settings.out.exists()


@pytest.mark.usefixtures("nodes", "prefect_api")
def test_a_run_of_the_flow_on_ray(write_manifest, tmp_path, monkeypatch):
    from t2vz_flows.render_manifest import RenderParameters, render_manifest

    monkeypatch.setattr("t2vz.workers.RENDER", "stub:render")
    monkeypatch.setattr("t2vz_flows.render_manifest.Pool", partial(Pool, backoff_s=0.05))
    prompts = ["kill-once a boat", *["a boat"] * 4]
    rows = ({"id": str(i), "seed": i, "prompt": prompt} for i, prompt in enumerate(prompts))
    manifest = write_manifest(tmp_path / "manifest.csv", *rows)
    parameters = RenderParameters(manifest=str(manifest), out=str(tmp_path / "out"), executor="ray", in_flight=1)
    state = render_manifest(parameters, return_state=True)
    assert state.is_completed(), state.message
    assert {row.id: (row.status, row.attempts) for row in read(tmp_path / "out")} == {
        str(i): ("ok", 2 if i == 0 else 1) for i in range(5)
    }
    assert not ray.is_initialized()


HANDLED = """
import os, signal
from t2vz.ray_workers import connected
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
with connected():
    os.kill(os.getpid(), signal.SIGTERM)
print("went on")
"""


@pytest.mark.usefixtures("nodes")
def test_what_a_termination_does_stays_the_run_s_own():
    ran = subprocess.run([sys.executable, "-c", HANDLED], capture_output=True, text=True)
    assert ran.stdout.split("\n")[:2] == ["handled", "went on"]


# Without a cluster


@pytest.mark.parametrize(
    ("cluster", "device", "workers_", "expected"),
    [
        ([{"CPU": 2}, {"CPU": 4}], "auto", None, (Place("cpu", threads=2),) * 2),
        ([{"CPU": 2}, {"CPU": 2}], "cpu", 4, (Place("cpu", threads=1),) * 4),
        ([{"CPU": 8}, {"CPU": 8}], "cpu", 3, (Place("cpu", threads=4),) * 3),
        ([{"CPU": 4}, {"CPU": 32, "GPU": 4}, {"CPU": 12, "GPU": 2}], "auto", None, (Place("cuda:0", threads=6),) * 6),
        ([{"CPU": 8, "GPU": 2}], "cuda", 1, (Place("cuda:0", threads=4),)),
        ([{"CPU": 8, "GPU": 2}], "cpu", None, (Place("cpu", threads=8),)),
        ([{"CPU": 8}], "cuda", 2, (Place("cuda:0", threads=1),) * 2),  # machines that come when they are asked for
    ],
)
def test_places(monkeypatch, cluster, device, workers_, expected):
    lost = {"Alive": False, "Resources": {}}
    monkeypatch.setattr(ray, "nodes", lambda: [*({"Alive": True, "Resources": node} for node in cluster), lost])
    assert placed(device, workers_) == expected
    assert workers.placed("ray", device, workers_) == ("ray", expected)


def test_devices_that_a_cluster_has_not(monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2}}])
    with pytest.raises(UnexpectedError, match="no GPU"):
        placed("cuda", None)
    with pytest.raises(UnexpectedError, match="Ray chooses"):
        placed("cuda:1", None)


def test_ray_that_is_missing_or_out_of_reach_is_told_plainly(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://head.example:10001")
    with pytest.raises(UnexpectedError, match="RAY_ADDRESS=HOST:6379"), connected():
        pass
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", closed)
    with pytest.raises(UnexpectedError, match=f"no Ray cluster answers at RAY_ADDRESS={closed}"), connected():
        pass
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnexpectedError, match=r"pip install 't2vz\[ray\]'"), connected():
        pass
