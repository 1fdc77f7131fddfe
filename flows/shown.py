"""A run in Prefect's UI: its progress, and in the end a summary, counts, the failed rows, a contact sheet, plots and a
link to the gallery as artifacts.

They are pictures of the results, which are safe: what Prefect does not take is logged and fails nothing.
"""

import base64
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from t2vz.events import counted, outcomes
from t2vz.gallery import plots
from t2vz.results import ResultRow, read
from t2vz.sheet import moving_thumbnail

TOLD_ROWS = 100  # failed rows in the artifact; the results table has them all
PICTURES = 24  # of some 10 kB
_COLUMNS = 4
_PROGRESS_S = 5.0


class Progress:
    """The run's progress, as a bar in the UI. To be used in the flow's thread."""

    def __init__(self) -> None:
        self.total: int | None = None  # as long as it isn't known, there is nothing to show
        self._artifact: UUID | None = None
        self._told_at = 0.0

    def count(self, rows: Iterable[object]) -> None:
        """Let the total be as many as these. For a thread of its own: of a million rows it takes seconds."""
        self.total = sum(1 for _ in rows)

    def tell(self, counts: Counter[str], *, now: bool = False) -> None:
        """Show the part of `total` rows that are over, at most every few seconds unless `now`."""
        if not self.total or (not now and time.monotonic() - self._told_at < _PROGRESS_S):
            return
        self._told_at = time.monotonic()
        percent, said = min(100.0, 100.0 * counts.total() / self.total), message(counts)
        if self._artifact is None:
            self._artifact = taken(
                lambda: create_progress_artifact(percent, key="render-progress", description=f"Rows: {said}")
            )
        else:
            artifact = self._artifact
            taken(lambda: update_progress_artifact(artifact, percent, description=f"Rows: {said}"))


def message(counts: Counter[str]) -> str:
    """The counts by status in words."""
    return counted(counts) or "no rows"


def gallery_address(out: str) -> str | None:
    """Where people see the output folder: T2VZ_GALLERY_URL shows the folder T2VZ_GALLERY_ROOT (the output folder itself
    if that isn't set); None if nothing shows it.
    """
    address, root = os.environ.get("T2VZ_GALLERY_URL"), os.environ.get("T2VZ_GALLERY_ROOT")
    if not address:
        return None
    if not root:
        return address
    within, folder = os.path.abspath(root), os.path.abspath(out)
    if os.path.commonpath([within, folder]) != within or "://" in out:
        return None
    below = quote(Path(folder).relative_to(within).as_posix())
    return f"{address.rstrip('/')}/{'' if below == '.' else f'{below}/'}"


def publish(
    manifest: str,
    out: str,
    counts: Counter[str],
    failures: list[ResultRow],
    finished: list[ResultRow],
    gallery: str | None = None,
) -> None:
    """The run's artifacts. failures, finished: the first TOLD_ROWS and PICTURES of them. gallery: its address."""
    lines = [f"**{message(counts)}**", "", f"Manifest: `{manifest}`", "", f"Videos and results table: `{out}`"]
    if gallery is not None:
        lines += ["", f"[Gallery]({gallery})"]
        taken(lambda: create_link_artifact(gallery, "Gallery", key="gallery", description=f"All rows of {out}"))
    table = [
        {"row": row.id, "stage": row.error_stage or "", "reason": row.error_message or "", "attempts": row.attempts}
        for row in failures
    ]
    if failures:
        lines += ["", "| failed row | stage | reason |", "| --- | --- | --- |"]
        lines += [f"| {cell(row.id)} | {row.error_stage} | {cell(row.error_message or '')} |" for row in failures]
    if counts["failed"] > len(failures):
        lines += ["", f"… and {counts['failed'] - len(failures)} more in the table."]
    taken(lambda: create_markdown_artifact("\n".join(lines), key="render-manifest", description="Summary of the run"))
    ended = [{"rows": number, "ended": word} for word, number in outcomes(counts)]
    if ended:
        taken(lambda: create_table_artifact(ended, key="row-counts", description="How the run's rows ended"))
    if failures:
        description = f"Failed rows: {counts['failed']}" + ("" if counts["failed"] == len(table) else ": the first")
        taken(lambda: create_table_artifact(table, key="failed-rows", description=description))
    pictures = [(row, picture) for row in finished if (picture := taken(partial(moving_thumbnail, out, row)))]
    if pictures:
        sheet = _sheet(pictures, gallery)
        taken(lambda: create_markdown_artifact(sheet, key="contact-sheet", description="Rows that were rendered"))


def publish_plots(out: str, run_id: str) -> None:
    """Where the run's time went, and how its quality measures lie, as pictures; of its own rows only."""
    drawn = taken(lambda: plots.of_run(read(out).where(run_id=run_id))) or {}
    pictures = [
        f"![{name}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"
        for name, svg in drawn.items()
        if svg
    ]
    if pictures:
        taken(
            lambda: create_markdown_artifact("\n\n".join(pictures), key="plots", description="Time per stage, quality")
        )


def _sheet(pictures: list[tuple[ResultRow, bytes]], gallery: str | None) -> str:
    """A markdown table of moving pictures, each with its row's id and prompt, and a link to its video."""
    tiles = []
    for row, picture in pictures:
        id = cell(row.id)
        shown = f"![{id}](data:image/webp;base64,{base64.b64encode(picture).decode()})"
        named = f"**{id}**"
        if gallery is not None:
            named = f"[{named}]({gallery.rstrip('/')}/{quote(row.output_uri or '')})"
        tiles.append(f"{shown}<br>{named} ({row.mode})<br>{cell((row.prompt or '')[:80])}")
    columns = min(_COLUMNS, len(tiles))
    tiles += [" "] * (-len(tiles) % columns)
    lines = ["| " + " | ".join([" "] * columns) + " |", "| " + " | ".join(["---"] * columns) + " |"]
    lines += ["| " + " | ".join(tiles[at : at + columns]) + " |" for at in range(0, len(tiles), columns)]
    return "\n".join(lines)


def cell(text: str) -> str:
    """The text as a cell of a Markdown table."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|`\[\]])", r"\\\1", plain)  # no links, and no pictures from elsewhere


def taken(make: Callable[[], Any]) -> Any:
    """What `make` makes in Prefect; None, and a line in the log, if Prefect does not take it."""
    try:
        return make()
    except Exception as error:
        get_run_logger().warning("Prefect did not take an artifact: %s", error)
        return None
