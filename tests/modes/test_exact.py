"""The modes against diffusers' own pipelines, with the same noise: equal to rounding, at every chunk size."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    TextToVideoZeroPipeline,
)
from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero import (
    CrossFrameAttnProcessor2_0,
)
from reference import Corrected, initial, quiet

from t2vz.engine import noise, schedule, vae
from t2vz.engine.lockstep import Snapshot
from t2vz.errors import OutOfDeviceMemory
from t2vz.models import loading
from t2vz.modes import Request, generate
from t2vz.spec import JobSpec, evaluations, t0_t1

SEED = 11
PROMPT = "a red ball on the grass"


class CorrectedPipeline(Corrected, TextToVideoZeroPipeline):
    seed = SEED


@functools.cache
def text_reference(model, width, height, frames, steps, scale, t0, t1):
    base = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline = quiet(
        CorrectedPipeline(base.vae, base.text_encoder, base.tokenizer, base.unet, base.scheduler, None, None, False)
    )
    # Their field is 512 by 512 whatever the size; ours is in true pixels.
    short = min(width, height)
    return pipeline(
        PROMPT,
        negative_prompt="blue",
        video_length=frames,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=scale,
        t0=t0,
        t1=t1,
        motion_field_strength_x=12 * short / width,
        motion_field_strength_y=12 * short / height,
        latents=initial(SEED, width, height),
        output_type="latent",
    ).images


def make(model, **columns):
    spec = JobSpec(prompt=PROMPT, model=str(model), **columns)
    return spec, loading.load(spec, "cpu")


@pytest.mark.parametrize("chunk", [8, 5, 2, 1])
@pytest.mark.parametrize(
    ("width", "height", "frames", "steps", "scale", "t0", "t1"),
    [
        (128, 128, 5, 10, 7.5, None, None),
        (128, 64, 3, 20, 3.0, None, None),
        (64, 96, 8, 6, 1.5, 1, 4),
        (64, 64, 2, 50, 7.5, None, None),
    ],
)
def test_text_equals_diffusers(tiny_model, width, height, frames, steps, scale, t0, t1, chunk):
    spec, components = make(
        tiny_model,
        negative_prompt="blue",
        num_inference_steps=steps,
        guidance_scale=scale,
        t0=t0,
        t1=t1,
        chunk_size=chunk,
    )
    made = generate(components, Request(spec, SEED, width, height, frames))
    theirs = text_reference(tiny_model, width, height, frames, steps, scale, *t0_t1(spec))
    assert theirs.std() > 1
    assert (made.latents - theirs).abs().max() <= 1e-4
    assert made.evaluations == evaluations(spec, frames)


def test_text_of_a_model_that_predicts_v_equals_diffusers(tiny_model, tmp_path):
    """As Stable Diffusion 2's 768 px models do."""
    model = tmp_path / "v"
    shutil.copytree(tiny_model, model)
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    spec, components = make(model, negative_prompt="blue", num_inference_steps=10, chunk_size=2)
    made = generate(components, Request(spec, SEED, 64, 64, 4)).latents
    theirs = text_reference(model, 64, 64, 4, 10, 7.5, *t0_t1(spec))
    assert (made - theirs).abs().max() <= 1e-4
    assert (made - text_reference(tiny_model, 64, 64, 4, 10, 7.5, *t0_t1(spec))).abs().max() > 0.1


def test_the_papers_setting_takes_389_evaluations():
    assert evaluations(JobSpec(prompt="x"), 8) == 389


@pytest.mark.parametrize("chunk", [8, 2, 1])
@pytest.mark.parametrize("scale", [7.5, 1.0])
def test_control_with_two_conditions_equals_diffusers(tiny_model, tiny_controlnets, chunk, scale):
    width, height, frames, steps = 96, 64, 4, 5
    spec, components = make(
        tiny_model,
        mode="control",
        source="unused",
        condition="edge+depth",
        controlnet="+".join(map(str, tiny_controlnets)),
        controlnet_conditioning_scale="0.7+1.2",
        num_inference_steps=steps,
        guidance_scale=scale,
        chunk_size=chunk,
    )
    pictures = np.random.default_rng(0).integers(0, 256, (2, frames, height, width, 3), dtype=np.uint8)
    made = generate(components, Request(spec, SEED, width, height, frames, conditions=tuple(pictures)))

    base = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    controlnets = [ControlNetModel.from_pretrained(folder) for folder in tiny_controlnets]
    pipeline = quiet(
        StableDiffusionControlNetPipeline(
            base.vae, base.text_encoder, base.tokenizer, base.unet, controlnets, base.scheduler, None, None, None, False
        )
    )
    for model in (pipeline.unet, *controlnets):
        model.set_attn_processor(CrossFrameAttnProcessor2_0(batch_size=2 if scale > 1 else 1))
    theirs = pipeline(
        [PROMPT] * frames,
        [torch.from_numpy(p).permute(0, 3, 1, 2) / 255 for p in pictures],
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=scale,
        latents=initial(SEED, width, height).repeat(frames, 1, 1, 1),
        controlnet_conditioning_scale=[0.7, 1.2],
        output_type="latent",
    ).images
    assert (made.latents - theirs).abs().max() <= 1e-4
    assert made.evaluations == steps * frames


@pytest.mark.parametrize("chunk", [8, 2, 1])
def test_edit_equals_diffusers(tiny_edit_model, monkeypatch, chunk):
    width, height, frames, steps = 96, 64, 3, 5
    spec, components = make(
        tiny_edit_model, mode="edit", source="unused", num_inference_steps=steps, guidance_scale=3, chunk_size=chunk
    )
    pictures = np.random.default_rng(1).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    made = generate(components, Request(spec, SEED, width, height, frames, source=pictures))

    pipeline = quiet(StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_edit_model, safety_checker=None))
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.unet.set_attn_processor(CrossFrameAttnProcessor2_0(batch_size=3))
    # Their sampler draws from one stream; hand it ours, step by step.
    step = pipeline.scheduler.step
    counter = iter(range(steps))

    def keyed_step(prediction, t, sample, generator=None, return_dict=True):
        number = next(counter)
        ours = [noise.generator(SEED, "step", frame, number) for frame in range(frames)]
        return step(prediction, t, sample, generator=ours, return_dict=return_dict)

    monkeypatch.setattr(pipeline.scheduler, "step", keyed_step)
    theirs = pipeline(
        [PROMPT] * frames,
        image=torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255,
        num_inference_steps=steps,
        guidance_scale=3,
        latents=initial(SEED, width, height).repeat(frames, 1, 1, 1),
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    assert (made.latents - theirs).abs().max() <= 1e-4
    assert made.evaluations == steps * frames


@pytest.mark.parametrize("scheduler", list(schedule.SCHEDULERS))
@pytest.mark.parametrize("mode", ["text", "control", "edit"])
def test_every_scheduler_in_every_mode_is_independent_of_the_chunks(
    tiny_model, tiny_edit_model, tiny_controlnets, mode, scheduler
):
    frames = 4
    columns = {"mode": mode, "scheduler": scheduler, "num_inference_steps": 6, "guidance_scale": 3}
    pictures = np.random.default_rng(2).integers(0, 256, (frames, 64, 64, 3), dtype=np.uint8)
    inputs = {}
    if mode == "control":
        columns |= {"source": "unused", "condition": "edge", "controlnet": str(tiny_controlnets[0])}
        inputs = {"conditions": (pictures,)}
    elif mode == "edit":
        columns |= {"source": "unused"}
        inputs = {"source": pictures}
    outcomes = []
    for chunk in (frames, 3, 1):
        spec, components = make(tiny_edit_model if mode == "edit" else tiny_model, chunk_size=chunk, **columns)
        made = generate(components, Request(spec, SEED, 64, 64, frames, **inputs))
        assert made.evaluations == evaluations(spec, frames)
        outcomes.append(made.latents)
    scale = outcomes[0].abs().max().clamp(min=1)
    for other in outcomes[1:]:
        assert (other - outcomes[0]).abs().max() / scale <= 1e-4
    pixels = [np.concatenate(list(vae.decode(components.vae, latents))).astype(int) for latents in outcomes]
    for other in pixels[1:]:
        difference = np.abs(other - pixels[0])
        assert difference.max() <= 1
        assert (difference > 0).mean() <= 1e-3


def test_text_noise_levels_agree_between_parametrisations(tiny_model):
    """ᾱ before a step is the same for a scheduler that keeps √ᾱ and one that keeps σ, at the same timestep."""
    _, components = make(tiny_model)
    plain = schedule.make_scheduler("ddim", components.scheduler_config, 50)
    sigma = EulerDiscreteScheduler.from_config(components.scheduler_config)
    sigma.set_timesteps(timesteps=[int(t) for t in plain.timesteps])
    for step in (0, 2, 5, 30):
        assert schedule.alpha_bar(sigma, step) == pytest.approx(schedule.alpha_bar(plain, step), rel=1e-3)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("injected"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_a_chunk_that_does_not_fit_is_halved_and_the_frames_stay_the_same(tiny_model, error):
    frames = 6
    spec, components = make(tiny_model, num_inference_steps=4)
    request = Request(spec, SEED, 64, 64, frames)
    expected = generate(components, request)

    sizes = []

    def small_memory(module, args, kwargs):
        sizes.append(len(args[0]) // 2)
        if sizes[-1] > 2:
            raise error

    hook = components.unet.register_forward_pre_hook(small_memory, with_kwargs=True)
    try:
        made = generate(components, request)
    finally:
        hook.remove()
    assert max(sizes) == frames
    assert (made.latents - expected.latents).abs().max() <= 1e-4
    assert made.evaluations == expected.evaluations


def test_one_frame_that_does_not_fit_says_what_to_do(tiny_model):
    spec, components = make(tiny_model, num_inference_steps=4)

    def no_memory(module, args):
        raise torch.OutOfMemoryError("injected")

    hook = components.unet.register_forward_pre_hook(no_memory)
    try:
        with pytest.raises(OutOfDeviceMemory, match="lower width and height"):
            generate(components, Request(spec, SEED, 64, 64, 3))
    finally:
        hook.remove()
    assert all(type(p).__name__ == "AttnProcessor2_0" for p in components.unet.attn_processors.values())


def test_progress_adds_up_to_the_evaluations(tiny_model):
    counts = []
    spec, components = make(tiny_model, num_inference_steps=5, chunk_size=2)
    made = generate(components, Request(spec, SEED, 64, 64, 3, on_step=counts.append))
    assert sum(counts) == made.evaluations


def test_a_rerun_is_the_same_bit_for_bit(tiny_model):
    spec, components = make(tiny_model, num_inference_steps=5, scheduler="euler_a")
    once, again = (generate(components, Request(spec, SEED, 64, 64, 3)).latents for _ in range(2))
    assert torch.equal(once, again)
    other = generate(components, Request(spec, SEED + 1, 64, 64, 3)).latents
    assert not torch.allclose(once, other, atol=0.1)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("scheduler", list(schedule.SCHEDULERS))
@pytest.mark.parametrize("mode", ["text", "edit"])
@pytest.mark.parametrize("steps_before", [1, 3])
def test_a_killed_denoising_goes_on_in_the_same_bits(
    tiny_model, tiny_edit_model, tmp_path, mode, scheduler, steps_before
):
    pictures = np.random.default_rng(3).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    edits = {"source": "unused", "guidance_scale": 3} if mode == "edit" else {}
    model = tiny_edit_model if mode == "edit" else tiny_model
    spec, components = make(model, mode=mode, num_inference_steps=7, scheduler=scheduler, **edits)
    request = Request(spec, SEED, 64, 64, 3, source=pictures if mode == "edit" else None)
    whole = generate(components, request)

    taken = []

    def kill(take):
        taken.append(take())
        if len(taken) == steps_before:
            torch.save(vars(taken[-1]), tmp_path / "snapshot")
            raise Killed

    with pytest.raises(Killed):
        generate(components, replace(request, on_snapshot=kill))
    saved = Snapshot(**torch.load(tmp_path / "snapshot", weights_only=True))
    resumed = generate(components, replace(request, start=saved))
    assert torch.equal(resumed.latents, whole.latents)
    assert resumed.evaluations == whole.evaluations - steps_before * 3


def test_what_a_condition_shows_matters(tiny_model, tiny_controlnets):
    """Else the comparison with diffusers could not see mixed-up conditions."""
    spec, components = make(
        tiny_model,
        mode="control",
        source="unused",
        condition="edge",
        controlnet=str(tiny_controlnets[0]),
        num_inference_steps=3,
    )
    pictures = np.random.default_rng(4).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    straight, swapped = (
        generate(components, Request(spec, SEED, 64, 64, 3, conditions=(frames,))).latents
        for frames in (pictures, pictures[[0, 2, 1]])
    )
    assert (straight[1] - swapped[1]).abs().max() > 0.1
    torch.testing.assert_close(straight[[0, 2, 1]], swapped, atol=1e-4, rtol=0)
