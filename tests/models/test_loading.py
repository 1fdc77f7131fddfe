"""Loading diffusers folders: what comes out, what is kept, what is refused and how it is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from tiny import write_controlnet, write_pipeline
from tiny_sdxl import write_sdxl

from t2vz.engine import noise
from t2vz.errors import ModelError, UnknownModel, UnsupportedModel
from t2vz.models import loading
from t2vz.modes import Request, generate
from t2vz.spec import JobSpec

PROMPT = "a red ball on the grass"
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"


def spec(model, **columns):
    return JobSpec(prompt=PROMPT, model=str(model), **columns)


def load(model, **columns):
    return loading.load(spec(model, **columns), "cpu")


def refused(model, kind=ModelError, **columns):
    """The message of the error that loading ends in: one line that names the model."""
    with pytest.raises(ModelError) as caught:
        load(model, **columns)
    assert type(caught.value) is kind
    message = caught.value.message
    assert "\n" not in message
    assert Path(model).name in message
    assert not caught.value.retryable
    return message


def test_the_parts_are_those_of_diffusers_own_pipeline(model):
    ours, theirs = load(model), StableDiffusionPipeline.from_pretrained(model)
    for name in ("text_encoder", "vae", "unet"):
        part, expected = getattr(ours, name), getattr(theirs, name)
        assert type(part) is type(expected)
        assert part.state_dict().keys() == expected.state_dict().keys()
        assert all(torch.equal(value, expected.state_dict()[key]) for key, value in part.state_dict().items())
        assert not part.training
        assert not any(weight.requires_grad for weight in part.parameters())
    assert ours.tokenizer(PROMPT).input_ids == theirs.tokenizer(PROMPT).input_ids
    assert {key: ours.scheduler_config[key] for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset")} == {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    assert ours.cell_px == theirs.vae_scale_factor


def test_native_px_is_read_from_the_configs_alone(model):
    for weights in model.rglob("*.safetensors"):
        weights.unlink()
    assert loading.native_px(spec(model)) == 128


def test_a_model_is_loaded_once_a_dtype(model):
    first = load(model)
    assert load(model, seed=3, num_inference_steps=7) is first
    half = load(model, dtype="bfloat16")
    assert half is not first
    assert {part.dtype for part in (half.unet, half.vae, half.text_encoder)} == {torch.bfloat16}
    assert load(model) is first


def test_changed_weights_are_loaded_anew(model):
    before = load(model).unet.conv_in.bias.clone()
    weights = load_file(model / UNET)
    weights["conv_in.bias"] += 1
    save_file(weights, model / "new.safetensors", metadata={"format": "pt"})
    (model / "new.safetensors").replace(model / UNET)
    assert torch.allclose(load(model).unet.conv_in.bias, before + 1)


def test_pickled_weights_are_refused(model):
    torch.save(load_file(model / UNET), (model / UNET).with_suffix(".bin"))
    (model / UNET).unlink()
    assert "convert" in refused(model, UnsupportedModel)


def test_a_pickled_controlnet_is_refused(tiny_model, tiny_controlnets, tmp_path):
    folder = Path(shutil.copytree(tiny_controlnets[0], tmp_path / "old"))
    weights = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    control = {"mode": "control", "source": "unused", "condition": "edge", "controlnet": str(folder)}
    with pytest.raises(UnsupportedModel, match=r"^controlnet .*old: pickled weights only.*convert"):
        load(tiny_model, **control)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt"])
def test_a_single_file_of_pickled_weights_is_refused(tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    torch.save({"x": torch.zeros(1)}, file)
    assert ".safetensors" in refused(file, UnsupportedModel)


def test_other_pipelines_are_refused_by_name(model, edit_json):
    edit_json(model / "model_index.json", _class_name="StableDiffusion3Pipeline")
    assert "StableDiffusion3Pipeline" in refused(model, UnsupportedModel)


def test_parts_of_sdxl_and_what_is_like_it(tmp_path, edit_json):
    torch.manual_seed(4)
    folder = tmp_path / "xl"
    write_sdxl(folder)
    ours, theirs = load(folder), StableDiffusionXLPipeline.from_pretrained(folder)
    for name in ("text_encoder", "text_encoder_2", "vae", "unet"):
        part, expected = getattr(ours, name), getattr(theirs, name)
        assert type(part) is type(expected)
        assert all(torch.equal(value, expected.state_dict()[key]) for key, value in part.state_dict().items())
    assert ours.tokenizer_2.pad_token == "!"

    weights = load_file(folder / "text_encoder_2/model.safetensors")
    weights.pop("text_projection.weight")
    save_file(weights, folder / "text_encoder_2/model.safetensors", metadata={"format": "pt"})
    assert "text_projection.weight" in refused(folder)
    edit_json(folder / "model_index.json", is_cosxl_edit=True)
    assert "CosXL" in refused(folder, UnsupportedModel)
    edit_json(folder / "model_index.json", is_cosxl_edit=False, text_encoder=[None, None])
    assert "without text_encoder (a refiner?)" in refused(folder, UnsupportedModel)


def test_code_in_the_folder_is_never_run(model, edit_json, tmp_path):
    trap = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    for file in ("pipeline.py", "mine.py", "unet/mine.py"):
        (model / file).write_text(trap)
    edit_json(model / "model_index.json", _class_name=["pipeline", "MyPipeline"])
    assert "MyPipeline" in refused(model, UnsupportedModel)
    edit_json(model / "model_index.json", _class_name="StableDiffusionPipeline", unet=["mine", "MyUNet"])
    assert "MyUNet" in refused(model, UnsupportedModel)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", [UNET, VAE, TEXT_ENCODER])
def test_truncated_weights(model, file):
    whole = (model / file).read_bytes()
    (model / file).write_bytes(whole[: len(whole) // 2])
    refused(model)


@pytest.mark.parametrize(("file", "key"), [(UNET, "conv_in.bias"), (VAE, "decoder.conv_in.bias"), (TEXT_ENCODER, None)])
def test_missing_weights_are_not_made_up(model, file, key):
    weights = load_file(model / file)
    key = key or next(key for key in weights if "q_proj.weight" in key)
    del weights[key]
    save_file(weights, model / file, metadata={"format": "pt"})
    assert key in refused(model)


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
    ],
)
@pytest.mark.parametrize("text", ["{", "[]"])
def test_broken_configs(model, file, text):
    (model / file).write_text(text)
    refused(model)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_missing_parts(model, part):
    shutil.rmtree(model / part)
    assert part in refused(model)


def test_an_empty_folder_is_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", UnknownModel)


def test_a_model_of_another_mode_is_refused(tiny_model, tiny_edit_model):
    assert "edit mode needs an InstructPix2Pix model" in refused(
        tiny_model, UnsupportedModel, mode="edit", source="unused"
    )
    assert "text mode needs a text-to-image model" in refused(tiny_edit_model, UnsupportedModel)


@pytest.mark.parametrize("settings", [{"block_out_channels": (32, 64, 32)}, {"cross_attention_dim": 32}])
def test_a_controlnet_of_another_family_is_refused(tiny_model, tmp_path, settings):
    write_pipeline(tmp_path / "other", in_channels=4, **settings)
    write_controlnet(tmp_path / "alien", base=tmp_path / "other")
    control = {"mode": "control", "source": "unused", "condition": "edge", "controlnet": str(tmp_path / "alien")}
    assert "alien" in refused(tiny_model, UnsupportedModel, **control)


@pytest.mark.parametrize(
    "columns", [{"mode": "control", "source": "unused", "condition": "edge", "controlnet": ""}, {"vae": ""}]
)
def test_what_is_damaged_is_told_by_its_column(tiny_model, tiny_controlnets, tmp_path, columns):
    (column,) = (name for name, value in columns.items() if not value)
    folder = tiny_controlnets[0] if column == "controlnet" else tiny_model / "vae"
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    weights = copy / "diffusion_pytorch_model.safetensors"
    kept = load_file(weights)
    kept.pop("conv_in.bias" if column == "controlnet" else "decoder.conv_in.bias")
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"^{column} .*copy: 1 weights of its .* are missing"):
        load(tiny_model, **columns | {column: str(copy)})
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match=rf"^{column} .*copy: can't be loaded"):
        load(tiny_model, **columns | {column: str(copy)})


def test_a_condition_without_a_controlnet_says_so():
    with pytest.raises(UnknownModel, match="no ControlNet for hed; name one in `controlnet`"):
        load("mini", mode="control", source="unused", condition="hed")


def test_a_v_prediction_model_is_sampled_as_one(model, edit_json):
    def latents(model):
        request = Request(spec(model, num_inference_steps=6, guidance_scale=3), 5, 64, 64, frames=1)
        return generate(loading.load(request.spec, "cpu"), request).latents

    as_noise = latents(model)
    edit_json(model / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPT,
        width=64,
        height=64,
        num_inference_steps=6,
        guidance_scale=3,
        latents=noise.draw(5, "initial", [0], (4, 8, 8)),
        output_type="latent",
    ).images
    assert (latents(model) - expected).abs().max() <= 1e-4
    assert (as_noise - expected).abs().max() > 0.1


def test_bfloat16_comes_close_to_float32(tiny_model):
    full, half = (
        generate(load(tiny_model, dtype=dtype), Request(spec(tiny_model, num_inference_steps=4), 5, 64, 64, 3)).latents
        for dtype in ("float32", "bfloat16")
    )
    assert half.dtype == torch.float32
    assert half.isfinite().all()
    assert 0 < (half - full).std() < 0.1 * full.std()
