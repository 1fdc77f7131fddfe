"""A PostgreSQL server of its own for tests and benchmarks, from the system's packages."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

USER = "postgres"  # it refuses to run as root


def binaries() -> Path | None:
    """The folder of the newest installed server's programs; None if there is none."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name))
    found = [folder for folder in folders if (folder / "postgres").exists()]
    if found:
        return found[-1]
    program = shutil.which("postgres")
    return Path(program).parent if program else None


@contextmanager
def postgres(folder: Path) -> Iterator[tuple[str, int]]:
    """A server with an empty database, kept in `folder`: its URL as Prefect wants it, and its process."""
    programs = binaries()
    assert programs is not None, "no PostgreSQL server is installed"
    folder.mkdir(parents=True, exist_ok=True)
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:
        as_user = {"user": USER, "group": USER, "extra_groups": []}
        os.chown(folder, pwd.getpwnam(USER).pw_uid, -1)
        for parent in folder.parents[:-1]:  # it has to get there
            if not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)
    data = folder / "data"
    initialise = [str(programs / "initdb"), "-D", str(data), "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C"]
    subprocess.run(initialise, check=True, capture_output=True, cwd="/", **as_user)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = [str(programs / "postgres"), "-D", str(data), "-p", str(port), "-k", "", "-c", "max_connections=200"]
    with (folder / "postgres.log").open("wb") as log:
        server = subprocess.Popen(serve, stdout=log, stderr=log, cwd="/", **as_user)
    try:
        ready = [str(programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
        deadline = time.monotonic() + 60
        while subprocess.run(ready, check=False).returncode:
            assert server.poll() is None, (folder / "postgres.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        create = [str(programs / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", USER, "prefect"]
        subprocess.run(create, check=True)
        yield f"postgresql+asyncpg://{USER}@127.0.0.1:{port}/prefect", server.pid
    finally:
        server.send_signal(signal.SIGINT)  # a fast shutdown
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
