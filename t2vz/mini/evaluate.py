"""The evaluation: a fixed suite, rendered by the engine with the `mini` family, and what it measures.

Each part has cases (fixed seeds), something that runs one of them, and a report on all. What is measured is in
`t2vz.mini.measures`; the page is written by `t2vz.mini.page`. Nothing here knows how the models were trained.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from t2vz.mini import measures, world
from t2vz.mini.measures import Figure, share, statistic
from t2vz.mini.world import Scene
from t2vz.models.table import MINI, Family
from t2vz.quality import Meter, edge_f1, seam_ratio
from t2vz.spec import JobSpec

Frames = NDArray[np.uint8]  # (F, H, W, 3), RGB

SIZE_PX = world.SIZE_PX
STEPS = 20
_SHOWN = 6  # cases of a part (of each kind) that the page shows
_REFERENCE_PX = 512  # of the shorter side: what motion_field_strength is given in

# What the last line of `t2vz eval` has.
KEYS = (
    "text_alignment", "identity_drift_ratio", "motion_slope", "edge_f1", "edge_f1_unrelated", "depth_order", "pose_pck",
    "edit_success", "edit_psnr_db", "warp_error", "warp_error_frame_by_frame", "seam_ratio",
)  # fmt: skip


class Strip(NamedTuple):
    """Frames in a row of the page."""

    caption: str
    frames: Frames


@dataclass(frozen=True)
class Section:
    """A part's report. figures: by name. table: equal rows of a table; plot: PNG."""

    title: str
    figures: dict[str, Figure]
    strips: list[Strip]
    table: list[dict[str, Any]] = field(default_factory=list)
    plot: bytes = b""


class Rendered(NamedTuple):
    """cpu_s: CPU seconds of this process from prompt to latents; evaluations: of the UNet, a frame each."""

    frames: Frames
    evaluations: int
    cpu_s: float


@dataclass(frozen=True)
class Studio:
    """Renders with a family of models on a device: text in, frames out, without files and flows. steps: denoising."""

    family: Family = MINI
    device: str = "cpu"
    steps: int = STEPS

    def render(
        self,
        prompt: str,
        seed: int,
        frames: int,
        *,
        source: Frames | None = None,
        conditions: Mapping[str, Frames] | None = None,
        **columns: Any,
    ) -> Rendered:
        """source: what to edit. conditions: by name. columns: of the manifest, beside those that follow from these."""
        from t2vz.engine import vae
        from t2vz.models.loading import load
        from t2vz.modes import Request, generate

        conditions = conditions or {}
        asked: dict[str, Any] = {"model": self.family.text_to_image, "num_inference_steps": self.steps}
        if source is not None:
            asked |= {"mode": "edit", "model": self.family.edit, "source": "drawn"}
        elif conditions:
            controlnets = tuple(self.family.controlnets[name] for name in conditions)
            asked |= {"mode": "control", "source": "drawn", "condition": tuple(conditions), "controlnet": controlnets}
        spec = JobSpec(prompt=prompt, **asked | columns)
        components = load(spec, self.device)
        shown = tuple(conditions.values())
        request = Request(spec, seed, SIZE_PX, SIZE_PX, frames, source=source, conditions=shown)
        began = time.process_time()
        made = generate(components, request)
        cpu_s = time.process_time() - began
        pictures = np.concatenate(list(vae.decode(components.vae, made.latents)))
        return Rendered(pictures, made.evaluations, cpu_s)

    def through_vae(self, frames: Frames) -> Frames:
        """The frames as the VAE gives them back: no model of the family can do better."""
        from t2vz.engine import vae
        from t2vz.models.loading import load

        components = load(JobSpec(prompt="-", model=self.family.text_to_image), self.device)
        latents = vae.encode(components.vae, frames) * components.vae.config.scaling_factor
        return np.concatenate(list(vae.decode(components.vae, latents)))


@dataclass(frozen=True)
class Case:
    """kind: of the cases of a part, if there are several. seed: of all that is random in it, frames included."""

    kind: str
    index: int
    seed: int

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)


def _cases(part_seed: int, scale: float, **kinds: int) -> list[Case]:
    """`scale` of each kind's number of cases, 1 at least. A smaller scale takes the first of the same cases."""
    return [
        Case(kind, i, 1_000_000 * part_seed + 10_000 * k + i)
        for k, (kind, number) in enumerate(kinds.items())
        for i in range(max(1, round(number * scale)))
    ]


Row = dict[str, Any]  # what a case gave: numbers by name, and under "strips" what the page may show


def _of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _known(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row[name] is not None]


def _mean(rows: Sequence[Row], name: str, of: str, meaning: str, bar: str = "") -> Figure:
    return statistic([[value] for value in _known(rows, name)], of, meaning, bar)


def _ratio(rows: Sequence[Row], above: str, below: str, of: str, meaning: str, bar: str = "") -> Figure:
    pairs = [[row[above], row[below]] for row in rows if row[above] is not None and row[below] is not None]
    return statistic(pairs, of, meaning, bar, of_sums=True)


# --- text ------------------------------------------------------------------------------------------------------------

TEXT_FRAMES = 4


def text_cases(scale: float) -> list[Case]:
    return _cases(1, scale, prompt=208)


def text_prompt(case: Case) -> tuple[str, tuple[str, str, str]]:
    """A prompt that says subject, colour and background, and these three words; sometimes it says the time, too."""
    rng = case.rng
    subjects = list(world.SUBJECTS)
    subject = subjects[case.index % len(subjects)]  # all of them equally often
    colour, place = str(rng.choice(list(world.COLOURS))), str(rng.choice(list(world.BACKGROUNDS)))
    thing = (
        f"a person in {colour}"
        if subject == "person"
        else f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {subject}"
    )
    opening, time = rng.choice(["", "a picture of ", "a drawing of "]), rng.choice(["", "", " by day", " at night"])
    return f"{opening}{thing} {world.BACKGROUNDS[place].preposition} the {place}{time}", (subject, colour, place)


def text_case(studio: Studio, case: Case) -> Row:
    prompt, words = text_prompt(case)
    frames = studio.render(prompt, case.seed, TEXT_FRAMES).frames
    subject, colour, place = words
    drawn = world.draw(world.sample(case.rng, subject=subject, colour=colour, background=place, count=1))
    other = text_prompt(replace(case, index=case.index + 1, seed=case.seed + 1))[1]
    right = np.array([measures.shows(frame, *words) for frame in frames])
    return {
        "all": float(right.all(1).mean()),
        "every_frame": float(right.all()),
        **{name: float(part) for name, part in zip(("subject", "colour", "background"), right.mean(0), strict=True)},
        "of_another_prompt": float(np.mean([all(measures.shows(frame, *other)) for frame in frames])),
        "drawn": float(all(measures.shows(drawn, *words))),
        "drawn_vae": float(all(measures.shows(studio.through_vae(drawn[None])[0], *words))),
        "strips": [Strip(f"“{prompt}” {'✓' if right.all() else '✗'}", frames)],
    }


def text_report(rows: list[Row]) -> Section:
    def of(name: str, meaning: str, bar: str = "") -> Figure:
        return share(_known(rows, name), "prompts", meaning, bar)

    return Section(
        "Text: is what was asked for in the picture?",
        {
            "text_alignment": of(
                "all",
                f"share of frames ({TEXT_FRAMES} a prompt) whose largest thing has the asked subject and colour before "
                "the asked background, read by rules",
                "≥ 0.9",
            ),
            "text_alignment_every_frame": of("every_frame", "share of prompts of which every frame does"),
            "text_subject": of("subject", "share of frames with the asked subject"),
            "text_colour": of("colour", "with the asked colour"),
            "text_background": of("background", "with the asked background"),
            "text_alignment_of_another_prompt": of("of_another_prompt", "control: judged by the next prompt's words"),
            "text_alignment_drawn": of("drawn", "ceiling: drawn pictures of the same words"),
            "text_alignment_drawn_vae": of("drawn_vae", "ceiling: drawn pictures, encoded and decoded by the VAE"),
        },
        _strips(rows),
    )


# --- the paper's ablation --------------------------------------------------------------------------------------------

ABLATION_FRAMES = 8
# Motion of the identity cases, in the paper's px: small, so that things stay in the picture.
IDENTITY_STRENGTH = 4.0
STRENGTHS = (4.0, 8.0, 12.0)
_ARMS: dict[str, dict[str, Any]] = {
    "method": {"motion_field_strength_x": IDENTITY_STRENGTH, "motion_field_strength_y": IDENTITY_STRENGTH},
    "no_attention": {
        "motion_field_strength_x": IDENTITY_STRENGTH,
        "motion_field_strength_y": IDENTITY_STRENGTH,
        "cross_frame_attention": False,
    },
    "no_motion": {"motion_dynamics": False},
    "neither": {"motion_dynamics": False, "cross_frame_attention": False},
}
_ARM_NAMES = {
    "method": "the method",
    "no_attention": "without cross-frame attention",
    "no_motion": "without motion dynamics",
    "neither": "without both",
}


def ablation_cases(scale: float) -> list[Case]:
    return _cases(2, scale, identity=32, motion=10)


def open_prompt(case: Case) -> str:
    """A prompt that names a subject alone: colour, pattern, size and background are the model's to choose."""
    subjects = list(world.SUBJECTS)
    subject = subjects[case.index % len(subjects)]
    return f"a {subject}"


def ablation_case(studio: Studio, case: Case) -> Row:
    return _identity_case(studio, case) if case.kind == "identity" else _motion_case(studio, case)


def _identity_case(studio: Studio, case: Case) -> Row:
    prompt, row, strips = open_prompt(case), {}, []
    for arm, columns in _ARMS.items():
        frames = studio.render(prompt, case.seed, ABLATION_FRAMES, **columns).frames
        row[arm], row[f"{arm}_lost"] = measures.identity_drift(frames)
        strips.append(Strip(f"“{prompt}”, {_ARM_NAMES[arm]}: drift {_told(row[arm])}", frames))
    return {**row, "strips": strips}


def _motion_case(studio: Studio, case: Case) -> Row:
    prompt, strips, found = open_prompt(case), [], {}
    for warp in ("nearest", "subpixel"):
        for strength in STRENGTHS:
            moving: dict[str, Any] = {
                "motion_field_strength_x": strength,
                "motion_field_strength_y": strength,
                "warp": warp,
                **_later(studio.steps),
            }
            frames = studio.render(prompt, case.seed, ABLATION_FRAMES, **moving).frames
            found[warp, strength] = measures.motion(frames, _content_px(strength))
        strips.append(Strip(f"“{prompt}”, δ = {strength:g}, {warp}", frames))
    strongest: dict[str, Any] = {"motion_field_strength_x": STRENGTHS[-1], "motion_field_strength_y": STRENGTHS[-1]}
    paper = studio.render(prompt, case.seed, ABLATION_FRAMES, **strongest).frames
    strips.append(Strip(f"“{prompt}”, δ = {STRENGTHS[-1]:g}, nearest, the paper's t0 and t1", paper))
    still = studio.render(prompt, case.seed, ABLATION_FRAMES, motion_dynamics=False).frames
    strips.append(Strip(f"“{prompt}”, without motion dynamics", still))
    row: Row = {"strips": strips}
    for warp in ("nearest", "subpixel"):
        clips = [found[warp, strength] for strength in STRENGTHS]
        row |= {f"{warp}_{name}": value for name, value in _sums(clips).items()}
        row[f"{warp}_jitter"] = float(np.mean([measures.jitter(clip) for clip in clips]))
    for name, frames in (("paper", paper), ("still", still)):
        moved = measures.motion(frames, _content_px(STRENGTHS[-1]))
        row |= {f"{name}_{sum_}": value for sum_, value in _sums([moved]).items()}
        row[f"{name}_jitter"] = measures.jitter(moved)
    return row


def _later(steps: int) -> dict[str, Any]:
    """t0 and t1 at 0.4 and 0.5 of the steps instead of the paper's 0.88 and 0.94.

    A latent of 16 × 16 cells is as much hidden by noise as one of 64 × 64 is by noise of 16 times its variance: at the
    paper's levels, next to nothing of the anchor is left here that could move. That is measured beside.
    """
    t1 = min(round(0.5 * steps), steps - 1)
    return {"t0": min(round(0.4 * steps), t1 - 1), "t1": t1}


def _content_px(strength: float) -> tuple[float, float]:
    """Motion of the content a frame for equal strengths along x and y: against the camera."""
    moved = -strength * SIZE_PX / _REFERENCE_PX
    return moved, moved


def _sums(clips: Sequence[NDArray[np.float64]]) -> dict[str, float]:
    """Σ requested · measured and Σ requested² of displacements, for both axes together and each."""
    every = np.concatenate(clips)
    products, squares = (every[..., 0] * every[..., 1]).sum(0), (every[..., 0] ** 2).sum(0)
    return {
        "product": float(products.sum()), "square": float(squares.sum()),
        "product_x": float(products[0]), "square_x": float(squares[0]),
        "product_y": float(products[1]), "square_y": float(squares[1]),
    }  # fmt: skip


def ablation_report(rows: list[Row]) -> Section:
    identity, moved = _of_kind(rows, "identity"), _of_kind(rows, "motion")
    drift = "√(mean_k ‖v_k − v̄‖²) of the thing's identity v (colour, pattern, size) over a clip's frames"
    slope = "Σ requested · measured ÷ Σ requested² of the picture's displacement since frame 0"
    strengths = ", ".join(f"{strength:g}" for strength in STRENGTHS)
    figures = {
        "identity_drift_ratio": _ratio(
            identity, "no_attention", "method", "clips",
            f"mean drift without cross-frame attention ÷ with it, motion dynamics in both; drift: {drift}", "≥ 3",
        ),
        "identity_drift_ratio_no_motion": _ratio(
            identity, "neither", "no_motion", "clips", "the same ratio where every frame starts from noise of its own"
        ),
    }  # fmt: skip
    for arm, name in _ARM_NAMES.items():
        figures[f"identity_drift_{arm}"] = _mean(identity, arm, "clips", f"mean drift, {name}")
        figures[f"identity_lost_{arm}"] = share(
            _known(identity, f"{arm}_lost"), "clips", f"share of frames in which no thing can be read, {name}"
        )
    figures["motion_slope"] = _ratio(
        moved, "nearest_product", "nearest_square", "prompts",
        f"{slope}; x and y, δ = {strengths} px of 512, t0, t1 at 0.4, 0.5 of the steps, warp nearest (the paper's)",
        "0.85–1.15",
    )  # fmt: skip
    for axis in ("x", "y"):
        figures[f"motion_slope_{axis}"] = _ratio(
            moved, f"nearest_product_{axis}", f"nearest_square_{axis}", "prompts", f"along {axis} alone"
        )
    figures["motion_slope_subpixel"] = _ratio(
        moved, "subpixel_product", "subpixel_square", "prompts", "warp subpixel", "0.85–1.15"
    )
    figures["motion_slope_paper_t0_t1"] = _ratio(
        moved, "paper_product", "paper_square", "prompts", f"the paper's t0 and t1, δ = {STRENGTHS[-1]:g}"
    )
    figures["motion_slope_off"] = _ratio(
        moved,
        "still_product",
        "still_square",
        "prompts",
        f"without motion dynamics, against δ = {STRENGTHS[-1]:g}",
        "≈ 0",
    )
    names = {"nearest": "warp nearest", "subpixel": "warp subpixel", "paper": "the paper's t0 and t1",
               "still": "without motion dynamics"}  # fmt: skip
    for name, called in names.items():
        figures[f"motion_jitter_px_{name}"] = _mean(
            moved, f"{name}_jitter", "prompts", f"RMS distance from even motion, {called}"
        )
    return Section("The paper's ablation: attention keeps identity, latents move", figures, _strips(rows, 2))


# --- control ---------------------------------------------------------------------------------------------------------

CONTROL_FRAMES = 4


def control_cases(scale: float) -> list[Case]:
    return _cases(3, scale, edge=40, depth=40, pose=40)


def control_case(studio: Studio, case: Case) -> Row:
    """A clip under one condition; what is compared with the condition of another clip, too, must be worse there."""
    rng = case.rng
    subject: dict[str, Any] = {"subject": "person", "count": 1} if case.kind == "pose" else {}
    clip, other = (world.moving(rng, CONTROL_FRAMES, scene=world.sample(rng, **subject)) for _ in range(2))
    prompt = world.caption(clip.scenes[0], rng)
    condition = conditions_of(case.kind, clip)
    frames = studio.render(prompt, case.seed, CONTROL_FRAMES, conditions={case.kind: condition}).frames
    again = studio.through_vae(clip.frames)

    def judged(pictures: Frames, truth: world.Motion) -> float | None:
        return _CONTROL[case.kind](studio, pictures, truth, case.rng)

    row = {
        "score": judged(frames, clip),
        "unrelated": judged(frames, other),
        "drawn": judged(clip.frames, clip),
        "drawn_vae": judged(again, clip),
    }
    told = f"{case.kind}, “{prompt}”: {_told(row['score'])}"
    return row | {"strips": [Strip(told, np.concatenate([condition, frames]))]}


def conditions_of(name: str, clip: world.Motion) -> Frames:
    """The condition frames of a drawn clip, exact, as the pipeline draws them: uint8 (F, H, W, 3)."""
    import cv2

    from t2vz.conditions.depth import render
    from t2vz.conditions.skeleton import draw_skeleton

    if name == "edge":
        return np.stack([cv2.Canny(frame, 100, 200) for frame in clip.frames])[..., None].repeat(3, -1)
    if name == "depth":
        depth = np.stack([world.depth(scene) for scene in clip.scenes]).astype(np.float32)
        return render(depth, *depth.shape[1:])
    return np.stack([draw_skeleton(_scored(_joints(scene)), SIZE_PX, SIZE_PX) for scene in clip.scenes])


def _joints(scene: Scene) -> NDArray[np.float32]:
    joints = world.joints(scene)
    assert joints is not None
    return joints


def _scored(joints: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([joints, np.ones((len(joints), 1), np.float32)], 1)


def _edges(studio: Studio, frames: Frames, clip: world.Motion, rng: np.random.Generator) -> float | None:
    import cv2

    def agrees(frame: world.Frame, wanted: world.Frame) -> float:
        return edge_f1(cv2.Canny(frame, 100, 200) > 0, wanted[..., 0] > 0)

    return measures.mean_over(agrees, frames, conditions_of("edge", clip))


def _depth(studio: Studio, frames: Frames, clip: world.Motion, rng: np.random.Generator) -> float | None:
    depths = [world.depth(scene) for scene in clip.scenes]
    return measures.mean_over(lambda frame, depth: measures.depth_order(frame, depth, rng), frames, depths)


def _pose(studio: Studio, frames: Frames, clip: world.Motion, rng: np.random.Generator) -> float | None:
    from t2vz.conditions.pose import detect_persons, estimate, openpose_from_coco

    options = _pose_options(studio)
    people = estimate(frames, detect_persons(frames, options), options)
    found = [openpose_from_coco(person)[-1, :, :2] if len(person) else None for person in people]
    return measures.mean_over(measures.pck, found, map(_joints, clip.scenes))


def _pose_options(studio: Studio) -> Any:
    from t2vz.conditions import ConditionOptions

    family = studio.family
    return ConditionOptions(family.depth, family.pose, family.detector, family.annotators, device=studio.device)


_CONTROL: dict[str, Callable[[Studio, Frames, world.Motion, np.random.Generator], float | None]] = {
    "edge": _edges,
    "depth": _depth,
    "pose": _pose,
}


def control_report(rows: list[Row]) -> Section:
    meanings = {
        "edge": ("edge_f1", "F1 of the frames' Canny edges and the condition's, found again within 1.5 px", "≥ 0.6"),
        "depth": ("depth_order", "share of pairs of points on a row whose order in depth is the condition's", "≥ 0.9"),
        "pose": ("pose_pck", "share of joints within 10 % of the body's size, by the family's estimator", "≥ 0.8"),
    }
    figures = {}
    for kind, (name, meaning, bar) in meanings.items():
        own = _of_kind(rows, kind)
        make = _mean if kind == "edge" else lambda rows, key, *rest: share(_known(rows, key), *rest)
        figures[name] = make(own, "score", "clips", meaning, bar)
        figures[f"{name}_unrelated"] = make(own, "unrelated", "clips", "control: against another clip's condition")
        figures[f"{name}_drawn"] = make(own, "drawn", "clips", "ceiling: the drawn clip itself")
        figures[f"{name}_drawn_vae"] = make(own, "drawn_vae", "clips", "ceiling: the drawn clip through the VAE")
    return Section("Control: do the frames follow edges, depth and pose?", figures, _strips(rows))


# --- edits -----------------------------------------------------------------------------------------------------------

EDIT_FRAMES = 6
_EDITS = ("colour", "pattern", "subject", "background", "time")


def edit_cases(scale: float) -> list[Case]:
    return _cases(4, scale, **dict.fromkeys(_EDITS, 12))


def edit_case(studio: Studio, case: Case) -> Row:
    edit, source, target = drawn_edit(case)
    arms = {
        name: studio.render(
            edit.instruction, case.seed, EDIT_FRAMES, source=source.frames, cross_frame_attention=name == "with"
        ).frames
        for name in ("with", "without")
    }

    def success(frames: Frames) -> float:
        return float(np.mean([measures.carried_out(f, edit, s) for f, s in zip(frames, target.scenes, strict=True)]))

    def kept(frames: Frames) -> float | None:
        return measures.mean_over(measures.kept_psnr, frames, source.frames, target.frames)

    row: Row = {}
    for name, frames in arms.items():
        row |= {f"success_{name}": success(frames), f"psnr_{name}": kept(frames)}
        row[f"warp_{name}"] = measures.flow_error(frames, source)
    again = studio.through_vae(source.frames)
    row |= {
        "nothing_done": success(source.frames),
        "drawn": success(target.frames),
        "drawn_vae": success(studio.through_vae(target.frames)),
        "psnr_vae": kept(again),
        "warp_source": measures.flow_error(source.frames, source),
        "warp_vae": measures.flow_error(again, source),
    }
    told = f"“{edit.instruction}” {'✓' if row['success_with'] == 1 else '✗'}"
    return row | {
        "strips": [Strip(f"source; {told}", np.concatenate([source.frames, arms["with"]]))],
    }


def drawn_edit(case: Case) -> tuple[world.Edit, world.Motion, world.Motion]:
    """An edit, and the same motion of its source and of its target."""
    rng = case.rng
    edit = world.edit_pair(rng, case.kind)
    motion: dict[str, Any] = {
        "velocity_px": (float(rng.uniform(-1.5, 1.5)), 0.0),
        "pan_px": (float(rng.uniform(-1.5, 1.5)), 0.0) if rng.random() < 0.5 else (0.0, 0.0),
        "growth": float(rng.uniform(0.99, 1.01)),
    }
    source, target = (world.moving(rng, EDIT_FRAMES, scene=scene, **motion) for scene in (edit.source, edit.target))
    return edit, source, target


def edit_report(rows: list[Row]) -> Section:
    def of(name: str, meaning: str, bar: str = "") -> Figure:
        return share(_known(rows, name), "clips", meaning, bar)

    def mean(name: str, meaning: str, bar: str = "") -> Figure:
        return _mean(rows, name, "clips", meaning, bar)

    error = "mean squared difference, levels as 0–1, of neighbouring frames along the source's known flow"
    figures = {
        "edit_success": of(
            "success_with", "share of frames that show what the instruction asks for, read by rules", "≥ 0.85"
        ),
        **{
            f"edit_success_{kind}": share(_known(_of_kind(rows, kind), "success_with"), "clips", f"… edits of {kind}")
            for kind in _EDITS
        },
        "edit_success_frame_by_frame": of("success_without", "without cross-frame attention"),
        "edit_success_nothing_done": of("nothing_done", "control: the source itself"),
        "edit_success_drawn": of("drawn", "ceiling: the drawn target"),
        "edit_success_drawn_vae": of("drawn_vae", "ceiling: the drawn target through the VAE"),
        "edit_psnr_db": mean(
            "psnr_with", "PSNR of what should not change (see `kept_psnr`) against the source", "≥ 22"
        ),
        "edit_psnr_db_vae": mean("psnr_vae", "ceiling: the source through the VAE"),
        "warp_error": mean("warp_with", error, "< frame by frame"),
        "warp_error_frame_by_frame": mean(
            "warp_without", "without cross-frame attention; the frames still share their initial noise"
        ),
        "warp_error_ratio": _ratio(rows, "warp_with", "warp_without", "clips", "with ÷ without", "< 1"),
        "warp_error_source_vae": mean("warp_vae", "floor: the source through the VAE"),
        "warp_error_source": mean("warp_source", "floor: the source itself"),
    }
    return Section("Edits: carried out, and nothing else changed?", figures, _strips(rows, 2))


# --- long clips ------------------------------------------------------------------------------------------------------

LONG_FRAMES, LONG_CHUNK = 104, 8
# Slow, and turning back before things leave the picture. Sub-pixel, as whole cells would step at a rhythm of their own.
_LONG: dict[str, Any] = {
    "motion_field_strength_x": 5.0, "motion_field_strength_y": 1.0, "motion_bound": 0.12, "warp": "subpixel",
    "chunk_size": LONG_CHUNK,
}  # fmt: skip


def long_cases(scale: float) -> list[Case]:
    return _cases(5, scale, clip=6)


def long_case(studio: Studio, case: Case) -> Row:
    prompt = open_prompt(case)
    clip = studio.render(prompt, case.seed, LONG_FRAMES, **_LONG).frames
    meter = Meter(chunk_size=LONG_CHUNK)
    meter.add(clip)
    errors = meter.warp_errors
    identities = [measures.read.identity(frame) for frame in clip]
    first = next((vector for vector in identities if vector is not None), None)
    away = [None if vector is None or first is None else float(np.linalg.norm(vector - first)) for vector in identities]
    known = [(t, value) for t, value in enumerate(away) if value is not None]
    times, values = np.array(known).T if known else (np.zeros(0), np.zeros(0))
    shown = clip[:: max(1, len(clip) // 13)]
    return {
        **_seam_sums(errors),
        "warp_error": meter.values().get("warp_error"),
        "flicker": meter.values()["flicker"],
        "colour_drift": meter.values()["colour_drift"],
        "away": away,
        "drift_per_100": float(100 * np.polyfit(times, values, 1)[0]) if len(times) > 2 else None,
        "lost": 1 - len(known) / len(clip),
        "strips": [Strip(f"“{prompt}”: every {max(1, len(clip) // 13)}th of {len(clip)} frames", shown)],
    }


def _seam_sums(errors: list[float | None]) -> Row:
    """The seam ratio for borders where they are, and were they elsewhere."""
    ratios = [seam_ratio(errors, LONG_CHUNK, offset) for offset in range(LONG_CHUNK)]
    return {"seam": ratios[0], "elsewhere": ratios[1:]}


def long_report(rows: list[Row]) -> Section:
    elsewhere = [ratio for row in rows for ratio in row["elsewhere"] if ratio is not None]
    figures = {
        "seam_ratio": _mean(
            rows, "seam", "clips",
            f"mean warp error at the borders of the chunks of {LONG_CHUNK} ÷ inside, optical flow", "≤ 1.05",
        ),
        "seam_ratio_elsewhere": replace(
            statistic([[ratio] for ratio in elsewhere], "phases",
                      "control: the same with borders assumed at the seven other places; the range is of single clips"),
            low=min(elsewhere, default=None), high=max(elsewhere, default=None),
        ),
        "long_identity_drift_per_100": _mean(
            rows, "drift_per_100", "clips", "slope of the identity's distance from the first frame's, a 100 frames"
        ),
        "long_identity_lost": share(_known(rows, "lost"), "clips", "share of frames in which no thing can be read"),
        "long_colour_drift": _mean(rows, "colour_drift", "clips", "ΔE of the mean colour, first to last frame"),
        "long_warp_error": _mean(rows, "warp_error", "clips", "optical flow"),
        "long_flicker": _mean(rows, "flicker", "clips", "levels, see `t2vz.quality`"),
    }  # fmt: skip
    return Section("Long clips: seams, and drift over time", figures, _strips(rows), plot=_drift_plot(rows))


def _drift_plot(rows: list[Row]) -> bytes:
    figure, axis = _axis(7, 2.6)
    for row in rows:
        axis.plot([math.nan if value is None else value for value in row["away"]], lw=0.8)
    axis.set_xlabel("frame")
    axis.set_ylabel("identity's distance\nfrom the first frame")
    return _png(figure)


# --- lossy options ---------------------------------------------------------------------------------------------------

LOSSY: dict[str, dict[str, Any]] = {
    f"ddim {STEPS}": {},
    "ddim 10": {"num_inference_steps": 10},
    "ddim 5": {"num_inference_steps": 5},
    "euler 10": {"scheduler": "euler", "num_inference_steps": 10},
    "dpmpp_2m 10": {"scheduler": "dpmpp_2m", "num_inference_steps": 10},
    "dpmpp_2m 5": {"scheduler": "dpmpp_2m", "num_inference_steps": 5},
    "unipc 10": {"scheduler": "unipc", "num_inference_steps": 10},
    "unipc 5": {"scheduler": "unipc", "num_inference_steps": 5},
    "merge 25 %": {"token_merging_ratio": 0.25},
    "merge 50 %": {"token_merging_ratio": 0.5},
    "merge 75 %": {"token_merging_ratio": 0.75},
    "guidance to 75 %": {"guidance_end": 0.75},
    "guidance to 50 %": {"guidance_end": 0.5},
    "guidance to 25 %": {"guidance_end": 0.25},
    "anchor first_previous": {"attention_anchor": "first_previous"},
}


def lossy_cases(scale: float) -> list[Case]:
    return _cases(6, scale, prompt=20)


def lossy_case(studio: Studio, case: Case) -> Row:
    """One prompt in all ways, one after the other: so what else the machine does hits all alike."""
    prompt, words = text_prompt(case)
    studio.render(prompt, case.seed, 1, num_inference_steps=3)  # the first call of a process is slow
    row: Row = {}
    reference, strips = None, []
    for name, columns in LOSSY.items():
        made = studio.render(prompt, case.seed, TEXT_FRAMES, **columns)
        reference = made.frames if reference is None else reference
        error = np.square(made.frames.astype(np.float64) - reference).mean()
        meter = Meter()
        meter.add(made.frames)
        row[name] = {
            "alignment": float(np.mean([all(measures.shows(frame, *words)) for frame in made.frames])),
            "drift": measures.identity_drift(made.frames)[0],
            "warp_error": meter.values().get("warp_error"),
            "psnr": float(10 * np.log10(255**2 / max(error, 1e-3))),
            "evaluations": made.evaluations,
            "cpu_s": made.cpu_s,
        }
        strips.append(Strip(f"“{prompt}”, {name}", made.frames))
    return {"options": row, "strips": strips}


def lossy_report(rows: list[Row]) -> Section:
    table, figures = [], {}
    for name in LOSSY:
        of = [row["options"][name] for row in rows]
        aligned = share(_known(of, "alignment"), "prompts", f"as text_alignment, with {name}")
        figures[f"lossy_alignment [{name}]"] = aligned
        cost = float(np.median([each["cpu_s"] for each in of]))
        table.append(
            {
                "option": name,
                "UNet evaluations": of[0]["evaluations"],
                "CPU s a clip": cost,
                "aligned": aligned.value,
                "identity drift": _mean(of, "drift", "", "").value,
                "warp error": _mean(of, "warp_error", "", "").value,
                "PSNR to the first, dB": _mean(of, "psnr", "", "").value,
            }
        )
    return Section(
        "Lossy options: quality against cost",
        figures,
        _strips(rows, 1),
        table,
        _cost_plot(table, figures),
    )


def _cost_plot(table: list[dict[str, Any]], figures: dict[str, Figure]) -> bytes:
    figure, axis = _axis(8, 4.2)
    for row, found in zip(table, figures.values(), strict=True):
        x, y = row["CPU s a clip"], row["aligned"]
        axis.errorbar(x, y, [[y - (found.low or 0)], [(found.high or 0) - y]], fmt="o", ms=4, lw=0.6, capsize=2)
        axis.annotate(row["option"], (x, y), textcoords="offset points", xytext=(5, 3), fontsize=7)
    axis.set_xlabel(f"CPU seconds a clip of {TEXT_FRAMES} frames (median)")
    axis.set_ylabel("text alignment (95 %)")
    axis.set_xlim(left=0)
    axis.set_ylim(0, 1.02)
    return _png(figure)


# --- the whole -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    cases: Callable[[float], list[Case]]
    run: Callable[[Studio, Case], Row]
    report: Callable[[list[Row]], Section]


PARTS: dict[str, Part] = {
    "text": Part(text_cases, text_case, text_report),
    "ablation": Part(ablation_cases, ablation_case, ablation_report),
    "control": Part(control_cases, control_case, control_report),
    "edit": Part(edit_cases, edit_case, edit_report),
    "long": Part(long_cases, long_case, long_report),
    "lossy": Part(lossy_cases, lossy_case, lossy_report),
}

OnCase = Callable[[str, int, int], None]


def evaluate(
    out: Path,
    *,
    scale: float = 1.0,
    parts: Sequence[str] = (),
    family: Family = MINI,
    device: str = "cpu",
    steps: int = STEPS,
    workers: int | None = None,
    on_case: OnCase = lambda part, done, total: None,
) -> dict[str, Any]:
    """Run the suite, write out/eval.json and out/eval.html; the figures of `KEYS` by name, None where not run.

    scale: part of the cases that is run, one of each kind at least. steps: of denoising, where a part doesn't vary
    them; fewer than the usual number are for trying the suite itself. parts: names of `PARTS`; all if empty.
    workers: processes, each on one core; on a GPU one. on_case: told after each case.
    Raises ModelError and its kinds, OutOfDeviceMemory, InvalidFrames, OutputError.
    """
    from t2vz.errors import translating
    from t2vz.mini import page

    if workers is None:
        workers = 1 if device.startswith("cuda") else os.cpu_count() or 1
    with translating("eval", str(out)):
        out.mkdir(parents=True, exist_ok=True)
    studio, sections, seconds = Studio(family, device, steps), {}, {}
    with _workers(workers) as pool:
        for name in parts or PARTS:
            began = time.monotonic()
            sections[name] = PARTS[name].report(_run(name, studio, scale, pool, on_case))
            seconds[name] = time.monotonic() - began
    figures = {name: figure for section in sections.values() for name, figure in section.figures.items()}
    about = _about(studio, scale)
    report = {
        **about,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "figures": {name: asdict(figure) for name, figure in figures.items()},
        "tables": {name: section.table for name, section in sections.items() if section.table},
    }
    with translating("eval", str(out)):
        (out / "eval.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
        (out / "eval.html").write_text(page.html(sections, about), encoding="utf-8")
    return {key: figures[key].value if key in figures else None for key in KEYS}


Pool = ProcessPoolExecutor | None


@contextmanager
def _workers(number: int) -> Iterator[Pool]:
    """A pool of processes; None for one, which is this one."""
    if number == 1:
        yield None
        return
    # Fresh processes: torch's threads don't survive a fork.
    pool = ProcessPoolExecutor(number, mp_context=get_context("spawn"), initializer=_one_core)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _run(name: str, studio: Studio, scale: float, pool: Pool, on_case: OnCase) -> list[Row]:
    cases = PARTS[name].cases(scale)
    pending = [] if pool is None else [pool.submit(_row, name, studio, case) for case in cases]
    rows: list[Row] = []
    on_case(name, 0, len(cases))
    for row in (future.result() for future in pending) if pool else (_row(name, studio, case) for case in cases):
        rows.append(row)
        on_case(name, len(rows), len(cases))
    return rows


def _row(name: str, studio: Studio, case: Case) -> Row:
    row = PARTS[name].run(studio, case) | {"kind": case.kind}
    if case.index >= _SHOWN:
        row["strips"] = []
    return row


def _one_core() -> None:
    import warnings

    import cv2
    import torch

    warnings.simplefilter("ignore")  # of libraries, to their developers
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _strips(rows: Sequence[Row], shown: int = _SHOWN) -> list[Strip]:
    """The strips of the first cases of each kind."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return [strip for kind in kinds for row in _of_kind(rows, kind)[:shown] for strip in row["strips"]]


def _about(studio: Studio, scale: float) -> dict[str, Any]:
    from importlib.metadata import version

    from t2vz.models.table import revision

    return {
        "t2vz": version("t2vz"),
        "torch": version("torch"),
        "model": f"{studio.family.text_to_image} ({revision(studio.family.text_to_image)})",
        "edit_model": f"{studio.family.edit} ({revision(studio.family.edit)})",
        "steps": studio.steps,
        "scale": scale,
        "device": studio.device,
    }


def family_in(folder: Path) -> Family:
    """The family in a folder laid out as `t2vz.mini.train` leaves it."""
    names = {"edge": "controlnet-edge", "depth": "controlnet-depth", "pose": "controlnet-pose"}
    return Family(
        text_to_image=str(folder / "base"),
        edit=str(folder / "edit"),
        controlnets={condition: str(folder / name) for condition, name in names.items()},
        depth=str(folder / "depth"),
        pose=str(folder / "pose"),
        detector=str(folder / "detector"),
    )


def _told(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _axis(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing((width, height), layout="constrained")
    return drawing, drawing.add_subplot()


def _png(drawing: Any) -> bytes:
    stream = io.BytesIO()
    drawing.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
