"""The gallery's page: one HTML file with its style, its script and, unless it is served, its data inside."""

from __future__ import annotations

import base64
import hashlib
import os
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from t2vz import storage
from t2vz.errors import OutputError
from t2vz.files import whole
from t2vz.gallery import plots, rows
from t2vz.storage import Place

NAME = "gallery.html"


def write(
    out: Place, file: str | Path | None = None, *, embed: bool = False, limit: int = rows.LIMIT
) -> tuple[str, int]:
    """Write the gallery of an output folder as it is now; where, and how many rows it shows.

    file: OUT/gallery.html if None, also on S3. The page names videos and pictures by their place relative to its own.
    embed: put the pictures into the file, so that it can be sent to anybody; without the videos.
    limit: at most so many rows, the last that finished. Raises ResultsError, OutputError, StorageTimeout.
    """
    if storage.is_remote(out) and file is not None and not embed:
        raise OutputError(f"{file}: a file here can't show what lies in {out}; embed the pictures, or write it there")
    data = rows.told(out, limit)
    if embed:
        _embed(out, data["rows"])
    base = "" if file is None or embed else _relative(Path(out), Path(file).absolute().parent)
    html = page(out, data | {"base": base}).encode()
    if file is None and storage.is_remote(out):
        storage.put(out, NAME, html, {"Content-Type": "text/html; charset=utf-8"})
        return storage.joined(out, NAME), len(data["rows"])
    path = Path(out, NAME) if file is None else Path(file)
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path}: there is no such folder to write to; make it first")
    try:
        with whole(path) as draft:
            draft.write_bytes(html)
    except OSError as error:
        raise OutputError(f"{path}: can't be written ({error.strerror})") from error
    return str(path), len(data["rows"])


def page(out: Place, data: dict[str, Any] | None) -> str:
    """The page. data: see `rows.told`; None for a page that asks its server for them."""
    style, script, template = _parts()
    return str(
        template.render(
            name=str(out).rstrip("/").rpartition("/")[2] or str(out),
            policy=policy() if data is None else policy("file:"),
            style=style,
            script=script,
            data={"live": data is None, "out": str(out)} | (data or {}),
        )
    )


@lru_cache(maxsize=2)
def policy(*places: str) -> str:
    """The page's Content-Security-Policy: its own script and style, pictures and videos from its own server (of which a
    page that is a file has none) and from `places`, and nothing from elsewhere."""
    media = " ".join(("'self'", *places))
    style, script, _ = _parts()
    return (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)} {_hash(plots.style())}; "
        f"img-src {media} data:; media-src {media}; connect-src 'self'; base-uri 'none'; form-action 'none'"
    )


@lru_cache(maxsize=1)
def _parts() -> tuple[str, str, Any]:
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    folder = files("t2vz.gallery").joinpath("templates")
    style, script = (Markup(folder.joinpath(name).read_text("utf-8")) for name in ("gallery.css", "gallery.js"))
    # Escapes by itself; `tojson`, too, so that no text in the data can end the script that holds them.
    environment = Environment(loader=PackageLoader("t2vz.gallery"), autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return style, script, environment.get_template("gallery.html")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _relative(out: Path, folder: Path) -> str:
    """The way from the page's folder to the output folder, as the start of an address."""
    from urllib.parse import quote

    way = os.path.relpath(out.absolute(), folder)
    return "" if way == "." else f"{quote(Path(way).as_posix())}/"


def _embed(out: Place, found: list[rows.Record]) -> None:
    """Put the pictures into the records; the videos stay where they are."""
    from urllib.parse import unquote

    keys = [unquote(record["picture"]) for record in found if "picture" in record]
    addresses = {
        key: f"data:image/webp;base64,{base64.b64encode(body).decode()}" for key, body in storage.get_all(out, keys)
    }
    for record in found:
        record.pop("video", None)
        if "picture" in record and (address := addresses.get(unquote(record.pop("picture")))) is not None:
            record["picture"] = address
