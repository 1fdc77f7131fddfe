"""Batches to kill runs over: all modes, several formats, rows of a second or less with the model mini."""

from __future__ import annotations

import csv
import random
from pathlib import Path

from killing import Batch

CLIP = Path(__file__).parents[2] / "manifests" / "clips" / "ball.mp4"
FORMATS = ("mp4", "png", "mkv", "webm")
KINDS = (
    {"mode": "text"},
    {"mode": "control", "condition": "edge", "source": CLIP, "video_length": 6, "guidance_scale": 2},
    {"mode": "edit", "source": CLIP, "video_length": 6},
)


def batch(folder: Path, rows: int, api: str, seed: int) -> Batch:
    """A batch in a new folder."""
    folder.mkdir(parents=True)
    given = [
        {"id": f"row-{i}", "prompt": "a red ball", "seed": seed + i, "width": 64, "height": 64, "video_length": 3}
        | {"num_inference_steps": 6, "guidance_scale": 1, "format": FORMATS[i % len(FORMATS)]}
        | KINDS[i % len(KINDS)]
        for i in range(rows)
    ]
    path = folder / "manifest.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({column for row in given for column in row}))
        writer.writeheader()
        writer.writerows(given)
    return Batch(path, folder / "out", rows, (CLIP,), api, seed)


def stub_batch(folder: Path, rows: int, api: str, seed: int) -> Batch:
    """A batch of the stub's rows (tests/benchmarks/stub.py): all but the stages is real, and a run starts quickly."""
    folder.mkdir(parents=True)
    path = folder / "manifest.csv"
    path.write_text("id,prompt\n" + "".join(f"row-{i},a ball {seed}\n" for i in range(rows)))
    return Batch(path, folder / "out", rows, (), api, seed)


def options(chance: random.Random) -> tuple[str, ...]:
    """Of a run: rendered by its own process, or by a worker, whose start is the dearest of all.

    One worker, which computes with as many threads as the run's own process: with others a few pixels round
    otherwise, so a video that was published just before a kill, and not yet recorded, would be made again under
    another name, and the first be there until `t2vz maintain` removes it.
    """
    threads = ("--executor", "threads")
    return chance.choice([threads, threads, ("--executor", "processes", "--workers", "1")])


def stub_options(chance: random.Random) -> tuple[str, ...]:
    return chance.choice([("--executor", "threads"), ("--workers", "2"), ("--workers", "2")])
