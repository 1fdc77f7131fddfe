"""What must hold for every mode, sampler, length and number of steps: chunks, parts and resumption change nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_controlnet, write_pipeline
from torch import Tensor

from t2vz.engine import vae
from t2vz.engine.lockstep import Snapshot
from t2vz.engine.schedule import SCHEDULERS
from t2vz.models import loading
from t2vz.models.components import Components
from t2vz.modes import Request, generate
from t2vz.spec import JobSpec, evaluations, t0_t1

# One level less than `tiny_model`, and narrower: examples are many.
NARROW: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 8,
}

few = functools.partial(settings, derandomize=True, database=None, deadline=None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `text`, `edit` and `controlnet`."""
    folder = tmp_path_factory.mktemp("narrow")
    torch.manual_seed(0)
    write_pipeline(folder / "text", in_channels=4, **NARROW)
    write_pipeline(folder / "edit", in_channels=8, **NARROW)
    write_controlnet(folder / "controlnet", base=folder / "text")
    return folder


@dataclass(frozen=True)
class Case:
    """A request without its model; its pictures are made of the frame count."""

    mode: str
    frames: int
    chunk: int
    columns: dict[str, Any]
    scenes: tuple[int, ...] = (0,)

    def request(self, models: Path, chunk: int | None = None) -> tuple[Components, Request]:
        columns = {"mode": self.mode, "model": str(models / "text"), "chunk_size": chunk or self.chunk, **self.columns}
        inputs: dict[str, Any] = {"scenes": self.scenes}
        width, height = 48, 32
        chance = np.random.default_rng(0)
        pictures = chance.integers(0, 256, (self.frames, height, width, 3), dtype=np.uint8)
        if self.mode == "edit":
            columns |= {"model": str(models / "edit"), "source": "unused"}
            inputs["source"] = pictures
        elif self.mode == "control":
            columns |= {"source": "unused", "condition": "edge", "controlnet": str(models / "controlnet")}
            inputs["conditions"] = (pictures,)
        elif "background_smoothing" in columns:
            inputs["masks"] = pictures[..., 0] > 128
        spec = JobSpec(prompt="a red ball on the grass", **columns)
        return loading.load(spec, "cpu"), Request(spec, 11, width, height, self.frames, **inputs)


@st.composite
def cases(draw: Callable[..., Any], frames: tuple[int, int] = (1, 7), splits: bool = False) -> Case:
    """splits: only what can be split over processes."""
    mode = draw(st.sampled_from(["text", "control", "edit"]))
    count = draw(st.integers(*frames))
    steps = draw(st.integers(3, 9))
    columns = {
        "scheduler": draw(st.sampled_from(sorted(SCHEDULERS))),
        "num_inference_steps": steps,
        "guidance_scale": draw(st.sampled_from([1.0, 4.0])),
    }
    anchors = ["first"] + ["first_previous"] * (not splits) + ["scene"] * (mode != "text")
    columns["attention_anchor"] = anchor = draw(st.sampled_from(anchors))
    scenes = (0,)
    if anchor == "scene":
        scenes = tuple(sorted({0, *draw(st.sets(st.integers(0, count - 1), max_size=3))}))
    if mode == "text":
        columns["t1"] = t1 = draw(st.integers(1, steps - 1))
        columns["t0"] = draw(st.integers(0, t1 - 1))
        columns["motion_field_strength_x"] = draw(st.integers(-300, 300))
        columns["warp"] = draw(st.sampled_from(["nearest", "subpixel"]))
        if draw(st.booleans()):
            columns |= {"background_smoothing": 0.4, "foreground_mask": "unused"}
    return Case(mode, count, draw(st.integers(1, count + 1)), columns, scenes)


def assert_close(ours: Tensor, expected: Tensor) -> None:
    """To 1e-4; of the largest value, where a sampler of few steps on random weights blows up."""
    assert torch.isfinite(expected).all()
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1)


@few(max_examples=30)
@given(case=cases())
def test_chunks_change_nothing_and_every_frame_is_evaluated_once(models: Path, case: Case) -> None:
    components, request = case.request(models)
    made = generate(components, request)
    whole = generate(*case.request(models, chunk=case.frames))
    assert_close(made.latents, whole.latents)
    assert made.evaluations == whole.evaluations == evaluations(request.spec, case.frames)
    ours, theirs = (np.concatenate(list(vae.decode(components.vae, x.latents))).astype(int) for x in (made, whole))
    assert np.abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() <= 1e-3


@few(max_examples=25)
@given(case=cases(), data=st.data())
def test_a_resumed_denoising_ends_in_the_same_bits(models: Path, case: Case, data: st.DataObject) -> None:
    components, request = case.request(models)
    taken: list[Snapshot] = []
    whole = generate(components, replace(request, on_snapshot=lambda take: taken.append(take())))
    start = data.draw(st.sampled_from(taken), label="snapshot")
    resumed = generate(components, replace(request, start=start))
    assert torch.equal(resumed.latents, whole.latents)
    assert taken[-1].step == request.spec.num_inference_steps
    assert whole.evaluations - resumed.evaluations == case.frames * (start.step - taken[0].step + 1)


@few(max_examples=25)
@given(case=cases(frames=(2, 7), splits=True), data=st.data())
def test_parts_are_the_whole(models: Path, case: Case, data: st.DataObject) -> None:
    components, request = case.request(models)
    whole = generate(components, request)
    parts = data.draw(st.integers(2, min(case.frames, 4)), label="parts")
    seen: set[int] = set()
    for i in range(parts):
        made = generate(components, replace(request, part=(i, parts)))
        assert_close(made.latents, whole.latents[list(made.indices)])
        own = range(i * case.frames // parts, (i + 1) * case.frames // parts)
        anchors = {max(scene for scene in case.scenes if scene <= frame) for frame in own}
        assert made.evaluations == taking(request.spec, len(anchors.union(own)))
        seen |= set(made.indices)
    assert seen == set(range(case.frames))


def taking(spec: JobSpec, count: int) -> int:
    """Evaluations of `count` frames of a longer clip, the first among them."""
    if spec.mode != "text":
        return spec.num_inference_steps * count
    t0, t1 = t0_t1(spec)
    return (spec.num_inference_steps - 1 - t0) + (t1 + 1) * count
