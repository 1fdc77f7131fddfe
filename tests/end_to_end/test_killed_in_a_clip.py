"""`kill -9` in the middle of a clip, again and again: it ends in the same file, and no step is done twice for it."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import re
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from ffmpeg_reader import ffmpeg

from t2vz.events import Event, listening
from t2vz.plan import Done, Job, plan
from t2vz.render import Settings, opening, render
from t2vz.results import read

STEPS, FRAMES, T0 = 40, 3, 35
KILLS = 3  # of each row

# Processes of their own, which share nothing but that torch and diffusers are imported already when they are forked.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["t2vz.modes.text", "t2vz.models.loading", "diffusers", "transformers"])


@pytest.fixture
def clips(
    manifest: Callable[..., Path],
    tiny_model: Path,
    tiny_edit_model: Path,
    tiny_controlnets: tuple[Path, Path],
    tmp_path: Path,
) -> Path:
    """A manifest of a row a mode, each with a sampler that remembers or draws."""
    source = tmp_path / "clip.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x64:r=8:d=0.5", "-c:v", "libx264", source)
    row: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "video_length": FRAMES,
        "seed": 5,
        "chunk_size": 1,
    }
    control = {"mode": "control", "condition": "edge", "controlnet": tiny_controlnets[0], "source": source}
    return manifest(
        tmp_path / "m.csv",
        row | {"id": "text", "model": tiny_model, "scheduler": "dpmpp_2m", "t0": T0, "t1": 38},
        row | {"id": "control", "model": tiny_model, "scheduler": "unipc"} | control,
        row | {"id": "edit", "model": tiny_edit_model, "mode": "edit", "source": source, "scheduler": "euler_a"},
    )


def rendering(manifest: Path, out: Path, run_id: str, told: Connection) -> None:
    """Render what is to do, tell every event, and save the state after each step; a run does so every 30 s."""
    torch.set_num_threads(1)
    settings = Settings(out, str(manifest), run_id, "cpu", snapshot_s=0)
    with listening(told.send), opening(settings):
        for job in plan(manifest, out):
            if not isinstance(job, Done):
                assert isinstance(job, Job), job
                render(job, settings)


def told_by_a_process(manifest: Path, out: Path, run_id: str, *, kill_at: tuple[str, int] | None = None) -> list[Event]:
    """What a process told that renders the manifest; kill_at: `kill -9` it after so many chunks of a row."""
    reader, writer = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=rendering, args=(manifest, out, run_id, writer))
    process.start()
    writer.close()
    id, chunks = kill_at or ("", 0)
    events: list[Event] = []
    with reader, suppress(EOFError, OSError):  # it ended; or in the middle of a word
        while True:
            events.append(reader.recv())
            chunks -= events[-1].id == id and events[-1].kind == "step"
            if kill_at is not None and chunks == 0:
                process.kill()  # the process is somewhere in what comes after that chunk
    process.join()
    assert process.exitcode == (0 if kill_at is None else -signal.SIGKILL)
    return events


def test_a_clip_that_was_killed_again_and_again_ends_in_the_same_file(clips: Path, tmp_path: Path) -> None:
    told_by_a_process(clips, tmp_path / "straight", "run")
    straight = {row.id: row for row in read(tmp_path / "straight")}
    assert {id: row.status for id, row in straight.items()} == dict.fromkeys(("text", "control", "edit"), "ok")

    chance, out, events = random.Random(1), tmp_path / "killed", []
    for id in straight:
        for kill in range(KILLS):
            chunks = chance.randint(2 * FRAMES, (STEPS // 2 // KILLS) * FRAMES)
            events += told_by_a_process(clips, out, f"{id}-{kill}", kill_at=(id, chunks))
    events += told_by_a_process(clips, out, "last")

    rows = {row.id: row for row in read(out, all=True)}
    assert rows.keys() == straight.keys()
    for id, row in rows.items():
        assert row.output_sha256 == straight[id].output_sha256, id
        assert hashlib.sha256((out / row.output_uri).read_bytes()).hexdigest() == row.output_sha256
        warnings = [event.message for event in events if event.id == id and event.kind == "warning"]
        resumed = [int(step) for text in warnings for step in re.findall(r"resumed at denoising step (\d+)", text)]
        assert len(resumed) == KILLS, "a kill came before the first snapshot, or after the row's end"
        assert resumed == sorted(set(resumed)), "an attempt left less than the one before"
        anchor = STEPS - 1 - T0 if id == "text" else 0  # its own steps are done again
        assert row.unet_evaluations == anchor + (STEPS - resumed[-1] + 1) * FRAMES < straight[id].unet_evaluations
    assert len(list((out / "videos").iterdir())) == len(rows)
    assert not list((out / ".work" / "snapshots").iterdir())
