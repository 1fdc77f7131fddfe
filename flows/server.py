"""A Prefect server for the length of one run, for whoever has none: it ends with the process that started it.

Prefect starts one by itself too, but that one dies of the terminal's Ctrl-C before the run could report its
end, and lives on for ever after a `kill -9` of the run (both seen with 3.8.8).
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import prefect.context
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL

from t2vz.errors import UnexpectedError

_START_TIMEOUT_S = 180  # 10 to 20 s on two busy cores
_CHECK_TIMEOUT_S = 10
_DRAIN_TIMEOUT_S = 10
_STOP_TIMEOUT_S = 20


@contextmanager
def api() -> Iterator[str]:
    """Yield the URL of the Prefect API for this process: the one that is set up, else one of its own.

    The server of its own keeps its history where Prefect always does (PREFECT_HOME), without UI. Raises
    UnexpectedError if it does not start.
    """
    if url := PREFECT_API_URL.value():
        _check_answers(url)
        yield url
        return
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        # The child gets the listening socket, so no port can be snatched away in between. Its stdin is a
        # pipe that closes when this process ends, however it ends.
        server = subprocess.Popen(
            [sys.executable, "-P", "-m", __spec__.name, str(listener.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(listener.fileno(),),
            start_new_session=True,  # out of reach of the terminal's Ctrl-C
            env={**os.environ, "PREFECT_UI_ENABLED": "0", "PREFECT_SERVER_ANALYTICS_ENABLED": "0"},
        )
    try:
        _await(server, url)
        os.environ["PREFECT_API_URL"] = url
        prefect.context.refresh_global_settings_context()
        yield url
    finally:
        # What is still to be sent, or Prefect retries for a minute at exit.
        APILogWorker.drain_all(timeout=_DRAIN_TIMEOUT_S)
        EventsWorker.drain_all(timeout=_DRAIN_TIMEOUT_S)
        os.environ.pop("PREFECT_API_URL", None)
        prefect.context.refresh_global_settings_context()
        assert server.stdin is not None
        server.stdin.close()
        try:
            server.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _check_answers(url: str) -> None:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=_CHECK_TIMEOUT_S):
            return
    except urllib.error.HTTPError:
        return  # it is there; what it wants to know, Prefect tells it
    except (OSError, ValueError) as error:
        raise UnexpectedError(
            f"the Prefect server at {url} does not answer ({error}); start it, or unset PREFECT_API_URL",
            stage="prefect",
        ) from error


def _await(server: "subprocess.Popen[bytes]", url: str) -> None:
    """Return when it answers. The request waits in the listening socket's queue until then."""
    try:
        # Not through the proxy that the environment may name: this machine is meant.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"{url}/health", timeout=_START_TIMEOUT_S):
            return
    except (OSError, urllib.error.URLError) as error:
        how = "ended" if server.poll() is not None else "does not answer"
        raise UnexpectedError(
            f"Prefect's temporary server {how} ({error}); try `prefect server start` and set PREFECT_API_URL",
            stage="prefect",
        ) from error


def _serve(listener_fd: int) -> None:
    import uvicorn

    def stop_with_parent() -> None:
        sys.stdin.buffer.read()  # ends when the parent does
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_with_parent, daemon=True).start()
    config = uvicorn.Config(
        "prefect.server.api.server:create_app",
        factory=True,
        log_level="error",
        timeout_graceful_shutdown=_STOP_TIMEOUT_S // 2,
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=listener_fd)])


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
