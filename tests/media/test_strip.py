"""Strips: which frames, the same however they arrive, whole or not at all."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from t2vz.media import strip


@pytest.mark.parametrize(
    ("count", "wanted"),
    [(1, (0,)), (2, (0, 1)), (8, tuple(range(8))), (15, (0, 2, 4, 6, 8, 10, 12, 14)), (9, (0, 1, 2, 3, 5, 6, 7, 8))],
)
def test_first_last_and_evenly_between(count, wanted):
    assert strip.shown(count) == wanted


@pytest.mark.parametrize("batch", [1, 4, 11, 40])
def test_passing_frames_give_the_thumbnails_of_the_whole_clip(batch):
    clip = np.random.default_rng(0).integers(0, 256, (23, 256, 128, 3), np.uint8)
    batches, found = [clip[i : i + batch] for i in range(0, len(clip), batch)], []
    passed = list(strip.collecting(batches, len(clip), found))
    assert np.array_equal(np.concatenate(passed), clip)
    assert np.array_equal(found, strip.thumbnails(clip))
    assert found[0].shape == (128, 64, 3)
    assert np.abs(found[0].mean() - clip[0].mean()) < 1  # averaged, not a crop


def test_a_strip_has_its_lines_under_each_other(tmp_path):
    red, blue = np.zeros((3, 64, 64, 3), np.uint8), np.zeros((2, 64, 64, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    file = tmp_path / "strips" / "a.webp"
    strip.write(tmp_path, "strips/a.webp", [red, list(blue)], tmp_path)
    with Image.open(file) as opened:
        picture = np.asarray(opened.convert("RGB")).astype(int)
    assert picture.shape == (128, 192, 3)
    for (y, x), colour in {(32, 160): (255, 0, 0), (96, 64): (0, 0, 255), (96, 160): (0, 0, 0)}.items():
        assert np.abs(picture[y, x] - colour).max() < 12
    assert list(file.parent.iterdir()) == [file]
    assert list(tmp_path.iterdir()) == [file.parent]


def test_a_panorama_is_made_small_enough_for_webp(tmp_path):
    wide = np.zeros((8, 64, 4096, 3), np.uint8)
    strip.write(tmp_path, "strips/wide.webp", [strip.thumbnails(wide)], tmp_path)
    with Image.open(tmp_path / "strips" / "wide.webp") as opened:
        assert opened.size == (8 * 1024, 16)
