"""An output folder as a run leaves it, without a run: rows of every kind, with pictures that can be told apart."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from t2vz.media import strip
from t2vz.results import ResultRow, ResultStore
from t2vz.sheet import strip_key, thumbnails_key

BEGAN = datetime(2026, 11, 27, 9, tzinfo=UTC)
FRAMES = 16
LEVEL = 15  # frame k of every line has the grey level k × LEVEL, so that lines out of step differ
_CONDITIONS = {"text": (), "control": ("edge",), "edit": ()}
_PROMPTS = ("a red ball on the grass by day", "a yellow cat in the snow at night", "make it snow", "a house by the sea")


def row(number: int = 1, **values: Any) -> ResultRow:
    """An ok row, the `number`th of the manifest; every tenth row failed, unless `status` is given."""
    mode = values.pop("mode", ("text", "control", "edit")[number % 3])
    failed = values.get("status", "failed" if number % 10 == 0 else "ok") == "failed"
    id = values.pop("id", f"row-{number:04}")
    prompt = values.get("prompt", _PROMPTS[number % len(_PROMPTS)])
    cells = {"id": id, "mode": mode, "prompt": prompt, "num_inference_steps": "20", "model": "mini"}
    cells |= {"source": "/clips/cat.mp4"} if mode != "text" else {}
    cells |= {"condition": "edge"} if mode == "control" else {}
    start = BEGAN + timedelta(seconds=number)
    common: dict[str, Any] = {
        "job_id": f"{number:032x}",
        "run_id": "run-1",
        "id": id,
        "manifest": "/data/manifest.csv",
        "row_number": number,
        "mode": mode,
        "prompt": prompt,
        "parameters": json.dumps(
            {"condition": _CONDITIONS[mode], "extracted": True, "guidance_scale": 7.5, "seed": number, "cells": cells}
        ),
        "seed": number,
        "model": "mini" if number % 4 else "/models/dreambooth",
        "source_uri": "/clips/cat.mp4" if mode != "text" else None,
        "decode_s": 0.01 * (1 + number % 7),
        "model_s": 0.2,
        "generate_s": 2.0 + number % 13,
        "wall_s": 3.0 + number % 13,
        "quality": json.dumps({"flicker": round(0.1 + number % 50 / 100, 3), "warp_error": 1.5 + number % 7}),
        "started_at": start,
        "finished_at": start + timedelta(seconds=3),
        "t2vz_version": "0.1.0",
    }
    if failed:
        common |= {
            "status": "failed",
            "error_stage": "decode",
            "error_class": "SourceCorrupt",
            "error_message": f"/clips/{number}.mp4: ends after 3 of 8 frames",
            "retryable": False,
            "quality": None,
        }
    else:
        common |= {
            "status": "ok",
            "output_uri": f"videos/{id}-{number:012x}.mp4",
            "output_sha256": f"{number:064x}",
            "output_bytes": 1000,
            "output_mtime_ns": 1,
            "encode_s": 0.1,
            "width": 64,
            "height": 64,
            "frames": FRAMES,
            "fps": "8",
            "codec": "h264",
        }
    return ResultRow(**common | values)


def keep(out: Path, rows: Iterable[ResultRow], *, pictures: bool = True) -> None:
    """Put the rows into the results table, and their pictures beside it."""
    store = ResultStore(out)
    made: dict[tuple[str, int], Path] = {}
    (out / "work").mkdir(parents=True, exist_ok=True)
    for one in rows:
        store.commit(one)
        if one.output_uri is None or not pictures:
            continue
        key = thumbnails_key(one.output_uri)
        known = made.get((one.mode or "", (one.row_number or 0) % 8))
        if known is None:
            strip.write_moving(out, key, lines_of(one), out / "work")
            strip.write(out, strip_key(one.output_uri), lines_of(one), out / "work")
            made[one.mode or "", (one.row_number or 0) % 8] = out / key
        else:
            (out / key).write_bytes(known.read_bytes())
    store.flush()


def lines_of(row: ResultRow) -> list[Any]:
    """The thumbnails of each line: in its middle the frame's level, around it the line's colour."""
    count = {"text": 1, "control": 3, "edit": 2}[row.mode or "text"]
    lines = []
    for line in range(count):
        frames = np.zeros((FRAMES, 64, 64, 3), np.uint8)
        frames[..., line % 3] = 60 + 20 * ((row.row_number or 0) % 8)
        frames[:, 16:48, 16:48] = (np.arange(FRAMES) * LEVEL)[:, None, None, None]
        lines.append(frames)
    return lines
