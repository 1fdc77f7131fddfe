"""The miniature world: what it claims to be true of a scene is true of the scene's pixels."""

from __future__ import annotations

import itertools
from dataclasses import replace

import cv2
import numpy as np
import pytest

from t2vz.mini import world

SEEDS = range(24)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def grown(mask: np.ndarray, px: int) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * px + 1, 2 * px + 1), np.uint8)) > 0


def shrunk(mask: np.ndarray, px: int) -> np.ndarray:
    return cv2.erode(mask.astype(np.uint8), np.ones((2 * px + 1, 2 * px + 1), np.uint8), borderValue=0) > 0


# --- sampling and drawing


def test_equal_seeds_give_equal_scenes_and_pixels():
    first, second = world.sample(rng(5)), world.sample(rng(5))
    assert first == second
    assert np.array_equal(world.draw(first), world.draw(second))
    assert world.caption(first, rng(1)) == world.caption(second, rng(1))
    assert world.edit_pair(rng(5)) == world.edit_pair(rng(5))
    assert len({world.draw(world.sample(rng(seed))).tobytes() for seed in SEEDS}) == len(SEEDS)


def test_what_is_given_is_kept():
    given = {"colour": "pink", "pattern": "dotted", "background": "sea", "time": "night"}
    for seed in SEEDS:
        scene = world.sample(rng(seed), subject="star", count=2, **given)
        (star,) = (thing for thing in scene.things if thing.subject == "star")
        assert (star.colour, star.pattern, scene.background, scene.time) == ("pink", "dotted", "sea", "night")
    assert world.sample(rng(), subject="person", pose="waving").things[-1].pose == "waving"


def test_about_a_quarter_of_the_scenes_have_two_things_which_do_not_touch():
    scenes = [world.sample(rng(seed)) for seed in range(300)]
    pairs = [scene for scene in scenes if len(scene.things) == 2]
    assert 0.17 < len(pairs) / len(scenes) < 0.33
    for scene in pairs[:20]:
        far, near = world.masks(scene)
        assert not (grown(far, 1) & near).any()
        assert world.bottom(scene.things[0]) <= world.bottom(scene.things[1])


@pytest.mark.parametrize("background", world.BACKGROUNDS)
@pytest.mark.parametrize("time", world.TIMES)
def test_a_wide_frame_shows_the_square_one_in_its_middle(background, time):
    scene = world.sample(rng(3), background=background, time=time)
    wide = world.draw(scene, 128, 192)
    assert wide.shape == (128, 192, 3)
    assert wide.dtype == np.uint8
    assert np.abs(wide[:, 32:160].astype(int) - world.draw(scene)).max() <= 1


def test_a_larger_frame_shows_the_same():
    for seed in SEEDS:
        scene = world.sample(rng(seed))
        small = cv2.resize(world.draw(scene, 256), (128, 128), interpolation=cv2.INTER_AREA).astype(int)
        assert np.abs(small - world.draw(scene)).mean() < 5  # outlines are rounded to other widths


def test_every_colour_stands_out_from_every_ground_and_from_the_others():
    for time in world.TIMES:
        light = np.array(world.NIGHT_LIGHT if time == "night" else (1, 1, 1))
        paint = {name: np.array(rgb) * light for name, rgb in world.COLOURS.items()}
        grounds = [np.array(look.ground[time]) for look in world.BACKGROUNDS.values()]
        assert min(np.linalg.norm(c - g) for c, g in itertools.product(paint.values(), grounds)) > 65
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(paint.values(), 2)) > 65
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(grounds, 2)) > 25


def test_things_have_contours_that_canny_finds():
    for seed in SEEDS:
        scene = world.sample(rng(seed))
        edges = grown(cv2.Canny(world.draw(scene), 100, 200) > 0, 2)
        for mask in world.masks(scene):
            assert edges[mask & ~shrunk(mask, 1)].mean() > 0.8, scene


# --- masks, depth, joints


@pytest.mark.parametrize("size_px", [128, 200])
def test_the_mask_of_a_ball_is_a_disc(size_px):
    scene = world.sample(rng(1), subject="ball", count=1)
    (mask,) = world.masks(scene, size_px)
    (ball,) = scene.things
    y, x = np.mgrid[:size_px, :size_px] + 0.5
    distance = (
        np.hypot(x - ball.x * size_px, y - ball.y * size_px) - (ball.size / 2 + 0.01) * size_px
    )  # half an outline
    assert mask[distance < -0.8].all()
    assert not mask[distance > 0.8].any()


def test_masks_hold_what_a_thing_changes_and_nothing_else():
    for seed in SEEDS:
        scene = world.sample(rng(seed))
        masks = world.masks(scene)
        empty = world.draw(replace(scene, things=())).astype(int)
        changed = np.abs(world.draw(scene) - empty).max(-1) > 6
        union = np.any(masks, axis=0)
        assert not (changed & ~grown(union, 1)).any()
        assert changed[shrunk(union, 2)].mean() > 0.97  # the rest: a night's outline against the night


def test_a_nearer_thing_hides_the_farther_one():
    scene = world.sample(rng(2), subject="box", count=1)
    (box,) = scene.things
    ball = world.Thing("ball", "red", "plain", box.x, box.y + 0.1, box.size * 0.6)
    box_mask, ball_mask = world.masks(replace(scene, things=(box, ball)))
    assert not (box_mask & ball_mask).any()
    assert np.array_equal(ball_mask, world.masks(replace(scene, things=(ball,)))[0])
    assert np.array_equal(box_mask | ball_mask, world.masks(scene)[0] | ball_mask)


def test_depth_rises_towards_the_viewer_and_things_stand_on_the_ground():
    for seed in SEEDS:
        scene = world.sample(rng(seed), count=2, subject="car")
        depth = world.depth(scene)
        assert depth.shape == (128, 128)
        masks = world.masks(scene)
        far, near = (int(np.unique(depth[mask]).item()) for mask in masks)
        assert far <= near
        ground = world.depth(replace(scene, things=())).astype(int)
        below = round(scene.horizon * 128) + 1
        assert (np.diff(ground[below:, 0]) > 0).all()
        assert (ground[below:] == ground[below:, :1]).all()
        assert (ground[: below - 2] <= 16).all()
        foot = np.flatnonzero(masks[1].any(1))[-1]
        assert abs(near - ground[foot, 0]) <= 6


@pytest.mark.parametrize("pose", world.POSES)
def test_joints_lie_inside_the_person(pose):
    for seed in range(6):
        scene = world.sample(rng(seed), subject="person", pose=pose)
        joints = world.joints(scene)
        assert joints is not None
        assert joints.shape == (18, 2)
        (mask,) = (m for m, thing in zip(world.masks(scene), scene.things, strict=True) if thing.joints)
        x, y = joints.round().astype(int).T
        inside = (x >= 0) & (x < 128) & (y >= 0) & (y < 128)
        assert inside[[0, 1, 8, 11]].all()
        assert mask[y[inside], x[inside]].all()
        assert joints[2, 0] < joints[5, 0]  # the right shoulder is on the viewer's left
        raised = joints[[4, 7], 1].min() < joints[1, 1]
        assert raised == (pose in ("waving", "dancing"))
        assert np.allclose(world.joints(scene, 256, 384), joints * 2 + (64.5, 0.5), atol=1e-3)


def test_no_joints_without_a_person():
    assert world.joints(world.sample(rng(), subject="house", count=1)) is None


# --- words

TIME_WORDS = {"day": "day", "daylight": "day", "night": "night"}


def test_captions_are_true_and_use_known_words_only():
    backgrounds = {name: key for key, look in world.BACKGROUNDS.items() for name in look.names}
    for seed in range(400):
        scene = world.sample(rng(seed))
        text = world.caption(scene, rng(seed))
        words = text.split()
        assert set(words) <= set(world.WORDS), text
        assert {word for word in words if word in world.SUBJECTS} == {thing.subject for thing in scene.things}
        assert {backgrounds[w] for w in words if w in backgrounds} <= {scene.background}, text
        assert {TIME_WORDS[w] for w in words if w in TIME_WORDS} <= {scene.time}, text
        assert ("left" not in words) or scene.things[0].x < 0.4
        assert ("right" not in words) or scene.things[0].x > 0.6
        for part in text.split(" and "):
            (thing,) = (t for t in scene.things if t.subject in part.split())
            said = {word for word in part.split() if word in (*world.COLOURS, *world.PATTERNS, *world.POSES)}
            assert said <= {thing.colour, thing.pattern, thing.pose}, text
            assert ("stripes" not in part) or thing.pattern == "striped"
            assert ("dots" not in part) or thing.pattern == "dotted"
            assert ("big" not in part.split()) or world.is_big(thing)
            assert ("small" not in part.split()) or world.is_small(thing)


def test_captions_leave_open_what_drift_measures():
    scene = world.sample(rng(1), subject="ball", colour="red", pattern="dotted", background="sand", count=1)
    texts = [world.caption(scene, rng(seed)) for seed in range(1000)]
    assert 0.35 < np.mean(["red" not in text for text in texts]) < 0.45
    assert np.mean(["dot" not in text for text in texts]) > 0.8
    assert 0.1 < np.mean(["sand" not in text for text in texts]) < 0.4
    assert len(set(texts)) > 100


# --- edits


@pytest.mark.parametrize("kind", ["colour", "pattern", "subject", "background", "time"])
def test_an_edit_changes_what_it_says_and_nothing_else(kind):
    for seed in range(12):
        edit = world.edit_pair(rng(seed), kind)
        assert edit.kind == kind
        assert set(edit.instruction.split()) <= set(world.WORDS)
        before, after = world.draw(edit.source).astype(int), world.draw(edit.target).astype(int)
        differs = np.abs(after - before).max(-1) > 0
        masks = list(zip(world.masks(edit.source), world.masks(edit.target), strict=True))
        things = list(zip(edit.source.things, edit.target.things, strict=True))
        if kind in ("background", "time"):
            assert edit.source.things == edit.target.things
            assert getattr(edit.target, kind) in edit.instruction.split()
            assert replace(edit.target, **{kind: getattr(edit.source, kind)}) == edit.source
            if kind == "background":
                inside = shrunk(np.any(world.masks(edit.source), axis=0), 1)
                assert differs[inside].mean() < 0.02  # gaps narrower than a pixel: between a person's legs
            assert differs[~grown(np.any(world.masks(edit.source), axis=0), 1)].mean() > 0.3
        else:
            ((index, (old, new)),) = ((i, pair) for i, pair in enumerate(things) if pair[0] != pair[1])
            assert {old.subject, getattr(new, kind)} <= set(edit.instruction.split())
            assert world.bottom(old) == pytest.approx(world.bottom(new))
            changed = masks[index][0] | masks[index][1]
            assert differs[changed].any()
            assert not differs[~grown(changed, 1)].any()


def test_every_kind_of_edit_is_drawn():
    kinds = {world.edit_pair(rng(seed)).kind for seed in range(60)}
    assert kinds == {"colour", "pattern", "subject", "background", "time"}


def test_edits_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="size"):
        world.edit_pair(rng(), "size")
    with pytest.raises(ValueError, match="person"):
        world.edit_pair(rng(), "subject", world.sample(rng(), subject="person", count=1))


# --- motion


def warped(frame: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """The frame seen through the flow: what each pixel finds where it goes."""
    y, x = np.mgrid[: flow.shape[0], : flow.shape[1]].astype(np.float32)
    return cv2.remap(frame, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR).astype(int)


@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_whole_pixels_of_motion_are_exact(background):
    scene = world.sample(rng(4), background=background, time="day", count=1)
    clip = world.moving(rng(), 4, scene=scene, velocity_px=(2, 1), pan_px=(-1, 0), growth=1)
    assert clip.frames.shape == (4, 128, 128, 3)
    assert clip.flow.shape == (3, 128, 128, 2)
    for t, (flow, valid) in enumerate(zip(clip.flow, clip.valid, strict=True)):
        assert valid.mean() > 0.7
        error = np.abs(warped(clip.frames[t + 1], flow) - clip.frames[t])[valid]
        assert error.max() <= 2
        (mask,) = world.masks(clip.scenes[t])
        assert (flow[mask] == (3, 1)).all()
        assert (flow[~mask] == (1, 0)).all()


def test_fractional_motion_and_growth_follow_the_flow():
    for seed in range(12):
        clip = world.moving(rng(seed), 3)
        for t, (flow, valid) in enumerate(zip(clip.flow, clip.valid, strict=True)):
            error = np.abs(warped(clip.frames[t + 1], flow) - clip.frames[t])[valid]
            assert error.mean() < 1.2
    clip = world.moving(rng(1), 2, velocity_px=(2.5, 0), pan_px=(1.5, 0), growth=1.02)
    right = np.abs(warped(clip.frames[1], clip.flow[0]) - clip.frames[0])[clip.valid[0]].mean()
    wrong = np.abs(warped(clip.frames[1], -clip.flow[0]) - clip.frames[0])[clip.valid[0]].mean()
    assert wrong > 3 * right


def test_the_flow_carries_the_joints_along():
    scene = world.sample(rng(3), subject="person", pose="standing")
    clip = world.moving(rng(), 2, scene=scene, velocity_px=(1.5, -0.5), pan_px=(1, 0), growth=1.06)
    before, after = (world.joints(s) for s in clip.scenes)
    x, y = before.round().astype(int).T
    moved = before + clip.flow[0][y, x]
    assert np.abs(after - before).max() > 2
    assert np.abs(moved - after).max() < 0.06  # half a pixel of rounding, times the growth


def test_what_gets_covered_is_not_valid():
    scene = world.sample(rng(1), subject="box", count=1)
    clip = world.moving(rng(), 2, scene=scene, velocity_px=(6, 0), pan_px=(0, 0), growth=1)
    before, after = (world.masks(s)[0] for s in clip.scenes)
    assert not clip.valid[0][after & ~before].any()
    assert clip.valid[0][shrunk(before, 3)].all()


def test_one_frame_has_no_flow():
    clip = world.moving(rng(), 1)
    assert clip.flow.shape == (0, 128, 128, 2)
    assert clip.valid.shape == (0, 128, 128)
