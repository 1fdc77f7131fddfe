"""The table of manifest columns in manifests/README.md, made from JobSpec so that it can't fall behind.

python -m t2vz.columns    writes it anew, between its two markers; in the repository's folder
"""

from __future__ import annotations

import sys
import types
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from t2vz.spec import JobSpec

BEGIN, END = "<!-- columns: begin (python -m t2vz.columns) -->", "<!-- columns: end -->"
_TYPES = {str: "text", int: "whole number", float: "number", bool: "true or false", Fraction: "rate"}


def columns_table() -> str:
    """A Markdown table, a line a column: name, type, default, unit, modes, meaning."""
    lines = ["| column | type | default | unit | modes | meaning |", "| --- | --- | --- | --- | --- | --- |"]
    for name, field in JobSpec.model_fields.items():
        extra: Any = field.json_schema_extra
        modes = "all" if extra["modes"] == "text control edit" else extra["modes"].replace(" ", ", ")
        default = "**needed**" if field.is_required() else _cell(field.default)
        meaning = _bounded(field.description or "", field.metadata)
        lines.append(f"| `{name}` | {_type(field.annotation)} | {default} | {extra['unit']} | {modes} | {meaning} |")
    return "\n".join(lines) + "\n"


def with_table(document: str) -> str:
    """`document` with the present table between its markers."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{columns_table()}{END}{after}"


def choices(annotation: Any) -> tuple[str, ...]:
    """The values that a column of a fixed few can have; none if it isn't one. true and false of a switch."""
    if annotation is bool:
        return ("true", "false")
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((found for part in get_args(annotation) if (found := choices(part))), ())


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _type(next(a for a in arguments if a is not type(None)))
    if origin is tuple:
        return f"{_type(arguments[0])}, joined by `+`"
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is not None:  # Annotated
        return _type(arguments[0])
    return _TYPES[annotation]


def _cell(value: Any) -> str:
    if value is None or value == "" or value == ():
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(f"{part:g}" for part in value) if isinstance(value, tuple) else str(value)


def _bounded(meaning: str, constraints: list[Any]) -> str:
    low = next((c.ge for c in constraints if hasattr(c, "ge")), None)
    high = next((c.le for c in constraints if hasattr(c, "le")), None)
    if low is None or high is None:
        return meaning
    return f"{meaning} ({low} to {high if high != 2**63 - 1 else '2⁶³ − 1'})"


if __name__ == "__main__":
    readme = Path(sys.argv[1] if len(sys.argv) > 1 else "manifests/README.md")
    readme.write_text(with_table(readme.read_text("utf-8")), "utf-8")
