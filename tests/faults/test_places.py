"""Output folders that refuse: a full disk, a read-only one, rights that are lost in the middle. Told, and mended by the
next run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from killing import strays

from t2vz.cli import main
from t2vz.results import ResultStore, read

ROWS = 4


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    """`folder` as a file system of its own, in memory. Skips where that is not allowed."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=777", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remounted(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.fixture
def manifest(write_manifest: Callable[..., Path], tmp_path: Path) -> Path:
    return write_manifest(tmp_path / "m.csv", *({"id": f"row-{i}", "seed": i} for i in range(ROWS)))


@pytest.fixture(autouse=True)
def api(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the processes that the tests start."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `t2vz run`: its exit code and all that this process prints meanwhile, whichever library prints it."""

    def run_one(manifest: Path, out: Path) -> tuple[int, str]:
        capfd.readouterr()
        code = main(["run", str(manifest), "--out", str(out), "--device", "cpu"])
        return code, "".join(capfd.readouterr())

    return run_one


def all_is_well(run: Run, manifest: Path, out: Path) -> None:
    code, told = run(manifest, out)
    assert code == 0, told
    assert sorted(row.id for row in read(out)) == sorted(f"row-{i}" for i in range(ROWS))
    assert {row.status for row in read(out)} == {"ok"}
    assert strays(out) == []


@pytest.mark.parametrize("left_kb", [0, 8, 40])
def test_a_full_disk_is_told_and_the_next_run_goes_on_once_there_is_room(
    run: Run, manifest: Path, tmp_path: Path, left_kb: int
) -> None:
    """From a disk without a byte to one that fills at the table."""
    disk = tmp_path / "disk"
    with mounted(disk, "2m"):
        out, ballast = disk / "out", disk / "ballast"
        out.mkdir()
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        ballast.write_bytes(b"\0" * (free - left_kb * 1024))
        code, told = run(manifest, out)
        assert code in (1, 2), told
        assert "no space left" in told
        assert "Traceback" not in told
        assert "panicked" not in told
        assert [path.name for path in out.glob("videos/*") if path.stat().st_size == 0] == []
        ballast.unlink()
        all_is_well(run, manifest, out)


def test_a_read_only_folder_is_told_when_there_is_something_to_write(run: Run, manifest: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "4m"):
        out = disk / "out"
        all_is_well(run, manifest, out)
        remounted(disk, "ro")
        code, told = run(manifest, out)
        assert (code, told) == (0, f"nothing to render: every row is done in {out}\n")
        assert main(["results", str(out)]) == 0
        assert main(["plan", str(manifest), "--out", str(out)]) == 0
        assert main(["maintain", str(out), "--dry-run"]) == 0
        assert main(["maintain", str(out)]) == 2
        code, told = run(manifest, disk / "other")
        assert code == 2
        assert told == f"error: {disk / 'other'}: no permission to write in {disk}; choose another output folder\n"
        remounted(disk, "rw")
        all_is_well(run, manifest, out)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("lost", ["videos", "records"])
def test_rights_that_are_lost_in_the_middle(
    run: Run, write_manifest: Callable[..., Path], tmp_path: Path, lost: str
) -> None:
    rows = ({"id": f"row-{i}", "seed": i, "num_inference_steps": 12} for i in range(ROWS))
    manifest, out = write_manifest(tmp_path / "m.csv", *rows), tmp_path / "out"
    # Root may write everywhere, unless it is without the right to.
    as_others = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    command = [*as_others, sys.executable, "-m", "t2vz.cli", "run", manifest, "--out", out, "--device", "cpu"]
    command += ["--in-flight", "1"]
    if as_others and subprocess.run([*as_others, "true"], check=False).returncode:
        pytest.skip("needs the right to give up rights")
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        deadline = time.monotonic() + 200
        while not (done := ResultStore(out).done()) or not any(
            folder.name not in done for folder in out.glob(".work/*/*/")
        ):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        folders = [out / lost, *(path for path in (out / lost).rglob("*") if path.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        told, _ = process.communicate(timeout=400)
        assert process.returncode in (1, 2), told
        assert "no permission" in told
        assert "Traceback" not in told
        for folder in folders:
            if folder.exists():
                folder.chmod(0o755)
    kept = {row.id: (row.output_uri, row.finished_at) for row in read(out) if row.status == "ok"}
    assert kept
    all_is_well(run, manifest, out)
    now = {row.id: (row.output_uri, row.finished_at) for row in read(out)}
    assert kept.items() <= now.items(), "a finished row was rendered again"
