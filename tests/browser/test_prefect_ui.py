"""A finished run's page in Prefect's own UI, with its artifacts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import Browser

MISSING = {"id": "missing", "mode": "control", "condition": "edge", "source": "nowhere.mp4"}


@pytest.fixture(scope="module")
def prefect_ui(chromium: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prefect server with its UI."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    env = {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_UI_ENABLED": "true",
        "PREFECT_SERVER_UI_API_URL": f"{url}/api",
        "PREFECT_SERVER_UI_V2_ENABLED": "false",  # it asks for things from elsewhere
    }
    log = (home / "server.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, **env}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        ends_at = time.monotonic() + 120
        while not _answers(f"{url}/api/health"):
            assert process.poll() is None, (home / "server.log").read_text()
            assert time.monotonic() < ends_at
            time.sleep(0.1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_a_finished_run_and_its_artifacts(
    browser: Browser, prefect_ui: str, write_manifest: Callable[..., Path], tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path / "boats.csv", {"id": "boat", "seed": "1"}, MISSING)
    ran = subprocess.run(
        [sys.executable, "-m", "t2vz.cli", "run", str(manifest), "--out", str(tmp_path / "out"), "--device", "cpu"],
        env={**os.environ, "PREFECT_API_URL": f"{prefect_ui}/api"}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 1, ran.stderr
    (run,) = json.loads(_post(f"{prefect_ui}/api/flow_runs/filter", {}))
    assert run["name"] == "boats.csv → out"

    browser.open(f"{prefect_ui}/runs/flow-run/{run['id']}", width=1400, height=1000)
    text = "document.body.innerText"
    browser.until(f"{text}.includes('boats.csv → out') && {text}.includes('Completed')", timeout_s=60)
    browser.until(f"{text}.includes('1 rendered, 1 failed')")
    browser.picture("prefect-run")

    artifacts = {one["key"]: one["id"] for one in json.loads(_post(f"{prefect_ui}/api/artifacts/filter", {}))}
    assert {"render-manifest", "failed-rows", "contact-sheet", "plots", "render-progress"} <= artifacts.keys()
    browser.open(f"{prefect_ui}/artifacts/artifact/{artifacts['contact-sheet']}", width=1400, height=1000)
    pictures = "[...document.querySelectorAll('img')].filter(image => image.src.startsWith('data:image'))"
    browser.until(
        f"{pictures}.length && {pictures}.every(image => image.complete && image.naturalWidth >= 64)", timeout_s=60
    )
    browser.picture("prefect-contact-sheet")
    browser.open(f"{prefect_ui}/artifacts/artifact/{artifacts['plots']}", width=1400, height=1000)
    drawn = "[...document.querySelectorAll('img')].filter(image => image.src.startsWith('data:image/svg'))"
    browser.until(f"{drawn}.length && {drawn}.every(image => image.complete && image.naturalWidth)", timeout_s=60)
    browser.picture("prefect-plots")
    browser.open(f"{prefect_ui}/artifacts/artifact/{artifacts['failed-rows']}", width=1400, height=1000)
    browser.until(f"{text}.includes('nowhere.mp4')", timeout_s=60)
    browser.picture("prefect-failed-rows")
    assert browser.requested_outside() == []


def _post(url: str, body: object) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return bytes(answer.read())
