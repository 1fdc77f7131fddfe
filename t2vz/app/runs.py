"""A run of the playground: a row of a manifest, rendered as `t2vz run` would, and appended to one that is kept."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from t2vz.errors import ManifestError, T2VZError, translating
from t2vz.events import Event, listening
from t2vz.manifest import Problem
from t2vz.plan import Job, Unready, plan
from t2vz.render import Settings, file_name, opening, render
from t2vz.results import ResultRow, read
from t2vz.spec import COLUMN_MODES, SOURCE_COLUMNS
from t2vz.storage import joined

SOURCES = "sources"  # folder beside `videos`: what was uploaded, for the manifest's rows to find again


@dataclass(frozen=True)
class Ran:
    """row: of the results table, ok or failed; None if the row could not be rendered, for `problems`, or was stopped.

    before: it was done already.
    """

    row: ResultRow | None = None
    problems: tuple[str, ...] = ()
    before: bool = False


class Playground:
    """Runs into one output folder, one at a time. Use within `opened`."""

    def __init__(self, settings: Settings, manifest: Path) -> None:
        self.settings = settings
        self.manifest = manifest
        self.folder = manifest.absolute().parent
        self.out = Path(settings.out)
        self._stopping = threading.Event()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The folders made ready. Raises OutputError."""
        with opening(self.settings), translating("manifest", str(self.folder)):
            self.folder.mkdir(parents=True, exist_ok=True)
            yield

    def run(self, cells: Mapping[str, str], on_event: Callable[[Event], None] = lambda event: None) -> Ran:
        """Render a row, or find that it is done. What is wrong with it is in the answer; raises only what no row is to
        blame for: T2VZError.
        """
        self._stopping = threading.Event()
        settings = replace(self.settings, stopping=self._stopping)
        # Beside the manifest that is kept, as paths in cells are relative to where it lies.
        with tempfile.NamedTemporaryFile("w", prefix=".t2vz-app-", suffix=".csv", dir=self.folder) as file:
            file.write(line(cells, header=True))
            file.flush()
            (item,) = plan(
                file.name, self.out, limits=settings.limits, models=settings.models, content=settings.content
            )
            if isinstance(item, Unready):
                problems: tuple[Problem, ...] = item.problems
                return Ran(problems=tuple(map(str, problems)) or (item.error.message,))
            if not isinstance(item, Job):
                return Ran(self._row(item.job_id), before=True)
            with listening(on_event):
                try:
                    row = render(item, settings)
                except KeyboardInterrupt:
                    return Ran(problems=("stopped",))
        return Ran(self._row(item.job_id) if row is None else row)

    def stop(self) -> None:
        """Let the run under way end at its next step."""
        self._stopping.set()

    def keep(self, upload: str) -> str:
        """The path of a lasting copy of an uploaded file, named after its content."""
        path = Path(upload)
        with translating("decode", path.name), path.open("rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()[:10]
            name = f"{file_name(path.stem)[:40]}-{digest}"
            kept = self.out / SOURCES / (f"{name}.{file_name(path.suffix)}" if path.suffix else name)
            if not kept.exists():
                kept.parent.mkdir(exist_ok=True)
                draft = kept.with_name(f".{kept.name}")
                shutil.copyfile(path, draft)
                draft.replace(kept)
        return str(kept)

    def line(self, cells: Mapping[str, str]) -> str:
        """Header and row as the manifest would have them."""
        return line(relative(cells, self.manifest), header=True)

    def append(self, cells: Mapping[str, str]) -> None:
        append(self.manifest, relative(cells, self.manifest))

    def video(self, row: ResultRow) -> str:
        return joined(self.out, row.output_uri or "")

    def _row(self, job_id: str) -> ResultRow:
        """What became of it, also if the manifest's row asks for something else by now."""
        return next(row for row in read(self.out, all=True) if row.job_id == job_id)


def relative(cells: Mapping[str, str], manifest: Path) -> dict[str, str]:
    """The cells with the paths of sources relative to the manifest's folder, if they are below it."""
    folder, found = manifest.absolute().parent, dict(cells)
    for name in SOURCE_COLUMNS:
        if os.path.isabs(found.get(name, "")) and Path(found[name]).is_relative_to(folder):
            found[name] = Path(found[name]).relative_to(folder).as_posix()
    return found


def line(cells: Mapping[str, str], columns: list[str] | None = None, *, header: bool = False) -> str:
    """A row as CSV, with the columns in the manifest's order."""
    columns = columns or [name for name in COLUMN_MODES if name in cells]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerow(cells)
    return text.getvalue()


def append(manifest: Path, cells: Mapping[str, str]) -> None:
    """Append a row to a CSV manifest, which is made if there is none. Columns that it lacks are added to all its rows,
    whole or not at all. Raises ManifestError (it is no CSV manifest), OutputError.
    """
    with translating("manifest", str(manifest)):
        if not manifest.exists() or not manifest.stat().st_size:
            manifest.parent.mkdir(parents=True, exist_ok=True)
            manifest.write_text(line(cells, header=True), "utf-8")
            return
        try:
            with manifest.open(encoding="utf-8-sig", newline="") as file:
                header, *rows = list(csv.reader(file, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ManifestError(f"{manifest}: can't be appended to, as it is not CSV in UTF-8 ({error})") from error
        columns = [name.strip() for name in header]
        if unknown := [name for name in columns if name not in COLUMN_MODES]:
            raise ManifestError(
                f"{manifest}: can't be appended to, as it has a column {unknown[0]!r}; name another file"
            )
        more = [name for name in COLUMN_MODES if name in cells and name not in columns]
        if not more:
            ended = manifest.read_bytes().endswith((b"\n", b"\r"))
            with manifest.open("a", encoding="utf-8", newline="") as file:
                file.write(("" if ended else "\n") + line(cells, columns))
            return
        draft = manifest.with_name(f".{manifest.name}.draft")
        with draft.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*columns, *more])
            writer.writerows([*row, *[""] * (len(columns) - len(row) + len(more))] for row in rows if row)
            file.write(line(cells, [*columns, *more]))
        draft.replace(manifest)


def told(error: T2VZError) -> str:
    """An error as a message."""
    return f"{error.stage}: {error.message}"
