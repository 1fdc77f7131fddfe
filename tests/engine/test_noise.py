"""Keyed noise: a function of its key alone, and Gaussian."""

import torch

from t2vz.engine import noise

SHAPE = (4, 64, 64)


def test_a_draw_depends_on_nothing_but_its_key():
    torch.manual_seed(1)
    alone = noise.draw(7, "motion", [5], SHAPE)
    torch.manual_seed(2)
    torch.rand(10)
    among_others = noise.draw(7, "motion", range(8), SHAPE)
    assert torch.equal(alone[0], among_others[5])


def test_every_part_of_the_key_matters():
    keys = [(1, "initial", 0, 0), (2, "initial", 0, 0), (1, "motion", 0, 0), (1, "initial", 1, 0), (1, "initial", 0, 1)]
    draws = [noise.draw(seed, purpose, [frame], SHAPE, step).flatten() for seed, purpose, frame, step in keys]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(keys))
    assert correlation.abs().max() < 0.05  # 16,384 independent values: standard deviation 0.008


def test_frames_that_share_digits_are_not_confused():
    assert not torch.equal(noise.draw(1, "step", [11], SHAPE, 1), noise.draw(1, "step", [1], SHAPE, 11))


def test_draws_are_standard_normal():
    sample = noise.draw(3, "step", range(16), SHAPE)
    assert abs(sample.mean()) < 0.01
    assert abs(sample.std() - 1) < 0.01
    assert sample.dtype == torch.float32
    assert sample.device.type == "cpu"
