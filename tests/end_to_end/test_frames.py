"""Which frame comes out where: conditions, sources, chunks and file formats must not shift or mix frames."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from ffmpeg_reader import Video, ffmpeg, frames_agree
from numpy.typing import NDArray

from t2vz.plan import Job, plan
from t2vz.render import Render, Settings, opening

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds at 30000/1001 frames a second in which no two frames are alike; of the model's own size."""
    path = tmp_path_factory.mktemp("sources") / "moving.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=128x72:r=30000/1001:d=2", "-c:v", "libx264", "-g", "12", "-bf", "2", path)
    return path


def stages(work: Render, *names: str) -> Render:
    for name in names:
        work.run(name)
    return work


@pytest.mark.parametrize(("first", "count"), [(0, 8), (17, 9), (31, 29)])
def test_condition_frames_are_those_of_the_range(
    moving: Path, manifest: Write, tmp_path: Path, first: int, count: int
) -> None:
    rate = 30000 / 1001
    row = {"mode": "control", "condition": "edge", "source": moving, "width": "", "height": "", "video_length": ""}
    path = manifest(tmp_path / "m.csv", row | {"start_s": first / rate, "end_s": (first + count) / rate})
    (job,) = plan(path, None)
    assert isinstance(job, Job)
    settings = Settings(tmp_path / "out", str(path), "run", "cpu")
    with opening(settings):
        work = stages(Render(job, settings), "decode", "conditions")

    pictures = Video(moving).frames()[first : first + count]
    edges = np.stack([np.repeat(cv2.Canny(picture, 100, 200)[..., None], 3, axis=2) for picture in pictures])
    assert all(np.any(a != b) for a, b in pairwise(edges)), "a shift by one could not be seen"
    assert job.frames == count
    assert np.array_equal(work.conditions[0], edges)


def write_pictures(folder: Path, pictures: NDArray[np.uint8]) -> Path:
    folder.mkdir()
    for i, picture in enumerate(pictures):
        cv2.imwrite(str(folder / f"{i}.png"), picture[..., ::-1])
    return folder


def pictures(count: int) -> NDArray[np.uint8]:
    """A white square on black that is somewhere else in each frame."""
    found = np.zeros((count, 64, 64, 3), np.uint8)
    for i in range(count):
        found[i, 8 * (i % 4) : 8 * (i % 4) + 24, 20 * (i // 4) : 20 * (i // 4) + 24] = 255
    return found


@pytest.fixture(scope="module")
def strong_controlnet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet for `tiny_model` that passes on what it sees; ordinary random weights let 1/10 000 through."""
    from diffusers import ControlNetModel
    from tiny import write_controlnet

    folder = tmp_path_factory.mktemp("models") / "strong"
    torch.manual_seed(4)
    write_controlnet(folder, base=tiny_model)
    controlnet = ControlNetModel.from_pretrained(folder)
    for layer in controlnet.controlnet_cond_embedding.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    controlnet.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", ["control", "edit"])
def test_each_output_frame_belongs_to_its_input_frame(
    mode: str, manifest: Write, tmp_path: Path, tiny_model: Path, strong_controlnet: Path
) -> None:
    """Frames other than the anchor know nothing of each other: what is done to one shows there and nowhere else."""
    order = np.array([0, 5, 3, 1, 7, 2, 6, 4])
    changed = pictures(8)
    changed[5] = 255 - changed[5]
    given = {"plain": pictures(8), "permuted": pictures(8)[order], "changed": changed}
    # DDIM, as Euler-ancestral's noise belongs to the frame's number, not to its content.
    row = {"mode": mode, "seed": 3, "format": "png", "video_length": 8, "fps": 8, "scheduler": "ddim"}
    row |= {"chunk_size": 3, "guidance_scale": 5}
    column = {"control": "condition_video", "edit": "source"}[mode]
    if mode == "control":
        row |= {"condition": "pose", "model": tiny_model, "controlnet": strong_controlnet}
    rows = [row | {"id": id, column: write_pictures(tmp_path / id, frames)} for id, frames in given.items()]
    settings = Settings(tmp_path / "out", "m.csv", "run", "cpu")
    made = {}
    with opening(settings):
        for job in plan(manifest(tmp_path / "m.csv", *rows), None):
            assert isinstance(job, Job)
            work = stages(Render(job, settings), "decode", "generate", "encode")
            assert work.encoded is not None
            made[job.row.id] = Video(work.encoded.path).frames()

    plain = made["plain"]
    assert not any(frames_agree(plain[i], plain[j]) for i in range(8) for j in range(i)), "a mix could not be seen"
    assert frames_agree(made["permuted"], plain[order])
    differs = [not frames_agree(made["changed"][i], plain[i]) for i in range(8)]
    assert differs == [i == 5 for i in range(8)]


@pytest.fixture(scope="module")
def formats(
    t2vz: Callable[..., Any], manifest: Write, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Any, Video]]:
    """One text job in several formats, and a longer one in several chunk sizes: id → (result row, output)."""
    folder = tmp_path_factory.mktemp("formats")
    rows: list[dict[str, Any]] = [
        {"id": format, "format": format, "seed": 1, "width": 96} for format in ("png", "mkv", "webm", "gif")
    ]
    rows += [
        {"id": f"chunks-of-{size}", "format": "png", "seed": 2, "video_length": 8, "chunk_size": size}
        | {"num_inference_steps": 5, "guidance_scale": 7.5}
        for size in (1, 3, 8)
    ]
    ran = t2vz("run", manifest(folder / "m.csv", *rows), folder / "out")
    assert ran.code == 0, ran.log
    return {id: (row, Video(ran.out / row.output_uri)) for id, row in ran.rows.items()}


def test_mkv_holds_the_pngs_bit_for_bit(formats: Any) -> None:
    pngs = formats["png"][1].frames()
    assert pngs.shape == (2, 64, 96, 3)
    assert pngs.std() > 5, "too plain to tell anything"
    assert np.array_equal(formats["mkv"][1].frames(), pngs)


@pytest.mark.parametrize(("format", "codec"), [("mkv", "ffv1"), ("webm", "vp9"), ("gif", "gif")])
def test_formats_are_what_they_are_called(format: str, codec: str, formats: Any) -> None:
    row, video = formats[format]
    assert f"Video: {codec}" in video.streams
    assert video.path.suffix == f".{format}"
    assert video.frames().shape == (2, 64, 96, 3)
    assert "4 fps" in video.streams
    assert (row.codec, row.fps, row.frames) == (codec, "4", 2)
    assert video.metadata["format"] == format
    if format == "webm":
        assert "(tv, bt709" in video.streams
    # Lossy, but of the same pictures: nearer to their own than to the other.
    pngs, frames = formats["png"][1].frames().astype(float), video.frames()
    own, other = np.abs(frames - pngs).mean(), np.abs(frames - pngs[::-1]).mean()
    assert own < other


def test_chunk_size_does_not_change_the_frames(formats: Any) -> None:
    (_, whole), *others = (formats[f"chunks-of-{size}"] for size in (8, 1, 3))
    assert whole.frames().shape[0] == 8
    for _, video in others:
        assert frames_agree(video.frames(), whole.frames())
