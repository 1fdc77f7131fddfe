"""SDXL against diffusers' own pipelines, with the same noise: equal to rounding."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    EulerAncestralDiscreteScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    TextToVideoZeroSDXLPipeline,
)
from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero import (
    CrossFrameAttnProcessor2_0,
)
from reference import Corrected, initial, quiet
from tiny import write_controlnet
from tiny_sdxl import write_sdxl

from t2vz.engine import noise
from t2vz.errors import UnsupportedModel
from t2vz.models import loading
from t2vz.models.prompt import encode
from t2vz.modes import Request, generate
from t2vz.spec import JobSpec, t0_t1

SEED = 13
PROMPT = "a red ball on the grass"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a tiny SDXL, of its ControlNet and of its editing sister."""
    folder = tmp_path_factory.mktemp("sdxl")
    torch.manual_seed(5)
    write_sdxl(folder / "base")
    write_sdxl(folder / "edit", in_channels=8)
    write_controlnet(folder / "controlnet", base=folder / "base")
    return folder


class CorrectedPipeline(Corrected, TextToVideoZeroSDXLPipeline):
    seed = SEED


def make(model, **columns):
    spec = JobSpec(prompt=PROMPT, model=str(model), **columns)
    return spec, loading.load(spec, "cpu")


@functools.cache
def text_reference(model, width, height, frames, steps, negative, t0, t1):
    base = StableDiffusionXLPipeline.from_pretrained(model)
    pipeline = quiet(CorrectedPipeline(**{name: part for name, part in base.components.items() if part is not None}))
    # Their field is 512 by 512 whatever the size; ours is in true pixels.
    short = min(width, height)
    return pipeline(
        PROMPT,
        negative_prompt=negative or None,
        video_length=frames,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=5.0,
        t0=t0,
        t1=t1,
        motion_field_strength_x=12 * short / width,
        motion_field_strength_y=12 * short / height,
        latents=initial(SEED, width, height),
        output_type="latent",
    ).images


@pytest.mark.parametrize("chunk", [8, 2])
@pytest.mark.parametrize(
    ("width", "height", "frames", "steps", "negative"), [(128, 128, 3, 10, ""), (64, 96, 4, 20, "blue")]
)
def test_text_equals_diffusers(models, width, height, frames, steps, negative, chunk):
    """Without a negative prompt its embedding is zeros, as SDXL's configuration asks."""
    spec, components = make(
        models / "base", negative_prompt=negative, num_inference_steps=steps, guidance_scale=5.0, chunk_size=chunk
    )
    made = generate(components, Request(spec, SEED, width, height, frames))
    theirs = text_reference(models / "base", width, height, frames, steps, negative, *t0_t1(spec))
    assert theirs.std() > 0.5
    assert (made.latents - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_control_equals_diffusers(models, scale):
    width, height, frames, steps = 96, 64, 3, 5
    spec, components = make(
        models / "base",
        mode="control",
        source="unused",
        condition="edge",
        controlnet=str(models / "controlnet"),
        controlnet_conditioning_scale="0.7",
        num_inference_steps=steps,
        guidance_scale=scale,
        chunk_size=2,
    )
    pictures = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    made = generate(components, Request(spec, SEED, width, height, frames, conditions=(pictures,)))

    controlnet = ControlNetModel.from_pretrained(models / "controlnet")
    pipeline = quiet(StableDiffusionXLControlNetPipeline.from_pretrained(models / "base", controlnet=controlnet))
    for model in (pipeline.unet, controlnet):
        model.set_attn_processor(CrossFrameAttnProcessor2_0(batch_size=2 if scale > 1 else 1))
    theirs = pipeline(
        [PROMPT] * frames,
        image=torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=scale,
        latents=initial(SEED, width, height).repeat(frames, 1, 1, 1),
        controlnet_conditioning_scale=0.7,
        output_type="latent",
    ).images
    assert (made.latents - theirs).abs().max() <= 1e-4


def test_edit_equals_diffusers(models, monkeypatch):
    width, height, frames, steps = 96, 64, 2, 5
    spec, components = make(
        models / "edit", mode="edit", source="unused", num_inference_steps=steps, guidance_scale=3, chunk_size=1
    )
    pictures = np.random.default_rng(1).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    made = generate(components, Request(spec, SEED, width, height, frames, source=pictures))

    pipeline = quiet(StableDiffusionXLInstructPix2PixPipeline.from_pretrained(models / "edit"))
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
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=3,
        latents=initial(SEED, width, height).repeat(frames, 1, 1, 1),
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    assert (made.latents - theirs).abs().max() <= 1e-4


def test_offloading_changes_where_the_parts_lie_not_the_frames(models):
    control = {"mode": "control", "source": "unused", "condition": "edge", "controlnet": str(models / "controlnet")}
    pictures = np.random.default_rng(2).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    made = []
    for offload in (False, True):
        spec, parts = make(models / "base", num_inference_steps=3, offload=offload, **control)
        made.append(generate(parts, Request(spec, SEED, 64, 64, 2, conditions=(pictures,))).latents)
    assert torch.equal(*made)
    before = {hook.model: hook.hook.prev_module_hook for hook in parts.hooks}
    leaving = {model: hook and hook.model for model, hook in before.items()}
    assert leaving == {
        parts.text_encoder: None,
        parts.text_encoder_2: parts.text_encoder,
        parts.controlnets[0]: parts.text_encoder_2,
        parts.unet: parts.text_encoder_2,
    }


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("negative", ["", "blue snow"])
def test_conditioning_equals_diffusers(tmp_path, zeros, negative):
    torch.manual_seed(6)
    write_sdxl(tmp_path / "model", force_zeros_for_empty_prompt=zeros)
    components = make(tmp_path / "model")[1]
    made = encode(components, [negative, PROMPT], width=96, height=64)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "model")
    text, no_text, pooled, no_pooled = pipeline.encode_prompt(PROMPT, negative_prompt=negative or None, device="cpu")
    torch.testing.assert_close(made.text, torch.cat([no_text, text]), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.added["text_embeds"], torch.cat([no_pooled, pooled]), atol=1e-5, rtol=0)
    assert made.added["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]] * 2
    assert (made.text[0] == 0).all() == (zeros and not negative)


def test_a_prompt_that_is_too_long_is_warned_of_once(models):
    long = " ".join(["ball"] * 75) + " red dog"
    warnings = encode(make(models / "base")[1], ["", long], width=64, height=64).warnings
    assert warnings == ["prompt longer than 77 tokens; without effect: “red dog”"]


def test_the_vae_is_kept_in_float32_where_its_config_says_that_it_overflows(models, tmp_path):
    half = make(models / "base", dtype="float16")[1]
    assert (half.vae.dtype, half.unet.dtype, half.text_encoder_2.dtype) == (torch.float32, torch.float16, torch.float16)
    assert make(models / "base", dtype="bfloat16")[1].vae.dtype == torch.bfloat16
    vae = half.vae.from_config(half.vae.config, force_upcast=False)
    vae.save_pretrained(tmp_path / "vae")
    assert make(models / "base", dtype="float16", vae=str(tmp_path / "vae"))[1].vae.dtype == torch.float16


def test_native_px_and_two_families_side_by_side(models, tiny_model, tiny_controlnets):
    assert loading.native_px(make(models / "base")[0]) == 128
    control = {"mode": "control", "source": "unused", "condition": "edge"}
    with pytest.raises(UnsupportedModel, match="made for another family"):
        make(models / "base", controlnet=str(tiny_controlnets[0]), **control)
    with pytest.raises(UnsupportedModel, match="made for another family"):
        make(tiny_model, controlnet=str(models / "controlnet"), **control)
