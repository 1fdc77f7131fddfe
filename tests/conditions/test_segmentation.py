"""Foreground masks: what transformers' own post-processing makes of the same model's output."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    MobileNetV2Config,
    MobileNetV2ForSemanticSegmentation,
    MobileNetV2ImageProcessor,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from t2vz.conditions.segmentation import background_classes, foreground
from t2vz.errors import UnknownModel, UnsupportedModel


def segformer(folder, names, kind=SegformerForSemanticSegmentation):
    config = SegformerConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16,
        initializer_range=0.5, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


def labels(frames, folder):
    """Class of each pixel, as transformers' documentation has it, a frame at a time: int (F, H, W)."""
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    out = []
    with torch.no_grad():
        for frame in frames:
            outputs = model(**processor(frame, return_tensors="pt"))
            out += processor.post_process_semantic_segmentation(outputs, target_sizes=[frame.shape[:2]])
    return np.stack([each.numpy() for each in out])


@pytest.fixture
def frames():
    """Coloured blocks, uint8 (5, 80, 112, 3)."""
    blocks = np.random.default_rng(0).integers(0, 256, (5, 10, 14, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=1).repeat(8, axis=2)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_is_not_background_is_foreground(frames, tmp_path, batch_size):
    model = segformer(tmp_path, ["dog", "Background"])
    masks = foreground(frames, model, batch_size=batch_size)
    assert masks.dtype == bool
    assert 0.05 < masks.mean() < 0.95
    assert (masks != (labels(frames, tmp_path) == 0)).mean() < 1e-3  # but for ties


def test_any_of_several_things_is_foreground(frames, tmp_path):
    model = segformer(tmp_path, ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"])
    masks = foreground(frames, model)
    assert 0.05 < masks.mean() < 0.95
    # Theirs is the likeliest class of enlarged scores, ours enlarges by how much a thing beats the background.
    assert (masks != (labels(frames, tmp_path) != 0)).mean() < 0.02


def test_a_single_class_is_the_foreground(frames, tmp_path):
    model = segformer(tmp_path, ["salient"])
    masks = foreground(frames, model)
    network = SegformerForSemanticSegmentation.from_pretrained(tmp_path).eval()
    inputs = SegformerImageProcessor.from_pretrained(tmp_path)(list(frames), return_tensors="pt")
    with torch.no_grad():
        logits = torch.nn.functional.interpolate(network(**inputs).logits, (80, 112), mode="bilinear")
    assert 0.05 < masks.mean() < 0.95
    assert (masks != (logits[:, 0] > 0).numpy()).mean() < 1e-3


def test_the_whole_frame_is_looked_at(tmp_path):
    """DeepLab's processor crops the middle out unless told not to."""
    config = MobileNetV2Config(num_labels=2, depth_multiplier=0.25, finegrained_output=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MobileNetV2ForSemanticSegmentation(config).save_pretrained(tmp_path)
    processor = MobileNetV2ImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    processor.save_pretrained(tmp_path)
    seen = []
    frames = np.zeros((1, 64, 256, 3), np.uint8)
    original = MobileNetV2ForSemanticSegmentation.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MobileNetV2ForSemanticSegmentation,
            "forward",
            lambda self, pixel_values: seen.append(pixel_values.shape) or original(self, pixel_values),
        )
        assert foreground(frames, str(tmp_path)).shape == (1, 64, 256)
    assert seen[0][-2:] == (64, 256)


def test_models_that_know_no_background_are_refused(tmp_path):
    model = segformer(tmp_path, ["wall", "sky", "tree"])
    config = SegformerConfig.from_pretrained(model)
    with pytest.raises(UnsupportedModel, match="none of its 3 classes is called background"):
        background_classes(config, model)
    assert background_classes(SegformerConfig(id2label={0: "hat", 1: "background"}), "x") == [1]
    assert background_classes(SegformerConfig(num_labels=5), "x") == [0]


def test_models_for_something_else_are_refused(frames, tmp_path):
    model = segformer(tmp_path, ["background", "dog"], kind=SegformerForImageClassification)
    with pytest.raises(UnsupportedModel, match="ForImageClassification"):
        foreground(frames, model)
    with pytest.raises(UnknownModel):
        foreground(frames, str(tmp_path / "absent"))
