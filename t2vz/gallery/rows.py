"""What the gallery's page is told of an output folder: a JSON object for every result row, and plots of each run.

The texts in it are anybody's (prompts, messages, paths): the page must never take them for markup or addresses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import fields
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any
from urllib.parse import quote

from t2vz import storage
from t2vz.gallery import plots
from t2vz.media.strip import thumbnail_size
from t2vz.results import ResultRow, Results, read
from t2vz.sheet import STRIPS, THUMBNAILS, strip_key, thumbnails_key
from t2vz.spec import JobSpec
from t2vz.storage import Place

LIMIT = 20_000  # rows of some 2 kB
_LISTED_FROM = 50  # rows: the pictures of fewer are asked for one by one
_PLOTTED_RUNS = 10
_SAFE_INT = 2**53  # beyond it a browser's numbers lose digits
_PERIOD_S = (0.5, 6.0)  # of a thumbnail's loop: neither a flash nor a slide show
_PLAYED = {"mp4": "video", "webm": "video", "gif": "image"}
_OUTPUT = re.compile(r"videos/[A-Za-z0-9._-]+")

Record = dict[str, Any]


def told(out: Place, limit: int = LIMIT) -> dict[str, Any]:
    """All that the page shows: `rows`, the last `limit` of them that finished, beside what they have in common.

    Raises ResultsError, OutputError, StorageTimeout.
    """
    results = read(out)
    newest = Results(results.table.slice(max(0, len(results) - limit)))
    rows = list(newest)
    there = pictures(out, rows)
    return {
        "rows": [record(row, there) for row in rows],
        "total": len(results),
        "plots": plots_of(newest),
        "better": plots.BETTER,
        "columns": list(JobSpec.model_fields),
    }


def pictures(out: Place, rows: Collection[ResultRow]) -> frozenset[str]:
    """Keys of those pictures of the rows that are there. Raises what `t2vz.storage` does."""
    if len(rows) >= _LISTED_FROM:
        return frozenset(entry.key for folder in (THUMBNAILS, STRIPS) for entry in storage.entries(out, folder))
    keys = [
        key for row in rows if row.output_uri for key in (thumbnails_key(row.output_uri), strip_key(row.output_uri))
    ]
    return frozenset(key for key in keys if storage.head(out, key) is not None)


def record(row: ResultRow, there: Collection[str]) -> Record:
    """A row for the page: its fields that are known, and what of it can be shown. there: see `pictures`.

    key: of the manifest's row, which a later result replaces. labels: of the lines in the picture. panel_px: size of
    one frame in it. period_s: how long its loop lasts. video, picture: addresses below the folder's.
    """
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    values |= {"parameters": _object(row.parameters), "quality": _object(row.quality)}
    found: Record = {name: _plain(value) for name, value in values.items() if value not in (None, (), {})}
    found["key"] = f"{row.manifest}\n{row.id}"
    if row.status == "ok" and row.output_uri and row.width and row.height and _OUTPUT.fullmatch(row.output_uri):
        kind = _PLAYED.get(row.output_uri.rpartition(".")[2])
        if kind is not None:
            found["video"] = {"kind": kind, "address": quote(row.output_uri)}
        for key in (thumbnails_key(row.output_uri), strip_key(row.output_uri)):
            if key in there:
                found["picture"] = quote(key)
                break
        found["labels"] = _labels(row.mode, values["parameters"])
        found["panel_px"] = thumbnail_size(row.width, row.height)
        found["period_s"] = _period_s(row)
    return found


def plots_of(results: Results) -> dict[str, dict[str, str]]:
    """The plots as SVG, of all rows together under "" and of each of the last runs under its id."""
    runs = dict.fromkeys(reversed(results.table["run_id"].to_pylist()))
    found = {"": plots.of_run(results)}
    if len(runs) > 1:
        found |= {run: plots.of_run(results.where(run_id=run)) for run in list(runs)[:_PLOTTED_RUNS]}
    return found


def _labels(mode: str | None, parameters: Record) -> list[str]:
    """What the lines of a row's picture are, from the top: see `render.Render`."""
    if mode == "edit":
        return ["source", "result"]
    if mode == "control" and parameters.get("extracted", True):
        return ["source", *map(str, parameters.get("condition") or ()), "result"]
    return ["condition", "result"] if mode == "control" else ["result"]


def _period_s(row: ResultRow) -> float:
    try:
        length_s = float((row.frames or 0) / Fraction(row.fps or ""))
    except (ValueError, ZeroDivisionError):
        length_s = 2.0
    return round(min(max(length_s, _PERIOD_S[0]), _PERIOD_S[1]), 3)


def _object(text: str | None) -> Record:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _plain(value: Any) -> Any:
    """The value as JSON that a browser reads exactly."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds")
    if isinstance(value, int) and abs(value) > _SAFE_INT:
        return str(value)
    if isinstance(value, float) and not abs(value) < float("inf"):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(part) for part in value]
    return value
