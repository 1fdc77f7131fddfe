"""Checkpoints in the original Stable Diffusion layout, written here from a folder: the same model comes out."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_sdxl import write_sdxl

from t2vz.errors import ModelError
from t2vz.models import loading, table
from t2vz.modes import Request, generate
from t2vz.spec import JobSpec

LAYERS = 1  # layers_per_block of the tiny UNet
DECODER_BLOCKS = 4  # of the tiny VAE

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
FIXED = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name, names):
    """The original name of a UNet's or ControlNet's weight. names: all of them, in diffusers' layout."""
    module, kind = name.rsplit(".", 1)
    if module in FIXED:
        return f"{FIXED[module]}.{kind}"
    if match := re.fullmatch(r"controlnet_down_blocks\.(\d+)", module):
        return f"zero_convs.{match[1]}.0.{kind}"
    if match := re.fullmatch(r"controlnet_cond_embedding\.blocks\.(\d+)", module):
        return f"input_hint_block.{2 * int(match[1]) + 2}.{kind}"
    side, *path = module.split(".")
    if side == "mid_block":
        part, number, *rest = path
        place = f"middle_block.{2 * int(number) if part == 'resnets' else 1}"
    else:
        block, part, number, *rest = path
        first = int(block) * (LAYERS + 1)
        if part == "downsamplers":
            return f"input_blocks.{first + LAYERS + 1}.0.op.{kind}"
        if part == "upsamplers":
            attends = any(other.startswith(f"up_blocks.{block}.attentions") for other in names)
            return f"output_blocks.{first + LAYERS}.{2 if attends else 1}.conv.{kind}"
        position = first + int(number)
        place = f"input_blocks.{position + 1}" if side == "down_blocks" else f"output_blocks.{position}"
        place += ".0" if part == "resnets" else ".1"
    inner = RESNET[rest[0]] if part == "resnets" else ".".join(rest)
    return f"{place}.{inner}.{kind}"


def vae_name(name):
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{DECODER_BLOCKS - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{DECODER_BLOCKS - 1 - int(m[1])}.upsample", name)
    if match := re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.*)\.(weight|bias)", name):
        name = f"{match[1]}mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
    return name


CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip(weights):
    """SDXL's second text encoder in OpenCLIP's layout, query, key and value in one matrix."""
    weights = {name.removeprefix("text_model."): weight for name, weight in weights.items()}
    made = {
        "token_embedding.weight": weights["embeddings.token_embedding.weight"],
        "positional_embedding": weights["embeddings.position_embedding.weight"],
        "ln_final.weight": weights["final_layer_norm.weight"],
        "ln_final.bias": weights["final_layer_norm.bias"],
        "text_projection": weights["text_projection.weight"].T,
    }
    for i in range(1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layers."))):
        ours, theirs = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            made |= {f"{theirs}.{new}.{kind}": weights[f"{ours}.{old}.{kind}"] for old, new in CLIP_LAYER.items()}
            made[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(
                [weights[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
    return made


def write_original(folder: Path, file: Path) -> Path:
    """Write the diffusers folder's weights as one file in the original layout."""
    is_sdxl = (folder / "text_encoder_2").is_dir()
    unet = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    text_encoder = load_file(folder / "text_encoder/model.safetensors")
    weights = {f"model.diffusion_model.{unet_name(name, unet)}": weight for name, weight in unet.items()}
    for name, weight in vae.items():
        original = vae_name(name)
        is_projection = "attn_1" in original and weight.ndim == 2  # 1 × 1 convolutions there
        weights[f"first_stage_model.{original}"] = weight[:, :, None, None] if is_projection else weight
    encoder = "conditioner.embedders.0" if is_sdxl else "cond_stage_model"
    for name, weight in text_encoder.items():
        weights[f"{encoder}.transformer.text_model.{name.removeprefix('text_model.')}"] = weight
    if is_sdxl:
        second = open_clip(load_file(folder / "text_encoder_2/model.safetensors"))
        weights |= {f"conditioner.embedders.1.model.{name}": weight for name, weight in second.items()}
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file)
    return file


@pytest.fixture
def configs(tmp_path):
    """The configs of a model, without its weights."""

    def copy(model):
        target = tmp_path / f"configs-{model.name}"
        shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors"))
        return target

    return copy


def latents(model, **columns):
    spec = JobSpec(prompt="a red ball", model=str(model), num_inference_steps=4, **columns)
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    inputs = {"text": {}, "edit": {"source": frames}, "control": {"conditions": (frames,)}}[spec.mode]
    return generate(loading.load(spec, "cpu"), Request(spec, 7, 64, 64, 2, **inputs)).latents


def same_but_for_rounding(ours, theirs):
    """Weights lie elsewhere in memory, and matrix products round by how they are aligned."""
    assert (ours - theirs).abs().max() <= 1e-4


def test_the_file_makes_the_folders_latents(tiny_model, tmp_path, configs):
    file = write_original(tiny_model, tmp_path / "dreambooth.safetensors")
    base = str(configs(tiny_model))
    same_but_for_rounding(latents(file, base_config=base), latents(tiny_model))

    parts = loading.load(JobSpec(prompt="x", model=str(file), base_config=base), "cpu")
    vae = loading.load(JobSpec(prompt="x", model=str(tiny_model)), "cpu").vae
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(parts.vae(pixels).sample, vae(pixels).sample)
    assert not any(weight.requires_grad for weight in parts.unet.parameters())
    assert loading.native_px(JobSpec(prompt="x", model=str(file), base_config=base)) == 128


def test_an_edit_models_file_makes_the_folders_latents(tiny_edit_model, tmp_path, configs):
    file = write_original(tiny_edit_model, tmp_path / "edit.safetensors")
    edit = {"mode": "edit", "source": "unused"}
    made = latents(file, base_config=str(configs(tiny_edit_model)), **edit)
    assert torch.equal(made, latents(tiny_edit_model, **edit))


@pytest.mark.parametrize("mode", ["text", "edit"])
def test_an_sdxl_file_makes_the_folders_latents(tmp_path, configs, mode):
    torch.manual_seed(6)
    model = tmp_path / "xl"
    write_sdxl(model, in_channels=8 if mode == "edit" else 4)
    file = write_original(model, tmp_path / "xl.safetensors")
    columns = {"mode": mode} | ({"source": "unused"} if mode == "edit" else {})
    made = latents(file, base_config=str(configs(model)), **columns)
    torch.testing.assert_close(made, latents(model, **columns), atol=1e-5, rtol=0)
    assert loading.native_px(JobSpec(prompt="x", model=str(file))) == 1024


def test_a_vaes_file_in_the_original_layout_makes_the_folders_pictures(tiny_model, tmp_path):
    weights = load_file(tiny_model / "vae/diffusion_pytorch_model.safetensors")
    for name in list(weights):
        weight = weights.pop(name)
        original = vae_name(name)
        weights[original] = weight[:, :, None, None] if "attn_1" in original and weight.ndim == 2 else weight
    save_file(weights, tmp_path / "vae.safetensors")
    own, plain = (
        loading.load(JobSpec(prompt="x", model=str(tiny_model), **columns), "cpu").vae
        for columns in ({"vae": str(tmp_path / "vae.safetensors")}, {})
    )
    assert own is not plain
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(own(pixels).sample, plain(pixels).sample)
    save_file({name: weights[name] for name in list(weights)[:-3]}, tmp_path / "vae.safetensors")
    with pytest.raises(ModelError, match=r"vae\.safetensors"):
        loading.load(JobSpec(prompt="x", model=str(tiny_model), vae=str(tmp_path / "vae.safetensors")), "cpu")


def test_a_controlnets_file_takes_its_shape_from_the_unet(tiny_model, tmp_path):
    torch.manual_seed(4)
    unet = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    controlnet = ControlNetModel.from_unet(unet)
    for weight in controlnet.parameters():  # the last layers start as zeros and would have no effect
        torch.nn.init.normal_(weight, std=0.05)
    controlnet.save_pretrained(tmp_path / "folder")
    weights = controlnet.state_dict()
    save_file(
        {f"control_model.{unet_name(name, weights)}": weight for name, weight in weights.items()},
        tmp_path / "original.safetensors",
    )

    control = {"mode": "control", "source": "unused", "condition": "edge"}
    expected = latents(tiny_model, controlnet=str(tmp_path / "folder"), **control)
    # The original layout, and diffusers' names, as most are shared now.
    for file in ("original.safetensors", "folder/diffusion_pytorch_model.safetensors"):
        same_but_for_rounding(latents(tiny_model, controlnet=str(tmp_path / file), **control), expected)


def test_the_configs_may_be_a_hub_models(tiny_model, tmp_path, configs, hub_cache):
    commit = "ab" * 20
    repository = hub_cache / "models--somebody--family"
    shutil.copytree(configs(tiny_model), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    file = write_original(tiny_model, tmp_path / "dreambooth.safetensors")
    same_but_for_rounding(latents(file, base_config="somebody/family"), latents(tiny_model))
    identity = table.identity(JobSpec(prompt="x", model=str(file), base_config="somebody/family"))
    assert identity.endswith(f" somebody/family@{commit}")


def test_without_configs_and_network_base_config_is_asked_for(tiny_model, tmp_path):
    file = write_original(tiny_model, tmp_path / "dreambooth.safetensors")
    with pytest.raises(ModelError, match=r"dreambooth\.safetensors.*`base_config`"):
        latents(file)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.out", "first_stage_model.decoder", "cond_stage_model"])
def test_missing_weights_are_not_made_up(tiny_model, tmp_path, prefix):
    file = write_original(tiny_model, tmp_path / "partial.safetensors")
    weights = load_file(file)
    save_file({name: weight for name, weight in weights.items() if not name.startswith(prefix)}, file)
    with pytest.raises(ModelError, match=r"partial\.safetensors"):
        latents(file, base_config=str(tiny_model))


def test_configs_without_a_tokenizer_are_refused(tiny_model, tmp_path, configs):
    file = write_original(tiny_model, tmp_path / "dreambooth.safetensors")
    base = configs(tiny_model)
    shutil.rmtree(base / "tokenizer")
    with pytest.raises(ModelError, match=r"dreambooth\.safetensors"):
        latents(file, base_config=str(base))


def test_configs_of_another_family_do_not_fit(tiny_model, tiny_edit_model, tmp_path):
    file = write_original(tiny_model, tmp_path / "dreambooth.safetensors")
    with pytest.raises(ModelError, match=r"dreambooth\.safetensors"):
        latents(file, base_config=str(tiny_edit_model))
