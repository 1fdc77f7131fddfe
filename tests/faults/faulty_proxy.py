"""An HTTP proxy before the tests' S3 server that fails as networks do, by chance and by a seed: python faulty_proxy.py
UPSTREAM SEED SHARE

SHARE of the requests meet trouble: a 500 or 503 before anything is done, an answer that is slow, one that is lost after
the server has done what was asked (the connection closes without it), or one that ends in the middle. Prints its port
and ends with its standard input; then prints what it did, as JSON.
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

TROUBLES = ("500", "503", "slow", "lost", "cut")
SLOW_S = (0.2, 2.0)
_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}


def main() -> None:
    upstream, seed, share = urlsplit(sys.argv[1]).netloc, int(sys.argv[2]), float(sys.argv[3])
    chance, lock, counts = random.Random(seed), threading.Lock(), Counter[str]()

    def drawn() -> str:
        with lock:
            trouble = chance.choice(TROUBLES) if chance.random() < share else "none"
            counts[trouble] += 1
        return trouble

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            trouble = drawn()
            if trouble in ("500", "503"):
                self.answer(int(trouble), [], b"<Error><Code>InternalError</Code><Message>injected</Message></Error>")
                return
            if trouble == "slow":
                time.sleep(random.uniform(*SLOW_S))
            beyond = http.client.HTTPConnection(upstream, timeout=60)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
            beyond.request(self.command, self.path, body, headers)  # Host too: it is signed
            got = beyond.getresponse()
            data = got.read()
            if trouble == "lost":
                self.close_connection = True
                return
            kept = [pair for pair in got.getheaders() if pair[0].lower() not in {*_HOP, "content-length"}]
            length = got.getheader("Content-Length") if self.command == "HEAD" else None
            self.answer(got.status, kept, data, length, cut=trouble == "cut" and len(data) > 1)

        def answer(
            self, status: int, headers: list[tuple[str, str]], body: bytes, length: str | None = None, cut: bool = False
        ) -> None:
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Length", length or str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = self.close_connection or cut

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
