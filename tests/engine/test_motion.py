"""Motion: shifts in true pixels, warps that move what they should, DDPM-forward in ᾱ."""

import warnings

import pytest
import torch

from t2vz.engine import motion


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (96, 96)])
@pytest.mark.parametrize("strength", [(12, 12), (7, -3.3), (30, 0)])
def test_nearest_equals_the_reference_far_past_the_border(size, strength):
    from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero import (
        create_motion_field_and_warp_latents,
    )

    latent = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = create_motion_field_and_warp_latents(*strength, list(range(1, 60)), latent.repeat(59, 1, 1, 1))
    ours = motion.warp(latent[0], motion.shifts(strength, range(1, 60), size), "nearest")
    assert torch.equal(ours, theirs)


def test_a_shift_is_the_same_number_of_pixels_on_both_axes_and_relative_to_the_picture():
    wide = motion.shifts((12, 12), range(1, 3), (64, 128))
    assert torch.equal(wide[:, 0], wide[:, 1])
    assert wide[0, 0] * 8 == 12  # 512 px high: the paper's pixels
    assert torch.allclose(motion.shifts((12, 12), range(1, 3), (128, 128)), 2 * wide)


@pytest.mark.parametrize("how", ["nearest", "subpixel"])
def test_the_content_moves_against_the_shift(how):
    latent = torch.zeros(1, 32, 32)
    latent[0, 20, 12] = 1.0
    moved = motion.warp(latent, torch.tensor([[3.2, 5.2]]), how)[0, 0]
    peak = divmod(int(moved.argmax()), 32)
    assert peak == (15, 9)


def test_subpixel_at_whole_cells_is_a_plain_shift_with_reflected_borders():
    latent = torch.randn(4, 24, 32, generator=torch.Generator().manual_seed(1))
    moved = motion.warp(latent, torch.tensor([[3.0, 2.0]]), "subpixel")[0]
    assert torch.allclose(moved[:, :22, :29], latent[:, 2:, 3:], atol=1e-5)
    assert torch.allclose(moved[:, :22, 29:], latent[:, 2:, -3:].flip(-1), atol=1e-5)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_subpixel_keeps_the_variance_of_noise_and_moves_by_the_fraction(fraction):
    latent = torch.randn(64, 32, 32, generator=torch.Generator().manual_seed(2))
    moved = motion.warp(latent, torch.tensor([[fraction, fraction]]), "subpixel")[0]
    assert moved.std() / latent.std() == pytest.approx(1, abs=0.02)  # bilinear gives 0.5 at a half cell
    # A slow wave's phase tells how far it went.
    x = torch.arange(64)
    wave = torch.cos(torch.pi * 2 * (x + 0.5) / 64).expand(1, 64, 64).clone()
    shifted = motion.warp(wave, torch.tensor([[fraction, 0.0]]), "subpixel")[0, 0, 32]
    expected = torch.cos(torch.pi * 2 * (x + 0.5 + fraction) / 64)
    assert torch.allclose(shifted[1:-1], expected[1:-1], atol=0.02)


def test_renoise_is_the_ddpm_forward_process():
    latents = torch.full((20000,), 2.0)
    noise = torch.randn(20000, generator=torch.Generator().manual_seed(3))
    out = motion.renoise(latents, noise, 0.5, 0.3)
    assert out.mean() == pytest.approx(2 * 0.6**0.5, abs=0.02)
    assert out.std() == pytest.approx(0.4**0.5, abs=0.02)
