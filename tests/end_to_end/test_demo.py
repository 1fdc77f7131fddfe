"""The demo manifest, whole; every output and every column of its row held against what ffmpeg sees."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ffmpeg_reader import Video
from PIL import Image

from t2vz.cli import main
from t2vz.manifest import Row, read
from t2vz.media.strip import shown
from t2vz.mini import measures
from t2vz.mini.read import time as read_time
from t2vz.results import ResultRow
from t2vz.sheet import strip_key, thumbnails_key
from t2vz.spec import JobSpec, evaluations

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "manifests" / "demo.csv"

# Columns of an ok row that are empty, and where. `quality` is asked for by --quality; `mini` has no checker.
EMPTY = {"error_stage", "error_class", "error_message", "retryable", "quality", "content_frames"}
OF_A_SOURCE = {"source_uri", "source_fingerprint", "decoder", "decode_s"}


@pytest.fixture(scope="module")
def demo(t2vz: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("demo")
    ran = t2vz("run", DEMO, out)
    assert ran.code == 0, ran.log
    return ran


@pytest.fixture(scope="module")
def rendered(demo: Any) -> Iterator[list[tuple[Row, ResultRow, Video]]]:
    """(manifest row, result row, output) of every row."""
    found = demo.rows
    return [(row, found[row.id], Video(demo.out / found[row.id].output_uri)) for row in read(DEMO)]


def test_every_row_is_ok_and_told(demo: Any, rendered: Any, leftovers: Callable[[Path], list[str]]) -> None:
    assert {row.status for row in demo.rows.values()} == {"ok"}
    assert f"{len(rendered)} rendered" in demo.told.splitlines()
    for row, _, video in rendered:
        assert f"{row.id}  ok  {video.path}" in demo.told
    assert leftovers(demo.out) == []


def test_files_are_what_their_rows_say(rendered: Any) -> None:
    for _, result, video in rendered:
        content = video.path.read_bytes()
        assert hashlib.sha256(content).hexdigest() == result.output_sha256
        assert len(content) == result.output_bytes
        assert video.frames().shape == (result.frames, result.height, result.width, 3)
        assert str(video.rate_fps) == result.fps
        assert "Video: h264" in video.streams
        assert result.codec == "h264"
        assert "yuv420p(tv, bt709" in video.streams


def test_shape_and_rate_follow_source_and_manifest(rendered: Any) -> None:
    for row, result, video in rendered:
        spec = row.spec
        assert video.rate_fps == (spec.fps or 8)  # the clips have 8
        if (path := source(row)) is None:
            assert (result.frames, *video.size) == (8, 128, 128)
            continue
        assert result.frames == min(spec.video_length or 99, 1.5 * video.rate_fps)  # they last 1.5 s
        assert video.size == Video(Path(path)).size == (128, 128)


def source(row: Row) -> str | None:
    return row.spec.source or row.spec.condition_video


def test_sound_is_kept_for_the_length_of_the_frames(rendered: Any) -> None:
    kept = {row.id for row, result, _ in rendered if result.audio_kept}
    assert kept == {"ball-at-night", "blue-ball"}  # of the clips only the ball's has sound
    for row, result, video in rendered:
        expected_s = result.frames / video.rate_fps if row.id in kept else 0
        assert video.audio_s == pytest.approx(expected_s, abs=0.05)  # two packets of AAC


def test_file_carries_the_parameters_of_its_row(rendered: Any) -> None:
    for row, result, video in rendered:
        carried = video.metadata
        assert carried.pop("job_id") == result.job_id
        assert carried.pop("t2vz") == result.t2vz_version
        parameters = json.loads(result.parameters)
        del parameters["cells"]  # may hold paths, which are no business of whoever gets the file
        assert carried == parameters
        assert carried["prompt"] == row.spec.prompt == result.prompt
        assert carried["seed"] == row.spec.seed == result.seed


def test_every_column_is_filled(rendered: Any) -> None:
    for row, result, _ in rendered:
        expected = EMPTY | (set() if source(row) else OF_A_SOURCE)
        if not row.spec.conditions_extracted:
            expected = expected | {"conditions_s"}
        empty = {field.name for field in dataclasses.fields(result) if getattr(result, field.name) is None}
        assert empty == expected, row.id
        assert bool(result.controlnets) == (row.spec.mode == "control")
        assert result.attempts == 1
        stages_s = sum(getattr(result, f"{stage}_s") or 0 for stage in ("decode", "conditions", "generate", "encode"))
        assert 0 < stages_s <= result.wall_s
        assert result.started_at.utcoffset() == timedelta(0)
        assert result.started_at < result.finished_at


def test_no_frame_is_evaluated_twice(rendered: Any) -> None:
    for row, result, _ in rendered:
        assert result.unet_evaluations == evaluations(row.spec, result.frames)
        if row.spec.mode != "text":
            assert result.unet_evaluations == row.spec.num_inference_steps * result.frames
    text = next(result for row, result, _ in rendered if row.id == "sepia-car")
    assert text.unet_evaluations == 11 + 11 * 8  # the anchor alone down to t0 = 8, then all from t1 = 10 on


def test_rerun_renders_nothing_and_says_so(demo: Any, t2vz: Callable[..., Any]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (demo.out / "videos").iterdir()}
    again = t2vz("run", DEMO, demo.out, "--verify")
    assert (again.code, again.told) == (0, f"nothing to render: every row is done in {demo.out}\n")
    assert {path: path.stat().st_mtime_ns for path in (demo.out / "videos").iterdir()} == before


def test_every_result_keeps_the_cells_that_asked_for_it(rendered: Any) -> None:
    for row, result, _ in rendered:
        cells = json.loads(result.parameters)["cells"]
        assert JobSpec.model_validate(cells) == row.spec


def test_every_row_has_a_strip_and_the_sheet_shows_them_all(
    demo: Any, rendered: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for row, result, video in rendered:
        with Image.open(demo.out / strip_key(result.output_uri)) as opened:
            strip = np.asarray(opened.convert("RGB")).astype(float)
        lines = 1 + (row.spec.source is not None) + len(row.spec.condition)
        width, height = video.size
        assert strip.shape == (lines * height, 8 * width, 3)
        made = np.concatenate(video.frames()[list(shown(result.frames))], axis=1)
        assert np.abs(strip[-height:] - made).mean() < 6  # two lossy codecs apart; another clip's: 30 and more
        with Image.open(demo.out / thumbnails_key(result.output_uri)) as opened:
            assert opened.size == (min(16, result.frames) * width, lines * height)
    sheet = tmp_path / "sheet.png"
    assert main(["sheet", str(demo.out), str(sheet), "--columns", "2", "--scale", "0.5"]) == 0
    assert capsys.readouterr().out == f"{len(rendered)} rows drawn in {sheet}\n"
    with Image.open(sheet) as opened:
        assert 1024 < opened.width < 1060
    assert main(["sheet", str(demo.out), str(tmp_path / "sheet.doc")]) == 2
    assert "sheet.doc: name a file that ends in .png" in capsys.readouterr().err
    assert main(["sheet", str(demo.out), str(sheet), "--mode", "text", "--limit", "1"]) == 0
    assert capsys.readouterr().out == f"1 row drawn in {sheet}\n"


ASKED = {  # what rows of the demo ask for: subject, colour, background
    "drifting-heart": ("heart", "pink", "grass"),
    "cat-edges": ("cat", "yellow", "snow"),
    "house-depth": ("house", "red", "sand"),
    "dancer-pose": ("person", "green", "grass"),
    "blue-ball": ("ball", "blue", "grass"),
}


def test_what_was_asked_for_is_in_the_pictures(rendered: Any) -> None:
    """Read by rules from the pixels of the videos, in most frames; how good the models are is `t2vz eval`'s to say."""
    frames = {row.id: video.frames() for row, _, video in rendered}
    for id, words in ASKED.items():
        seen = np.mean([all(measures.shows(frame, *words)) for frame in frames[id]])
        assert seen >= 0.5, (id, seen)
    for id in ("cat-edges", "ball-at-night", "zorp", "skeleton"):
        times = [read_time(frame) for frame in frames[id]]
        assert np.mean([found is not None and found.value == "night" for found in times]) >= 0.5, id
    # The camera goes 12 of 512 px to the right a frame, so the picture goes 3 of 128 to the left.
    moved = measures.motion(frames["drifting-heart"], (-3.0, 0.0))
    slope = (moved[..., 0] * moved[..., 1]).sum() / (moved[..., 0] ** 2).sum()
    assert 0.5 <= slope <= 1.5
