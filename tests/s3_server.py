"""An S3 server (moto's) in a process of its own, which can be told to fail: python s3_server.py

Prints its port and ends with its standard input. POST /t2vz-faults?before=N&after=N: of the next requests N are
answered with 500 before anything is done, and then N after it was done, as when the answer is lost on the way.
GET /t2vz-requests: the requests since the last such question, a line each.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

_FAILED = b"<Error><Code>InternalError</Code><Message>injected</Message></Error>"


class Faulty:
    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.app, self.before, self.after = app, 0, 0
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/t2vz-faults":
            wanted = {name: int(values[0]) for name, values in parse_qs(environ["QUERY_STRING"]).items()}
            self.before, self.after = wanted.get("before", 0), wanted.get("after", 0)
            return self._answer(start, "200 OK", b"")
        if path == "/t2vz-requests":
            told, self.requests = "\n".join(self.requests), []
            return self._answer(start, "200 OK", told.encode())
        with self.lock:
            self.requests.append(f"{environ['REQUEST_METHOD']} {path}")
            fails_before = self.before > 0
            fails_after = not fails_before and self.after > 0
            self.before -= fails_before
            self.after -= fails_after
        if fails_before:
            return self._answer(start, "500 Internal Server Error", _FAILED)
        answer = self.app(environ, (lambda *_: lambda _: None) if fails_after else start)
        if fails_after:
            b"".join(answer)
            return self._answer(start, "500 Internal Server Error", _FAILED)
        return answer

    def _answer(self, start: Callable[..., Any], status: str, body: bytes) -> Iterable[bytes]:
        start(status, [("Content-Length", str(len(body)))])
        return [body]


def main() -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = Faulty(DomainDispatcherApplication(create_backend_app))  # type: ignore[arg-type]
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
