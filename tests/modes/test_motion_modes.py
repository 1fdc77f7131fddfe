"""Text mode's motions, its ablation and background smoothing: what they mean, cost and never change."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from t2vz.engine import motion, noise, vae
from t2vz.errors import GenerationError
from t2vz.models import loading
from t2vz.modes import Request, generate, text
from t2vz.spec import JobSpec, evaluations, smoothing_evaluations

SEED = 5
PROMPT = "a red ball on the grass"
FRAMES, SIDE_PX = 4, 64
CELLS = SIDE_PX // 8
MASKS = np.zeros((FRAMES, SIDE_PX, SIDE_PX), bool)
for _frame in range(FRAMES):  # something that moves to the right, a cell a frame
    MASKS[_frame, 16:40, 8 * _frame + 4 : 8 * _frame + 34] = True
SMOOTHED = {"background_smoothing": 0.4, "pan_x_per_s": 0.5}


def segment(frames):
    """The quarters of a frame that are brighter than all of it. (Single pixels might change sides by rounding.)"""
    half = SIDE_PX // 2
    quarters = frames.reshape(len(frames), 2, half, 2, half, 3).mean((2, 4, 5))
    bright = quarters > quarters.mean((1, 2), keepdims=True)
    return bright.repeat(half, axis=1).repeat(half, axis=2)


# name → (columns, further fields of the request)
OPTIONS = {
    "camera": ({"pan_x_per_s": 0.4, "zoom_per_s": 1.5, "rotation_deg_per_s": -20, "warp": "subpixel"}, {}),
    "path": ({"camera_path": "0: 0 0 1 0; 0.5: 0.2 0.1 0.7 10", "motion_bound": 0.15}, {}),
    "ablation": ({"motion_dynamics": False}, {}),
    "mask video": (SMOOTHED | {"foreground_mask": "masks.mp4"}, {"masks": MASKS}),
    "attention": (SMOOTHED | {"foreground_mask": "attention", "foreground": "red ball"}, {}),
    "segmentation": (
        SMOOTHED | {"foreground_mask": "segmentation", "segmentation_model": "unused"},
        {"segment": segment},
    ),
}


def make(model, columns=None, fields=None, **more):
    spec = JobSpec(prompt=PROMPT, model=str(model), num_inference_steps=6, **{**(columns or {}), **more})
    return loading.load(spec, "cpu"), Request(spec, SEED, SIDE_PX, SIDE_PX, FRAMES, **(fields or {}))


def latents_at_t1(components, request):
    """The latents that the lockstep of all frames starts from, as the UNet sees them (F, C, h, w)."""
    seen = []

    def look(module, args):
        if len(args[0]) == FRAMES:
            seen.append(args[0].clone())

    hook = components.unet.register_forward_pre_hook(look)
    try:
        generate(components, request)
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_independent_of_chunks_and_processes(tiny_model, option):
    components, request = make(tiny_model, *OPTIONS[option])
    whole = generate(components, request)
    assert whole.evaluations == evaluations(request.spec, FRAMES)
    assert whole.latents[1:].sub(whole.latents[:1]).abs().amax((1, 2, 3)).min() > 0.1  # no two frames alike
    for chunk in (3, 2, 1):
        components, request = make(tiny_model, *OPTIONS[option], chunk_size=chunk)
        made = generate(components, request)
        assert made.evaluations == whole.evaluations
        torch.testing.assert_close(made.latents, whole.latents, atol=1e-4, rtol=0)
    for part in ((0, 4), (2, 3)):  # the anchor alone, and with the last two
        made = generate(components, replace(request, part=part))
        torch.testing.assert_close(made.latents, whole.latents[list(made.indices)], atol=1e-4, rtol=0)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("option", OPTIONS)
def test_a_killed_clip_goes_on_in_the_same_bits(tiny_model, option):
    components, request = make(tiny_model, *OPTIONS[option])
    whole = generate(components, request)
    taken = []

    def kill(take):
        taken.append(take())
        if len(taken) == 2:
            raise Killed

    with pytest.raises(Killed):
        generate(components, replace(request, on_snapshot=kill))
    resumed = generate(components, replace(request, start=taken[-1]))
    assert torch.equal(resumed.latents, whole.latents)
    # What is done, and the look at the foreground, isn't done again.
    assert resumed.evaluations == whole.evaluations - 2 * FRAMES - smoothing_evaluations(request.spec, FRAMES)


def test_a_steady_pan_of_as_many_pixels_is_the_papers_motion(tiny_model):
    """12 px of 512 a frame are 12 / 512 · fps shorter sides a second."""
    fps = Fraction(15)
    components, papers = make(tiny_model, fields={"fps": fps})
    rate = float(12 * fps / 512)
    _, panned = make(tiny_model, {"pan_x_per_s": rate, "pan_y_per_s": rate, "motion_bound": 10}, {"fps": fps})
    assert torch.equal(generate(components, panned).latents, generate(components, papers).latents)


def test_columns_become_poses(tiny_model):
    _, request = make(tiny_model, {"zoom_per_s": 4, "motion_bound": 2}, {"fps": Fraction(2)})
    poses = text.camera_path(request, range(1, 40), (16, 32))
    assert poses[0].tolist() == pytest.approx([0, 0, np.log(2), 0])
    assert poses[:, 2].abs().max() < np.log(4)  # unbounded it would be 4^19
    _, request = make(tiny_model, {"camera_path": "1: 0.5 0 1 90"}, {"fps": Fraction(2)})
    assert text.camera_path(request, [1, 3], (16, 32)).tolist() == [
        pytest.approx([4, 0, 0, np.pi / 4]),
        pytest.approx([8, 0, 0, np.pi / 2]),
    ]


def test_the_ablation_without_cross_frame_attention_makes_diffusers_pictures(tiny_model):
    components, request = make(tiny_model, motion_dynamics=False, cross_frame_attention=False)
    made = generate(components, request).latents
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    start = noise.draw(SEED, "initial", range(FRAMES), (4, CELLS, CELLS))
    theirs = pipeline(
        [PROMPT] * FRAMES,
        width=SIDE_PX,
        height=SIDE_PX,
        num_inference_steps=6,
        latents=start,
        output_type="latent",
    ).images
    torch.testing.assert_close(made, theirs, atol=1e-4, rtol=0)


def test_smoothing_is_eq_10_at_t1(tiny_model):
    columns, fields = OPTIONS["mask video"]
    # Without guidance a batch of the UNet is one of frames; with t1 below the last step the anchor goes a way to T1.
    levels = {"guidance_scale": 1, "t0": 2, "t1": 3, "warp": "subpixel"}
    components, request = make(tiny_model, columns, fields, **levels)
    plain = {"pan_x_per_s": columns["pan_x_per_s"]}
    own = latents_at_t1(*make(tiny_model, plain, **levels))[0]
    poses = motion.steady_path((0.5, 0), 1, 0, [k / 4 for k in range(FRAMES)], (CELLS, CELLS))
    expected = 0.4 * own + 0.6 * motion.warp(own[0], poses, "subpixel")
    for frame in range(1, FRAMES):
        inside = (frame, slice(None), slice(2, 5), slice(frame, frame + 5))  # cells that the mask touches
        expected[inside] = own[inside]
    expected[0] = own[0]  # the anchor is what the others are smoothed with
    torch.testing.assert_close(latents_at_t1(components, request)[0], expected, atol=1e-5, rtol=0)


def test_a_mask_of_everything_or_a_weight_of_1_smooths_nothing(tiny_model):
    columns, _ = OPTIONS["mask video"]
    components, request = make(tiny_model, {"pan_x_per_s": 0.5})
    unsmoothed = generate(components, request).latents
    full = generate(*make(tiny_model, columns, {"masks": np.ones_like(MASKS)}))
    assert torch.equal(full.latents, unsmoothed)
    assert "covers all" in full.warnings[-1]
    own = generate(*make(tiny_model, columns, {"masks": MASKS}, background_smoothing=1))
    torch.testing.assert_close(own.latents, unsmoothed)
    empty = generate(*make(tiny_model, columns, {"masks": np.zeros_like(MASKS)}))
    assert "empty" in empty.warnings[-1]
    assert not torch.allclose(empty.latents, unsmoothed, atol=0.1)


def test_segmentation_sees_the_finished_frames_of_a_first_pass(tiny_model):
    shown = []

    def look(frames):
        shown.append(frames)
        return segment(frames)

    columns, _ = OPTIONS["segmentation"]
    components, request = make(tiny_model, columns, {"segment": look})
    made = generate(components, request).latents
    first_pass = generate(*make(tiny_model, {"pan_x_per_s": 0.5})).latents
    pictures = np.concatenate(list(vae.decode(components.vae, first_pass[1:])))
    assert np.array_equal(np.concatenate(shown), pictures)
    given = {"masks": np.concatenate([MASKS[:1], segment(pictures)])}
    assert torch.equal(generate(*make(tiny_model, OPTIONS["mask video"][0], given)).latents, made)


def test_the_attended_foreground_moves_with_the_picture(tiny_model):
    columns, _ = OPTIONS["attention"]
    # A cell a frame, and nothing of a background's own: what is not the warped anchor is foreground.
    columns = columns | {"background_smoothing": 0, "pan_x_per_s": 4 / CELLS, "guidance_scale": 1, "warp": "subpixel"}
    components, request = make(tiny_model, columns)
    seen = latents_at_t1(components, request)[0]
    poses = text.camera_path(request, range(1, FRAMES), (CELLS, CELLS))
    foreground = ((seen[1:] - motion.warp(seen[0], poses, "subpixel")).abs() > 1e-4).any(1)
    assert 0 < foreground[0].float().mean() < 1
    for before, after in itertools.pairwise(foreground):
        assert torch.equal(after[:, :-1], before[:, 1:])


def test_the_foregrounds_words_are_found_among_the_tokens(tiny_model):
    def tokens(prompt, foreground):
        spec = JobSpec(
            prompt=prompt,
            foreground=foreground,
            background_smoothing=0.4,
            foreground_mask="attention",
            model=str(tiny_model),
        )
        components, request = make(tiny_model)
        components = replace(components, tokenizer=copy.deepcopy(components.tokenizer))
        components.tokenizer.add_tokens(["<toy>", "<toy>_1"])  # as a textual inversion of two vectors has it
        found = text._foreground_tokens(components, replace(request, spec=spec), 77)
        ids = components.tokenizer(prompt.replace("<toy>", "<toy> <toy>_1")).input_ids
        pieces = components.tokenizer.convert_ids_to_tokens([ids[i] for i in found])
        return "".join(pieces).replace("</w>", " ").split()

    assert tokens(PROMPT, "red ball") == ["red", "ball"]
    assert tokens("a Ball, a ball and a dog", "ball") == ["ball", "ball"]
    assert tokens("a zebra at night", "zebra") == ["zebra"]  # a token a letter in this vocabulary
    assert tokens("a <toy> at night", "<toy>") == ["<toy><toy>_1"]
    assert tokens(PROMPT, None) == PROMPT.split()
    with pytest.raises(GenerationError, match="whole words"):
        tokens(PROMPT, "ras")
    with pytest.raises(GenerationError, match="first 75 tokens"):
        tokens("grass " * 75 + "ball", "ball")
