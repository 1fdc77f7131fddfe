"""What a file does to its reader stays with the reader; what it yields is what reading it here yields."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2vz.clip import MAX_IN_MEMORY_BYTES, Clip
from t2vz.errors import SourceCorrupt, SourceMissing, SourceTooLarge, SourceTooSlow, UnexpectedError, WorkerDied
from t2vz.media import decode, images, probe, sandbox
from t2vz.media.limits import Limits


class Doing:
    """Runs a statement in the process that it is sent to: what a file that breaks its reader comes to."""

    def __init__(self, statement: str) -> None:
        self._statement = statement

    def __reduce__(self):
        return exec, (f"import os, signal, sys, time; {self._statement}",)


@pytest.fixture(autouse=True)
def no_children_left():
    yield
    sandbox._end_all()


@pytest.mark.parametrize("name", ["closed.mp4", "closed.ts", "edit_list.mp4", "animation.gif", "variable.mp4"])
def test_a_clip_is_the_one_that_is_read_here(clip_path, name):
    path = clip_path(name)
    options = {"start_s": 0.3, "video_length": 7, "width": 96, "height": 64}
    ours, theirs = decode.decode(path, **options), sandbox.decode(path, **options)
    for field in fields(Clip):
        np.testing.assert_array_equal(getattr(theirs, field.name), getattr(ours, field.name), field.name)
    theirs.frames[0] = 0  # it is writable, as ours is
    assert sandbox.probe(path) == probe.probe(path)


def test_pictures_are_those_that_are_read_here(tmp_path):
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (33, 47, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    np.testing.assert_array_equal(sandbox.decode(tmp_path, width=96).frames, decode.decode(tmp_path, width=96).frames)
    path = tmp_path / "1.png"
    np.testing.assert_array_equal(sandbox.read_image(path), images.read_image(path))
    assert sandbox.image_size(path) == (47, 33)


def test_a_clip_that_is_too_large_for_memory_is_a_file_without_a_name(clip_path, tmp_path):
    clip = sandbox.decode(clip_path("closed.mp4"), width=2048, height=2048, video_length=24, workspace=tmp_path)
    assert clip.frames.nbytes > MAX_IN_MEMORY_BYTES
    assert list(tmp_path.iterdir()) == []
    assert len({frame[::64, ::64].tobytes() for frame in clip.frames}) == 24


def test_errors_are_those_of_reading_here(tmp_path):
    path = tmp_path / "text.mp4"
    path.write_text("no video")
    with pytest.raises(SourceCorrupt) as ours:
        decode.decode(path)
    with pytest.raises(SourceCorrupt) as theirs:
        sandbox.decode(path)
    assert theirs.value.message == ours.value.message
    with pytest.raises(SourceMissing, match="nowhere"):
        sandbox.probe(tmp_path / "nowhere.mp4")


@pytest.mark.parametrize("warm", [False, True])
def test_a_file_that_crashes_its_reader_is_told_and_the_next_is_read(clip_path, warm):
    path = clip_path("closed.mp4")
    if warm:
        sandbox.probe(path)
    with pytest.raises(SourceCorrupt, match=r"closed.mp4: crashes its reader \(SIGSEGV\)") as told:
        sandbox.decode(path, fit=Doing("os.kill(os.getpid(), signal.SIGSEGV)"))
    assert not told.value.retryable
    assert len(sandbox.decode(path, video_length=2)) == 2


def test_a_file_that_hangs_its_reader_is_given_up(clip_path, monkeypatch):
    path = clip_path("closed.mp4")
    sandbox.probe(path)
    monkeypatch.setattr(sandbox, "_starter", None)  # not tried again in a new one: the deadline is one
    with pytest.raises(SourceTooSlow, match=r"closed.mp4: not read within 0\.5 s") as told:
        sandbox.decode(path, limits=Limits(max_decode_s=0.5), fit=Doing("time.sleep(1000)"))
    assert not told.value.retryable
    monkeypatch.undo()
    assert len(sandbox.decode(path, video_length=2)) == 2


def test_an_idle_reader_that_another_thread_takes_first(clip_path, monkeypatch):
    class Contested(list):
        def __len__(self):
            return 1  # as it was a moment ago

        def pop(self):
            monkeypatch.setattr(sandbox, "_idle", [])
            raise IndexError

    monkeypatch.setattr(sandbox, "_idle", Contested())
    assert sandbox.probe(clip_path("closed.mp4")).frames
    assert len(sandbox._idle) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")
@pytest.mark.parametrize("kind", ["picture", "video"])
def test_a_file_that_takes_too_much_memory_is_refused_and_the_next_is_read(kind, ffmpeg, clip_path, tmp_path):
    if kind == "picture":
        path = tmp_path / "bomb.png"  # 192 kB
        Image.new("RGB", (8000, 8000)).save(path)
    else:
        path = tmp_path / "bomb.mp4"
        ffmpeg("-f", "lavfi", "-i", "color=black:s=7680x4320:r=4:d=2", "-c:v", "libx264", "-preset", "ultrafast", path)
    limits = Limits(max_decode_bytes=60 * 10**6, max_pixels=8192**2)
    with pytest.raises(SourceTooLarge, match=r"bomb\.\w+: .* 60 MB of memory"):
        sandbox.decode(path, limits=limits, video_length=4, width=64, height=64)
    assert len(sandbox.decode(clip_path("closed.mp4"), limits=limits, video_length=2)) == 2
    assert len(sandbox.decode(path, limits=Limits(max_pixels=8192**2), width=64, height=64)) >= 1


def test_a_killed_reader_is_no_fault_of_the_file(clip_path):
    path = clip_path("closed.mp4")
    sandbox.probe(path)
    (child,) = sandbox._idle
    os.kill(child._process.pid, signal.SIGKILL)  # while it waits
    assert len(sandbox.decode(path, video_length=2)) == 2
    with pytest.raises(WorkerDied) as told:  # at the file, twice
        sandbox.decode(path, fit=Doing("os.kill(os.getpid(), signal.SIGKILL)"))
    assert told.value.retryable
    assert told.value.stage == "decode"


def test_a_reader_that_ends_by_itself_is_a_defect_with_its_last_words(clip_path):
    with pytest.raises(UnexpectedError, match=r"ended \(3\): goodbye"):
        sandbox.decode(clip_path("closed.mp4"), fit=Doing("print('goodbye', file=sys.stderr); sys.exit(3)"))


def test_one_reader_serves_many_sources_and_several_threads_at_once(clip_path):
    path = clip_path("closed.mp4")
    expected = decode.decode(path, video_length=5).frames
    for _ in range(3):
        sandbox.probe(path)
    (child,) = sandbox._idle
    assert child.calls == 3
    with ThreadPoolExecutor(6) as pool:
        clips = list(pool.map(lambda _: sandbox.decode(path, video_length=5), range(12)))
    assert all(np.array_equal(clip.frames, expected) for clip in clips)
    assert len(sandbox._idle) <= 2


def test_a_reader_knows_no_secrets(clip_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("HF_TOKEN", "very-secret")
    sandbox.probe(clip_path("closed.mp4"))
    (child,) = sandbox._idle
    environment = Path(f"/proc/{child._process.pid}/environ").read_bytes()
    assert b"PATH=" in environment
    assert b"very-secret" not in environment


def test_what_lies_where_it_is_started_is_not_imported(clip_path, tmp_path, monkeypatch):
    """A folder of other people's files may have an av.py in it."""
    path = clip_path("closed.mp4")
    for name in ("av", "cv2", "numpy", "random"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    assert sandbox.probe(path).frames
    assert not (tmp_path / "ran").exists()


def test_what_a_reader_sends_can_not_run_code():
    for hostile in (Doing("raise AssertionError"), subprocess.Popen, os.system):
        with pytest.raises(pickle.UnpicklingError):
            sandbox._Unpickler(io.BytesIO(pickle.dumps(("made", hostile, None)))).load()


def test_a_reader_dies_with_its_process(clip_path):
    script = (
        "import os, signal, sys; from t2vz.media import sandbox; from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(1) as other: other.submit(sandbox.probe, sys.argv[1]).result()\n"  # and that one ends
        "sandbox.probe(sys.argv[1])\n"
        "(child,) = sandbox._idle\n"
        "assert child.calls == 2\n"
        "print(child._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ran = subprocess.run([sys.executable, "-c", script, clip_path("closed.mp4")], capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    gone(int(ran.stdout))


def gone(pid: int) -> None:
    """Wait until there is no such process, or one that is dead."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    import select

    assert select.select([descriptor], [], [], 20)[0], "it lives"
