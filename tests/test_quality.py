"""Measures without ground truth: right on drawn clips, and each of them worse where it must be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from t2vz.cli import main
from t2vz.errors import ModelError
from t2vz.mini import world
from t2vz.mini.family import tokenizer
from t2vz.plan import Job, plan
from t2vz.quality import Meter, edge_f1, measure, optical_flow, seam_ratio, warp_error
from t2vz.render import Settings, opening, render
from t2vz.results import ResultRow


@pytest.fixture(scope="module")
def clip() -> world.Motion:
    """24 frames: a thing moves, the camera pans."""
    rng = np.random.default_rng(3)
    scene = world.sample(rng, subject="star", colour="red", background="grass", time="day", count=1)
    return world.moving(rng, 24, scene=scene, velocity_px=(1.2, 0.0), pan_px=(-1.0, 0.0), growth=1.0)


def test_a_steady_clip_scores_well(clip):
    found = measure([clip.frames], chunk_size=8)
    assert (found["black_frames"], found["frozen_frames"]) == (0, 0)
    assert found["warp_error"] < 5e-4
    assert found["flow_coverage"] > 0.9
    assert found["flicker"] < 0.6
    assert 0.9 < found["seam_ratio"] < 1.1
    assert found["colour_drift"] < 5  # the thing leaves the frame in part
    assert set(found) == {"black_frames", "frozen_frames", "warp_error", "flow_coverage", "flicker", "seam_ratio",
                          "colour_drift"}  # fmt: skip


def test_the_measures_do_not_depend_on_batches(clip):
    whole = measure([clip.frames], chunk_size=8)
    assert measure(np.split(clip.frames, [1, 2, 7, 20]), chunk_size=8) == whole


def test_a_shuffled_clip_scores_badly(clip):
    order = np.random.default_rng(0).permutation(len(clip.frames))
    shuffled, steady = measure([clip.frames[order]]), measure([clip.frames])
    assert shuffled["warp_error"] > 2 * steady["warp_error"]
    assert shuffled["flow_coverage"] < steady["flow_coverage"]
    assert shuffled["flicker"] > 5 * steady["flicker"]


def test_flicker_is_not_fading(clip):
    levels = clip.frames[:1].astype(np.float32).repeat(12, 0)
    ramp = np.arange(12, dtype=np.float32)[:, None, None, None]
    fading = (levels * 0.5 + 4 * ramp).astype(np.uint8)
    flickering = (levels * 0.5 + 20 * (ramp % 2)).astype(np.uint8)
    assert measure([fading])["flicker"] < 0.5
    assert measure([flickering])["flicker"] == pytest.approx(20, abs=0.5)
    assert measure([fading])["colour_drift"] > 10
    assert measure([flickering[:11]])["colour_drift"] == 0  # ends as it began


def test_black_and_frozen_frames_are_counted(clip):
    frames = clip.frames[:10].copy()
    frames[4] = 3
    frames[7:] = frames[6]
    found = measure([frames])
    assert found["black_frames"] == pytest.approx(1 / 10)
    assert found["frozen_frames"] == pytest.approx(3 / 9)


def test_a_seam_is_found_where_it_is_and_only_there(clip):
    frames = clip.frames.astype(np.int16)
    for chunk in range(3):
        frames[8 * chunk : 8 * chunk + 8] += 9 * (chunk % 2)
    frames = frames.clip(0, 255).astype(np.uint8)
    assert measure([frames], chunk_size=8)["seam_ratio"] > 2
    assert measure([frames], chunk_size=7)["seam_ratio"] < 1
    assert "seam_ratio" not in measure([frames[:8]], chunk_size=8)
    assert seam_ratio([1.0, 1.0, 4.0, 1.0, 1.0, 4.0], 3) == 4
    assert seam_ratio([1.0, 1.0, 4.0, 1.0, 1.0, 4.0], 3, offset=1) == pytest.approx(0.4)


def test_optical_flow_finds_the_known_motion(clip):
    flow, valid = optical_flow(clip.frames[0], clip.frames[1])
    both = valid & clip.valid[0]
    assert both.sum() > 0.8 * clip.valid[0].sum()
    moving = both & (np.abs(cv2.Laplacian(cv2.cvtColor(clip.frames[0], cv2.COLOR_RGB2GRAY), cv2.CV_32F)) > 20)
    error = np.linalg.norm(flow - clip.flow[0], axis=-1)[moving]
    assert np.median(error) < 0.3


def test_warp_error_is_laid_out_as_its_formula_says():
    first, second = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)
    first[:, 2] = second[:, 3] = 255
    right = np.broadcast_to(np.float32([1, 0]), (4, 6, 2))
    valid = np.ones((4, 6), bool)
    valid[:, 5] = False
    assert warp_error(first, second, right, valid) == 0
    assert warp_error(first, second, 0 * right, valid) == pytest.approx(2 / 5)
    assert warp_error(first, second, right, ~valid & False) is None


def test_edge_f1():
    edges = np.zeros((32, 32), bool)
    edges[8, 4:28] = True
    assert edge_f1(edges, edges) == 1
    assert edge_f1(np.roll(edges, (1, 1), (0, 1)), edges) == pytest.approx(1)
    assert edge_f1(np.roll(edges, 3, 0), edges) == 0
    assert edge_f1(edges | np.roll(edges, 12, 0), edges) == pytest.approx(2 / 3)  # P = 1/2, R = 1
    assert edge_f1(np.zeros_like(edges), edges) == 0
    assert edge_f1(np.zeros_like(edges), np.zeros_like(edges)) == 1


def test_edges_agree_with_their_own_clip_alone(clip):
    edges = np.stack([cv2.Canny(frame, 100, 200) for frame in clip.frames])[..., None].repeat(3, -1)
    other = world.moving(np.random.default_rng(9), len(edges)).frames
    assert measure([clip.frames], edges=edges)["edge_f1"] == 1
    assert measure([other], edges=edges)["edge_f1"] < 0.5


def test_long_frames_are_measured_at_a_bounded_size():
    frame = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    wide = cv2.resize(frame, (1600, 300), interpolation=cv2.INTER_CUBIC)
    meter = Meter()
    meter.add(np.stack([wide, np.roll(wide, 8, 1)]))
    assert meter._last.shape == (96, 512, 3)
    assert meter.values()["warp_error"] < 1e-3


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights in the hub's layout."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("models") / "clip"
    words = tokenizer()
    thin = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**thin, "vocab_size": len(words), "eos_token_id": words.eos_token_id},
        vision_config={**thin, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_clip_consistency_is_that_of_transformers(clip, clip_model):
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    frames, prompt = clip.frames[::6], "a red star on the grass"
    found = measure(np.split(frames, [2, 3]), clip_model=str(clip_model), prompt=prompt)
    model = CLIPModel.from_pretrained(clip_model).eval()
    inputs = CLIPTokenizer.from_pretrained(clip_model)([prompt], return_tensors="pt")
    inputs |= CLIPImageProcessor.from_pretrained(clip_model)(list(frames), return_tensors="pt")
    with torch.inference_mode():
        out = model(**inputs)
    pictures = torch.nn.functional.normalize(out.image_embeds, dim=-1)
    text = torch.nn.functional.normalize(out.text_embeds, dim=-1)
    between = (pictures[1:] * pictures[:-1]).sum(-1).mean()
    assert found["clip_frame_consistency"] == pytest.approx(float(between), abs=1e-5)
    assert found["clip_prompt_consistency"] == pytest.approx(float((pictures @ text.T).mean()), abs=1e-5)
    assert found["clip_frame_consistency"] < 1
    frozen = measure([frames[:1].repeat(4, 0)], clip_model=str(clip_model), prompt=prompt)
    assert frozen["clip_frame_consistency"] == pytest.approx(1)


@pytest.fixture
def edge_job(tmp_path: Path, write_manifest: Callable[..., Path], clip: world.Motion) -> Job:
    """A control row that follows the edges of 5 drawn frames."""
    (tmp_path / "frames").mkdir()
    for index, frame in enumerate(clip.frames[:5]):
        cv2.imwrite(str(tmp_path / "frames" / f"{index}.png"), frame[..., ::-1])
    row = {"mode": "control", "source": "frames", "condition": "edge", "fps": 4, "chunk_size": 2}
    manifest = write_manifest(tmp_path / "manifest.csv", {**row, "video_length": 5, "format": "png"})
    (job,) = plan(manifest, None)
    assert isinstance(job, Job)
    return job


def rendered(job: Job, settings: Settings) -> ResultRow:
    with opening(settings):
        row = render(job, settings)
    assert row is not None
    return row


def test_a_run_measures_its_rows_when_asked(edge_job, tmp_path, clip_model, capsys):
    plain = rendered(edge_job, Settings(tmp_path / "plain", "m", "run"))
    settings = Settings(tmp_path / "out", "m", "run", quality=True, clip_model=str(clip_model))
    row = rendered(edge_job, settings)
    assert plain.quality is None
    assert row.output_sha256 == plain.output_sha256
    frames = np.stack(
        [cv2.imread(str(file))[..., ::-1] for file in sorted((settings.out / row.output_uri).glob("*.png"))]
    )
    source = np.stack([cv2.imread(str(tmp_path / "frames" / f"{i}.png"))[..., ::-1] for i in range(5)])
    source = np.stack([cv2.resize(frame, (64, 64), interpolation=cv2.INTER_AREA) for frame in source])
    edges = np.stack([cv2.Canny(frame, 100, 200) for frame in source])[..., None].repeat(3, -1)
    expected = measure([frames], chunk_size=2, edges=edges, prompt=edge_job.row.spec.prompt, clip_model=str(clip_model))
    found = json.loads(row.quality)
    assert set(found) == set(expected)
    assert found.pop("edge_f1") == pytest.approx(expected.pop("edge_f1"), abs=0.05)  # another resizing
    assert found == pytest.approx(expected, abs=1e-5)

    assert main(["results", str(settings.out)]) == 0
    assert f"warp_error {found['warp_error']:.3g}" in capsys.readouterr().out


def test_what_can_not_be_measured_fails_no_row(edge_job, tmp_path):
    """And what can be, is."""
    row = rendered(edge_job, Settings(tmp_path / "out", "m", "run", clip_model=str(tmp_path / "none")))
    assert row.status == "ok"
    assert {"flicker", "warp_error", "seam_ratio", "edge_f1"} <= set(json.loads(row.quality))
    assert not any(name.startswith("clip") for name in json.loads(row.quality))
    assert any("quality could not be measured (clip_model: " in warning for warning in row.warnings)


def test_a_clip_model_that_is_none_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="can't be loaded"):
        measure([], clip_model=str(tmp_path))
