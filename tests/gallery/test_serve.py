"""The server: only what the page names, only to this machine, and what is new since the last question."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from finished import keep, row
from s3 import S3
from starlette.testclient import TestClient

from t2vz import claims, storage
from t2vz.errors import StorageTimeout
from t2vz.gallery import serve
from t2vz.results import ResultStore

VIDEO = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def _always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_FRESH_S", 0.0)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    keep(out, [row(1), row(10)])
    (out / "videos").mkdir()
    (out / "videos" / "row-0001-000000000001.mp4").write_bytes(VIDEO)
    return out


@pytest.fixture
def client(out: Path) -> Iterator[TestClient]:
    with TestClient(serve.application(out), base_url="http://127.0.0.1:8080") as client:
        yield client


def test_the_page_and_what_it_names(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    told = client.get("/data.json").json()
    assert [one["id"] for one in told["rows"]] == ["row-0001", "row-0010"]
    picture = client.get(f"/{told['rows'][0]['picture']}")
    assert (picture.status_code, picture.headers["content-type"]) == (200, "image/webp")
    video = client.get(f"/{told['rows'][0]['video']['address']}")
    assert (video.status_code, video.content) == (200, VIDEO)


def test_a_player_gets_the_part_it_asks_for(client: TestClient) -> None:
    part = client.get("/videos/row-0001-000000000001.mp4", headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, VIDEO[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(VIDEO)}"


@pytest.mark.parametrize(
    "path",
    [
        *("/../secret.mp4", "/videos/../../secret.mp4", "/videos/..%2F..%2Fsecret.mp4", "/videos/%2e%2e/secret.mp4"),
        *("/videos/", "/videos", "/videos/.hidden.mp4", "/videos//etc/passwd", "/videos/link.mp4"),
        *("/results/_delta_log/00000000000000000000.json", "/records/x.json", "/claims/x.json", "/.work/x.mp4"),
        *("/videos/page.html", "/videos/folder.mp4", "/videos/none.mp4", "/videos/x.mp4%00.webp", "/gallery.html"),
        "/thumbnails/..\\..\\secret.mp4",
    ],
)
def test_nothing_else_is_served(path: str, client: TestClient, out: Path) -> None:
    (out.parent / "secret.mp4").write_bytes(b"secret")
    (out / "secret.mp4").write_bytes(b"secret")
    (out / "gallery.html").write_bytes(b"secret")
    for name in ("page.html", ".hidden.mp4"):
        (out / "videos" / name).write_bytes(b"secret")
    (out / "videos" / "link.mp4").symlink_to(out.parent / "secret.mp4")
    (out / "videos" / "folder.mp4").mkdir()
    answer = client.get(path)
    assert answer.status_code == 404
    assert b"secret" not in answer.content


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("127.0.0.1:8080", 200),
        ("localhost:8080", 200),
        ("evil.example:8080", 400),
        ("127.0.0.1.evil.example", 400),
        ("localhost.evil.example", 400),
        ("0.0.0.0:8080", 400),
        ("", 400),
    ],
)
def test_only_this_machines_names_are_answered(host: str, code: int, client: TestClient) -> None:
    """A page at evil.example whose name is made to mean 127.0.0.1 asks with its own name."""
    for path in ("/", "/data.json", "/videos/row-0001-000000000001.mp4"):
        assert client.get(path, headers={"Host": host}).status_code == code


def test_no_other_page_may_read_or_show_what_is_here(client: TestClient) -> None:
    for path in ("/", "/data.json", "/videos/row-0001-000000000001.mp4"):
        answer = client.get(path, headers={"Origin": "http://evil.example"})
        assert "access-control-allow-origin" not in answer.headers
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.post("/data.json").status_code == 405


def test_a_page_learns_what_is_new(client: TestClient, out: Path) -> None:
    first = client.get("/data.json").json()
    assert len(first["rows"]) == 2
    seen = {"epoch": first["epoch"], "number": first["number"]}
    assert client.get("/data.json", params=seen).json()["rows"] == []
    keep(out, [row(2), row(10, status="ok", run_id="run-2", finished_at=row(40).finished_at)])
    second = client.get("/data.json", params=seen).json()
    assert {(one["id"], one["status"]) for one in second["rows"]} == {("row-0002", "ok"), ("row-0010", "ok")}
    assert second["total"] == 3
    assert set(second["plots"]) == {"", "run-1", "run-2"}
    assert second["epoch"] == first["epoch"]
    # A record that is not merged yet counts, too, and so does a page that is opened now.
    ResultStore(out).commit(row(3))
    assert len(client.get("/data.json").json()["rows"]) == 4


def test_rows_that_went_make_pages_begin_anew(client: TestClient, out: Path) -> None:
    first = client.get("/data.json").json()
    ResultStore(out).forget(row(5).finished_at)
    told = client.get("/data.json", params={"epoch": first["epoch"], "number": first["number"]}).json()
    assert told["epoch"] != first["epoch"]
    assert [one["id"] for one in told["rows"]] == ["row-0010"]


def test_of_very_many_rows_the_last_are_told_and_no_page_begins_anew(out: Path) -> None:
    follower = serve.Follower(out, limit=2)
    first = follower.since("", 0)
    keep(out, [row(20), row(30)], pictures=False)
    told = follower.since(first["epoch"], first["number"])
    assert told["epoch"] == first["epoch"]
    assert [one["id"] for one in told["rows"]] == ["row-0020", "row-0030"]
    assert told["total"] == 4


def test_the_rows_under_way_are_told(client: TestClient, out: Path) -> None:
    with claims.living(out, "run-9"):
        claims.take(out, "job", "run-9", "row-0077")
        assert client.get("/data.json").json()["under_way"] == ["row-0077"]
    assert client.get("/data.json").json()["under_way"] == []


def test_a_folder_that_a_run_has_yet_to_make_is_waited_for(tmp_path: Path) -> None:
    with TestClient(serve.application(tmp_path / "new"), base_url="http://127.0.0.1") as client:
        first = client.get("/data.json").json()
        assert first["rows"] == []
        keep(tmp_path / "new", [row(1)], pictures=False)
        told = client.get("/data.json", params={"epoch": first["epoch"], "number": first["number"]}).json()
        assert [one["id"] for one in told["rows"]] == ["row-0001"]


def _no_answer(*_: object) -> None:
    raise StorageTimeout("s3://bucket: no answer in time")


def test_an_output_folder_on_s3_is_served_from_here(s3: S3, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"{s3.bucket()}/out"
    for file in (path for path in out.rglob("*") if path.is_file()):
        storage.upload(file, place, file.relative_to(out).as_posix())
    with TestClient(serve.application(place), base_url="http://127.0.0.1") as client:
        (first, _) = client.get("/data.json").json()["rows"]
        assert client.get(f"/{first['picture']}").headers["content-type"] == "image/webp"
        address = f"/{first['video']['address']}"
        assert client.get(address).content == VIDEO
        for asked, wanted in (
            ("bytes=100-199", VIDEO[100:200]),
            ("bytes=10000-", VIDEO[10000:]),
            ("bytes=-9", VIDEO[-9:]),
        ):
            part = client.get(address, headers={"Range": asked})
            assert (part.status_code, part.content) == (206, wanted)
        assert client.get(address, headers={"Range": f"bytes={len(VIDEO)}-"}).status_code == 416
        assert client.get("/videos/none.mp4").status_code == 404
        monkeypatch.setattr(storage, "head", _no_answer)
        assert client.get(address).status_code == 503
        assert "no answer" in client.get(address).text


def test_the_command_serves_on_this_machine_only_and_ends_well(out: Path) -> None:
    (out.parent / "secret.mp4").write_bytes(b"secret")
    with _serving(out) as (url, server):
        host, _, port = url.removeprefix("http://").rstrip("/").partition(":")
        assert host == "127.0.0.1"

        def ask(path: str) -> bytes:
            """As an attacker does: clients normalise paths before they send them."""
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                return b"".join(iter(lambda: connection.recv(65536), b""))

        assert b"t2vz gallery" in ask("/")
        for path in ("/videos/../../secret.mp4", "//videos/../secret.mp4", "/videos/..%2f..%2fsecret.mp4"):
            assert ask(path).startswith(b"HTTP/1.1 404"), path
            assert b"secret" not in ask(path)
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
        assert server.stderr is not None
        assert server.stderr.read() == ""


def test_a_port_that_is_taken_is_said(out: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [
            sys.executable,
            "-m",
            "t2vz.cli",
            "gallery",
            str(out),
            "--serve",
            "--port",
            str(taken.getsockname()[1]),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "can't be used (Address already in use)" in done.stderr


@contextmanager
def _serving(out: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command at work: its URL and process."""
    command = [sys.executable, "-m", "t2vz.cli", "gallery", str(out), "--serve"]
    pipe = subprocess.PIPE
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().split()[4], server
        finally:
            server.kill()
