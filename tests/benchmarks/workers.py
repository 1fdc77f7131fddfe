"""How busy the workers keep their devices, and what a second one brings, with stages of known cost that only wait.

What is measured is the machinery around the stages: pulling, messages, results, claims and files are real (`stub.py`).

python tests/benchmarks/workers.py [--rows 100] [--generate 0.3]

device_busy: the part of the wall time, up to the last row's end, in which one worker's device generates.
speedup_2_workers: rows a second with two workers over those with one. The same with a generation that keeps a
core busy, over a quarter of the rows, shows what the machinery itself takes of two cores.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from t2vz.events import Event, listening
from t2vz.plan import plan
from t2vz.render import Settings, opening
from t2vz.workers import Place, Pool

sys.path.insert(0, str(Path(__file__).parent))  # the workers find the stub there

IN_FLIGHT = 3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--generate", type=float, default=0.3, help="seconds of the device a row")
    parser.add_argument("--decode", type=float, default=0.1)
    parser.add_argument("--encode", type=float, default=0.15)
    options = parser.parse_args()
    costs = {name: getattr(options, name) for name in ("decode", "generate", "encode")}
    one, two = (measured(options.rows, workers, costs) for workers in (1, 2))
    print(f"one worker: {one}\ntwo workers: {two}", flush=True)
    pinned = [measured(max(4, options.rows // 4), workers, {**costs, "computing": True}) for workers in (1, 2)]
    print(f"with generation that computes: {pinned}")
    figures = {
        "benchmark": "workers",
        "rows": options.rows,
        "cores": len(os.sched_getaffinity(0)),
        "stage_s": costs,
        "device_busy": one["busy"],
        "device_busy_2_workers": two["busy"],
        "speedup_2_workers": round(two["rows_per_s"] / one["rows_per_s"], 3),
        "speedup_2_workers_computing": round(pinned[1]["rows_per_s"] / pinned[0]["rows_per_s"], 3),
    }
    print(json.dumps(figures))


def measured(rows: int, workers: int, costs: dict[str, float]) -> dict[str, float]:
    """busy: device seconds over the wall seconds of all workers. rows_per_s. Both from when all workers have done a
    row: their start is paid once in a run.
    """
    os.environ["T2VZ_STUB"] = json.dumps(costs)
    generating: dict[str, float] = {}
    generated: list[tuple[float, float]] = []
    ended: list[float] = []
    warm: list[float] = []

    def watch(event: Event) -> None:
        if event.kind == "stage" and event.stage == "generate":
            generating[event.id] = time.monotonic()
        elif event.kind == "stage_ended" and event.stage == "generate":
            generated.append((generating[event.id], time.monotonic()))
        elif event.kind == "row_finished":
            (warm if event.id.startswith("warm") else ended).append(time.monotonic())

    with tempfile.TemporaryDirectory() as folder:
        manifest, out = Path(folder, "manifest.csv"), Path(folder, "out")
        with manifest.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "prompt", "seed", "width", "height"])
            # Twice as wide, and so done first. Of two workers, each waits with one until the other has one, too: they
            # are one more than the first can take.
            prompt, warm_ups = ("pair a boat", IN_FLIGHT + 1) if workers == 2 else ("a boat", 1)
            writer.writerows([f"warm-{i}", prompt, i, 128, 64] for i in range(warm_ups))
            writer.writerows([f"row-{i}", "a boat", i, 64, 64] for i in range(rows))
        settings = Settings(out, str(manifest), "run", device="cpu")
        places = (Place("cpu", threads=1),) * workers
        with opening(settings), listening(watch):  # noqa: SIM117
            with Pool(settings, "processes", places, in_flight=IN_FLIGHT, function="stub:render") as pool:
                outcomes = list(pool.run(list(plan(manifest, None))))
    assert len(outcomes) == rows + warm_ups
    assert all(outcome.status == "ok" for outcome in outcomes)
    begin, end = max(warm), max(ended)
    device_s = sum(max(0.0, min(until, end) - max(since, begin)) for since, until in generated)
    done = sum(at > begin for at in ended)
    return {"busy": round(device_s / ((end - begin) * workers), 3), "rows_per_s": round(done / (end - begin), 3)}


if __name__ == "__main__":
    main()
