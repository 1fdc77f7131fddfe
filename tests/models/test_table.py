"""What a model's name means, and what identifies its weights: on this machine and in the hub's cache."""

from __future__ import annotations

import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2vz.errors import ModelError, UnknownModel, UnsupportedModel
from t2vz.models import loading, table
from t2vz.models.adapters import weight_file
from t2vz.spec import JobSpec

UNET = "unet/diffusion_pytorch_model.safetensors"
FIRST, SECOND = "1" * 40, "2" * 40


def spec(model="mini", **columns):
    return JobSpec(prompt="x", model=str(model), **columns)


def control(condition, **columns):
    return spec(mode="control", condition=condition, **({"source": "unused"} | columns))


def add_one(folder):
    """Change one weight of the model."""
    weights = load_file(folder / UNET)
    weights["conv_in.bias"] += 1
    save_file(weights, folder / UNET, metadata={"format": "pt"})


@pytest.fixture
def hub_model(hub_cache, tiny_model):
    """`somebody/model` in the hub's cache: a branch `main` and, with other weights, `dreambooth`."""
    repository = hub_cache / "models--somebody--model"
    (repository / "refs").mkdir(parents=True)
    for branch, commit in (("main", FIRST), ("dreambooth", SECOND)):
        (repository / "refs" / branch).write_text(commit)
        shutil.copytree(tiny_model, repository / "snapshots" / commit)
    add_one(repository / "snapshots" / SECOND)
    return "somebody/model"


def test_a_folders_identity_is_its_weights_not_its_place(model, tmp_path):
    before = table.identity(spec(model))
    copy = shutil.copytree(model, tmp_path / "elsewhere" / "renamed")
    assert table.identity(spec(copy)) == before
    (copy / "README.md").write_text("says nothing about the frames")
    assert table.identity(spec(copy)) == before
    add_one(copy)
    assert table.identity(spec(copy)) != before


def test_the_names_of_a_folders_files_are_in_its_identity(model):
    before = table.identity(spec(model))
    (model / "unet/config.json").rename(model / "unet/config1.json")
    assert table.identity(spec(model)) != before


def test_identity_holds_every_model_that_is_used_and_no_other():
    assert table.identity(spec()) == "mini/base@2"
    assert table.identity(spec(mode="edit", source="unused")) == "mini/edit@2"
    assert table.identity(control("edge")) == "mini/base@2 mini/controlnet-edge@2"
    assert table.identity(control("depth")) == "mini/base@2 mini/controlnet-depth@2 mini/depth@2"
    assert table.identity(control("edge+pose")).split()[3:] == ["mini/detector@2", "mini/pose@2"]
    assert table.identity(control("depth", source=None, condition_video="ready.mp4")).split()[2:] == []


def test_identity_holds_a_controlnet_of_ones_own(tiny_controlnets):
    one, two = (table.identity(control("edge", controlnet=str(folder))) for folder in tiny_controlnets)
    assert one.startswith("mini/base@2 folder@")
    assert one.split("@")[-1] != two.split("@")[-1]


def test_a_hub_model_is_loaded_at_the_commit_that_identifies_it(hub_model, tiny_model):
    assert table.identity(spec(hub_model)) == f"somebody/model@{FIRST}"
    assert table.identity(spec(hub_model, revision="dreambooth")) == f"somebody/model@{SECOND}"
    assert table.identity(spec(hub_model, revision=SECOND)) == f"somebody/model@{SECOND}"

    expected = load_file(tiny_model / UNET)["conv_in.bias"]
    for revision, change in ((None, 0), ("dreambooth", 1), (SECOND, 1)):
        unet = loading.load(spec(hub_model, revision=revision), "cpu").unet
        assert torch.equal(unet.conv_in.bias, expected + change)
    assert loading.native_px(spec(hub_model)) == 128


def test_a_hub_models_one_weight_file_is_found_at_the_commit(hub_cache):
    repository = hub_cache / "models--somebody--lora"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(FIRST)
    (repository / "snapshots" / FIRST / "unet").mkdir(parents=True)
    file = repository / "snapshots" / FIRST / "style.safetensors"
    for path in (file, file.parent / "unet" / "model.safetensors"):
        save_file({"x": torch.zeros(1)}, path)
    assert table.identity(spec(lora="somebody/lora")) == f"mini/base@2 lora=somebody/lora@{FIRST}"
    assert weight_file("somebody/lora", "usual.safetensors", "lora") == str(file)
    with pytest.raises(ModelError, match=r"nobody/lora: not in the local cache"):
        weight_file("nobody/lora", "usual.safetensors", "lora")
    file.unlink()
    with pytest.raises(ModelError, match=r"^lora somebody/lora: no \.safetensors files there"):
        weight_file("somebody/lora", "usual.safetensors", "lora")


def test_a_branch_that_moves_meanwhile_does_not_change_the_run(hub_model, hub_cache, tiny_model):
    row = spec(hub_model)
    planned = table.identity(row)
    (hub_cache / "models--somebody--model/refs/main").write_text(SECOND)
    unet = loading.load(row, "cpu").unet
    assert torch.equal(unet.conv_in.bias, load_file(tiny_model / UNET)["conv_in.bias"])
    assert table.identity(row) == planned


def test_a_hub_model_without_tokenizer_files_is_refused(hub_model, hub_cache):
    shutil.rmtree(hub_cache / "models--somebody--model/snapshots" / FIRST / "tokenizer")
    with pytest.raises(ModelError, match="somebody/model"):
        loading.load(spec(hub_model), "cpu")


@pytest.mark.parametrize("columns", [{}, {"revision": "no-such-branch"}])
def test_what_is_not_in_the_cache_fails_at_once_without_a_network(hub_model, columns):
    name = hub_model if columns else "nobody/nothing"
    begin_s = time.monotonic()
    for ask in (table.identity, lambda row: loading.load(row, "cpu"), loading.native_px):
        with pytest.raises(ModelError, match=f"{name}: not in the local cache.*name a folder") as caught:
            ask(spec(name, **columns))
        assert "\n" not in caught.value.message
    assert time.monotonic() - begin_s < 5


@pytest.mark.parametrize(("name", "near"), [("minni", "`mini`"), ("sd1.5", "`sd15`"), ("SD15", "`sd15`")])
def test_an_unknown_name_suggests_a_near_one(name, near):
    with pytest.raises(UnknownModel, match=f"no model `{name}`: did you mean {near}"):
        table.identity(spec(name))


@pytest.mark.parametrize("name", ["quite-different", "no/such/folder", "a b/c", "folder/"])
def test_an_unknown_name_says_what_is_known(name):
    with pytest.raises(UnknownModel, match="known names: mini, sd15"):
        table.identity(spec(name))


@pytest.mark.parametrize("name", ["../escape", "/no/such", "~/m.safetensors", "m.safetensors", "org/m.safetensors"])
def test_what_is_written_as_a_path_is_no_hub_id(name):
    with pytest.raises(UnknownModel, match=f"^{name}: no such file or folder"):
        table.identity(spec(name))


def test_a_folder_without_a_sign_of_a_model_is_refused_before_its_files_are_read(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "model.safetensors").symlink_to("/proc/self/mem")  # reading it is an error
    with pytest.raises(UnknownModel, match="no model there"):
        table.identity(spec(tmp_path))


def test_a_rows_model_is_a_whole_pipeline(tiny_controlnets):
    with pytest.raises(UnsupportedModel, match=r"it has no model_index\.json"):
        table.identity(spec(tiny_controlnets[0]))


def test_an_endless_name_is_shortened_and_told_without_class_names():
    with pytest.raises(ModelError) as caught:
        table.identity(spec("/" + "x" * 3000))
    assert len(caught.value.message) < 400
    assert "OSError" not in caught.value.message


def test_every_family_names_a_model_for_every_mode():
    for name in table.MODELS:
        assert table.model_reference(spec(name)) != table.model_reference(spec(name, mode="edit", source="unused"))
        for condition in ("edge", "depth", "pose"):
            assert table.controlnet_references(control(condition, model=name))


def test_members_of_mini_are_known_by_name():
    assert {path.name for path in table.MINI_FOLDER.iterdir()} == table.MINI_MEMBERS.keys()
    assert table.identity(spec("mini/dreambooth", lora="mini/lora")) == "mini/dreambooth@2 lora=mini/lora@2"
    assert table.controlnet_references(control("edge", model="mini/dreambooth")) == ("mini/controlnet-edge",)
    with pytest.raises(UnknownModel, match="mini has base, controlnet-depth"):
        table.identity(spec("mini/../mini"))


CONTROL = {"mode": "control", "source": "unused"}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"model": "mini/lora"},
            "^model mini/lora is a LoRA, not a text-to-image model: name mini/base or mini/dreambooth",
        ),
        ({"model": "mini/edit"}, "^model mini/edit is an InstructPix2Pix model, not a text-to-image model"),
        (
            {"model": "mini/dreambooth", "mode": "edit", "source": "unused"},
            "^model mini/dreambooth is .*, not an InstructPix2Pix model: name mini/edit",
        ),
        ({"controlnet": "mini/base", "condition": "edge", **CONTROL}, "^controlnet: mini/base is .*, not a ControlNet"),
        ({"depth_model": "mini/pose", "condition": "depth", **CONTROL}, "^depth_model: .*, not a depth estimator"),
        ({"pose_model": "mini/depth", "condition": "pose", **CONTROL}, "^pose_model: .*, not a pose estimator"),
        ({"person_detector": "mini/depth", "condition": "pose", **CONTROL}, "^person_detector: .*name mini/detector"),
        (
            {"annotators": "mini/depth", "condition": "hed", "controlnet": "mini/controlnet-edge", **CONTROL},
            "^annotators: mini/depth",
        ),
        ({"lora": "mini/base"}, "^lora: mini/base is a text-to-image model, not a LoRA: name mini/lora"),
        ({"textual_inversion": "mini/base"}, "^textual_inversion: .* mini has nothing that is"),
        ({"vae": "mini/base"}, "^vae: mini/base"),
        ({"vae": "mini/lora"}, "^vae: mini/lora"),
        (
            {"foreground_mask": "segmentation", "background_smoothing": 0.4, "segmentation_model": "mini/detector"},
            "^segmentation_model: mini/detector is a person detector",
        ),
        (
            {"ip_adapter": "somebody/adapter", "ip_adapter_image": "a.png", "image_encoder": "mini/base"},
            "^image_encoder: mini/base",
        ),
    ],
)
def test_a_member_of_mini_in_the_wrong_place_is_refused_by_its_column(columns, said, monkeypatch):
    monkeypatch.setattr(table.hub, "commit", lambda reference, wanted=None: FIRST)
    with pytest.raises(UnsupportedModel, match=said):
        table.identity(spec(**columns))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"lora": "mini"}, "^lora: mini is a whole family; name e.g. mini/lora"),
        ({"vae": "sd15"}, "^vae: sd15 is a whole family; name a folder"),
        ({"depth_model": "mini", "condition": "depth", **CONTROL}, "^depth_model: .* e.g. mini/depth"),
        ({"lora": "no such"}, "^lora: no model `no such`: give a folder, a .safetensors file or a hub id$"),
    ],
)
def test_the_name_of_a_family_is_for_model_alone(columns, said):
    with pytest.raises(UnknownModel, match=said):
        table.identity(spec(**columns))


def test_a_device_is_no_model():
    with pytest.raises(UnsupportedModel, match=r"^lora: /dev/null: not a regular file"):
        table.identity(spec(lora="/dev/null"))


def test_base_config_is_in_the_identity_of_a_single_file_alone(tiny_model, tiny_edit_model, tmp_path):
    def identity(model, base):
        row = {"prompt": "x", "model": str(model), "base_config": str(base)}
        return table.identity(JobSpec.model_validate(row, context={"base_config"}))

    assert identity(tiny_model, tmp_path / "nowhere") == table.identity(spec(tiny_model))
    file = tmp_path / "one.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    assert len({table.identity(spec(file)), identity(file, tiny_model), identity(file, tiny_edit_model)}) == 3
    with pytest.raises(UnknownModel, match=r"^base_config: .*nowhere: no such file or folder"):
        identity(file, tmp_path / "nowhere")
    with pytest.raises(UnsupportedModel, match=r"^base_config: .*unet: not a whole diffusers model"):
        identity(file, tiny_model / "unet")
