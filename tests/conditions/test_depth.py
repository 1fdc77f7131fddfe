"""Depth: one range for the whole clip, near is bright, and the model's own predictions underneath."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from t2vz.conditions import extract
from t2vz.conditions.depth import normalise, predict, render, value_range


@pytest.fixture
def approach():
    """Inverse depth of a background at rest, graded from 1 to 2, before which an object comes from 2 to 9."""
    background = np.tile(np.linspace(1, 2, 40, dtype=np.float32), (30, 1))
    clip = np.repeat(background[None], 6, axis=0)
    clip[:, 5:25, 15:35] = np.linspace(2, 9, 6, dtype=np.float32)[:, None, None]
    return clip


def test_a_moving_object_leaves_the_background_as_it_is(approach):
    pictures = render(approach, 30, 40)
    background = pictures[:, :, :12]
    assert background.std(axis=(1, 2, 3)).min() > 0
    assert (background == background[0]).all()
    # Normalising frame by frame, as controlnet-aux does, fails that by far.
    alone = np.stack([render(frame[None], 30, 40)[0] for frame in approach])[:, :, :12].astype(int)
    assert abs(alone - alone[0]).max() > 50


def test_near_is_bright(approach):
    pictures = render(approach, 30, 40)
    nearness = pictures[:, 15, 25, 0].astype(int)
    assert (np.diff(nearness) > 0).all()
    assert nearness[-1] == 255


def test_the_range_is_that_of_numpy_s_percentiles():
    depth = np.random.default_rng(0).gamma(2, 3, (7, 20, 30)).astype(np.float32)
    low, high = np.percentile(depth.reshape(-1), [2, 98])
    assert value_range(depth) == pytest.approx((low, high), rel=1e-6)
    expected = np.clip((depth - low) / (high - low), 0, 1)
    np.testing.assert_allclose(normalise(depth, low, high), expected, atol=1e-6)


def test_a_large_clip_s_range_is_sampled(monkeypatch):
    depth = np.random.default_rng(0).gamma(2, 3, (4, 200, 300)).astype(np.float32)
    exact = np.percentile(depth, [2, 98])
    monkeypatch.setattr("t2vz.conditions.depth._SAMPLE", depth.size // 20)
    assert value_range(depth) == pytest.approx(exact, rel=0.05)


def test_constant_depth_is_black_and_a_rare_object_survives():
    depth = np.full((2, 100, 100), 3.0, np.float32)
    assert not render(depth, 100, 100).any()
    depth[1, 50, 50] = 4.0  # less than the 2 % that the percentiles ignore
    assert render(depth, 100, 100)[1, 50, 50, 0] == 255
    assert render(depth, 100, 100)[0].max() == 0


def directly(frames, folder):
    """transformers as its documentation calls it, a frame at a time."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForDepthEstimation.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        outputs = [model(**processor(Image.fromarray(frame), return_tensors="pt")) for frame in frames]
    return np.concatenate([each.predicted_depth.numpy() for each in outputs])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_predictions_are_the_model_s_whatever_the_batch(batch_size, noise, options):
    depth = predict(noise, replace(options, batch_size=batch_size))
    assert depth.std() > 0.1
    np.testing.assert_allclose(depth, directly(noise, options.depth_model), atol=1e-4)


def test_a_metric_model_is_inverted(noise, options, tmp_path):
    shutil.copytree(options.depth_model, tmp_path / "metric")
    config = json.loads((tmp_path / "metric" / "config.json").read_text())
    config |= {"depth_estimation_type": "metric", "max_depth": 20}
    (tmp_path / "metric" / "config.json").write_text(json.dumps(config))
    metric = replace(options, depth_model=str(tmp_path / "metric"))
    distance = directly(noise[:2], metric.depth_model)
    assert distance.max() > distance.min() > 0
    np.testing.assert_allclose(predict(noise[:2], metric), 1 / distance, rtol=1e-4)


def test_the_border_that_zoedepth_pads_is_taken_off(noise, options, tmp_path):
    import torch
    from PIL import Image
    from transformers import BeitConfig, ZoeDepthConfig, ZoeDepthForDepthEstimation, ZoeDepthImageProcessor

    backbone = BeitConfig(
        image_size=64, patch_size=16, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=32, out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
        use_relative_position_bias=True, initializer_range=0.3,
    )  # fmt: skip
    config = ZoeDepthConfig(
        backbone_config=backbone, neck_hidden_sizes=[16, 16, 16, 16], fusion_hidden_size=16,
        initializer_range=0.3,
        bottleneck_features=16, num_relative_features=8, bin_embedding_dim=8, num_attractors=[4, 2, 2, 1],
        bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ZoeDepthForDepthEstimation(config).save_pretrained(tmp_path)
    processor = ZoeDepthImageProcessor(size={"height": 96, "width": 96}, ensure_multiple_of=32)
    processor.save_pretrained(tmp_path)

    model = ZoeDepthForDepthEstimation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        outputs = model(**processor(Image.fromarray(noise[0]), return_tensors="pt"))
    size = tuple(outputs.predicted_depth.shape[-2:])
    assert outputs.predicted_depth.std() > 1
    (expected,) = processor.post_process_depth_estimation(outputs, [noise.shape[1:3]], [size])
    depth = predict(noise[:1], replace(options, depth_model=str(tmp_path)))
    np.testing.assert_allclose(depth[0], 1 / expected["predicted_depth"].numpy(), rtol=1e-3)


@pytest.mark.parametrize("shape", [(1, 90, 130, 3), (2, 16, 16, 3), (3, 64, 64, 3)])
def test_the_whole_path(shape, options):
    frames = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    pictures, warnings = extract("depth", frames, options)
    assert pictures.shape == shape
    assert pictures.dtype == np.uint8
    assert (pictures[..., :1] == pictures).all()
    assert pictures.max() > 240  # not 255 where the model sees more pixels than the frame has
    assert pictures.min() < 15
    assert warnings == ()


def test_a_black_clip(options):
    pictures, _ = extract("depth", np.zeros((2, 40, 40, 3), np.uint8), options)
    assert pictures.shape == (2, 40, 40, 3)


def test_a_model_without_output_gives_black_and_says_so(noise, options, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(options.depth_model, tmp_path / "dead")
    weights = load_file(tmp_path / "dead" / "model.safetensors")
    weights["head.conv3.bias"].fill_(-100)  # below 0 everywhere, so that the ReLU cuts all off
    save_file(weights, tmp_path / "dead" / "model.safetensors", metadata={"format": "pt"})
    pictures, warnings = extract("depth", noise, replace(options, depth_model=str(tmp_path / "dead")))
    assert not pictures.any()
    assert "same everywhere" in warnings[0]
