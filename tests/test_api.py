"""The Python API: what a manifest makes, it makes, of arguments and arrays; and diffusers' calls carry over."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, TextToVideoZeroPipeline
from diffusers.utils import export_to_video
from numpy.typing import NDArray
from PIL import Image

from t2vz import TextToVideoZero, TextToVideoZeroControlNet, VideoInstructPix2Pix, api
from t2vz.errors import ConditionError, ManifestError, SourceError, UnknownModel, UnsupportedModel
from t2vz.plan import Job, plan
from t2vz.render import Render, Settings, opening
from t2vz.spec import JobSpec, evaluations

SMALL = {"width": 64, "height": 64, "video_length": 3, "num_inference_steps": 5, "guidance_scale": 3}


@pytest.fixture(scope="module")
def text(tiny_model: Path) -> TextToVideoZero:
    return TextToVideoZero.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def frames() -> NDArray[np.uint8]:
    """Three frames of 64 by 64, smooth enough for edges, no two alike."""
    small = np.random.default_rng(5).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    return np.stack([cv2.resize(picture, (64, 64), interpolation=cv2.INTER_CUBIC) for picture in small])


def folder_of(path: Path, frames: NDArray[np.uint8]) -> Path:
    path.mkdir()
    for number, frame in enumerate(frames):
        cv2.imwrite(str(path / f"{number}.png"), frame[..., ::-1])
    return path


def latents_of_manifest(tmp_path: Path, write_manifest: Callable[..., Path], row: dict[str, Any]) -> torch.Tensor:
    """What the manifest's stages make of the row."""
    (job,) = plan(write_manifest(tmp_path / "m.csv", {**SMALL, **row}), None)
    assert isinstance(job, Job), job
    settings = Settings(tmp_path / "out", "m.csv", "run", "cpu")
    with opening(settings):
        work = Render(job, settings)
        for stage in work.stages[:-1]:
            work.run(stage)
    assert work.generated is not None
    return work.generated.latents


def test_text_is_what_a_manifest_makes(text, tiny_model, write_manifest, tmp_path):
    columns = {"pan_x_per_s": 0.3, "zoom_per_s": 1.1, "negative_prompt": "blue", "scheduler": "euler_a"}
    expected = latents_of_manifest(tmp_path, write_manifest, {"model": tiny_model, "seed": 7, **columns})
    made = text("a boat", seed=7, **SMALL, **columns)
    assert torch.equal(made.latents, expected)
    assert made.seed == 7
    assert made.evaluations == evaluations(JobSpec(prompt="a boat", num_inference_steps=5), 3)
    assert made.warnings == ()


@pytest.mark.parametrize("rendered", [True, False])
def test_control_is_what_a_manifest_makes(tiny_model, tiny_controlnets, frames, write_manifest, tmp_path, rendered):
    column = "condition_video" if rendered else "source"
    row = {"mode": "control", "condition": "edge", "controlnet": tiny_controlnets[0], "model": tiny_model, "fps": 4}
    row |= {column: folder_of(tmp_path / "frames", frames), "seed": 7, "controlnet_conditioning_scale": 0.5}
    expected = latents_of_manifest(tmp_path, write_manifest, row)
    pipe = TextToVideoZeroControlNet.from_pretrained(tiny_model, controlnet=tiny_controlnets[0])
    arguments = {"condition": "edge", "controlnet_conditioning_scale": 0.5, "seed": 7, **SMALL}
    made = pipe("a boat", **{column: frames}, **arguments)
    assert torch.equal(made.latents, expected)
    other = pipe("a boat", **{column: frames[::-1]}, **arguments)
    assert not torch.equal(other.latents, expected), "the condition could not be seen"


def test_an_edit_is_what_a_manifest_makes(tiny_edit_model, frames, write_manifest, tmp_path):
    row = {"mode": "edit", "model": tiny_edit_model, "source": folder_of(tmp_path / "frames", frames), "fps": 4}
    expected = latents_of_manifest(tmp_path, write_manifest, {**row, "seed": 7, "image_guidance_scale": 1.2})
    pipe = VideoInstructPix2Pix.from_pretrained(tiny_edit_model)
    made = pipe("a boat", source=frames, image_guidance_scale=1.2, seed=7, **SMALL)
    assert torch.equal(made.latents, expected)


def test_a_call_of_diffusers_pipeline_carries_over(text, tiny_model, tmp_path):
    """Every argument of TextToVideoZeroPipeline's call, by name; the picture differs by the noise alone."""
    arguments = {
        "video_length": 3,
        "height": 64,
        "width": 96,
        "num_inference_steps": 10,
        "guidance_scale": 5.0,
        "negative_prompt": "blue",
        "num_videos_per_prompt": 1,
        "eta": 0.0,
        "generator": torch.Generator().manual_seed(3),
        "latents": None,
        "motion_field_strength_x": 8,
        "motion_field_strength_y": 4,
        "output_type": "tensor",
        "return_dict": True,
        "callback": None,
        "callback_steps": 1,
        "t0": 6,
        "t1": 8,
        "frame_ids": None,
    }
    base = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    parts = (base.vae, base.text_encoder, base.tokenizer, base.unet, base.scheduler, None, None, False)
    peer = TextToVideoZeroPipeline(*parts)
    peer.set_progress_bar_config(disable=True)
    theirs = peer("a red ball", **arguments).images
    ours = text("a red ball", **arguments)
    assert ours.images.shape == np.asarray(theirs).shape == (3, 64, 96, 3)
    assert ours.images.dtype == np.float32
    assert 0 <= ours.images.min() < ours.images.max() <= 1
    assert ours.seed == 3
    # Each of them arrives where it should: what a spec of the same columns takes.
    assert ours.evaluations == (9 - 6) + (8 + 1) * 3
    export_to_video(ours.frames[0], str(tmp_path / "video.mp4"), fps=4)
    for changed in ({"motion_field_strength_x": 200}, {"motion_field_strength_y": 200}, {"t0": 2}, {"t1": 9}):
        assert not torch.equal(text("a red ball", **{**arguments, **changed}).latents, ours.latents), changed


def test_the_seed_comes_from_the_generator_or_from_torchs(text):
    def made(**arguments: Any) -> Any:
        return text("a boat", **{**SMALL, "num_inference_steps": 3, "output_type": "latent"}, **arguments)

    generator = torch.Generator().manual_seed(11)
    once = made(generator=generator)
    torch.rand(5, generator=generator)
    assert torch.equal(made(generator=generator).images, once.images)
    assert torch.equal(made(seed=11).images, once.images)
    assert made(generator=torch.Generator().manual_seed(-1)).seed == 2**63 - 1

    torch.manual_seed(0)
    drawn = [made() for _ in range(2)]
    assert not torch.equal(drawn[0].images, drawn[1].images)
    assert torch.equal(made(seed=drawn[1].seed).images, drawn[1].images)
    torch.manual_seed(0)
    assert made().seed == drawn[0].seed


def test_output_types_are_the_same_pictures(text):
    outputs = {kind: text("a boat", seed=1, **SMALL, output_type=kind) for kind in ("np", "pil", "pt", "latent")}
    pictures = outputs["np"].images
    levels = (pictures * 255).round().astype(np.uint8)
    assert levels.std() > 5
    assert all(isinstance(picture, Image.Image) for picture in outputs["pil"].images)
    assert np.array_equal(np.stack(list(map(np.asarray, outputs["pil"].images))), levels)
    assert np.array_equal(outputs["pt"].images.permute(0, 2, 3, 1).numpy(), pictures)
    assert torch.equal(outputs["latent"].images, outputs["np"].latents)
    assert outputs["pil"].frames[0] is outputs["pil"].images


def test_frames_may_come_as_diffusers_users_have_them(tiny_edit_model, frames):
    pipe = VideoInstructPix2Pix.from_pretrained(tiny_edit_model, seed=1, num_inference_steps=2, guidance_scale=3)
    expected = pipe("make it snow", source=frames).latents
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
    for given in (list(map(Image.fromarray, frames)), frames.astype(np.float32) / 255, tensor, tensor / 255):
        assert torch.equal(pipe("make it snow", source=given).latents, expected)


def test_the_callback_sees_every_step_of_all_frames(text):
    seen = []

    def callback(pipe, step, timestep, given):
        assert pipe is text
        seen.append((step, int(timestep), given["latents"]))

    made = text("a boat", seed=1, **{**SMALL, "num_inference_steps": 10}, t0=6, t1=8, callback_on_step_end=callback)
    assert [step for step, *_ in seen] == list(range(1, 10))  # step 0 is the anchor's alone
    timesteps = [timestep for _, timestep, _ in seen]
    assert timesteps[0] == 801
    assert timesteps == sorted(timesteps, reverse=True)
    assert all(latents.shape == made.latents.shape for *_, latents in seen)
    assert torch.equal(seen[-1][2], made.latents)


def test_what_from_pretrained_is_given_holds_until_a_call_says_otherwise(tiny_model):
    pipe = TextToVideoZero.from_pretrained(tiny_model, torch_dtype=torch.float32, seed=1, scheduler="euler", **SMALL)
    same = TextToVideoZero.from_pretrained(str(tiny_model))
    assert torch.equal(pipe("a boat").latents, same("a boat", seed=1, scheduler="euler", **SMALL).latents)
    assert pipe("a boat", video_length=2, scheduler="ddim", negative_prompt=None).latents.shape[0] == 2
    assert pipe.to(torch.device("cpu"), torch.bfloat16) is pipe
    assert pipe.columns["dtype"] == "bfloat16"
    assert np.isfinite(pipe("a boat").images).all()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"guidance": 3}, "no argument 'guidance'"),
        ({"video_lenght": 3}, "did you mean 'video_length'?"),
        ({"t0": 9, "num_inference_steps": 10, "t1": 5}, "t0"),
        ({"num_inference_steps": 0, "guidance_scale": -1}, r"num_inference_steps must be at least 1.*guidance_scale"),
        ({"image_guidance_scale": 2}, "image_guidance_scale is used by edit, not in text mode"),
        ({"crf": 20}, "crf belongs to manifests"),
        ({"eta": 1.0}, "euler_a"),
        ({"num_videos_per_prompt": 2}, "call once for each seed"),
        ({"latents": torch.zeros(1)}, "seed"),
        ({"output_type": "gif"}, "output_type must be one of np, "),
        ({"seed": 1, "generator": torch.Generator()}, "one of them"),
        ({"prompt": ""}, "prompt is empty"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(text, arguments, told):
    with pytest.raises(ManifestError, match=told) as caught:
        text(**{"prompt": "a boat", **arguments})
    assert "\n" not in caught.value.message


def test_frames_that_do_not_fit_are_told(tiny_edit_model, tiny_model, tiny_controlnets, frames):
    edit = VideoInstructPix2Pix.from_pretrained(tiny_edit_model)
    control = TextToVideoZeroControlNet.from_pretrained(tiny_model, controlnet=str(tiny_controlnets[0]))
    wrong: list[tuple[Any, str]] = [
        (frames[:, :60], "60"),
        (frames.astype(np.float32), "0 … 1"),
        (frames[..., 0], "needs uint8"),
        ([], "not frames"),
        ([frames[0], frames[1, :32]], "not frames of one size"),
    ]
    for given, told in wrong:
        with pytest.raises(SourceError, match=told):
            edit("make it snow", source=given)
    with pytest.raises(SourceError, match="64x64"):
        edit("make it snow", source=frames, width=128)
    with pytest.raises(ManifestError, match="the pictures themselves"):
        edit("make it snow", source="clip.mp4")
    with pytest.raises(ManifestError, match="source is needed"):
        edit("make it snow")
    with pytest.raises(ConditionError, match="lower video_length to 3"):
        control("a robot", condition="pose", condition_video=frames, video_length=5)
    with pytest.raises(SourceError, match=r"foreground_mask: needs bool \(3, 64, 64\)"):
        TextToVideoZero.from_pretrained(tiny_model)(
            "a boat", foreground_mask=np.zeros((2, 64, 64), bool), background_smoothing=0.4, **SMALL
        )


def test_a_mask_reaches_the_engine(text):
    plain = text("a boat", seed=1, **SMALL).latents
    masks = np.zeros((3, 64, 64), bool)
    masks[:, :, 32:] = True
    smoothed = text("a boat", seed=1, foreground_mask=masks, background_smoothing=0.4, **SMALL).latents
    assert torch.equal(smoothed[0], plain[0])
    assert not torch.equal(smoothed[1:], plain[1:])


def test_models_that_are_not_there_or_do_not_fit_are_told(tiny_model):
    with pytest.raises(UnknownModel, match="did you mean `mini`"):
        TextToVideoZero.from_pretrained("minni")
    with pytest.raises(UnsupportedModel, match="edit mode needs"):
        VideoInstructPix2Pix.from_pretrained(tiny_model)("x", source=np.zeros((1, 64, 64, 3), np.uint8))
    with pytest.raises(ManifestError, match="did you mean 'scheduler'"):
        TextToVideoZero.from_pretrained(tiny_model, schedular="euler")


def test_importing_the_package_imports_nothing_of_it():
    code = "import sys, t2vz; print([n for n in ('torch', 't2vz.api', 'numpy') if n in sys.modules], t2vz.VideoOutput)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"[] {api.VideoOutput}"
