"""No memory: on the device a chunk halves and the frames are the same; on the host a clip is refused before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from t2vz import clip
from t2vz.media.limits import Limits
from t2vz.plan import Job, Unready, plan
from t2vz.render import Settings, opening, render
from t2vz.results import ResultRow

CLIP = Path(__file__).parents[2] / "manifests" / "clips" / "ball.mp4"
FRAMES = 6
CONTROL = {"mode": "control", "condition": "edge", "source": CLIP, "guidance_scale": 2}


def rendered(manifest: Path, out: Path, **settings: object) -> ResultRow:
    (job,) = plan(manifest, None)
    assert isinstance(job, Job), job
    given = Settings(out, str(manifest), "run", "cpu", **settings)
    with opening(given):
        row = render(job, given)
    assert row is not None
    return row


@pytest.mark.parametrize("mode", [{}, CONTROL], ids=["text", "control"])
@pytest.mark.parametrize("fits", [1, 2, 3])
def test_device_memory_that_runs_out_halves_the_chunk_and_the_frames_are_the_same(
    write_manifest: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: dict, fits: int
) -> None:
    """fits: frames that do, of all guidance branches."""
    row = {"id": "one", "seed": 1, "video_length": FRAMES, "chunk_size": FRAMES, "format": "png"} | mode
    manifest = write_manifest(tmp_path / "m.csv", row)
    plain = rendered(manifest, tmp_path / "plain")
    assert plain.status == "ok"

    forward, refused = UNet2DConditionModel.forward, []
    most = fits * (2 if mode else 1)

    def small(model: UNet2DConditionModel, sample: torch.Tensor, *given: object, **more: object) -> object:
        if len(sample) > most:
            refused.append(len(sample))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(model, sample, *given, **more)

    monkeypatch.setattr(UNet2DConditionModel, "forward", small)
    halved = rendered(manifest, tmp_path / "halved")
    assert refused, "nothing ran out of memory"
    assert (halved.status, halved.attempts) == ("ok", 1)
    # To rounding, as for any two chunk sizes.
    change = np.abs(pictures(tmp_path / "halved", halved) - pictures(tmp_path / "plain", plain))
    assert change.shape[0] == FRAMES
    assert change.max() <= 1
    assert (change > 0).mean() <= 1e-3


def pictures(out: Path, row: ResultRow) -> np.ndarray:
    return np.stack([cv2.imread(str(file)).astype(int) for file in sorted((out / row.output_uri).glob("*.png"))])


def test_one_frame_that_does_not_fit_is_a_failed_row(
    write_manifest: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*given: object, **more: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(UNet2DConditionModel, "forward", none)
    row = rendered(write_manifest(tmp_path / "m.csv", {"id": "one"}), tmp_path / "out")
    assert (row.status, row.error_class, row.retryable) == ("failed", "OutOfDeviceMemory", False)


def test_a_clip_over_the_limit_is_refused_by_the_plan(write_manifest: Callable[..., Path], tmp_path: Path) -> None:
    for name, row in {"text": {"video_length": 30, "width": 512, "height": 512}, "control": CONTROL}.items():
        path = write_manifest(tmp_path / f"{name}.csv", {"id": "one", "video_length": 12} | row)
        (job,) = plan(path, None)
        assert isinstance(job, Job)
        size_bytes = job.frames * 3 * (job.row.spec.width or 0) * (job.row.spec.height or 0)
        assert isinstance(next(plan(path, None, limits=Limits(max_clip_bytes=size_bytes))), Job)
        (item,) = plan(path, None, limits=Limits(max_clip_bytes=size_bytes - 1))
        assert isinstance(item, Unready)
        assert type(item.error).__name__ == "SourceTooLarge"
        assert f"{job.frames} frames of" in item.error.message
        assert "lower video_length" in item.error.message


def test_a_clip_whose_size_only_the_model_knows_is_refused_before_it_is_decoded(
    write_manifest: Callable[..., Path], tmp_path: Path
) -> None:
    row = {"id": "one", **CONTROL, "width": None, "height": None}
    made = rendered(write_manifest(tmp_path / "m.csv", row), tmp_path / "out", limits=Limits(max_clip_bytes=10_000))
    assert (made.status, made.error_class, made.error_stage) == ("failed", "SourceTooLarge", "decode")


def test_what_the_host_has_no_memory_for_is_refused_and_not_tried_again(
    write_manifest: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip, "free_memory_bytes", lambda: 1000)
    row = rendered(write_manifest(tmp_path / "m.csv", {"id": "one", **CONTROL}), tmp_path / "out")
    # Of this process: what decodes is another, and has its own look.
    assert (row.status, row.error_stage, row.retryable, row.attempts) == ("failed", "conditions", False, 1)
    assert "out of host memory; lower the size or the frame count" in (row.error_message or "")


def test_the_hosts_memory_is_known() -> None:
    assert 2**20 < clip.free_memory_bytes() < 2**63
