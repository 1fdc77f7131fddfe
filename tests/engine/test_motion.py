"""Motion: camera paths in true pixels, warps that move what they should, DDPM-forward in ᾱ."""

import math
import warnings

import cv2
import numpy as np
import pytest
import torch

from t2vz.engine import motion

SQUARE = (32, 32)


def pose(x=0.0, y=0.0, zoom=1.0, degrees=0.0):
    return torch.tensor([[x, y, math.log(zoom), math.radians(degrees)]], dtype=torch.float64)


def spot(height, width, x, y):
    """A blob of radius 2 at (x, y): float32 (1, height, width)."""
    dx, dy = torch.arange(width) - x, torch.arange(height)[:, None] - y
    return torch.exp(-(dx**2 + dy**2) / 8)[None]


def centre(picture):
    """Centre of mass (x, y) of a picture (1, h, w)."""
    mass = picture[0].clamp(min=0.05) - 0.05
    y, x = (axis.to(mass) for axis in torch.meshgrid(*map(torch.arange, mass.shape), indexing="ij"))
    return float((x * mass).sum() / mass.sum()), float((y * mass).sum() / mass.sum())


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
    ours = motion.warp(latent[0], motion.paper_path(strength, range(1, 60), size), "nearest")
    assert torch.equal(ours, theirs)


def test_a_shift_is_the_same_number_of_pixels_on_both_axes_and_relative_to_the_picture():
    wide = motion.paper_path((12, 12), range(1, 3), (64, 128))
    assert torch.equal(wide[:, 0], wide[:, 1])
    assert wide[0, 0] * 8 == 12  # 512 px high: the paper's pixels
    assert torch.allclose(motion.paper_path((12, 12), range(1, 3), (128, 128)), 2 * wide)


@pytest.mark.parametrize("how", ["nearest", "subpixel"])
def test_the_content_moves_against_the_shift(how):
    latent = torch.zeros(1, 32, 32)
    latent[0, 20, 12] = 1.0
    moved = motion.warp(latent, pose(3.2, 5.2), how)[0, 0]
    peak = divmod(int(moved.argmax()), 32)
    assert peak == (15, 9)


def test_subpixel_at_whole_cells_is_a_plain_shift_with_reflected_borders():
    latent = torch.randn(4, 24, 32, generator=torch.Generator().manual_seed(1))
    moved = motion.warp(latent, pose(3, 2), "subpixel")[0]
    assert torch.allclose(moved[:, :22, :29], latent[:, 2:, 3:], atol=1e-5)
    assert torch.allclose(moved[:, :22, 29:], latent[:, 2:, -3:].flip(-1), atol=1e-5)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_subpixel_keeps_the_variance_of_noise_and_moves_by_the_fraction(fraction):
    latent = torch.randn(64, 32, 32, generator=torch.Generator().manual_seed(2))
    moved = motion.warp(latent, pose(fraction, fraction), "subpixel")[0]
    assert moved.std() / latent.std() == pytest.approx(1, abs=0.02)  # bilinear gives 0.5 at a half cell
    # A slow wave's phase tells how far it went.
    x = torch.arange(64)
    wave = torch.cos(torch.pi * 2 * (x + 0.5) / 64).expand(1, 64, 64).clone()
    shifted = motion.warp(wave, pose(fraction), "subpixel")[0, 0, 32]
    expected = torch.cos(torch.pi * 2 * (x + 0.5 + fraction) / 64)
    assert torch.allclose(shifted[1:-1], expected[1:-1], atol=0.02)


@pytest.mark.parametrize("how", ["nearest", "subpixel"])
@pytest.mark.parametrize(
    ("camera", "expected"),
    [
        (pose(4, -3), (20 - 4, 10 + 3)),  # to the right and up: the content moves left and down
        (pose(zoom=1.5), (15.5 + 4.5 * 1.5, 15.5 - 5.5 * 1.5)),  # closer: away from the middle
        (pose(zoom=0.5), (15.5 + 4.5 * 0.5, 15.5 - 5.5 * 0.5)),
        (pose(degrees=90), (15.5 - 5.5, 15.5 - 4.5)),  # counter-clockwise: from upper right to upper left
        (pose(2, 1, 1.25, 90), (15.5 + 1.25 * (-5.5 - 1), 15.5 + 1.25 * (-4.5 + 2))),  # about where it looks
    ],
)
def test_what_the_camera_sees(how, camera, expected):
    (seen,) = motion.warp(spot(*SQUARE, 20, 10), camera, how)
    x, y = (round(place) for place in expected)  # nothing but the spot: mirror images show at the borders
    found = centre(seen[:, y - 4 : y + 5, x - 4 : x + 5])
    assert (found[0] + x - 4, found[1] + y - 4) == pytest.approx(expected, abs=0.2 if how == "subpixel" else 0.6)


def test_subpixel_is_what_opencv_samples():
    """Of a smooth picture, where every good sampler gives the same, away from the borders."""
    picture = cv2.GaussianBlur(np.random.default_rng(0).normal(size=(48, 64)).astype(np.float32), (0, 0), 3)
    camera = pose(3.3, -1.7, 1.2, 25)
    (seen,) = motion.warp(torch.from_numpy(picture)[None], camera, "subpixel")
    turn = cv2.getRotationMatrix2D((31.5, 23.5), 25, 1.2)  # theirs is counter-clockwise, too
    turn[:, 2] -= turn[:, :2] @ (3.3, -1.7)
    theirs = cv2.warpAffine(picture, turn, (64, 48), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    inside = (slice(8, -8), slice(8, -8))
    assert np.abs(seen[0].numpy() - theirs)[inside].max() < 0.02 * np.abs(picture).max()


def test_any_warp_of_no_turn_is_the_fourier_shift():
    """The two ways to read between the cells are one: motion that starts to zoom does not jump."""
    latent = torch.randn(4, 24, 40, generator=torch.Generator().manual_seed(4))
    for shift in ((0.3, -0.8), (7.5, 3.25), (90.1, -55.7)):
        shifted = motion.warp(latent, pose(*shift), "subpixel")
        torch.testing.assert_close(motion._warp_cosine(latent, pose(*shift)[0])[None], shifted, atol=1e-4, rtol=0)
        almost = motion.warp(latent, pose(*shift, 1 + 1e-9), "subpixel")
        torch.testing.assert_close(almost, shifted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("camera", [pose(zoom=1.7), pose(zoom=0.6), pose(degrees=31), pose(3.4, 1.1, 1.3, -12)])
def test_zoom_and_rotation_keep_variance_and_mean(camera):
    noise = torch.randn(64, 64, 96, generator=torch.Generator().manual_seed(5))
    for how in ("nearest", "subpixel"):
        (seen,) = motion.warp(noise, camera, how)
        assert seen.std() == pytest.approx(1, abs=0.02)
        assert seen[:, 24:40, 32:64].std() == pytest.approx(1, abs=0.02)  # sees no border
    flat = torch.full((1, 64, 96), 3.0)
    for how in ("nearest", "subpixel"):
        torch.testing.assert_close(motion.warp(flat, camera, how)[0], flat, atol=1e-4, rtol=0)


def test_steady_motion_is_in_shorter_sides_and_seconds():
    path = motion.steady_path((0.5, -0.25), 2.0, 30.0, [0.5, 2.0], (64, 128))
    expected = torch.cat([pose(0.25 * 64, -0.125 * 64, 2**0.5, 15), pose(64, -32, 4, 60)])
    torch.testing.assert_close(path, expected)
    half = motion.steady_path((0.5, -0.25), 2.0, 30.0, [0.5, 2.0], (32, 64))
    torch.testing.assert_close(half * torch.tensor([2, 2, 1, 1]), path)


def test_keyframes_are_interpolated_and_the_last_is_held():
    keyframes = [(1, 0.5, 0, 4, 0), (3, 0.5, -1, 1, 90)]
    path = motion.keyframe_path(keyframes, [0.5, 1, 2, 3, 50], (32, 32))
    expected = [pose(8, 0, 2), pose(16, 0, 4), pose(16, -16, 2, 45), pose(16, -32, 1, 90), pose(16, -32, 1, 90)]
    torch.testing.assert_close(path, torch.cat(expected))


def test_keyframes_are_seen_from_the_one_that_the_anchor_shows():
    """Frame 0 is the anchor, wherever the path begins: two views of one large picture differ by the relative pose."""
    start, later = (0.125, 0.0625, 0.8, 20), (0.25, -0.125, 1.1, 50)
    world = spot(96, 96, 50, 44)
    views = []
    for x, y, zoom, degrees in (start, later):
        views.append(motion.warp(world, pose(32 * x, 32 * y, zoom, degrees), "subpixel")[0, :, 32:64, 32:64])
    (relative,) = motion.keyframe_path([(0, *start), (1, *later)], [1], SQUARE)
    seen = motion.warp(views[0], relative[None], "subpixel")[0]
    assert centre(seen) == pytest.approx(centre(views[1]), abs=0.05)


@pytest.mark.parametrize("axis", range(4))
def test_a_bounded_path_turns_back_at_its_bound_without_changing_speed(axis):
    size, bound, step = (32, 48), 0.3, 1e-3
    steady = torch.zeros(20001, 4, dtype=torch.float64)
    steady[:, axis] = torch.arange(-10000, 10001) * step
    path = motion.bounded(steady, bound, size)
    # The same motion until the first turn; from then on as fast, to and fro.
    assert torch.equal(path[10000], torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(path[9900:10101], steady[9900:10101])
    speed = path.diff(dim=0)[:, axis].abs()
    assert (speed > 0.999 * step).float().mean() > 0.98  # all but the steps in which it turns
    assert speed.max() <= 1.001 * step
    farthest = max(motion._displacement(each, *size).norm(dim=0).max() for each in path[::50])
    assert farthest <= bound * 32 + 1e-9
    assert farthest > (0.9 if axis != 2 else 0.5) * bound * 32  # zooming in carries less than zooming out
    assert len(set(path[:, axis].diff().sign().tolist()) - {0.0}) == 2


def test_renoise_is_the_ddpm_forward_process():
    latents = torch.full((20000,), 2.0)
    noise = torch.randn(20000, generator=torch.Generator().manual_seed(3))
    out = motion.renoise(latents, noise, 0.5, 0.3)
    assert out.mean() == pytest.approx(2 * 0.6**0.5, abs=0.02)
    assert out.std() == pytest.approx(0.4**0.5, abs=0.02)
