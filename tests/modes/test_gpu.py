"""The modes on a CUDA device: recorded batches, half precision, memory that runs out. `pytest -m gpu` runs them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from t2vz.engine import graphs, vae
from t2vz.models import loading
from t2vz.modes import Request, common, generate
from t2vz.spec import JobSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

PX, FRAMES = 128, 5
MOTIF = np.full((PX, PX, 3), (120, 200, 90), dtype=np.uint8)
MOTIF[40:90, 30:80] = (200, 40, 40)
MODES = {
    "text": {"t0": 4, "t1": 6},
    "control": {"source": "clip.mp4", "condition": "edge+depth"},
    "edit": {"source": "clip.mp4"},
}


@pytest.fixture(autouse=True)
def _exact_arithmetic() -> Iterator[None]:
    """float32 as on the CPU: cuDNN's convolutions would round to 10 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def make(device="cuda", mode="text", frames=FRAMES, px=PX, **columns):
    spec = JobSpec.model_validate(
        {"prompt": "a red ball on the grass", "mode": mode, "num_inference_steps": 10, **MODES[mode], **columns}
    )
    clip = np.stack([np.resize(np.roll(MOTIF, 3 * frame, axis=1), (px, px, 3)) for frame in range(frames)])
    request = Request(
        spec,
        seed=3,
        width=px,
        height=px,
        frames=frames,
        source=clip if mode == "edit" else None,
        conditions=(clip,) * len(spec.condition),
    )
    return generate(loading.load(spec, device), request).latents.cpu()


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[graphs.Graphs]:
    """Every `Graphs` that a clip makes."""
    made: list[graphs.Graphs] = []

    def noted():
        made.append(graphs.Graphs())
        return made[-1]

    monkeypatch.setattr(common, "Graphs", noted)
    return made


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("columns", [{}, {"guidance_end": 0.5}, {"token_merging_ratio": 0.5}])
@pytest.mark.parametrize("chunk_size", [2, 5])
def test_recorded_batches_give_the_same(mode, columns, chunk_size, recordings, monkeypatch):
    recorded = make(mode=mode, chunk_size=chunk_size, **columns)
    assert recordings[0].possible
    assert recordings[0].recorded
    monkeypatch.setattr(common, "Graphs", lambda: graphs.eager)
    torch.testing.assert_close(recorded, make(mode=mode, chunk_size=chunk_size, **columns), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_as_on_the_cpu(mode):
    here, there = make(mode=mode), make("cpu", mode=mode)
    assert (here - there).abs().max() <= 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_any_chunk_size_and_any_rerun(mode, dtype):
    whole = make(mode=mode, dtype=dtype, chunk_size=5)
    assert torch.equal(whole, make(mode=mode, dtype=dtype, chunk_size=5))
    for chunk_size in (1, 2):
        difference = (whole - make(mode=mode, dtype=dtype, chunk_size=chunk_size)).abs()
        if dtype == "float32":
            assert difference.max() <= 1e-4
        assert difference.mean() <= {"float32": 1e-5, "float16": 0.02, "bfloat16": 0.1}[dtype]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_shows_the_same_picture(dtype):
    frames = []
    for precision in ("float32", dtype):
        latents = make(dtype=precision)
        parts = loading.load(JobSpec(prompt="x", dtype=precision), "cuda")
        frames.append(np.concatenate(list(vae.decode(parts.vae, latents))).astype(float))
    psnr = 10 * np.log10(255**2 / ((frames[0] - frames[1]) ** 2).mean())
    assert psnr > 20
    assert frames[1].std() > 10  # a picture, not black


def test_a_chunk_that_does_not_fit_is_halved(recordings):
    """Memory so short that 8 frames don't fit, and one does."""
    settings = {"frames": 8, "px": 1024, "dtype": "float16"}
    few = make(chunk_size=1, **settings)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    make(chunk_size=2, **settings)
    enough = torch.cuda.max_memory_reserved()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(enough * 1.05 / total)
        halved = make(chunk_size=8, **settings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    sizes = {key[1][0][0] for key in recordings[-1].calls}
    assert max(sizes) < 8
    assert (halved - few).abs().mean() <= 0.02


def test_offloaded_parts_give_the_same_in_less_memory():
    at_once = make(offload=False)
    loading._cache.clear()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    offloaded = make(offload=True)
    assert torch.cuda.memory_allocated() - before < 1e6  # all went home
    torch.testing.assert_close(at_once, offloaded, atol=1e-5, rtol=0)


def test_what_cannot_be_recorded_goes_on_without(recordings, caplog):
    def waits(inputs):
        return inputs[0] * float(inputs[0].sum())  # asks the device for a number

    run = graphs.Graphs()
    x = torch.ones(3, device="cuda")
    for _ in range(4):
        assert torch.equal(run("waits", waits, [x]), x * 3)
    assert not run.possible
    assert "could not be recorded" in caplog.text


def test_clips_of_other_prompts_and_seeds_do_not_mix():
    spec = JobSpec(prompt="a blue star on the sand", num_inference_steps=6, t0=2, t1=3, chunk_size=2)
    parts = loading.load(spec, "cuda")
    request = Request(spec, 5, PX, PX, 4)
    first = generate(parts, request).latents
    generate(parts, replace(request, spec=spec.model_copy(update={"prompt": "a cat"}), seed=6))
    assert torch.equal(first, generate(parts, request).latents)
