"""What orchestration costs at scale: rows of no work through real flows, Prefect on PostgreSQL, and the real table.

python tests/benchmarks/scale.py [--task-rows 2000] [--rows 100000]

Rows of the stub (`stub.py`) take no time of their own, so all that is measured is ours and Prefect's. A run of
--task-rows rows has a task run for each, one of --rows rows is shown in shards; both count the CPU seconds of the run's
process, the Prefect server and PostgreSQL. Then the larger manifest is planned again, all of it done, and one more
run skips it. The last line is one JSON object:

tasks, shards: rows, wall_s, rows_per_s, CPU ms a row of each process (client, server, database, all), peak memory of
client and server, task_runs that the server knows of. plan_s: `t2vz plan` of the finished rows. rerun: as above.
ui_ms: answers of what a run's page asks for, for the run with a task a row.
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

BESIDE = Path(__file__).parent
sys.path[:0] = [str(BESIDE), str(BESIDE.parent / "flows")]
from fleet import server  # noqa: E402
from postgres import postgres  # noqa: E402

# The tests' server looks at its schedules every second; an ordinary one does not.
PACE = {
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "60",
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_LOOP_SECONDS": "20",
    "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT5S",
}
# A run's own process, with the stub in the stages' place.
RUN = """
import json, sys
sys.path.insert(0, sys.argv[1])
from t2vz import workers
workers.RENDER = "stub:render"
from t2vz_flows.render_manifest import RenderParameters, render_manifest
state = render_manifest(RenderParameters(**json.loads(sys.argv[2])), return_state=True)
print(json.dumps({"message": state.message, **state.result()}))
"""


def say(*what: object) -> None:
    print(*what, file=sys.stderr, flush=True)


def settings_of(file: Path) -> dict[str, str]:
    """What infra/prefect.env sets."""
    lines = [line.strip() for line in file.read_text().splitlines()]
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


class Tree:
    """A process and all below it: CPU seconds so far, those of ended children included, and memory."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._seen: dict[int, float] = {}
        self.peak_bytes = 0

    def cpu_s(self) -> float:
        memory = 0
        for process in [self._root, *self._root.children(recursive=True)]:
            try:
                times = process.cpu_times()
                memory += process.memory_info().rss
            except psutil.Error:
                continue
            self._seen[process.pid] = times.user + times.system
        self.peak_bytes = max(self.peak_bytes, memory)
        return sum(self._seen.values())


@contextmanager
def watched(trees: Iterable[Tree]) -> Iterator[None]:
    """Look at them every half second: processes come and go."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.5):
            for tree in trees:
                tree.cpu_s()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def write_manifest(path: Path, rows: int) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "seed", "video_length", "num_inference_steps"])
        writer.writerows([f"row-{n}", f"scene {n}", n, 2, 3] for n in range(rows))
    return path


def run(api: str, trees: dict[str, Tree], manifest: Path, out: Path, rows: int, **parameters: Any) -> dict[str, Any]:
    """One run of the flow, and what it took."""
    given = {"manifest": str(manifest), "out": str(out), "device": "cpu", **parameters}
    before = {name: tree.cpu_s() for name, tree in trees.items()}
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, **settings_of(BESIDE.parents[1] / "infra" / "prefect.env"), "PREFECT_API_URL": api}
    environment |= {"PREFECT_LOGGING_LEVEL": "WARNING", "T2VZ_STUB": "{}"}
    begun = time.perf_counter()
    client = subprocess.Popen(
        [sys.executable, "-c", RUN, str(BESIDE), json.dumps(given)], env=environment, stdout=subprocess.PIPE, text=True
    )
    tree = Tree(client.pid)
    with watched([tree, *trees.values()]):
        output = client.communicate()[0]
    wall_s = time.perf_counter() - begun
    assert client.returncode == 0, output
    told = json.loads(output.splitlines()[-1])
    time.sleep(3 if rows < 10_000 else 10)  # the server writes down what it heard last
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = {name: tree.cpu_s() - before[name] for name, tree in trees.items()}
    cpu["client"] = usage.ru_utime + usage.ru_stime - children.ru_utime - children.ru_stime
    cpu["all"] = sum(cpu.values())
    found = {
        "rows": rows,
        "message": told["message"],
        "wall_s": round(wall_s, 1),
        "rows_per_s": round(rows / wall_s, 1),
        "cpu_ms_a_row": {name: round(s * 1000 / rows, 3) for name, s in cpu.items()},
        "client_peak_mb": round(tree.peak_bytes / 1e6),
        "server_peak_mb": round(trees["server"].peak_bytes / 1e6),
        "run_id": told["run_id"],
    }
    say(json.dumps(found))
    return found


def ask(api: str, path: str, body: Any = None) -> tuple[float, Any]:
    """An answer of Prefect's API, and the ms that it took."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{api}{path}", data, {"Content-Type": "application/json"})
    begun = time.perf_counter()
    with urllib.request.urlopen(request, timeout=120) as answer:
        return (time.perf_counter() - begun) * 1000, json.load(answer)


def page(api: str, run_id: str) -> tuple[dict[str, float], int]:
    """What a run's page asks for, in ms; the task runs that the server knows of."""
    of_run = {"flow_runs": {"id": {"any_": [run_id]}}}
    asked = {
        "run": (f"/flow_runs/{run_id}", None),
        "graph": (f"/flow_runs/{run_id}/graph-v2", None),
        "task_runs_page": ("/task_runs/filter", {**of_run, "limit": 200, "sort": "EXPECTED_START_TIME_DESC"}),
        "task_runs_count": ("/task_runs/count", of_run),
        "logs_page": ("/logs/filter", {"logs": {"flow_run_id": {"any_": [run_id]}}, "limit": 200}),
        "artifacts": ("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run_id]}}}),
    }
    taken, count = {}, 0
    for name, (path, body) in asked.items():
        try:
            taken[name], answer = ask(api, path, body)
            taken[name] = round(taken[name], 1)
        except urllib.error.HTTPError as error:
            say(f"  {name}: {error}")
            continue
        if name == "task_runs_count":
            count = answer
    return taken, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task-rows", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=100_000)
    asked = parser.parse_args()
    figures: dict[str, Any] = {"benchmark": "scale", "cores": os.cpu_count(), "database": "PostgreSQL"}
    with tempfile.TemporaryDirectory(prefix="t2vz-scale-") as name:
        folder = Path(name)
        with postgres(folder / "database") as (url, database):
            (folder / "home").mkdir()
            settings = settings_of(BESIDE.parents[1] / "infra" / "prefect.env")
            settings |= PACE | {"PREFECT_API_DATABASE_CONNECTION_URL": url}
            with server(folder / "home", **settings) as (api, pid):
                trees = {"server": Tree(pid), "database": Tree(database)}
                say("a task a row")
                small = write_manifest(folder / "tasks.csv", asked.task_rows)
                figures["tasks"] = run(api, trees, small, folder / "tasks", asked.task_rows)
                figures["ui_ms"], figures["tasks"]["task_runs"] = page(api, figures["tasks"]["run_id"])
                say(f"  the run's page: {figures['ui_ms']}, {figures['tasks']['task_runs']} task runs")
                say("shards")
                large = write_manifest(folder / "shards.csv", asked.rows)
                out = folder / "shards"
                figures["shards"] = run(api, trees, large, out, asked.rows, max_row_tasks=min(2000, asked.rows - 1))
                _, figures["shards"]["task_runs"] = page(api, figures["shards"]["run_id"])
                say("planning what is done")
                begun = time.perf_counter()
                t2vz = [sys.executable, "-m", "t2vz.cli", "plan", str(large), "--out", str(out), "--json"]
                told = json.loads(subprocess.run(t2vz, capture_output=True, text=True, check=True).stdout)
                figures["plan_s"] = round(time.perf_counter() - begun, 2)
                assert told["done"] == asked.rows, told
                figures["rerun"] = run(api, trees, large, out, asked.rows)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
