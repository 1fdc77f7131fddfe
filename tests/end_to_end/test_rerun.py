"""A second run renders what is missing or changed, and only that."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ffmpeg_reader import ffmpeg


class Folder:
    """A manifest of three rows and its output folder, rendered once."""

    def __init__(self, folder: Path, t2vz: Callable[..., Any], manifest: Callable[..., Path]) -> None:
        self.manifest, self.out, self.source = folder / "m.csv", folder / "out", folder / "clip.mp4"
        self._t2vz = t2vz
        self._write_source("testsrc2")
        manifest(
            self.manifest,
            {"id": "one", "seed": 1},
            {"id": "two", "seed": 2, "format": "png"},
            {"id": "three", "mode": "edit", "source": "clip.mp4"},
        )
        assert self.run() == {"one", "two", "three"}

    def run(self, *options: str) -> set[str]:
        """Run; the ids of the rows that were rendered. The outputs of the others must be untouched."""
        before = self.outputs()
        ran = self._t2vz("run", self.manifest, self.out, *options)
        assert ran.code == 0, ran.log
        self.rows = ran.rows
        after = self.outputs()
        rendered = {id for id, row in ran.rows.items() if f"{id}  ok" in ran.told}
        replaced = {self.out / ran.rows[id].output_uri for id in rendered}
        assert {path for path in before if before[path] != after.get(path)} <= replaced
        if not rendered:
            assert ran.told == f"nothing to render: every row is done in {self.out}\n"
            assert after == before
        return rendered

    def outputs(self) -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in self.out.glob("videos/*")}

    def output(self, id: str) -> Path:
        return self.out / self.rows[id].output_uri

    def change(self, id: str, **cells: object) -> None:
        with self.manifest.open(newline="") as file:
            rows = list(csv.DictReader(file))
        columns = list(dict.fromkeys([*rows[0], *cells]))
        with self.manifest.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(row | cells if row["id"] == id else row for row in rows)

    def change_source(self) -> None:
        self._write_source("smptebars")

    def _write_source(self, pattern: str) -> None:
        ffmpeg("-f", "lavfi", "-i", f"{pattern}=s=64x64:r=8:d=0.5", "-c:v", "libx264", self.source)


@pytest.fixture(scope="module")
def folder(t2vz: Callable[..., Any], manifest: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("rerun"), t2vz, manifest)


# Each test leaves the folder with everything rendered, so they do not depend on their order.


def test_nothing_changed(folder: Folder) -> None:
    assert folder.run() == set()
    assert folder.run("--verify") == set()


def test_chunk_size_changed(folder: Folder) -> None:
    folder.change("one", chunk_size=1)
    folder.change("three", chunk_size=1)
    assert folder.run() == set()


def test_prompt_changed(folder: Folder) -> None:
    before = folder.rows["one"]
    folder.change("one", prompt="a red house")
    assert folder.run() == {"one"}
    assert folder.rows["one"].prompt == "a red house"
    assert folder.rows["one"].output_sha256 != before.output_sha256


def test_source_changed(folder: Folder) -> None:
    before = folder.rows["three"]
    folder.change_source()
    assert folder.run() == {"three"}
    assert folder.rows["three"].source_fingerprint != before.source_fingerprint
    assert folder.rows["three"].output_sha256 != before.output_sha256


def test_video_deleted(folder: Folder) -> None:
    before = folder.rows["three"].output_sha256
    folder.output("three").unlink()
    assert folder.run() == {"three"}
    assert folder.rows["three"].output_sha256 == before  # the same bytes again


def test_image_of_a_folder_deleted(folder: Folder) -> None:
    (folder.output("two") / "000001.png").unlink()
    assert folder.run() == {"two"}


def test_video_damaged_but_of_the_same_size_and_time(folder: Folder) -> None:
    video = folder.output("one")
    stat = video.stat()
    with video.open("r+b") as file:
        file.seek(stat.st_size // 2)
        byte = file.read(1)
        file.seek(stat.st_size // 2)
        file.write(bytes([byte[0] ^ 255]))
    os.utime(video, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert folder.run() == set()  # not seen without reading it
    assert folder.run("--verify") == {"one"}
