"""render-library against a real server, with the real stages: cut, rendered, joined with sound, mended, not redone."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import ffmpeg, frames_of, lag_s, make_clip, sound_of
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from s3 import S3

from t2vz import storage
from t2vz.media.encode import Encoding, encode, publish
from t2vz.media.probe import probe
from t2vz.plan import Job, plan
from t2vz.render import Render
from t2vz.results import ResultRow, read
from t2vz_flows.render_library import LibraryParameters, render_library
from t2vz_flows.render_manifest import RenderParameters

STYLE = {
    "mode": "edit",
    "prompt": "make it night",
    "fps": "6",
    "width": "64",
    "height": "64",
    "num_inference_steps": "3",
    "image_guidance_scale": "0",  # no guidance: a third of the work
}


@pytest.fixture(autouse=True)
def _server(prefect_api: str) -> None:
    pass


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    """Runs the flow from tmp_path/in to tmp_path/out; the final state."""

    def run(**parameters: Any) -> Any:
        given = {
            "folder": str(tmp_path / "in"),
            "out": str(tmp_path / "out"),
            "style": STYLE,
            "cutting": {"max_frames": 5},
            "render": {"device": "cpu"},
            **parameters,
        }
        return render_library(LibraryParameters.model_validate(given), return_state=True)

    return run


def told(state: Any) -> dict[str, Any]:
    summary = dict(state.result(raise_on_failure=False))
    assert summary.pop("run_id")
    return summary


def rows_of(out: Path) -> dict[str, ResultRow]:
    return {row.id: row for row in read(out)}


def joined_videos(out: Path) -> list[Path]:
    return sorted(path for path in (out / "joined").iterdir() if path.suffix != ".json")


def test_long_videos_are_cut_rendered_and_joined_with_their_sound(run: Callable[..., Any], tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in" / "deep" / "long.mp4", 2)
    make_clip(tmp_path / "in" / "short.mp4", 0.5, sound=False)
    out = tmp_path / "out"

    state = run()
    assert state.is_completed(), state.message
    assert told(state) == {"sources": 2, "rows": 4, "ok": 4, "joined": 1}
    rows = rows_of(out)
    assert sorted(rows) == ["deep/long.mp4#000", "deep/long.mp4#001", "deep/long.mp4#002", "short.mp4"]
    parts = [rows[f"deep/long.mp4#00{i}"] for i in range(3)]
    assert [row.frames for row in parts] == [4, 4, 4]
    assert len({row.seed for row in parts}) == 1

    # The whole as ffmpeg sees it: as many frames as one row would have had, and they are the parts' frames.
    (video,) = joined_videos(out)
    (whole,) = plan_of_one_row(source, tmp_path)
    frames = frames_of(video, 64, 64)
    assert len(frames) == whole.frames == 12
    assert np.array_equal(frames, np.concatenate([frames_of(out / str(row.output_uri), 64, 64) for row in parts]))
    seen = probe(video)
    assert (seen.rate_fps, seen.first_pts_s) == (6, 0.0)
    assert np.allclose(seen.timestamps_s, np.arange(12) / 6)
    assert abs(lag_s(sound_of(video), sound_of(source))) <= 0.001
    assert abs(len(sound_of(video)) - len(sound_of(source))) / 8000 < 0.05

    # Nothing is done twice, not even joining.
    before = video.stat().st_mtime_ns
    state = run()
    assert told(state) == {"sources": 2, "rows": 4, "done": 4, "kept": 1}
    assert joined_videos(out) == [video]
    assert video.stat().st_mtime_ns == before
    assert [path for path in (out / ".work").iterdir() if path.name != "sweep.lock"] == []

    # A changed source is rendered and joined anew, and takes the old one's place; the others are left alone.
    make_clip(source, 2, picture="mandelbrot")
    state = run()
    assert told(state) == {"sources": 2, "rows": 4, "ok": 3, "done": 1, "joined": 1}
    (other,) = joined_videos(out)
    assert other != video

    # A joined video that is gone is made again of its parts.
    other.unlink()
    assert told(run()) == {"sources": 2, "rows": 4, "done": 4, "joined": 1}
    assert joined_videos(out) == [other]

    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["render-library"]))
        )
    assert any("| deep/long.mp4 | joined | joined/deep_long.mp4-" in str(artifact.data) for artifact in artifacts)


def _unchanged(self: Render) -> None:
    """Instead of encoding what was generated: the source's own frames."""
    assert self.clip is not None
    suffix = "" if self.spec.format == "png" else f".{self.spec.format}"
    made = encode(
        [self.clip.frames],
        self.workspace / f"video{suffix}",
        width=self.clip.width,
        height=self.clip.height,
        rate_fps=self._rate_fps(),
        encoding=Encoding.of(self.spec),
    )
    self.output_uri = f"videos/{self.job.row.id.replace('/', '_')}-{made.sha256[:12]}{suffix}"
    self.encoded = publish(made, self.settings.out, self.output_uri)


def _nothing(self: Render) -> None:
    self.seconds["model"] = 0.0
    self.device = "cpu"


def test_sources_and_output_on_s3(
    run: Callable[..., Any], s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Render, "_generate", _nothing)
    monkeypatch.setattr(Render, "_encode", _unchanged)
    bucket = s3.bucket()
    out, long = f"{bucket}/styled", "deep/a long #1.mp4"
    source = make_clip(tmp_path / "long.mp4", 2)
    storage.upload(source, bucket, f"in/{long}")
    storage.upload(make_clip(tmp_path / "short.mp4", 0.5, sound=False), bucket, "in/short.mp4")
    places = {"folder": f"{bucket}/in", "out": out}

    def videos() -> list[str]:
        keys = (entry.key for entry in storage.entries(out, "joined", deep=True))
        return sorted(key for key in keys if not key.endswith(".json"))

    state = run(**places)
    assert told(state) == {"sources": 2, "rows": 4, "ok": 4, "joined": 1}, state.message
    rows = {row.id: row for row in read(out)}
    parts = [rows[f"{long}#00{i}"] for i in range(3)]
    assert {row.source_uri for row in parts} == {f"{bucket}/in/{long}"}
    (key,) = videos()
    files = [tmp_path / f"{number}.mp4" for number in range(4)]
    for file, uri in zip(files, [key, *(str(row.output_uri) for row in parts)], strict=True):
        file.write_bytes(storage.get(out, uri) or b"")
    whole = frames_of(files[0], 64, 64)
    assert len(whole) == 12
    assert np.array_equal(whole, np.concatenate([frames_of(file, 64, 64) for file in files[1:]]))
    assert abs(lag_s(sound_of(files[0]), sound_of(source))) <= 0.001
    assert [path.name for path in storage.workspace(out).iterdir()] == ["sweep.lock"]

    # What is there is known again: nothing is probed, rendered or put; nothing but the library's state.
    s3.requests()
    with monkeypatch.context() as known:
        known.setattr("t2vz.media.join.join", lambda *_, **__: pytest.fail("it is joined"))
        assert told(run(**places)) == {"sources": 2, "rows": 4, "done": 4, "kept": 1}
    put = {request.rpartition("/styled/")[2] for request in s3.requests() if request.startswith("PUT")}
    assert {name for name in put if not name.startswith("runs/")} == {
        "manifests/library.parquet",
        "manifests/library.cuts.json",
    }
    # A joined video that is gone is made again; one of a changed source takes the old one's place.
    storage.remove(out, key)
    assert told(run(**places)) == {"sources": 2, "rows": 4, "done": 4, "joined": 1}
    assert videos() == [key]
    storage.upload(make_clip(tmp_path / "other.mp4", 2, picture="mandelbrot"), bucket, f"in/{long}")
    assert told(run(**places)) == {"sources": 2, "rows": 4, "ok": 3, "done": 1, "joined": 1}
    (other,) = videos()
    assert other != key
    # Folders of images, too.
    state = run(**places, style=STYLE | {"format": "png"}, name="images")
    assert told(state) == {"sources": 2, "rows": 4, "ok": 4, "joined": 1}
    assert len([key for key in videos() if key.endswith(".png")]) == 12
    assert told(run(**places, style=STYLE | {"format": "png"}, name="images")) == {
        "sources": 2,
        "rows": 4,
        "done": 4,
        "kept": 1,
    }


def plan_of_one_row(source: Path, folder: Path) -> list[Job]:
    manifest = folder / "one.csv"
    cells = {**STYLE, "source": str(source)}
    manifest.write_text(",".join(cells) + "\n" + ",".join(cells.values()) + "\n")
    return [item for item in plan(manifest, None) if isinstance(item, Job)]


def test_a_source_with_a_failed_part_is_told_and_joined_once_it_is_mended(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_clip(tmp_path / "in" / "one.mp4", 1, sound=False)
    make_clip(tmp_path / "in" / "two.mp4", 1, sound=False)
    generate = Render._generate

    def fails(self: Render) -> None:
        if self.job.row.id == "one.mp4#001":
            raise ValueError("out of luck")
        generate(self)

    monkeypatch.setattr(Render, "_generate", fails)
    state = run(cutting={"max_frames": 3})
    assert state.is_completed()
    assert told(state) == {"sources": 2, "rows": 4, "ok": 3, "failed": 1, "joined": 1, "waiting": 1}
    assert [video.name[:7] for video in joined_videos(tmp_path / "out")] == ["two.mp4"]
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["render-library"]))
        )
    assert any(
        "part one.mp4#001 failed in generate" in str(one.data) and "out of luck" in str(one.data) for one in artifacts
    )

    monkeypatch.setattr(Render, "_generate", generate)
    state = run(cutting={"max_frames": 3})
    assert told(state) == {"sources": 2, "rows": 4, "ok": 1, "done": 3, "joined": 1, "kept": 1}
    assert len(joined_videos(tmp_path / "out")) == 2


def test_a_damaged_source_stops_no_other(run: Callable[..., Any], tmp_path: Path) -> None:
    make_clip(tmp_path / "in" / "good.mp4", 0.5)
    (tmp_path / "in" / "bad.mp4").write_bytes(b"no video")
    state = run()
    assert told(state) == {"sources": 2, "rows": 2, "ok": 1, "failed": 1}
    assert rows_of(tmp_path / "out")["bad.mp4"].error_class == "SourceCorrupt"


def test_more_failed_rows_than_allowed_make_it_failed(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.mp4").write_bytes(b"no video")
    assert run(render={"device": "cpu", "max_failed": 0}).is_failed()


def test_what_can_not_be_begun_says_so_plainly(run: Callable[..., Any], tmp_path: Path) -> None:
    state = run()
    assert state.is_failed()
    assert "no such folder" in state.message
    (tmp_path / "in").mkdir()
    state = run(style={"mode": "edit", "promt": "x"})
    assert "did you mean 'prompt'" in state.message
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_no_error(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert told(run()) == {"sources": 0, "rows": 0}


def test_every_parameter_has_a_title_and_the_inner_flows_are_all_there() -> None:
    schema = render_library.parameters.model_dump()
    for model in ("LibraryParameters", "CuttingParameters", "RenderOptions"):
        for name, field in schema["definitions"][model]["properties"].items():
            assert field.get("title"), name
    inner = set(RenderParameters.model_fields) - {"manifest", "out", "defaults"}
    assert set(schema["definitions"]["RenderOptions"]["properties"]) == inner
    assert set(schema["definitions"]["LibraryParameters"]["required"]) == {"folder", "out", "style"}


@pytest.mark.slow
def test_every_format_is_joined(run: Callable[..., Any], tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in" / "clip.mp4", 2, "24")
    seen: set[Path] = set()
    for format in ("mp4", "webm", "mkv", "gif", "png"):
        state = run(style=STYLE | {"format": format}, name=format)
        assert told(state) == {"sources": 1, "rows": 3, "ok": 3, "joined": 1}, format
        (video,) = (path for path in joined_videos(tmp_path / "out") if path not in seen)
        seen.add(video)
        assert video.is_dir() if format == "png" else video.suffix == f".{format}"
        assert len(list(video.glob("*.png")) if video.is_dir() else frames_of(video, 64, 64)) == 12
        if format in ("mp4", "webm", "mkv"):
            assert abs(lag_s(sound_of(video), sound_of(source))) <= 0.001
    shutil.rmtree(tmp_path / "in")
    assert ffmpeg
