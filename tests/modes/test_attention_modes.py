"""Anchors, ablations and lossy options, against plain diffusers and against clips rendered apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline

from t2vz.engine import noise
from t2vz.errors import GenerationError
from t2vz.models import loading
from t2vz.modes import Request, generate
from t2vz.spec import JobSpec, evaluations

SEED, SIZE, FRAMES, STEPS = 5, 64, 5, 4
PROMPT = "a red ball on the grass"


def pictures(frames=FRAMES, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, SIZE, SIZE, 3), dtype=np.uint8)


def control(model, controlnet, frames=FRAMES, shown=None, scenes=(0,), **columns):
    columns = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "condition": "edge"} | columns
    spec = JobSpec(prompt=PROMPT, model=str(model), mode="control", source="x", controlnet=str(controlnet), **columns)
    conditions = (pictures() if shown is None else shown,) * len(spec.condition)
    request = Request(spec, SEED, SIZE, SIZE, frames, conditions=conditions, scenes=scenes)
    return generate(loading.load(spec, "cpu"), request)


def reference(model, controlnets, processor, frames=FRAMES, **arguments):
    """diffusers' ControlNet pipeline with the attention processor that `processor()` makes; None leaves its own."""
    base = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    nets = [ControlNetModel.from_pretrained(folder) for folder in controlnets]
    pipeline = StableDiffusionControlNetPipeline(
        base.vae, base.text_encoder, base.tokenizer, base.unet, nets, base.scheduler, None, None, None, False
    )
    pipeline.set_progress_bar_config(disable=True)
    if processor is not None:
        for part in (pipeline.unet, *nets):
            part.set_attn_processor(processor())
    start = noise.draw(SEED, "initial", [0], (4, SIZE // 8, SIZE // 8))
    return pipeline(
        [PROMPT] * frames,
        [torch.from_numpy(pictures()).permute(0, 3, 1, 2) / 255] * len(nets),
        width=SIZE,
        height=SIZE,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        latents=start.repeat(frames, 1, 1, 1),
        controlnet_conditioning_scale=[1.0] * len(nets),
        output_type="latent",
        **arguments,
    ).images


class FirstAndPrevious:
    """Keys and values of the first frame and of the one before, gathered from the whole batch: independent of ours."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        residual = hidden_states
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        key, value = attn.to_k(states), attn.to_v(states)
        if encoder_hidden_states is None:
            n = len(states) // 2
            before = [branch * n + max(0, frame - 1) for branch in range(2) for frame in range(n)]
            first = [branch * n for branch in range(2) for _ in range(n)]
            key, value = (torch.cat([x[first], x[before]], dim=1) for x in (key, value))
        split = [x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (attn.to_q(hidden_states), key, value)]
        out = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        out = attn.to_out[0](out)
        return (out + residual if attn.residual_connection else out) / attn.rescale_output_factor


@pytest.mark.parametrize("chunk", [1, 2, 3, FRAMES])
def test_first_and_previous_equals_a_batch_that_gathers_them(tiny_model, tiny_controlnets, chunk):
    net = tiny_controlnets[0]
    made = control(tiny_model, net, attention_anchor="first_previous", chunk_size=chunk)
    assert (made.latents - reference(tiny_model, [net], FirstAndPrevious)).abs().max() <= 1e-4
    assert made.evaluations == STEPS * FRAMES
    assert (made.latents - control(tiny_model, net).latents).abs().max() > 1e-3


def test_a_chunk_of_first_and_previous_that_does_not_fit_leaves_no_trace(tiny_model, tiny_controlnets):
    net, columns = tiny_controlnets[0], {"attention_anchor": "first_previous", "chunk_size": 2}
    expected = control(tiny_model, net, **columns)
    unet = loading.load(JobSpec(prompt="x", model=str(tiny_model)), "cpu").unet
    late, calls = unet.up_blocks[-1], []

    def small_memory(module, args, kwargs):
        """Out of memory deep inside, when most layers have seen the batch."""
        calls.append(len(kwargs["hidden_states"]) // 2)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("injected")

    hook = late.register_forward_pre_hook(small_memory, with_kwargs=True)
    try:
        made = control(tiny_model, net, **columns)
    finally:
        hook.remove()
    assert 1 in calls
    assert (made.latents - expected.latents).abs().max() <= 1e-4


def test_frames_that_need_the_one_before_are_not_split(tiny_model):
    spec = JobSpec(prompt=PROMPT, model=str(tiny_model), attention_anchor="first_previous", num_inference_steps=4)
    with pytest.raises(GenerationError, match="can't be split"):
        generate(loading.load(spec, "cpu"), Request(spec, SEED, SIZE, SIZE, FRAMES, part=(0, 2)))


@pytest.mark.parametrize("chunk", [1, 2, FRAMES])
def test_scenes_are_as_if_each_were_rendered_alone(tiny_model, tiny_controlnets, chunk):
    net, shown = tiny_controlnets[0], pictures()
    made = control(tiny_model, net, attention_anchor="scene", scenes=(0, 3), chunk_size=chunk)
    first = control(tiny_model, net, 3, shown[:3])
    second = control(tiny_model, net, 2, shown[3:])
    assert (made.latents - torch.cat([first.latents, second.latents])).abs().max() <= 1e-4
    assert made.evaluations == STEPS * FRAMES  # an anchor a scene costs nothing


@pytest.mark.parametrize("chunk", [2, FRAMES])
def test_without_cross_frame_attention_frames_are_plain_pictures(tiny_model, tiny_controlnets, chunk):
    net = tiny_controlnets[0]
    made = control(tiny_model, net, cross_frame_attention=False, chunk_size=chunk)
    assert (made.latents - reference(tiny_model, [net], None)).abs().max() <= 1e-4


def test_conditions_act_from_their_start_to_their_end(tiny_model, tiny_controlnets):
    spans = {"control_guidance_start": "0.0+0.3", "control_guidance_end": "0.5+1.0"}
    both = "+".join(map(str, tiny_controlnets))
    made = control(tiny_model, both, condition="edge+depth", cross_frame_attention=False, **spans)
    theirs = reference(
        tiny_model, tiny_controlnets, None, control_guidance_start=[0.0, 0.3], control_guidance_end=[0.5, 1.0]
    )
    assert (made.latents - theirs).abs().max() <= 1e-4
    plain = control(tiny_model, both, condition="edge+depth", cross_frame_attention=False)
    assert (made.latents - plain.latents).abs().max() > 1e-3


def text(model, **columns):
    spec = JobSpec(prompt=PROMPT, model=str(model), **{"num_inference_steps": 6, "guidance_scale": 3.0} | columns)
    made = generate(loading.load(spec, "cpu"), Request(spec, SEED, SIZE, SIZE, FRAMES))
    assert made.evaluations == evaluations(spec, FRAMES)
    return made.latents


def test_after_its_end_guidance_is_off(tiny_model):
    """Switched off before the first step it is no guidance at all; in the middle, half the UNet's batches shrink."""
    full, none = text(tiny_model), text(tiny_model, guidance_scale=1.0)
    assert (text(tiny_model, guidance_end=1e-9) - none).abs().max() > 1e-3  # step 0 is always guided …
    sizes = []
    unet = loading.load(JobSpec(prompt="x", model=str(tiny_model)), "cpu").unet
    hook = unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    try:
        half = text(tiny_model, guidance_end=0.5)
    finally:
        hook.remove()
    assert sizes == [2] + [2 * FRAMES] * 3 + [FRAMES] * 3
    assert (half - full).abs().max() > 1e-3


@pytest.mark.parametrize(
    "columns",
    [{"guidance_end": 0.5}, {"token_merging_ratio": 0.5}, {"cross_frame_attention": False}],
    ids=lambda columns: next(iter(columns)),
)
def test_options_keep_the_frames_independent_of_the_chunks(tiny_model, columns):
    whole = text(tiny_model, chunk_size=FRAMES, **columns)
    for chunk in (1, 2, 3):
        assert (text(tiny_model, chunk_size=chunk, **columns) - whole).abs().max() <= 1e-4
    assert (whole - text(tiny_model)).abs().max() > 1e-3


def test_parts_of_a_clip_are_frames_of_the_whole(tiny_model):
    spec = JobSpec(prompt=PROMPT, model=str(tiny_model), num_inference_steps=6, scheduler="euler_a")
    request = Request(spec, SEED, SIZE, SIZE, FRAMES)
    components = loading.load(spec, "cpu")
    whole = generate(components, request)
    assert whole.indices == tuple(range(FRAMES))
    for part in range(3):
        made = generate(components, replace(request, part=(part, 3)))
        assert made.indices == ((0,), (0, 1, 2), (0, 3, 4))[part]
        assert (made.latents - whole.latents[list(made.indices)]).abs().max() <= 1e-4
