"""The gallery on 127.0.0.1 while runs go on: the page, its rows as they come, and the pictures and videos they name.

Nothing else of the output folder is served, nothing outside it, and only to who asks for this machine by name: a page
elsewhere whose name is made to mean 127.0.0.1 (DNS rebinding) gets no answer, and no page elsewhere may show what is
here.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2vz import claims, storage
from t2vz.errors import OutputError, ResultsError, T2VZError
from t2vz.gallery import page, plots, rows
from t2vz.results import Results, read
from t2vz.sheet import STRIPS, THUMBNAILS
from t2vz.spec import JobSpec
from t2vz.storage import Place

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

HOSTS = ("127.0.0.1", "localhost")
FOLDERS = ("videos", STRIPS, THUMBNAILS)
_TYPES = {
    "mp4": "video/mp4",
    "webm": "video/webm",
    "mkv": "video/x-matroska",
    "gif": "image/gif",
    "webp": "image/webp",
}
_FRESH_S = 1.0  # several pages that are open ask the storage as often as one
_STOP_TIMEOUT_S = 1
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_SAFE = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}


class Follower:
    """The rows of an output folder as pages follow them: each page asks for what came since its last question.

    Every row gets a number as it is seen first or anew. epoch: another one when the numbers have begun anew, as this
    process did or rows went; a page then asks for all.
    """

    def __init__(self, out: Place, limit: int = rows.LIMIT) -> None:
        self._out, self._limit = out, limit
        self._lock = threading.Lock()
        self._forget_rows()
        self._asked_at = -_FRESH_S

    def _forget_rows(self) -> None:
        self._epoch, self._number = secrets.token_hex(8), 0
        self._seen: dict[str, tuple[Any, int, rows.Record]] = {}  # key → what tells it from others, number, record
        self._common: dict[str, Any] = {"total": 0, "plots": {}}
        self._under_way: list[str] = []

    def since(self, epoch: str, number: int) -> dict[str, Any]:
        """What a page that has seen so much is to learn. Raises OutputError, StorageTimeout, ResultsError."""
        with self._lock:
            if time.monotonic() - self._asked_at >= _FRESH_S:
                self._look()
                self._asked_at = time.monotonic()
            known = number if epoch == self._epoch else 0
            return {
                "epoch": self._epoch,
                "number": self._number,
                "rows": [record for _, at, record in self._seen.values() if at > known],
                "under_way": self._under_way,
                "better": plots.BETTER,
                "columns": list(JobSpec.model_fields),
                **(self._common if self._number > known or not known else {}),
            }

    def _look(self) -> None:
        living = [claim.row for claim in claims.claimed(self._out) if claim.is_live]
        self._under_way = [row.encode("utf-8", "replace").decode() for row in living]  # a file name may be no UTF-8
        try:
            results = read(self._out)
        except ResultsError:
            if storage.is_remote(self._out) or not Path(self._out).exists() or living:  # a run is about to begin
                self._forget_rows()
                return
            raise
        newest = results.table.slice(max(0, len(results) - self._limit))
        marks = newest.select(["manifest", "id", "job_id", "run_id", "status", "finished_at"]).to_pylist()
        keys = [f"{mark['manifest']}\n{mark['id']}" for mark in marks]
        if len(results) < self._common["total"] + sum(key not in self._seen for key in keys):
            self._forget_rows()  # some were removed
        changed = [at for at, key in enumerate(keys) if key not in self._seen or self._seen[key][0] != marks[at]]
        if not changed:
            return
        self._number += 1
        new = list(Results(newest.take(changed)))
        there = rows.pictures(self._out, new)
        for at, row in zip(changed, new, strict=True):
            self._seen[keys[at]] = marks[at], self._number, rows.record(row, there)
        self._common = {"total": len(results), "plots": rows.plots_of(Results(newest))}


def application(out: Place, limit: int = rows.LIMIT) -> Starlette:
    """The server's ASGI application."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route

    out = storage.normal(out)
    follower = Follower(out, limit)

    def index(request: Request) -> Response:
        headers = _SAFE | {"Content-Security-Policy": f"{page.policy()}; frame-ancestors 'none'"}
        return HTMLResponse(page.page(out, None), headers=headers | {"Cache-Control": "no-store"})

    def data(request: Request) -> Response:
        number = request.query_params.get("number", "0")
        try:
            told = follower.since(request.query_params.get("epoch", ""), int(number) if number.isdecimal() else 0)
        except T2VZError as error:  # of the storage: the page says so and asks again
            return JSONResponse({"error": error.message}, 503, _SAFE)
        return JSONResponse(told, headers=_SAFE | {"Cache-Control": "no-store"})

    def media(request: Request) -> Response:
        return _media(out, request.path_params["folder"], request.path_params["name"], request.headers.get("range"))

    routes: list[tuple[str, Callable[[Any], Any]]] = [("/", index), ("/data.json", data), ("/{folder}/{name}", media)]
    return Starlette(
        routes=[Route(path, endpoint) for path, endpoint in routes],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False)],
    )


def _media(out: Place, folder: str, name: str, range: str | None) -> Response:
    """A picture or video; 404 for whatever else."""
    from starlette.responses import FileResponse, PlainTextResponse

    kind = _TYPES.get(name.rpartition(".")[2])
    missing = PlainTextResponse("there is no such picture or video", 404, headers=_SAFE)
    if folder not in FOLDERS or kind is None or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        return missing
    headers = _SAFE | {"Content-Security-Policy": "default-src 'none'; sandbox", "Cache-Control": "max-age=86400"}
    if storage.is_remote(out):
        return _remote_media(out, f"{folder}/{name}", kind, range, headers) or missing
    path = Path(out, folder, name)
    try:
        found = path.lstat()  # a link could lead out of the folder
    except OSError:
        return missing
    if not stat.S_ISREG(found.st_mode):
        return missing
    return FileResponse(path, media_type=kind, headers=headers)


def _remote_media(out: Place, key: str, kind: str, range: str | None, headers: dict[str, str]) -> Response | None:
    """An object on S3, whole or the part that a player asks for; None if there is none."""
    from starlette.responses import PlainTextResponse, Response, StreamingResponse

    try:
        entry = storage.head(out, key)
        if entry is None:
            return None
        headers = headers | {"Accept-Ranges": "bytes"}
        asked = _RANGE.fullmatch(range or "")
        if asked is None or asked.groups() == ("", ""):
            headers["Content-Length"] = str(entry.size_bytes)
            return StreamingResponse(storage.stream(out, key), media_type=kind, headers=headers)
        first, last = asked.groups()
        start = int(first) if first else max(0, entry.size_bytes - int(last))
        end = min(int(last) + 1 if first and last else entry.size_bytes, entry.size_bytes)
        if start >= end:
            return Response(status_code=416, headers=headers | {"Content-Range": f"bytes */{entry.size_bytes}"})
        (body,) = storage.ranges(out, key, [(start, end)])
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{entry.size_bytes}"
        return Response(body, 206, headers, kind)
    except T2VZError as error:
        return PlainTextResponse(error.message, 503, headers=_SAFE)


def serve(out: Place, port: int = 0, limit: int = rows.LIMIT, on_start: Callable[[str], None] = print) -> None:
    """Serve the gallery on 127.0.0.1 until SIGINT or SIGTERM. port: 0 for any free one; on_start: gets the URL.

    Raises OutputError if the port is taken, or the output folder is none.
    """
    import uvicorn

    from t2vz.plan import check_out

    check_out(out)
    try:
        listener = socket.create_server((HOSTS[0], port))
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error
        raise OutputError(f"port {port} can't be used ({why}); leave it out to get a free one") from error
    with listener:
        config = uvicorn.Config(
            application(out, limit),
            log_level="error",
            lifespan="off",
            timeout_graceful_shutdown=_STOP_TIMEOUT_S,
        )
        on_start(f"http://{HOSTS[0]}:{listener.getsockname()[1]}/")
        uvicorn.Server(config).run(sockets=[listener])
