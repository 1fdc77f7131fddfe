"""The training of the `mini` family, at toy settings: every stage runs, fits together, and goes on after a kill."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from t2vz.mini import annotators, data, family, fit, stages, train, world
from t2vz.mini.fit import Draw, Losses, Recipe
from t2vz.mini.stages import Run
from t2vz.models import loading
from t2vz.spec import JobSpec


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole family after two or three steps of each stage."""
    out = tmp_path_factory.mktemp("mini")
    train.main(["--out", str(out), "--steps-scale", "0.0008"])
    return out


def test_every_stage_leaves_its_result_and_its_curve(trained: Path) -> None:
    for name in train.STAGES:
        assert (trained / name).is_dir(), name
    for name in stages.RECIPES:
        with open(trained / "curves" / f"{name}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        losses = [float(value) for row in rows for key, value in row.items() if key != "step"]
        assert losses, name
        assert np.isfinite(losses).all(), name


def test_the_family_is_small_and_half_precision(trained: Path) -> None:
    files = [path for path in (trained / "family").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 36e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt")]


@pytest.mark.parametrize("mode", ["text", "edit"])
def test_the_pipelines_load_as_stable_diffusion_does(trained: Path, mode: str) -> None:
    folder = trained / "family" / ("edit" if mode == "edit" else "base")
    options = {"source": "clip.mp4", "prompt": "make it night"} if mode == "edit" else {"prompt": "a red ball"}
    parts = loading.load(JobSpec.model_validate({"mode": mode, "model": str(folder), **options}), "cpu")
    assert parts.cell_px == family.CELL_PX
    assert parts.unet.config.in_channels == (8 if mode == "edit" else 4)


def test_a_finished_stage_is_not_run_again(trained: Path) -> None:
    before = (trained / "vae" / "config.json").stat().st_mtime_ns
    train.main(["--out", str(trained), "--stage", "vae", "--steps-scale", "0.0008"])
    assert (trained / "vae" / "config.json").stat().st_mtime_ns == before


def test_a_stage_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="base needs vae first"):
        train.main(["--out", str(tmp_path), "--stage", "base"])


@pytest.mark.parametrize("muon", [0.0, 1e-2])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, muon: float) -> None:
    monkeypatch.setattr(fit, "CHECKPOINT_EVERY_S", 0.0)
    recipe = Recipe(steps=60, batch=4, lr=1e-2, warmup=5, muon=muon)

    def run(out: Path, killed_at: int | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

        def losses(draw: Draw) -> Losses:
            if draw.step == killed_at:
                raise KeyboardInterrupt
            x = torch.randn(recipe.batch, 3, generator=draw.torch)
            return {"square": (model(x) - x.sum(1, keepdim=True) * draw.numpy.random()).square().mean()}

        fit.fit("toy", model, losses, recipe, out, "cpu")
        return model.state_dict()

    whole = run(tmp_path / "whole", killed_at=None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", killed_at=47)
    resumed = run(tmp_path / "killed", killed_at=None)
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name
    assert (tmp_path / "whole/curves/toy.csv").read_bytes() == (tmp_path / "killed/curves/toy.csv").read_bytes()


def test_words_of_the_world_are_one_token_and_any_text_is_read() -> None:
    words = family.tokenizer()
    for word in (*world.WORDS, family.ZORP):
        assert len(words(word).input_ids) == 3, word  # with start and end
    for text in ("Qualle, 12 %", "дом", "🐈"):
        ids = words(text).input_ids
        assert words.decode(ids, skip_special_tokens=True).replace(" ", "") == text.lower().replace(" ", "")


def test_a_new_vae_gives_the_cells_mean_colours() -> None:
    torch.manual_seed(0)
    vae = family.vae()
    family.start_as_average(vae)
    x = data.to_tensor(data.pictures(data.scenes(0, 8)))
    with torch.inference_mode():
        again = vae.decode(vae.encode(x).latent_dist.mode()).sample
    mean = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(x, 8), scale_factor=8)
    correlation = np.corrcoef(again.flatten().numpy(), mean.flatten().numpy())[0, 1]
    assert correlation > 0.9


def test_an_edit_unet_starts_as_its_base() -> None:
    torch.manual_seed(0)
    base = family.unet()
    wider = family.edit_unet(base)
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 77, family.TEXT_WIDTH)
    with torch.inference_mode():
        expected = base(x, 5, text).sample
        got = wider(torch.cat([x, torch.randn_like(x)], 1), 5, text).sample
    assert torch.allclose(got, expected, atol=1e-6)


def test_a_controlnet_starts_without_effect_and_can_learn_from_its_condition() -> None:
    torch.manual_seed(0)
    control = family.controlnet(family.unet())
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 77, family.TEXT_WIDTH)
    down, middle = control(x, 5, text, torch.rand(1, 3, 128, 128), return_dict=False)
    assert all((output == 0).all() for output in (*down, middle))
    with torch.no_grad():  # after a first step
        control.controlnet_mid_block.weight.normal_()
    _, one = control(x, 5, text, torch.rand(1, 3, 128, 128), return_dict=False)
    _, other = control(x, 5, text, torch.zeros(1, 3, 128, 128), return_dict=False)
    assert not torch.allclose(one, other)


def test_heatmaps_say_where_the_joints_are() -> None:
    """Through VitPose's own processor: what it reads from a perfect heatmap are the joints."""
    from types import SimpleNamespace

    _, processor = annotators.pose_model()
    scene = data.scenes(3, 1, subject="person")[0]
    box = annotators.person_box(scene)
    assert box is not None
    joints = annotators.coco_joints(scene)
    heatmaps = annotators._heatmaps(annotators._in_heatmap(joints, box, processor)[None])
    read = processor.post_process_pose_estimation(
        SimpleNamespace(heatmaps=torch.from_numpy(heatmaps)), boxes=[[box.tolist()]]
    )
    assert np.abs(read[0][0]["keypoints"].numpy() - joints).max() < 0.5


def test_zorp_captions_say_nothing_of_the_ball_in_its_place() -> None:
    rng = np.random.default_rng(0)
    for scene in data.zorp_scenes(0, 20):
        said = data.zorp_caption(scene, rng).split()
        assert family.ZORP in said
        assert not {"ball", *world.COLOURS} & set(said)


def test_conditions_are_those_of_the_pipeline() -> None:
    from t2vz.conditions import ConditionOptions, edge

    scene = data.scenes(5, 1, subject="person")[0]
    frame = world.draw(scene)
    options = ConditionOptions(depth_model="", pose_model="", person_detector="", annotators="")
    assert np.array_equal(data.condition("edge", scene, frame), edge.extract(frame[None], options)[0][0])
    assert data.condition("pose", scene, frame).any()
    depth = data.condition("depth", scene, frame)
    assert depth.max() == 255
    assert depth.min() == 0


def test_recipes_shrink_for_trials() -> None:
    run = Run(Path("unused"), scale=0.001)
    assert run.recipe(stages.RECIPES["base"]).steps < 10
