"""What a row puts onto its model, against diffusers' pipelines with the same put on; and that it leaves no trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import ImageProjection
from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero import (
    CrossFrameAttnProcessor2_0,
)
from PIL import Image
from reference import initial, quiet
from safetensors.torch import load_file, save_file
from tiny_sdxl import WIDTHS, write_sdxl
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from t2vz.engine import noise, vae
from t2vz.errors import ModelError, UnknownModel, UnsupportedModel
from t2vz.models import loading, table
from t2vz.modes import Request, generate
from t2vz.spec import JobSpec

SEED = 17
PROMPT = "a <tabby> cat on the grass"
LORA_LAYERS = ("to_q", "to_v", "to_out.0", "ff.net.0.proj", "q_proj", "out_proj", "fc1")
RANK = 3


def lora_layers(part):
    """Names of the layers that the test's LoRAs change, with their (outputs, inputs)."""
    return {
        name: tuple(layer.weight.shape)
        for name, layer in part.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(LORA_LAYERS)
    }


def write_lora(file, model, parts=("unet", "text_encoder"), *, kohya=False, alpha=2.0):
    """A LoRA of random weights for a folder's model, in diffusers' layout or in kohya's."""
    kind = StableDiffusionXLPipeline if (model / "text_encoder_2").is_dir() else StableDiffusionPipeline
    pipeline, weights = kind.from_pretrained(model), {}
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
    if kind is StableDiffusionXLPipeline:
        prefixes["text_encoder"] = "lora_te1_"
    for part in parts:
        for name, (outputs, inputs) in lora_layers(getattr(pipeline, part)).items():
            down, up = torch.randn(RANK, inputs) / inputs**0.5, torch.randn(outputs, RANK) / RANK
            if kohya:
                inner = name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"
                stem = prefixes[part] + inner.replace(".", "_")
                weights |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
                weights[f"{stem}.alpha"] = torch.tensor(alpha)
            else:
                weights |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    save_file(weights, file, metadata={"format": "pt"})
    return file


@pytest.fixture(scope="module")
def files(tiny_model, tmp_path_factory):
    """Adapters for `tiny_model` by name."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(7)
    made = {
        "lora": write_lora(folder / "lora.safetensors", tiny_model),
        "unet_lora": write_lora(folder / "unet.safetensors", tiny_model, ("unet",)),
        "text_lora": write_lora(folder / "text.safetensors", tiny_model, ("text_encoder",)),
        "kohya": write_lora(folder / "kohya.safetensors", tiny_model, kohya=True),
        "word": folder / "word.safetensors",
        "words": folder / "tabby.safetensors",
        "ip": write_ip_adapter(folder / "ip.safetensors", tiny_model),
        "ip_plus": write_ip_adapter(folder / "plus.safetensors", tiny_model, plus=True),
    }
    save_file({"<tabby>": torch.randn(64)}, made["word"])
    save_file({"emb_params": torch.randn(3, 64)}, made["words"])
    return made


IMAGE_WIDTH, IMAGE_PROJECTED, IMAGE_TOKENS = 24, 40, 4


def write_ip_adapter(file, model, *, plus=False):
    """IP-Adapter weights as they are shared, and their image encoder's folder beside the file."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    width = unet.config.cross_attention_dim
    if plus:
        weights = plus_projection(width)
    else:
        projection = ImageProjection(IMAGE_PROJECTED, width, IMAGE_TOKENS)
        weights = {
            f"image_proj.{new}.{kind}": getattr(getattr(projection, old), kind).detach().clone()
            for old, new in (("image_embeds", "proj"), ("norm", "norm"))
            for kind in ("weight", "bias")
        }
    number = 1
    for name in unet.attn_processors:
        if "attn2" in name:
            layer = unet.get_submodule(name.removesuffix(".processor"))
            for projection in ("to_k", "to_v"):
                shape = getattr(layer, projection).weight.shape
                weights[f"ip_adapter.{number}.{projection}_ip.weight"] = torch.randn(shape) / shape[1] ** 0.5
            number += 2
    save_file(weights, file)
    config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=32,
        projection_dim=IMAGE_PROJECTED,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    encoder = file.parent / "image_encoder"
    if not encoder.exists():
        CLIPVisionModelWithProjection(config).save_pretrained(encoder)
    return file


def plus_projection(width, *, heads=2, depth=4):
    """The resampler of the adapters called Plus."""
    inner = 64 * heads  # the original has heads of 64 numbers
    shapes = {
        "latents": (1, IMAGE_TOKENS, width),
        "proj_in.weight": (width, IMAGE_WIDTH),
        "proj_in.bias": (width,),
        "proj_out.weight": (width, width),
        "proj_out.bias": (width,),
        "norm_out.weight": (width,),
        "norm_out.bias": (width,),
    }
    for i in range(depth):
        shapes |= {f"layers.{i}.0.norm{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")}
        shapes |= {
            f"layers.{i}.0.to_q.weight": (inner, width),
            f"layers.{i}.0.to_kv.weight": (2 * inner, width),
            f"layers.{i}.0.to_out.weight": (width, inner),
            f"layers.{i}.1.0.weight": (width,),
            f"layers.{i}.1.0.bias": (width,),
            f"layers.{i}.1.1.weight": (4 * width, width),
            f"layers.{i}.1.3.weight": (width, 4 * width),
        }
    return {f"image_proj.{name}": torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}


PICTURE = np.random.default_rng(3).integers(0, 256, (50, 70, 3), dtype=np.uint8)


def make(model, **columns):
    columns = {"prompt": PROMPT, "num_inference_steps": 5, "guidance_scale": 4} | columns
    if "ip_adapter" in columns:
        columns["ip_adapter_image"] = "unused"
    spec = JobSpec(model=str(model), **columns)
    return spec, loading.load(spec, "cpu")


def latents(model, frames=1, **columns):
    spec, components = make(model, **columns)
    picture = PICTURE if spec.ip_adapter else None
    return generate(components, Request(spec, SEED, 64, 64, frames, picture=picture)).latents


def theirs(model, put_on, *, prompt=PROMPT, frames=1, **settings):
    """diffusers' pipeline after put_on(pipeline); several frames in the manner of control mode: one initial noise."""
    kind = StableDiffusionXLPipeline if (model / "text_encoder_2").is_dir() else StableDiffusionPipeline
    pipeline = kind.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    put_on(pipeline)
    start = noise.draw(SEED, "initial", [0], (4, 8, 8)).repeat(frames, 1, 1, 1)
    settings = {"num_inference_steps": 5, "guidance_scale": 4, "width": 64, "height": 64} | settings
    return pipeline([prompt] * frames, latents=start, output_type="latent", **settings).images


def close(made, expected):
    assert expected.std() > 0.1
    return (made - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["lora", "unet_lora", "text_lora", "kohya"])
def test_a_lora_makes_diffusers_latents(tiny_model, files, name):
    made = latents(tiny_model, lora=str(files[name]))
    assert close(made, theirs(tiny_model, lambda pipeline: pipeline.load_lora_weights(str(files[name]))))
    assert not close(made, latents(tiny_model))


def two_loras(pipeline, files, *scales):
    for name in ("unet_lora", "lora"):
        pipeline.load_lora_weights(str(files[name]), adapter_name=name)
    pipeline.set_adapters(["unet_lora", "lora"], list(scales))


def test_two_loras_with_weights_and_cross_frame_attention(tiny_model, tiny_controlnets, files):
    """In control mode with a ControlNet of no weight, all frames start from one noise, as in their pipeline."""
    columns = {"lora": f"{files['unet_lora']}+{files['lora']}", "lora_scale": "0.4+-1.3"}
    control = {
        "mode": "control",
        "source": "unused",
        "condition": "edge",
        "controlnet": str(tiny_controlnets[0]),
        "controlnet_conditioning_scale": "0",
    }
    spec, components = make(tiny_model, **columns, **control)
    pictures = np.zeros((2, 64, 64, 3), np.uint8)
    made = generate(components, Request(spec, SEED, 64, 64, 2, conditions=(pictures,))).latents

    def put_on(pipeline):
        two_loras(pipeline, files, 0.4, -1.3)
        pipeline.unet.set_attn_processor(CrossFrameAttnProcessor2_0(batch_size=2))

    assert close(made, theirs(tiny_model, put_on, frames=2))
    assert not close(made[:1], latents(tiny_model, **(columns | {"lora_scale": "1+1"})))


def test_a_word_of_one_vector_makes_diffusers_latents(tiny_model, files):
    made = latents(tiny_model, textual_inversion=str(files["word"]))
    assert close(made, theirs(tiny_model, lambda pipeline: pipeline.load_textual_inversion(str(files["word"]))))
    assert not close(made, latents(tiny_model))


def test_a_word_of_several_vectors_is_called_as_its_file(tiny_model, files):
    prompt = "a tabby in the snow"
    made = latents(tiny_model, prompt=prompt, textual_inversion=str(files["words"]))

    def put_on(pipeline):
        pipeline.load_textual_inversion(load_file(files["words"])["emb_params"], token="tabby")

    assert close(made, theirs(tiny_model, put_on, prompt=prompt))


def test_a_word_that_no_prompt_holds_is_warned_of(tiny_model, files):
    spec, components = make(tiny_model, prompt="a cat", textual_inversion=str(files["word"]))
    warnings = generate(components, Request(spec, SEED, 64, 64, 1)).warnings
    assert warnings == ("textual inversion “<tabby>” has no effect: it stands in no prompt",)


@pytest.mark.parametrize(("name", "scale"), [("ip", 0.3), ("ip_plus", 1.0)])
def test_an_ip_adapter_makes_diffusers_latents(tiny_model, files, name, scale):
    made = latents(tiny_model, ip_adapter=str(files[name]), ip_adapter_scale=scale)

    def put_on(pipeline):
        pipeline.load_ip_adapter(str(files[name].parent), subfolder="", weight_name=files[name].name)
        pipeline.set_ip_adapter_scale(scale)

    assert close(made, theirs(tiny_model, put_on, ip_adapter_image=Image.fromarray(PICTURE)))
    assert not close(made, latents(tiny_model))


def test_an_ip_adapter_makes_diffusers_latents_of_an_edit(tiny_edit_model, tmp_path):
    torch.manual_seed(8)
    ip = write_ip_adapter(tmp_path / "ip.safetensors", tiny_edit_model)
    source = np.random.default_rng(4).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)

    def ours(**columns):
        spec, components = make(tiny_edit_model, mode="edit", source="unused", scheduler="ddim", **columns)
        picture = PICTURE if spec.ip_adapter else None
        return generate(components, Request(spec, SEED, 64, 64, 1, source=source, picture=picture)).latents

    pipeline = quiet(StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_edit_model, safety_checker=None))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.load_ip_adapter(str(tmp_path), subfolder="", weight_name=ip.name)
    expected = pipeline(
        PROMPT,
        image=torch.from_numpy(source).permute(0, 3, 1, 2) / 255,
        num_inference_steps=5,
        guidance_scale=4,
        latents=initial(SEED, 64, 64),
        ip_adapter_image=Image.fromarray(PICTURE),
        output_type="latent",
    ).images
    made = ours(ip_adapter=str(ip))
    assert close(made, expected)
    assert not close(made, ours())


def test_all_at_once_in_frames_that_do_not_depend_on_the_chunks(tiny_model, files):
    columns = {
        "lora": str(files["lora"]),
        "textual_inversion": str(files["word"]),
        "ip_adapter": str(files["ip"]),
        "num_inference_steps": 6,
    }
    whole, single = (latents(tiny_model, 3, chunk_size=size, **columns) for size in (3, 1))
    assert close(single, whole)

    def put_on(pipeline):
        pipeline.load_ip_adapter(str(files["ip"].parent), subfolder="", weight_name=files["ip"].name)
        pipeline.load_textual_inversion(str(files["word"]))
        pipeline.load_lora_weights(str(files["lora"]))

    expected = theirs(tiny_model, put_on, ip_adapter_image=Image.fromarray(PICTURE), num_inference_steps=6)
    assert close(latents(tiny_model, **columns), expected)


def test_what_was_put_on_leaves_no_trace_and_the_model_is_loaded_once(tiny_model, files, monkeypatch):
    loads = []
    monkeypatch.setattr(loading, "_load", lambda *given, load=loading._load: loads.append(given) or load(*given))
    monkeypatch.setattr(loading, "_cache", type(loading._cache)())
    plain = latents(tiny_model, 2)
    base = make(tiny_model)[1]
    weights = {name: weight.clone() for name, weight in base.unet.state_dict().items()}
    vocabulary = len(base.tokenizer)
    rows = [
        {"lora": str(files["lora"])},
        {"lora": str(files["unet_lora"]), "lora_scale": "0.5"},
        {"textual_inversion": str(files["word"]), "ip_adapter": str(files["ip"])},
        {"ip_adapter": str(files["ip_plus"]), "lora": str(files["kohya"])},
    ]
    first = [latents(tiny_model, 2, **row) for row in rows]
    assert torch.equal(latents(tiny_model, 2), plain)
    assert all(torch.equal(latents(tiny_model, 2, **row), made) for row, made in zip(rows, first, strict=True))
    assert torch.equal(latents(tiny_model, 2), plain)
    assert len(loads) == 1

    assert make(tiny_model)[1] is base
    assert base.unet.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, base.unet.state_dict()[name]) for name, weight in weights.items())
    assert len(base.tokenizer) == vocabulary
    assert base.text_encoder.get_input_embeddings().weight.shape[0] == vocabulary
    adapted = make(tiny_model, **rows[0])[1]
    assert adapted.unet.conv_in.weight is base.unet.conv_in.weight  # no second copy
    assert adapted.vae is base.vae


def test_a_vae_of_ones_own(tiny_model, tmp_path):
    plain = make(tiny_model)[1]
    torch.manual_seed(8)
    own = type(plain.vae).from_config(plain.vae.config, scaling_factor=0.3)
    own.save_pretrained(tmp_path / "vae")
    drawn = noise.draw(SEED, "initial", [0], (4, 8, 8))
    for where in (tmp_path / "vae", tmp_path / "vae/diffusion_pytorch_model.safetensors"):
        parts = make(tiny_model, vae=str(where))[1]
        assert parts.unet is plain.unet
        frames = np.concatenate(list(vae.decode(parts.vae, drawn)))
        with torch.no_grad():
            expected = own.decode(drawn / parts.vae.config.scaling_factor).sample
        expected = (expected * 127.5 + 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(frames, expected.astype(np.uint8))
    assert make(tiny_model)[1].vae is plain.vae


def test_a_vae_of_another_family_is_refused(tiny_model, tmp_path):
    vae = type(make(tiny_model)[1].vae)(block_out_channels=(32,), latent_channels=16)
    vae.save_pretrained(tmp_path / "flux")
    with pytest.raises(UnsupportedModel, match=r"^vae .*flux: its latents have 16 channels"):
        make(tiny_model, vae=str(tmp_path / "flux"))


def test_sdxl_takes_them_too(tmp_path, monkeypatch):
    torch.manual_seed(9)
    model = tmp_path / "xl"
    write_sdxl(model)
    everywhere = ("unet", "text_encoder", "text_encoder_2")
    plain = write_lora(tmp_path / "lora.safetensors", model, everywhere)
    kohya = write_lora(tmp_path / "kohya.safetensors", model, everywhere, kohya=True)
    for file in (plain, kohya):
        made = latents(model, lora=str(file), lora_scale="0.8")
        expected = theirs(model, lambda pipeline, file=file: lora_of_weight(pipeline, file, 0.8))
        assert close(made, expected)
        assert not close(made, latents(model))

    word = tmp_path / "tabby.safetensors"
    save_file({"clip_l": torch.randn(2, WIDTHS[0]), "clip_g": torch.randn(2, WIDTHS[1])}, word)
    prompt = "a tabby in the snow"

    def both_encoders(pipeline):
        vectors = load_file(word)
        for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
            encoder, tokenizer = getattr(pipeline, f"text_encoder{suffix}"), getattr(pipeline, f"tokenizer{suffix}")
            pipeline.load_textual_inversion(vectors[key], token="tabby", text_encoder=encoder, tokenizer=tokenizer)

    made = latents(model, prompt=prompt, textual_inversion=str(word))
    assert close(made, theirs(model, both_encoders, prompt=prompt))

    ip = write_ip_adapter(tmp_path / "ip.safetensors", model)
    made = latents(model, ip_adapter=str(ip))

    def put_on(pipeline):
        pipeline.load_ip_adapter(str(tmp_path), subfolder="", weight_name=ip.name)

    assert close(made, theirs(model, put_on, ip_adapter_image=Image.fromarray(PICTURE)))


def lora_of_weight(pipeline, file, scale):
    pipeline.load_lora_weights(str(file), adapter_name="one")
    pipeline.set_adapters(["one"], [scale])


def refused(model, kind, match, **columns):
    with pytest.raises(ModelError, match=match) as caught:
        make(model, **columns)
    assert type(caught.value) is kind
    assert "\n" not in caught.value.message


def test_adapters_of_another_family_are_refused(tiny_model, tmp_path):
    torch.manual_seed(10)
    write_sdxl(tmp_path / "xl")
    lora = write_lora(tmp_path / "xl_lora.safetensors", tmp_path / "xl")
    refused(
        tiny_model, UnsupportedModel, r"^lora .*xl_lora\.safetensors: only \d+ of its \d+ weights fit", lora=str(lora)
    )
    narrow = load_file(write_lora(tmp_path / "narrow.safetensors", tiny_model, ("unet",)))
    narrow = {name: weight[:, :5] if ".lora_A." in name else weight for name, weight in narrow.items()}
    save_file({name: weight.contiguous() for name, weight in narrow.items()}, tmp_path / "narrow.safetensors")
    lora = tmp_path / "narrow.safetensors"
    refused(tiny_model, UnsupportedModel, r"^lora .*narrow\.safetensors: only 0 of its \d+ weights fit", lora=str(lora))
    ip = write_ip_adapter(tmp_path / "xl_ip.safetensors", tmp_path / "xl")
    refused(tiny_model, UnsupportedModel, r"^ip_adapter .*xl_ip\.safetensors: .*family", ip_adapter=str(ip))
    save_file({"<tabby>": torch.randn(1024)}, tmp_path / "wide.safetensors")
    refused(
        tiny_model,
        UnsupportedModel,
        r"^textual_inversion .*wide\.safetensors: made for another family \(vectors of 1024 numbers, not 64\)",
        textual_inversion=str(tmp_path / "wide.safetensors"),
    )


def test_a_lora_that_fits_in_part_only_is_refused(tiny_model, files, tmp_path):
    weights = load_file(files["lora"])
    for old in [name for name in weights if "mid_block" in name]:
        weights[old.replace("mid_block", "no_such_block")] = weights.pop(old)
    save_file(weights, tmp_path / "part.safetensors")
    refused(
        tiny_model, UnsupportedModel, "part.*: only .* made for another family", lora=str(tmp_path / "part.safetensors")
    )
    weights = load_file(files["kohya"])
    stem = next(name for name in weights if name.endswith(".alpha")).removesuffix(".alpha")
    save_file(weights | {f"{stem}.dora_scale": torch.ones(1, 3)}, tmp_path / "dora.safetensors")
    refused(tiny_model, UnsupportedModel, "a DoRA, which isn't covered", lora=str(tmp_path / "dora.safetensors"))
    save_file({"something": torch.zeros(3)}, tmp_path / "none.safetensors")
    refused(tiny_model, UnsupportedModel, "only 0 of its 1 weights fit", lora=str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize(
    ("name", "keep", "said"),
    [
        ("lora", lambda key: "lora_B" in key, r"55 of its 55 layers lack one of their two matrices"),
        ("lora", lambda key: "lora_A" in key, r"55 of its 55 layers lack"),
        ("lora", lambda key: "lora_B" in key or key.startswith("text_encoder"), r"49 of its 55 layers lack"),
        ("lora", lambda key: "lora_B" in key or key.startswith("unet"), r"6 of its 55 layers lack"),
        ("kohya", lambda key: ".lora_down." not in key or "fc1" not in key, r"2 of its 55 layers lack"),
    ],
)
def test_an_incomplete_lora_is_refused(tiny_model, files, tmp_path, name, keep, said):
    half = tmp_path / "half.safetensors"
    save_file({key: weight for key, weight in load_file(files[name]).items() if keep(key)}, half)
    refused(tiny_model, UnsupportedModel, rf"^lora .*half\.safetensors: {said}", lora=str(half))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_lora_that_names_only_the_ends_of_layers_is_refused(tiny_model, tmp_path, part):
    end = "q_proj" if part == "text_encoder" else "attn1.to_q"
    save_file(
        {f"{part}.{end}.lora_A.weight": torch.zeros(RANK, 64), f"{part}.{end}.lora_B.weight": torch.zeros(64, RANK)},
        tmp_path / "ends.safetensors",
    )
    refused(tiny_model, UnsupportedModel, "only 0 of its 2 weights fit", lora=str(tmp_path / "ends.safetensors"))


def test_a_word_without_a_name_is_called_as_its_file(tiny_model, tmp_path):
    for key in ("", " "):
        save_file({key: torch.zeros(64)}, tmp_path / "nameless.safetensors")
        assert make(tiny_model, textual_inversion=str(tmp_path / "nameless.safetensors"))[1].words == ("nameless",)


@pytest.mark.parametrize(
    "vectors", [torch.zeros(0, 64), torch.zeros(1, 2, 64), torch.tensor(1.0), torch.zeros(64, dtype=torch.int64)]
)
def test_what_are_no_vectors_is_refused(tiny_model, tmp_path, vectors):
    save_file({"<cat>": vectors}, tmp_path / "word.safetensors")
    refused(
        tiny_model,
        UnsupportedModel,
        r"^textual_inversion .*word\.safetensors: (float32|int64) \(.*where one vector or rows",
        textual_inversion=str(tmp_path / "word.safetensors"),
    )


def test_a_word_that_is_taken_is_refused(tiny_model, files, tmp_path):
    again = tmp_path / "again.safetensors"
    save_file({"<tabby>": torch.zeros(64)}, again)
    pair = f"{files['word']}+{again}"
    refused(
        tiny_model,
        UnsupportedModel,
        r"^textual_inversion .*again\.safetensors: its word “<tabby>” is one of another of the row's",
        textual_inversion=pair,
    )
    taken = next(iter(make(tiny_model)[1].tokenizer.get_vocab()))
    save_file({taken: torch.zeros(64)}, again)
    refused(tiny_model, UnsupportedModel, "is one that the model has already", textual_inversion=str(again))


def test_what_is_no_adapter_is_refused_by_name_and_column(tiny_model, files, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(files["lora"].read_bytes()[:5000])
    (tmp_path / "image_encoder").symlink_to(files["ip"].parent / "image_encoder")
    for column in ("lora", "textual_inversion", "ip_adapter"):
        refused(tiny_model, ModelError, rf"^{column} .*broken\.safetensors: can't be loaded", **{column: str(broken)})
    torch.save({}, tmp_path / "old.pt")
    refused(tiny_model, UnsupportedModel, r"^lora: .*old\.pt: only \.safetensors", lora=str(tmp_path / "old.pt"))
    refused(tiny_model, UnknownModel, r"^lora: nowhere\.safetensors: no such file", lora="nowhere.safetensors")
    refused(
        tiny_model, UnsupportedModel, r"^ip_adapter .*lora\.safetensors: no IP-Adapter", ip_adapter=str(files["lora"])
    )


def test_an_image_encoder_that_does_not_fit_is_refused(tiny_model, files, tmp_path):
    alone = tmp_path / "ip.safetensors"
    alone.symlink_to(files["ip"])
    refused(tiny_model, UnknownModel, r"^ip_adapter .*: no folder image_encoder beside it", ip_adapter=str(alone))
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=16, projection_dim=16, num_attention_heads=2)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "other")
    refused(
        tiny_model,
        UnsupportedModel,
        r"^image_encoder .*other: it gives 16 numbers, the IP-Adapter reads 40",
        ip_adapter=str(files["ip"]),
        image_encoder=str(tmp_path / "other"),
    )


def test_a_folder_stands_for_its_one_file(tiny_model, files, tmp_path):
    (tmp_path / "any.safetensors").write_bytes(files["lora"].read_bytes())
    made = latents(tiny_model, lora=str(tmp_path))
    assert torch.equal(made, latents(tiny_model, lora=str(files["lora"])))
    (tmp_path / "other.safetensors").write_bytes(files["lora"].read_bytes())
    refused(tiny_model, ModelError, r"several \.safetensors files there \(any.*name one", lora=str(tmp_path))
    (tmp_path / "other.safetensors").rename(tmp_path / "pytorch_lora_weights.safetensors")
    assert torch.equal(made, latents(tiny_model, lora=str(tmp_path)))


def test_everything_that_is_put_on_is_in_the_identity(tiny_model, files, tmp_path):
    def identity(**columns):
        if "ip_adapter" in columns:
            columns["ip_adapter_image"] = "unused"
        return table.identity(JobSpec(prompt="x", **columns))

    one, two = str(files["lora"]), str(files["kohya"])
    plain = identity()
    found = [
        plain,
        identity(lora=one),
        identity(lora=f"{one}+{two}"),
        identity(lora=f"{two}+{one}"),
        identity(textual_inversion=str(files["word"])),
        identity(ip_adapter=str(files["ip"])),
        identity(ip_adapter=str(files["ip"]), image_encoder=str(tiny_model / "text_encoder")),
        identity(vae=str(tiny_model / "vae")),
    ]
    assert len(set(found)) == len(found)
    assert all(each.startswith(plain) for each in found)
    assert found[5].split()[-1].startswith("image_encoder=folder@")
    elsewhere = Path(tmp_path / "renamed.safetensors")
    elsewhere.write_bytes(files["lora"].read_bytes())
    assert identity(lora=str(elsewhere)) == identity(lora=one)


def test_offloading_changes_where_the_parts_lie_not_the_frames(tiny_model, files):
    """On a machine without accelerator the hooks do all but the moving."""
    columns = {"lora": str(files["lora"]), "ip_adapter": str(files["ip"])}
    spec, parts = make(tiny_model, offload=True, **columns)
    request = Request(spec, SEED, 64, 64, 2, picture=PICTURE)
    made = generate(parts, request)
    assert torch.equal(made.latents, latents(tiny_model, 2, **columns))
    plain = make(tiny_model, **columns)[1]
    assert all(
        np.array_equal(*frames)
        for frames in zip(vae.decode(parts.vae, made.latents), vae.decode(plain.vae, made.latents), strict=True)
    )
    hooks = {hook.model: hook.hook for hook in parts.hooks}
    assert set(hooks) == {parts.text_encoder, parts.image_encoder, parts.unet}
    assert hooks[parts.unet].prev_module_hook.model is parts.image_encoder
    assert hooks[parts.image_encoder].prev_module_hook.model is parts.text_encoder
    assert not any(hasattr(part, "_hf_hook") for part in (plain.unet, plain.text_encoder, plain.vae))
    processors = [each for each in parts.unet.attn_processors.values() if isinstance(each, torch.nn.Module)]
    assert processors
    assert set(processors) == set(parts.unet.ip_adapter_processors)  # they move with the UNet
    parts.release()


def test_tiling_is_the_rows_own(tiny_model):
    parts = make(tiny_model, vae_tiling=True)[1]
    plain = make(tiny_model)[1]
    assert parts.vae.use_tiling
    assert not plain.vae.use_tiling
    large = noise.draw(SEED, "initial", [0], (4, 24, 40))
    tiled, whole = (np.concatenate(list(vae.decode(each.vae, large))).astype(int) for each in (parts, plain))
    assert tiled.shape == whole.shape == (1, 192, 320, 3)
    assert 0 < np.abs(tiled - whole).mean() < 8
    frames = np.random.default_rng(0).integers(0, 256, (1, 192, 320, 3), dtype=np.uint8)
    assert not torch.equal(vae.encode(parts.vae, frames), vae.encode(plain.vae, frames))
    small = large[:, :, :16, :16]
    assert np.array_equal(*(np.concatenate(list(vae.decode(each.vae, small))) for each in (parts, plain)))
