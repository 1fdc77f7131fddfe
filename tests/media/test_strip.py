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
    wide = np.zeros((40, 64, 4096, 3), np.uint8)
    strip.write(tmp_path, "strips/wide.webp", [strip.thumbnails(wide)], tmp_path)
    strip.write_moving(tmp_path, "thumbnails/wide.webp", [strip.thumbnails(wide)], tmp_path)
    for folder, frames in (("strips", 8), ("thumbnails", 16)):
        with Image.open(tmp_path / folder / "wide.webp") as opened:
            assert opened.size == (frames * 1020, 16)


@pytest.mark.parametrize("count", [3, 16, 100])
def test_thumbnails_run_from_the_first_frame_to_the_last_and_the_strip_shows_some_of_them(count, tmp_path):
    clip = np.zeros((count, 32, 32, 3), np.uint8)
    clip[...] = (np.arange(count) * 2)[:, None, None, None]  # a frame's level is its place twice
    thumbnails = strip.thumbnails(clip)
    places = [int(frame.mean()) // 2 for frame in thumbnails]
    assert (len(places), places[0], places[-1]) == (min(count, 16), 0, count - 1)
    steps = np.diff(places)
    assert steps.max() - steps.min() <= 1  # evenly
    strip.write(tmp_path, "strip.webp", [thumbnails], tmp_path)
    with Image.open(tmp_path / "strip.webp") as opened:
        picture = np.asarray(opened.convert("L")).astype(float)
    levels = picture.reshape(32, -1, 32).mean(axis=(0, 2))
    assert len(levels) == min(count, 8)
    assert np.abs(levels[[0, -1]] - [0, 2 * (count - 1)]).max() < 4
    assert (np.diff(levels) > 0).all()
