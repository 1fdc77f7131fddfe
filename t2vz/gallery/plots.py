"""Plots of a run as SVG: where its time went, and how its quality measures lie. For the gallery and for artifacts.

Drawn by a template: two kinds of boxes don't need a plotting library, and SVG is sharp, small and has a dark side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from t2vz.results import Results

STAGES = ("decode", "conditions", "model", "generate", "encode")
# Which way a measure is better (`t2vz.quality`); those that are left out have no better.
BETTER = {
    "black_frames": "lower",
    "frozen_frames": "lower",
    "flicker": "lower",
    "warp_error": "lower",
    "seam_ratio": "lower",
    "colour_drift": "lower",
    "edge_f1": "higher",
    "clip_frame_consistency": "higher",
    "clip_prompt_consistency": "higher",
}
_DOTS = 60  # more values are drawn as a box only
_WIDTH_PX, _LEFT_PX, _RIGHT_PX, _LINE_PX, _TOP_PX = 600, 128, 212, 34, 44


@dataclass(frozen=True)
class _Line:
    """One distribution as it is drawn; x positions in px. beside: two texts at its right."""

    name: str
    low: float
    quarter: float
    median: float
    three_quarters: float
    high: float
    dots: tuple[float, ...]
    beside: tuple[str, str]


def of_run(results: Results) -> dict[str, str]:
    """`times` and `quality`: an SVG picture each, "" if nothing is known. Values of rows that failed count, too."""
    return {"times": stage_times(results), "quality": quality(results)}


def stage_times(results: Results) -> str:
    """Seconds a row spent in each stage: the median, the middle half, and all but the outer 5 %; on one log scale."""
    seconds = {stage: sorted(value for value in results.table[f"{stage}_s"].to_pylist() if value is not None)
               for stage in STAGES}  # fmt: skip
    seconds = {stage: values for stage, values in seconds.items() if values}
    if not seconds:
        return ""
    positive = [value for values in seconds.values() for value in values if value > 0]
    low = 10 ** math.floor(math.log10(max(1e-3, min(positive, default=0.1))))
    high = max(10 ** math.ceil(math.log10(max(positive, default=1.0))), low * 10)

    def x(value: float) -> float:
        return _at(math.log(max(value, low) / low) / math.log(high / low))

    total_s = sum(map(sum, seconds.values())) or 1.0
    lines = [
        _line(stage, values, x, (f"{_duration(_quantile(values, 0.5))} a row", f"{sum(values) / total_s:.0%} of all"))
        for stage, values in seconds.items()
    ]
    decades = round(math.log10(high / low))
    ticks = [(x(low * 10**i), _duration(low * 10**i) if decades < 5 or i % 2 == 0 else "") for i in range(decades + 1)]
    said = "; ".join(f"{line.name} {line.beside[0]}, {line.beside[1]}" for line in lines)
    return _drawn("Time per stage", f"{_duration(total_s)} in all", said, lines, ticks)


def quality(results: Results) -> str:
    """Each quality measure of the rows, on a scale of its own from its lowest to its highest value."""
    found: dict[str, list[float]] = {}
    for text in results.table["quality"].to_pylist():
        for name, value in (json.loads(text) if text else {}).items():
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, []).append(float(value))
    lines = []
    for name, values in found.items():
        values.sort()
        low, span = values[0], (values[-1] - values[0]) or 1.0

        def x(value: float, low: float = low, span: float = span) -> float:
            return _at((value - low) / span)

        better = f"{BETTER[name]} is better" if name in BETTER else ""
        beside = f"{_quantile(values, 0.5):.3g}  ({values[0]:.3g} – {values[-1]:.3g})"
        lines.append(_line(name.replace("_", " "), values, x, (beside, better)))
    if not lines:
        return ""
    rows = max(map(len, found.values()))
    said = "; ".join(f"{line.name} {line.beside[0]}" for line in lines)
    return _drawn("Quality", f"median (lowest – highest) of {rows} row{'' if rows == 1 else 's'}", said, lines, [])


def _line(name: str, values: Sequence[float], x: Any, beside: tuple[str, str]) -> _Line:
    low, quarter, median, three_quarters, high = (x(_quantile(values, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95))
    dots = tuple(round(x(value), 1) for value in values) if len(values) <= _DOTS else ()
    return _Line(name, low, quarter, median, three_quarters, high, dots, beside)


def _quantile(values: Sequence[float], q: float) -> float:
    """Of sorted values, with linear interpolation."""
    place = q * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (place - below)


def _at(part: float) -> float:
    return _LEFT_PX + part * (_WIDTH_PX - _LEFT_PX - _RIGHT_PX)


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


@lru_cache(maxsize=1)
def style() -> str:
    """The style sheet in each plot: a page's Content-Security-Policy binds the pictures in it, too."""
    return files("t2vz.gallery").joinpath("templates", "plot.css").read_text("utf-8")


@lru_cache(maxsize=1)
def _template() -> Any:
    from jinja2 import Environment, PackageLoader

    return Environment(loader=PackageLoader("t2vz.gallery"), autoescape=True, trim_blocks=True).get_template("plot.svg")


def _drawn(title: str, subtitle: str, said: str, lines: list[_Line], ticks: list[tuple[float, str]]) -> str:
    height = _TOP_PX + _LINE_PX * len(lines) + (26 if ticks else 8)
    from markupsafe import Markup

    return str(
        _template().render(
            style=Markup(style()),
            title=title,
            subtitle=subtitle,
            said=said,
            lines=lines,
            ticks=ticks,
            height=height,
            width=_WIDTH_PX,
            top=_TOP_PX,
            step=_LINE_PX,
            left=_LEFT_PX,
            right=_WIDTH_PX - _RIGHT_PX,
        )
    )
