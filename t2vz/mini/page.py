"""The evaluation's page: figures, pictures and plots in one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from t2vz.mini.evaluate import Section, Strip
    from t2vz.mini.measures import Figure

_GAP_PX = 2
_WEBP_QUALITY = 80

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1120px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .7em; border-bottom: 1px solid #ddd;
text-align: left; vertical-align: top } td.n { text-align: right; font-variant-numeric: tabular-nums; white-space:
nowrap } tr.key { font-weight: 600; background: #f3f6fa } figure { margin: .8em 0 } figcaption { font-size: 13px;
color: #555 } img { max-width: 100%; image-rendering: auto } dl { display: grid; grid-template-columns: max-content 1fr;
gap: 0 1em; font-size: 13px }
"""


def html(sections: Mapping[str, Section], about: Mapping[str, Any]) -> str:
    """The whole page."""
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in about.items())
    parts = "".join(_section(section) for section in sections.values())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>t2vz evaluation</title>'
        f"<style>{_STYLE}</style><h1>t2vz: the measure of quality</h1><dl>{facts}</dl>"
        "<p>Every figure with its 95 % interval and the number of units that it is made of. Controls are what the "
        "measure gives where it must be bad, ceilings where it can't be better.</p>"
        f"{parts}</html>\n"
    )


def _section(section: Section) -> str:
    from t2vz.mini.evaluate import KEYS

    rows = "".join(_figure(name, figure, name in KEYS) for name, figure in section.figures.items())
    head = "<tr><th>figure<th>value<th>95 %<th>n<th>should be<th>what it is</tr>"
    plot = f'<figure><img alt="" src="{_uri(section.plot, "png")}"></figure>' if section.plot else ""
    strips = "".join(_strip(strip) for strip in section.strips)
    return f"<h2>{escape(section.title)}</h2><table>{head}{rows}</table>{_table(section.table)}{plot}{strips}"


def _figure(name: str, figure: Figure, is_key: bool) -> str:
    interval = "" if figure.low is None else f"{_number(figure.low)} – {_number(figure.high)}"
    return (
        f"<tr{' class=key' if is_key else ''}><td>{escape(name)}<td class=n>{_number(figure.value)}"
        f"<td class=n>{interval}<td class=n>{figure.n} {escape(figure.of)}<td>{escape(figure.bar)}"
        f"<td>{escape(figure.meaning)}</tr>"
    )


def _table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td{_class(value)}>{escape(_number(value))}" for value in row.values()) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _class(value: Any) -> str:
    return "" if isinstance(value, str) else " class=n"


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _strip(strip: Strip) -> str:
    from PIL import Image

    count, height, width, _ = strip.frames.shape
    row = np.full((height, count * (width + _GAP_PX) - _GAP_PX, 3), 255, np.uint8)
    for i, frame in enumerate(strip.frames):
        row[:, i * (width + _GAP_PX) :][:, :width] = frame
    stream = io.BytesIO()
    Image.fromarray(row).save(stream, "WEBP", quality=_WEBP_QUALITY)
    caption, uri = escape(strip.caption), _uri(stream.getvalue(), "webp")
    return f'<figure><figcaption>{caption}</figcaption><img alt="{caption}" src="{uri}"></figure>'


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
