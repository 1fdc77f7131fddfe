"""The embedded annotators `mini/depth`, `mini/detector`, `mini/pose`: very small models of the usual classes.

Their weights are random, of a fixed seed: they prove the path from frames to condition frames without a
download, and estimate nothing. Trained ones can take their place under the same names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_SEED = 0

COCO_KEYPOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder",
    "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee",
    "right_knee", "left_ankle", "right_ankle",
)  # fmt: skip


def write_annotators(folder: Path) -> None:
    """Write the three models into `folder`/depth, /detector and /pose, as `from_pretrained` reads them.

    Bit for bit the same in every process with the same torch; torch's random state is left as it was.
    """
    import torch

    for name, make in (("depth", _depth), ("detector", _detector), ("pose", _pose)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            model, processor = make()
        model.eval().save_pretrained(folder / name)
        processor.save_pretrained(folder / name)


def _depth() -> tuple[Any, Any]:
    """Depth Anything on a DINOv2 of 4 thin layers; it sees frames at about 128 px."""
    import torch
    from transformers import (
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        Dinov2Config,
        DPTImageProcessor,
    )

    backbone = Dinov2Config(
        image_size=128,
        patch_size=16,
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.1,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=16,
        initializer_range=0.1,
        reassemble_hidden_size=48,
        neck_hidden_sizes=[16, 24, 32, 48],
        fusion_hidden_size=32,
        head_hidden_size=16,
    )
    model = DepthAnythingForDepthEstimation(config)
    with torch.no_grad():
        model.head.conv3.bias.fill_(1.0)  # random outputs would be cut off at 0 by the last ReLU
    processor = DPTImageProcessor(
        size={"height": 128, "width": 128},
        keep_aspect_ratio=True,
        ensure_multiple_of=16,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return model, processor


def _detector() -> tuple[Any, Any]:
    """RT-DETR on a ResNet of 4 blocks, with the one class `person`; no score reaches the usual 0.5."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor, RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_indices=[2, 3, 4],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[32, 48, 64],
        encoder_hidden_dim=32,
        encoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_in_channels=[32, 32, 32],
        d_model=32,
        decoder_ffn_dim=64,
        decoder_attention_heads=4,
        decoder_layers=2,
        num_queries=20,
        initializer_bias_prior_prob=0.05,
        id2label={0: "person"},
        label2id={"person": 0},
    )
    return RTDetrForObjectDetection(config), RTDetrImageProcessor(size={"height": 128, "width": 128})


def _pose() -> tuple[Any, Any]:
    """VitPose on 2 thin layers; a person is seen as 128 x 96 px, heatmaps are 32 x 24."""
    import torch
    from transformers import (
        VitPoseBackboneConfig,
        VitPoseConfig,
        VitPoseForPoseEstimation,
        VitPoseImageProcessor,
    )

    backbone = VitPoseBackboneConfig(
        image_size=[128, 96],
        patch_size=[16, 16],
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
        out_indices=[2],
    )
    config = VitPoseConfig(
        backbone_config=backbone,
        initializer_range=0.1,
        id2label=dict(enumerate(COCO_KEYPOINTS)),
        label2id={name: label for label, name in enumerate(COCO_KEYPOINTS)},
    )
    model = VitPoseForPoseEstimation(config)
    with torch.no_grad():
        model.head.conv.bias.fill_(0.5)  # heatmaps of no positive value place a keypoint nowhere
    return model, VitPoseImageProcessor(size={"height": 128, "width": 96})
