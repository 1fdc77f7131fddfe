"""Bad input: one plain line, a failed row with stage and reason, the right exit code, and nothing left over."""

from __future__ import annotations

import os
import random
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ffmpeg_reader import Video, ffmpeg
from PIL import Image

from t2vz.media.limits import Limits
from t2vz.plan import Job, Unready, plan
from t2vz.render import Settings, opening, render

T2vz = Callable[..., Any]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sources, most of them bad."""
    folder = tmp_path_factory.mktemp("sources")
    pattern = ["-f", "lavfi", "-i", "testsrc2=s=96x64:r=8:d=1"]
    ffmpeg(*pattern, "-c:v", "libx264", folder / "good.mp4")
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", folder / "sound.mp4")
    ffmpeg(*pattern, "-frames:v", "0", "-c:v", "libx264", folder / "no-frames.mp4")
    whole = (folder / "good.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "random.mp4").write_bytes(random.Random(0).randbytes(20_000))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video")
    (folder / "no-images").mkdir()
    (folder / "no-images" / "notes.txt").write_text("nothing to see")
    for name, size in (("tiny", (3, 2)), ("odd", (97, 65)), ("narrow", (400, 10))):
        (folder / name).mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
        for i in range(2):
            Image.fromarray(noise).save(folder / name / f"{i}.png")
    return folder


EDIT = {"mode": "edit", "width": "", "height": ""}
POSE = {"mode": "control", "condition": "pose", "width": "", "height": ""}

# id → (row, stage that refuses it, what its message must say)
BAD: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "mode": ({"mode": "txet"}, "manifest", ("mode", "'txet'", "did you mean 'text'?")),
    "scheduler": ({"scheduler": "dddim"}, "manifest", ("scheduler", "did you mean 'ddim'?")),
    "model": ({"model": "no-such-model"}, "model", ("no-such-model",)),
    "no-prompt": ({"prompt": ""}, "manifest", ("prompt",)),
    "blank-prompt": ({"prompt": "  "}, "manifest", ("prompt",)),
    "odd-width": ({"width": 65}, "manifest", ("width", "multiple of 8")),
    "tiny-width": ({"width": 8}, "manifest", ("width", "64")),
    "end-first": ({**EDIT, "source": "good.mp4", "start_s": 0.5, "end_s": 0.2}, "manifest", ("end_s", "after start_s")),
    "late-start": ({**EDIT, "source": "good.mp4", "start_s": 9}, "decode", ("good.mp4", "9 s")),
    "missing": ({**EDIT, "source": "nowhere.mp4"}, "decode", ("nowhere.mp4", "no such file")),
    "empty": ({**EDIT, "source": "empty.mp4"}, "decode", ("empty.mp4",)),
    "truncated": ({**EDIT, "source": "truncated.mp4"}, "decode", ("truncated.mp4",)),
    "random": ({**EDIT, "source": "random.mp4"}, "decode", ("random.mp4",)),
    "text-file": ({**EDIT, "source": "text.mp4"}, "decode", ("text.mp4",)),
    "no-frames": ({**EDIT, "source": "no-frames.mp4"}, "decode", ("no-frames.mp4",)),
    "sound": ({**EDIT, "source": "sound.mp4"}, "decode", ("sound.mp4",)),
    "no-images": ({**EDIT, "source": "no-images"}, "decode", ("no-images", "no images")),
    "narrow": ({**EDIT, "source": "narrow"}, "decode", ("narrow", "set both width and height")),
    "short": (
        {**POSE, "condition_video": "good.mp4", "video_length": 20},
        "conditions",
        ("8 frames", "20", "lower video_length"),
    ),
}
MET_WHILE_RENDERING = {"narrow"}  # its size is the model's; a plan reads headers only

LONG_PROMPT = "a boat on the sea " * 20 + "with a lighthouse"
GOOD: dict[str, dict[str, Any]] = {
    "good": {},
    "long-prompt": {"prompt": LONG_PROMPT},
    "long": {**POSE, "condition_video": "good.mp4", "video_length": 3},
    "tiny": {**EDIT, "source": "tiny", "width": 64, "height": 64},
    "odd": {**EDIT, "source": "odd", "fps": "8"},
}


@pytest.fixture(scope="module")
def mixed(sources: Path, manifest: Write) -> Path:
    rows = [{"id": id, **row} for id, (row, *_) in BAD.items()] + [{"id": id, **row} for id, row in GOOD.items()]
    return manifest(sources / "mixed.csv", *rows)


@pytest.fixture(scope="module")
def ran(mixed: Path, t2vz: T2vz, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return t2vz("run", mixed, tmp_path_factory.mktemp("mixed") / "out")


@pytest.mark.parametrize("id", BAD)
def test_bad_row_fails_with_stage_and_reason(id: str, ran: Any) -> None:
    _, stage, said = BAD[id]
    row = ran.rows[id]
    assert (row.status, row.error_stage, row.retryable) == ("failed", stage, False)
    assert row.error_class != "UnexpectedError"
    assert row.output_uri is None
    for part in said:
        assert part in row.error_message
    assert len(row.error_message.splitlines()) == 1
    (line,) = (line for line in ran.log.splitlines() if line.startswith(f"{id}: failed: "))
    assert line.endswith(row.error_message)


def test_good_rows_beside_them_are_rendered(ran: Any, leftovers: Callable[[Path], list[str]]) -> None:
    assert ran.code == 1
    assert f"{len(GOOD)} rendered, {len(BAD)} failed" in ran.told.splitlines()
    assert {id for id, row in ran.rows.items() if row.status == "ok"} == set(GOOD)
    assert "Traceback" not in ran.told + ran.log
    assert leftovers(ran.out) == []


def test_long_prompt_is_cut_with_a_warning(ran: Any) -> None:
    (warning,) = ran.rows["long-prompt"].warnings
    assert "77 tokens" in warning
    assert "with a lighthouse" in warning
    assert f"long-prompt: warning: {warning}" in ran.log.splitlines()


def test_condition_video_is_cut_and_odd_sizes_are_brought_to_multiples_of_8(ran: Any) -> None:
    sizes = {id: Video(ran.out / ran.rows[id].output_uri).frames().shape[:3] for id in GOOD}
    assert sizes == {
        "good": (2, 64, 64),
        "long-prompt": (2, 64, 64),
        "long": (3, 88, 128),  # 96x64 enlarged to the model's 128
        "tiny": (2, 64, 64),
        "odd": (2, 88, 128),
    }


def test_plan_tells_the_same_without_rendering(mixed: Path, t2vz: T2vz, tmp_path: Path) -> None:
    planned = t2vz("plan", mixed, tmp_path / "out")
    assert planned.code == 1
    assert "Traceback" not in planned.told + planned.log
    for id, (_, _, said) in BAD.items():
        if id not in MET_WHILE_RENDERING:
            (line,) = (line for line in planned.told.splitlines() if f"({id})" in line)
            assert all(part in line for part in said), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("promt\na boat\n", "did you mean 'prompt'?"),
        ("id,prompt,colour\na,a boat,red\n", "'colour'"),
        ("", "empty"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_unusable_manifest(text: str, said: str, command: str, t2vz: T2vz, tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text(text)
    done = t2vz(command, path, tmp_path / "out")
    assert done.code == 2
    (line,) = done.log.splitlines()
    assert line.startswith(f"error: {path}")
    assert said in line
    assert not (tmp_path / "out").exists()


def test_manifest_without_rows(t2vz: T2vz, tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("id,prompt\n")
    done = t2vz("run", path, tmp_path / "out")
    assert (done.code, done.told, done.log) == (0, f"nothing to render: {path} has no rows\n", "")


def test_output_folder_that_is_a_file(t2vz: T2vz, manifest: Write, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    refused(t2vz("run", manifest(tmp_path / "m.csv", {}), tmp_path / "out"), "not a folder")
    assert (tmp_path / "out").read_text() == "mine"


def test_output_folder_that_may_not_be_made(t2vz: T2vz, manifest: Write, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):  # root may write everywhere but here
        folder = Path("/proc")
        if not folder.is_dir():
            pytest.skip("root may write everywhere, and there is no /proc")
    refused(t2vz("run", manifest(tmp_path / "m.csv", {}), folder / "out"), str(folder / "out"))


def refused(ran: Any, said: str) -> None:
    assert ran.code == 2
    assert "Traceback" not in ran.told + ran.log
    line = ran.log.splitlines()[-1]
    assert line.startswith("error: ")
    assert said in line


def test_what_sources_may_be_is_said_on_the_command_line(
    sources: Path, manifest: Write, t2vz: T2vz, tmp_path: Path
) -> None:
    """To the plan and to the run, through the flow."""
    row = {"id": "one", **EDIT, "source": str(sources / "good.mp4")}
    path = manifest(tmp_path / "m.csv", row)
    for option, value, said in (
        ("--max-frames", "1", "the limit is 1"),
        ("--max-duration-s", "0.5", "the limit is 0.5 s"),
        ("--source-scheme", "s3", "may come from s3 only"),
        ("--source-root", str(tmp_path), "outside of the folders"),
        ("--model-checksums", "nowhere.json", "nowhere.json"),
    ):
        planned = t2vz("plan", path, tmp_path / "out", option, value)
        ran = t2vz("run", path, tmp_path / option, option, value)
        assert (planned.code, ran.code) == (1, 1)
        assert said in planned.told
        assert said in ran.rows["one"].error_message
    assert t2vz("plan", path, tmp_path / "out", "--source-root", str(sources), "--max-frames", "8").code == 0
    assert t2vz("plan", path, tmp_path / "out", "--max-frames", "0").code == 2


# Limits and a full disk, below the command line.


def test_source_over_a_limit(sources: Path, manifest: Write, tmp_path: Path) -> None:
    path = manifest(sources / "large.csv", {"id": "large", **EDIT, "source": "good.mp4"})
    for limits, said in (
        (Limits(max_source_bytes=100), "MB"),
        (Limits(max_pixels=96 * 64 - 1), "96x64"),
        (Limits(max_frames=1), "the limit is 1"),
    ):
        (item,) = plan(path, None, limits=limits)
        assert isinstance(item, Unready)
        assert type(item.error).__name__ == "SourceTooLarge"
        assert "good.mp4" in item.error.message
        assert said in item.error.message

        (job,) = plan(path, None)
        assert isinstance(job, Job)
        settings = Settings(tmp_path / "out", str(path), "run", "cpu", limits)
        with opening(settings):
            row = render(job, settings)
        assert row is not None
        assert (row.status, row.error_class, row.error_message) == ("failed", "SourceTooLarge", item.error.message)


@contextmanager
def small_file_system(folder: Path) -> Iterator[None]:
    """`folder` on a file system of 256 KiB."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def small_files() -> Iterator[None]:
    """No file of more than 64 KiB can be written by this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("shortage", "said"), [("disk", "no space left"), ("file size", "larger than")])
def test_no_room_for_the_video(
    shortage: str, said: str, manifest: Write, tiny_model: Path, tmp_path: Path, leftovers: Any
) -> None:
    """The row fails and leaves nothing; once there is room the same row is rendered."""
    # Random weights: their noise makes a big file.
    row = {"id": "big", "model": str(tiny_model), "format": "mkv", "width": 256, "height": 256}
    path = manifest(tmp_path / "m.csv", row)
    out = tmp_path / "out"
    settings = Settings(out, str(path), "run", "cpu")
    (job,) = plan(path, None)
    assert isinstance(job, Job)
    with small_file_system(out) if shortage == "disk" else small_files(), opening(settings):
        failed = render(job, settings)
        assert failed is not None
        assert (failed.status, failed.error_stage) == ("failed", "encode")
        assert said in failed.error_message
        assert [path.name for path in (out / "videos").iterdir()] == []
        assert not any(settings.workspace.iterdir())
    with opening(settings):
        done = render(job, settings)
    assert done is not None
    assert done.status == "ok"
    assert leftovers(out) == []
