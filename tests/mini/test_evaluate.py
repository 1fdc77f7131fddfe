"""The evaluation: what it measures is right on drawn clips and wrong where it must be, part by part; and the whole
suite runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from t2vz.cli import cli, main
from t2vz.mini import evaluate as suite
from t2vz.mini import measures, world
from t2vz.mini.evaluate import PARTS, Case, Frames, Rendered, Studio
from t2vz.models.table import MINI, Family

# --- intervals -------------------------------------------------------------------------------------------------------


def test_wilsons_interval_is_the_textbooks():
    found = measures.share([1.0] * 9 + [0.0], "prompts", "")
    assert (found.value, found.n) == (0.9, 10)
    assert (found.low, found.high) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert measures.share([1.0] * 10, "prompts", "").low == pytest.approx(0.7225, abs=1e-4)
    assert measures.share([], "prompts", "").value is None


def test_the_bootstrap_is_as_wide_as_theory_has_it():
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = measures.statistic(values[:, None].tolist(), "clips", "")
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 2 / 20, rel=0.15)
    assert measures.statistic([[1, 2], [2, 2]], "clips", "", of_sums=True).value == 0.75
    assert measures.statistic([[1, 0]], "clips", "", of_sums=True).value is None


# --- the measures, on drawn frames and wrong ones --------------------------------------------------------------------


def drawn(seed: int = 0, **given: object) -> tuple[world.Scene, world.Frame]:
    scene = world.sample(np.random.default_rng(seed), **given)
    return scene, world.draw(scene)


def test_shows_wants_subject_colour_and_background():
    _, frame = drawn(subject="star", colour="red", background="sand", time="day", count=1)
    assert measures.shows(frame, "star", "red", "sand") == (True, True, True)
    assert measures.shows(frame, "ball", "red", "sand") == (False, True, True)
    assert measures.shows(frame, "star", "blue", "sand") == (True, False, True)
    assert measures.shows(frame, "star", "red", "grass") == (True, True, False)
    noise = np.random.default_rng(0).integers(0, 255, frame.shape, np.uint8)
    assert measures.shows(noise, "star", "red", "sand") == (False, False, False)


def test_identity_drift_tells_one_thing_from_many():
    rng = np.random.default_rng(1)
    one = world.moving(rng, 8, scene=world.sample(rng, subject="house", count=1), velocity_px=(1, 0), growth=1).frames
    many = np.stack([drawn(seed, subject="house", count=1)[1] for seed in range(8)])
    steady, lost = measures.identity_drift(one)
    changing, _ = measures.identity_drift(many)
    assert lost == 0
    assert changing > 10 * steady
    assert measures.identity_drift(np.full_like(one, 128)) == (None, 1)


def test_motion_is_what_was_drawn_and_nothing_where_nothing_moves():
    rng = np.random.default_rng(2)
    pan = {"velocity_px": (0, 0), "pan_px": (2.5, 1.25), "growth": 1.0}
    clip = world.moving(rng, 8, scene=world.sample(rng, count=1), **pan).frames
    even = measures.motion(clip, (-2.5, -1.25))
    assert even[..., 1] == pytest.approx(even[..., 0], abs=0.15)
    assert measures.jitter(even) < 0.1
    frozen = measures.motion(clip[:1].repeat(8, 0), (-2.5, -1.25))
    assert np.abs(frozen[..., 1]).max() < 0.1
    shuffled = measures.motion(clip[[0, 5, 2, 7, 1, 6, 3, 4]], (-2.5, -1.25))
    assert measures.jitter(shuffled) > 3
    steps = np.array([0, 0, 3, 3, 3, 6, 6, 6])  # whole cells
    assert measures.jitter(measures.motion(clip[steps], (-2.5, -1.25))) > 10 * measures.jitter(even)


def test_depth_order_of_another_scene_is_wrong():
    rng = np.random.default_rng(0)
    own, other, empty = [], [], []
    for seed in range(12):
        scene, frame = drawn(seed)
        depth = world.depth(scene)
        own.append(measures.depth_order(frame, depth, rng))
        other.append(measures.depth_order(drawn(seed + 100)[1], depth, rng))
        empty.append(measures.depth_order(world.draw(replace(scene, things=())), depth, rng))
    assert np.mean(own) > 0.98
    assert np.mean(other) < 0.55
    assert np.mean(empty) < 0.05
    assert measures.depth_order(frame, np.zeros_like(depth), rng) is None


def test_pck_counts_the_joints_that_are_in_place():
    joints = world.joints(drawn(3, subject="person", pose="dancing")[0])
    size = (joints.max(0) - joints.min(0)).max()
    assert measures.pck(joints, joints) == 1
    assert measures.pck(joints + 0.06 * size, joints) == 1
    assert measures.pck(joints + 0.08 * size, joints) == 0  # 0.113 on the diagonal
    half = joints.copy()
    half[:9] += size
    assert measures.pck(half, joints) == 0.5
    assert measures.pck(None, joints) == 0


@pytest.mark.parametrize("kind", ["colour", "pattern", "subject", "background", "time"])
def test_an_edit_that_did_nothing_or_something_else_is_not_carried_out(kind):
    done, nothing, other = [], [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        edit = world.edit_pair(rng, kind)
        done.append(measures.carried_out(world.draw(edit.target), edit, edit.target))
        nothing.append(measures.carried_out(world.draw(edit.source), edit, edit.target))
        elsewhere = world.edit_pair(rng, "colour" if kind in ("background", "time") else "background", edit.source)
        other.append(measures.carried_out(world.draw(elsewhere.target), edit, edit.target))
    assert np.mean(done) == 1
    assert np.mean(nothing) == 0
    assert np.mean(other) == 0


def test_what_an_edit_should_not_have_changed():
    edit, source, target = suite.drawn_edit(Case("colour", 0, 4))
    frame, before, after = target.frames[0], source.frames[0], target.frames[0]
    assert measures.kept_psnr(frame, before, after) > 45
    noise = np.random.default_rng(0).normal(0, 10, before.shape)
    noisy = (before + noise).clip(0, 255).round().astype(np.uint8)
    assert measures.kept_psnr(noisy, before, after) == pytest.approx(10 * np.log10(255**2 / 100), abs=0.6)
    elsewhere = world.draw(replace(edit.target, background="city" if edit.source.background != "city" else "sand"))
    assert measures.kept_psnr(elsewhere, before, after) < 20
    night = suite.drawn_edit(Case("time", 0, 4))[2].frames[0]
    day = suite.drawn_edit(Case("time", 0, 4))[1].frames[0]
    assert measures.kept_psnr(night, day, night) is None  # everything changes


def test_warp_error_by_the_known_flow_punishes_what_does_not_move_along():
    rng = np.random.default_rng(5)
    scene = world.sample(rng, background="grass", pattern="striped")
    clip = world.moving(rng, 8, scene=scene, velocity_px=(2, 0), pan_px=(-1.5, 0))
    along = measures.flow_error(clip.frames, clip)
    levels = np.random.default_rng(0).integers(-30, 30, (8, 1, 1, 1))
    flickering = (clip.frames + levels).clip(0, 255).astype(np.uint8)
    assert measures.flow_error(clip.frames[:1].repeat(8, 0), clip) > 3 * along
    assert measures.flow_error(clip.frames[[3, 0, 6, 1, 7, 2, 5, 4]], clip) > 3 * along
    assert measures.flow_error(flickering, clip) > 3 * along


# --- the parts, rendered by drawing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing(Studio):
    """Draws what a model should render, or something wrong: an oracle for the parts."""

    draw: Callable[..., Frames] | None = None

    def render(self, prompt: str, seed: int, frames: int, **asked: object) -> Rendered:
        assert self.draw is not None
        return Rendered(self.draw(prompt, seed, frames, **asked), frames, 0.1)

    def through_vae(self, frames: Frames) -> Frames:
        return frames


def report(name: str, number: int, draw: Callable[..., Frames], kind: str | None = None) -> dict[str, float | None]:
    """The part's figures over `number` cases of each kind, for what `draw(case)` gives to draw."""
    part, rows = PARTS[name], []
    for case in part.cases(1.0):
        if case.index < number and kind in (None, case.kind):
            rows.append(part.run(Drawing(draw=draw(case)), case) | {"kind": case.kind})
    return {name: figure.value for name, figure in part.report(rows).figures.items()}


def test_text_scores_well_for_the_asked_and_badly_for_the_wrong_colour():
    def draws(wrong: bool) -> Callable[[Case], Callable[..., Frames]]:
        def of(case: Case) -> Callable[..., Frames]:
            subject, colour, place = suite.text_prompt(case)[1]
            if wrong:
                colour = next(name for name in world.COLOURS if name != colour)
            frame = drawn(case.seed, subject=subject, colour=colour, background=place, count=1)[1]
            return lambda prompt, seed, frames: frame[None].repeat(frames, 0)

        return of

    right, wrong = report("text", 9, draws(False)), report("text", 9, draws(True))
    assert right["text_alignment"] == right["text_alignment_every_frame"] == 1
    assert right["text_alignment_of_another_prompt"] < 0.15
    assert wrong["text_alignment"] == wrong["text_colour"] == 0
    assert wrong["text_subject"] == wrong["text_background"] == 1


def camera(scene: world.Scene, step: float, frames: int) -> Frames:
    """The scene under a camera that moves by `step` frame heights a frame, right and down."""
    return np.stack([world.draw(replace(scene, camera=(k * step, k * step))) for k in range(frames)])


def test_the_ablation_sees_identity_kept_and_lost_and_motion_as_asked():
    def of(case: Case) -> Callable[..., Frames]:
        def draw(prompt: str, seed: int, frames: int, **asked: object) -> Frames:
            scenes = [drawn(seed + k, subject=prompt.split()[-1], count=1)[0] for k in range(frames)]
            moving = asked.get("motion_dynamics", True)
            if not asked.get("cross_frame_attention", True) or (not moving and case.kind == "motion"):
                return np.stack([world.draw(scene) for scene in scenes])
            return camera(scenes[0], float(asked.get("motion_field_strength_x", 0)) / 512, frames)

        return draw

    found = report("ablation", 5, of)
    assert found["identity_drift_ratio"] > 5
    assert found["motion_slope"] == pytest.approx(1, abs=0.03)
    assert found["motion_slope_x"] == pytest.approx(1, abs=0.03)
    assert found["motion_jitter_px_nearest"] < 0.2
    assert found["motion_jitter_px_still"] > 2
    assert abs(found["motion_slope_off"]) < 0.8

    def frozen(case: Case) -> Callable[..., Frames]:
        frame = drawn(case.seed, count=1)[1]
        return lambda prompt, seed, frames, **asked: frame[None].repeat(frames, 0)

    still = report("ablation", 3, frozen)
    assert abs(still["motion_slope"]) < 0.02
    assert still["identity_drift_ratio"] == pytest.approx(1)  # nothing changes with or without attention


@pytest.mark.parametrize(("kind", "name"), [("edge", "edge_f1"), ("depth", "depth_order")])
def test_control_scores_the_clip_of_the_condition_and_no_other(kind, name):
    def of(related: bool) -> Callable[[Case], Callable[..., Frames]]:
        def draws(case: Case) -> Callable[..., Frames]:
            rng = case.rng
            clips = [world.moving(rng, suite.CONTROL_FRAMES, scene=world.sample(rng)).frames for _ in range(2)]
            return lambda prompt, seed, frames, conditions: clips[0 if related else 1]

        return draws

    right, wrong = report("control", 6, of(True), kind), report("control", 6, of(False), kind)
    assert right[name] == pytest.approx(right[f"{name}_drawn"])
    assert right[name] > 0.95
    assert right[f"{name}_unrelated"] < 0.6
    assert wrong[name] < 0.6


def test_edits_that_did_nothing_fail_and_those_frame_by_frame_flicker():
    def of(what: str) -> Callable[[Case], Callable[..., Frames]]:
        def draws(case: Case) -> Callable[..., Frames]:
            target = suite.drawn_edit(case)[2]

            def draw(prompt: str, seed: int, frames: int, source: Frames, cross_frame_attention: bool) -> Frames:
                if what == "nothing" or cross_frame_attention:
                    return source if what == "nothing" else target.frames
                levels = np.random.default_rng(seed).integers(-20, 20, (frames, 1, 1, 3))
                return (target.frames + levels).clip(0, 255).astype(np.uint8)

            return draw

        return draws

    done, nothing = report("edit", 1, of("target")), report("edit", 1, of("nothing"))
    assert done["edit_success"] == done["edit_success_drawn"] == 1
    assert done["edit_psnr_db"] > 40
    assert done["warp_error"] < 0.5 * done["warp_error_frame_by_frame"]
    assert nothing["edit_success"] == nothing["edit_success_nothing_done"] == 0
    assert nothing["warp_error_ratio"] == pytest.approx(1)


def test_long_clips_with_seams_are_told_from_those_without(monkeypatch):
    monkeypatch.setattr(suite, "LONG_FRAMES", 40)

    def of(step: int) -> Callable[[Case], Callable[..., Frames]]:
        def draws(case: Case) -> Callable[..., Frames]:
            scene = drawn(case.seed, count=1)[0]

            def draw(prompt: str, seed: int, frames: int, **asked: object) -> Frames:
                chunk = np.arange(frames)[:, None, None, None] // suite.LONG_CHUNK
                return (camera(scene, 0.002, frames) + step * (chunk % 2)).clip(0, 255).astype(np.uint8)

            return draw

        return draws

    even, seams = report("long", 2, of(0)), report("long", 2, of(8))
    assert 0.9 < even["seam_ratio"] < 1.1
    assert seams["seam_ratio"] > 1.5
    assert seams["seam_ratio_elsewhere"] < 1.05
    assert abs(even["long_identity_drift_per_100"]) < 0.3


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained(tiny_model: Path, tiny_edit_model: Path, tiny_controlnets: tuple[Path, Path]) -> Family:
    """A family of random weights."""
    one, two = map(str, tiny_controlnets)
    return replace(
        MINI,
        text_to_image=str(tiny_model),
        edit=str(tiny_edit_model),
        controlnets={"edge": one, "depth": two, "pose": one},
    )


def test_the_suite_runs_and_finds_that_random_weights_show_nothing(untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "LONG_FRAMES", 17)
    monkeypatch.setattr(suite, "STRENGTHS", (12.0,))
    monkeypatch.setattr(suite, "ABLATION_FRAMES", 4)
    monkeypatch.setattr(suite, "LOSSY", {name: suite.LOSSY[name] for name in ("ddim 5", "merge 50 %")})
    seen = []
    keys = suite.evaluate(
        tmp_path, scale=0.001, steps=3, family=untrained, workers=1, on_case=lambda *told: seen.append(told)
    )
    assert tuple(keys) == suite.KEYS
    assert keys["text_alignment"] == 0
    assert keys["identity_drift_ratio"] is None
    assert (keys["depth_order"], keys["edit_success"]) == (0, 0)
    assert keys["warp_error"] > 0
    assert {part for part, *_ in seen} == set(PARTS)
    assert all(done <= total for _, done, total in seen)

    told = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert told["figures"]["text_alignment"] | {"meaning": ""} == {
        "value": 0, "low": 0, "high": pytest.approx(0.793, abs=1e-3), "n": 1, "of": "prompts", "meaning": "",
        "bar": "≥ 0.9",
    }  # fmt: skip
    assert told["figures"]["text_alignment_drawn"]["value"] == 1
    assert all(figure["meaning"] for figure in told["figures"].values())
    page = (tmp_path / "eval.html").read_text(encoding="utf-8")
    assert all(name in page for name in told["figures"])
    assert re.findall(r"""(?:src|href)=["']?(\w+:)?""", page).count("data:") == len(re.findall("src=|href=", page)) > 0
    assert len(page) < 2_000_000


def test_the_command_prints_the_keys_last(untrained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "family_in", lambda folder: untrained)
    for member in ("base", "edit"):
        (tmp_path / member).mkdir()
    command = ["eval", "--out", str(tmp_path / "out"), "--scale", "0.001", "--steps", "3", "--device", "cpu"]
    assert main([*command, "--part", "text", "--family", str(tmp_path)]) == 0
    out = capsys.readouterr().out.splitlines()
    keys = json.loads(out[-1])
    assert tuple(keys) == suite.KEYS
    assert keys["text_alignment"] == 0
    assert keys["seam_ratio"] is None
    assert (tmp_path / "out" / "eval.html").is_file()


def test_the_command_knows_all_parts():
    (option,) = (option for option in cli.commands["eval"].params if option.name == "parts")
    assert list(option.type.choices) == list(PARTS)


def test_a_smaller_scale_is_a_part_of_the_suite():
    for part in PARTS.values():
        whole, less = part.cases(1.0), part.cases(0.1)
        assert set(less) < set(whole)
        assert len({case.seed for case in whole}) == len(whole)
    assert len(PARTS["text"].cases(1.0)) >= 200
    assert len({suite.text_prompt(case)[0] for case in PARTS["text"].cases(1.0)}) > 150
