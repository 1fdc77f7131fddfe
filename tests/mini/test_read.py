"""The rules that read the miniature world: right on drawn scenes, also on bad copies, and "no" where nothing is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest

from t2vz.mini import read, world


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def worn(frame: np.ndarray, seed: int) -> np.ndarray:
    """As a weak VAE gives it back: blurred, noisy, its colours shifted, then JPEG."""
    draws = rng(seed)
    soft = cv2.GaussianBlur(frame.astype(np.float32), (0, 0), 1.0)
    soft += draws.normal(0, 6, frame.shape) + draws.uniform(-10, 10, 3)
    encoded = cv2.imencode(".jpg", np.clip(soft, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 75])[1]
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR)


def value(reading: read.Reading | None) -> str | None:
    return reading.value if reading else None


@pytest.mark.parametrize(("quality", "least"), [("clean", 0.99), ("worn", 0.97)])
def test_scenes_are_read_as_they_were_drawn(quality, least):
    right: Counter[str] = Counter()
    count, overlaps, size_errors = 0, [], []
    combinations = [(s, b, t) for s in world.SUBJECTS for b in world.BACKGROUNDS for t in world.TIMES]
    for seed, (subject, background, time) in enumerate(combinations):
        scene = world.sample(rng(1000 + seed), subject=subject, background=background, time=time)
        frame = world.draw(scene) if quality == "clean" else worn(world.draw(scene), seed)
        right["background"] += value(read.background(frame)) == background
        right["time"] += value(read.time(frame)) == time
        found = read.things(frame)
        right["count"] += len(found) == len(scene.things)
        main = max(zip(world.masks(scene), scene.things, strict=True), key=lambda pair: pair[0].sum())
        count += 1
        if not found:
            continue
        mask, thing = main
        best = max(found, key=lambda reading: (reading.mask & mask).sum())
        for name in ("subject", "colour", "pattern"):
            right[name] += value(getattr(best, name)) == getattr(thing, name)
        overlaps.append((best.mask & mask).sum() / (best.mask | mask).sum())
        size_errors.append(abs(best.size - max(np.ptp(np.nonzero(mask), axis=1) + 1) / 128))
    shares = {name: right[name] / count for name in right}
    assert len(shares) == 6
    assert min(shares.values()) >= least, shares
    assert np.quantile(overlaps, 0.05) > 0.75
    assert np.quantile(size_errors, 0.95) < 0.05


def test_things_come_largest_first_with_their_places():
    scene = world.sample(rng(7), subject="ball", colour="red", background="grass", time="day", count=2)
    found = read.things(world.draw(scene))
    assert [t.mask.sum() for t in found] == sorted((t.mask.sum() for t in found), reverse=True)
    (ball,) = (t for t in found if value(t.subject) == "ball")
    (drawn,) = (t for t in scene.things if t.subject == "ball")
    assert (ball.x, ball.y) == pytest.approx((drawn.x, drawn.y), abs=0.02)
    assert ball.size == pytest.approx(drawn.size, abs=0.04)
    assert ball.aspect == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("level", [0, 60, 128, 255])
def test_an_even_frame_shows_nothing(level):
    frame = np.full((128, 128, 3), level, np.uint8)
    assert read.time(frame) is None
    assert read.background(frame) is None
    assert read.things(frame) == ()
    assert read.identity(frame) is None


def test_noise_shows_nothing():
    for seed, shape in enumerate([(128, 128, 3), (256, 256, 3), (96, 160, 3)]):
        frame = rng(seed).integers(0, 256, shape, dtype=np.uint8)
        assert read.background(frame) is None
        assert read.things(frame) == ()


@pytest.mark.parametrize("time", world.TIMES)
@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_an_empty_scene_has_a_background_and_no_thing(background, time):
    for seed in range(3):
        scene = replace(world.sample(rng(seed), background=background, time=time), things=())
        for frame in (world.draw(scene), worn(world.draw(scene), seed)):
            assert value(read.background(frame)) == background
            assert value(read.time(frame)) == time
            assert read.thing(frame) is None


def test_a_ground_of_no_known_colour_is_no_background():
    frame = world.draw(world.sample(rng(1), background="grass", time="day", count=1))
    frame[50:] = (250, 40, 200)
    assert value(read.time(frame)) == "day"
    assert read.background(frame) is None


def test_a_shape_of_no_known_kind_has_no_subject():
    scene = replace(world.sample(rng(1), background="sand", time="day"), things=())
    frame = world.draw(scene)
    cv2.ellipse(frame, (64, 90), (50, 6), 0, 0, 360, (36, 78, 226), -1)
    cv2.ellipse(frame, (64, 90), (6, 30), 0, 0, 360, (36, 78, 226), -1)
    found = read.thing(frame)
    assert found is not None
    assert found.subject is None
    assert value(found.colour) == "blue"


def test_a_thing_of_no_known_colour_has_no_colour():
    scene = world.sample(rng(1), subject="ball", background="sand", time="day", pattern="plain", count=1)
    frame = world.draw(scene)
    inside = cv2.erode(world.masks(scene)[0].astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    frame[inside] = (90, 30, 20)
    found = read.thing(frame)
    assert found is not None
    assert value(found.subject) == "ball"
    assert found.colour is None


@pytest.mark.parametrize("kind", ["colour", "pattern", "subject", "background", "time"])
def test_an_edit_is_seen_and_its_source_is_not_taken_for_it(kind):
    right = wrong = 0
    for seed in range(15):
        edit = world.edit_pair(rng(seed), kind, world.sample(rng(seed), subject="heart", count=1))
        for scene in (edit.source, edit.target):
            frame = world.draw(scene)
            if kind in ("background", "time"):
                seen, asked = value(getattr(read, kind)(frame)), getattr(edit.target, kind)
            else:
                found = read.thing(frame)
                assert found is not None
                seen, asked = value(getattr(found, kind)), getattr(edit.target.things[0], kind)
            if scene is edit.target:
                right += seen == asked
            else:
                wrong += seen == asked
    assert right >= 14
    assert wrong == 0


@pytest.mark.parametrize("size", [(256, 256), (128, 192), (96, 96)])
def test_frames_of_other_sizes_are_read(size):
    right = 0
    for seed in range(10):
        scene = world.sample(rng(seed), subject="house", count=1)
        frame = world.draw(scene, *size)
        found = read.thing(frame)
        assert found is not None
        assert found.mask.shape == size
        (mask,) = world.masks(scene, *size)
        assert (found.mask & mask).sum() / (found.mask | mask).sum() > 0.75
        right += (value(found.subject), value(found.colour)) == ("house", scene.things[0].colour)
        assert value(read.background(frame)) == scene.background
    assert right >= 9


def test_identity_stays_with_a_moving_thing_and_leaves_with_another():
    for seed in range(8):
        scene = world.sample(rng(seed), subject="heart", count=1, background="road", time="day")
        (heart,) = scene.things
        middle = replace(scene, things=(replace(heart, x=0.5),))
        clip = world.moving(rng(seed), 5, scene=middle, pan_px=(0, 0), velocity_px=(1.3, 0.2), growth=1)
        first, *others = (read.identity(frame) for frame in clip.frames)
        drift = max(np.abs(other - first).max() for other in others)
        assert drift < 0.06
        another = world.edit_pair(rng(seed), "colour", middle).target
        assert np.abs(read.identity(world.draw(another)) - first).max() > 3 * drift
        smaller = replace(middle, things=(replace(heart, x=0.5, size=heart.size * 0.8),))
        assert read.identity(world.draw(smaller))[5] / first[5] == pytest.approx(0.8, abs=0.06)
