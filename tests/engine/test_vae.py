"""The VAE's overflow, its memory and its comings and goings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers import AutoencoderKL

from t2vz.engine import noise, vae
from t2vz.errors import InvalidFrames

LATENTS = noise.draw(3, "initial", range(3), (4, 4, 6))


@pytest.fixture
def model(tiny_model):
    return AutoencoderKL.from_pretrained(tiny_model, subfolder="vae").eval()


def decoded(model, latents=LATENTS):
    return np.concatenate(list(vae.decode(model, latents)))


@pytest.fixture
def calls(model, monkeypatch):
    """The dtypes in which the model decodes, and how many frames at once."""
    seen = []

    def counted(z, *given, decode=model.decode, **named):
        seen.append((z.dtype, len(z)))
        return decode(z, *given, **named)

    monkeypatch.setattr(model, "decode", counted)
    return seen


def test_half_precision_that_overflows_is_done_again_in_float32(model, calls):
    with torch.no_grad():
        model.decoder.conv_in.weight *= 60_000 / model.decoder.conv_in.weight.abs().max()
    expected = decoded(model.half().float())
    calls.clear()
    model.half()
    made = decoded(model)
    assert [dtype for dtype, _ in calls] == [torch.float16, torch.float32] * 2
    assert np.array_equal(made, expected)
    assert made.std() > 1
    assert model.dtype == torch.float16


def test_black_frames_are_looked_at_twice_and_may_be_meant(model, calls):
    with torch.no_grad():
        model.decoder.conv_out.weight.zero_()
        model.decoder.conv_out.bias.fill_(-1.25)
    assert not decoded(model).any()
    assert [dtype for dtype, _ in calls] == [torch.float32] * 2
    calls.clear()
    assert not decoded(model.to(torch.bfloat16)).any()
    assert [dtype for dtype, _ in calls] == [torch.bfloat16, torch.float32] * 2
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_in_float32_either_fails(model, dtype):
    with torch.no_grad():
        model.decoder.conv_in.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(InvalidFrames, match="in float32 too"):
        decoded(model.to(dtype))
    assert model.dtype == dtype


def test_a_batch_that_does_not_fit_is_decoded_frame_by_frame(model, calls, monkeypatch):
    expected = decoded(model)

    def small(z, *given, decode=model.decode, **named):
        if len(z) > 1:
            raise torch.OutOfMemoryError("injected")
        return decode(z, *given, **named)

    monkeypatch.setattr(model, "decode", small)
    calls.clear()
    assert np.abs(decoded(model).astype(int) - expected).max() <= 1
    assert [frames for _, frames in calls] == [1, 1, 1]


class Recorded(CpuOffload):
    """accelerate's hook, that tells when it brings the model to the device and when it sends it home."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.moves = []

    def init_hook(self, module):
        self.moves.append("home")
        return super().init_hook(module)

    def pre_forward(self, module, *args, **kwargs):
        self.moves.append("device")
        return super().pre_forward(module, *args, **kwargs)


def test_an_offloaded_vae_comes_for_the_call_and_goes_home_after(model):
    expected, hook = decoded(model), Recorded()
    add_hook_to_module(model, hook)
    assert hook.moves == ["home"]
    assert np.array_equal(decoded(model), expected)
    assert hook.moves == ["home", "device", "device", "home"]
    hook.moves.clear()
    batches = vae.decode(model, LATENTS)
    next(batches)
    assert hook.moves == ["device"]
    batches.close()  # a stopped run
    assert hook.moves == ["device", "home"]
    hook.moves.clear()
    vae.encode(model, np.zeros((1, 32, 48, 3), np.uint8))
    assert hook.moves == ["device", "home"]
