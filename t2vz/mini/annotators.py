"""The family's annotators, which estimate depth, persons and poses: architectures and training.

Classes of transformers that `t2vz.conditions` loads for real models too. `…_model` return (model, processor).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from t2vz.mini import data, world
from t2vz.mini.fit import Draw, Losses
from t2vz.mini.stages import RECIPES, Run, fit_stage, keep, load_vae
from t2vz.mini.world import Frame, Scene

COCO_KEYPOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder",
    "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee",
    "right_knee", "left_ankle", "right_ankle",
)  # fmt: skip
# OpenPose's index of each of COCO's keypoints.
_OPENPOSE = (0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10)
_HEATMAP_SIGMA = 2.0  # cells, as VitPose was trained at 64×48

LossesOf = Callable[[Draw], Losses]


def rough(frames: Frame, rng: np.random.Generator) -> Frame:
    """The frames as generated or compressed ones look: each blurred, noisy and shifted in colour by a drawn amount."""
    import cv2

    out = np.empty_like(frames)
    for frame, result in zip(frames, out, strict=True):
        soft = cv2.GaussianBlur(frame, (0, 0), rng.uniform(0.1, 1.2)).astype(np.float32)
        soft += rng.normal(0, rng.uniform(0, 7), frame.shape) + rng.uniform(-10, 10, 3)
        result[:] = soft.round().clip(0, 255)
    return out


# --- depth -----------------------------------------------------------------------------------------------------------


def depth_model() -> tuple[Any, Any]:
    """Depth Anything on a DINOv2 of 4 thin layers; it sees frames at about 128 px, in patches of 16."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

    backbone = Dinov2Config(
        image_size=world.SIZE_PX,
        patch_size=16,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        mlp_ratio=2,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=16,
        reassemble_hidden_size=64,
        neck_hidden_sizes=[16, 24, 32, 48],
        fusion_hidden_size=32,
        head_hidden_size=16,
    )
    model = DepthAnythingForDepthEstimation(config)
    _bias(model.head.conv3, 0.5)  # the last ReLU would cut off much of what a new model predicts
    processor = DPTImageProcessor(
        size={"height": world.SIZE_PX, "width": world.SIZE_PX},
        keep_aspect_ratio=True,
        ensure_multiple_of=16,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return model, processor


def depth_losses(model: Any, scenes: list[Scene], batch: int, device: str) -> LossesOf:
    """L1 of inverse depth, 0 to 1, and of its differences to the neighbours."""
    import torch

    frames = data.pictures(scenes)
    truth = np.stack([world.depth(scene) for scene in scenes])

    def losses(draw: Draw) -> Losses:
        chosen = draw.numpy.integers(len(frames), size=batch)
        x = data.to_tensor(rough(frames[chosen], draw.numpy), device)
        target = torch.from_numpy(truth[chosen]).to(device).float() / 255
        predicted = model(pixel_values=x).predicted_depth.float()
        error = predicted - target
        slope = (error[:, 1:] - error[:, :-1]).abs().mean() + (error[..., 1:] - error[..., :-1]).abs().mean()
        return {"l1": error.abs().mean(), "slope": slope}

    return losses


def depth_score(model: Any, scenes: list[Scene], device: str) -> str:
    """Mean error of inverse depth, as a share of its range, on other scenes."""
    import torch

    rng = np.random.default_rng(0)
    x = data.to_tensor(rough(data.pictures(scenes), rng), device)
    with torch.inference_mode():
        predicted = model(pixel_values=x).predicted_depth.float().cpu().numpy()
    truth = np.stack([world.depth(scene) for scene in scenes]) / 255
    return f"mean error {100 * np.abs(predicted - truth).mean():.2f} % of the range"


# --- persons ---------------------------------------------------------------------------------------------------------


def detector_model() -> tuple[Any, Any]:
    """RT-DETR on a ResNet of 4 blocks, with the one class `person`."""
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
        freeze_backbone_batch_norms=False,  # nothing is pre-trained
        encoder_in_channels=[32, 48, 64],
        encoder_hidden_dim=48,
        encoder_ffn_dim=96,
        encoder_attention_heads=4,
        decoder_in_channels=[48, 48, 48],
        d_model=48,
        decoder_ffn_dim=96,
        decoder_attention_heads=4,
        decoder_layers=2,
        num_queries=10,
        num_denoising=10,
        id2label={0: "person"},
        label2id={"person": 0},
    )
    size = {"height": world.SIZE_PX, "width": world.SIZE_PX}
    return RTDetrForObjectDetection(config), RTDetrImageProcessor(size=size)


def person_box(scene: Scene) -> NDArray[np.float64] | None:
    """x, y, width, height in px of the person's visible pixels; None without one."""
    for thing, mask in zip(scene.things, world.masks(scene), strict=True):
        if thing.subject == "person" and mask.any():
            rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
            left, top = columns[0], rows[0]
            return np.array([left, top, columns[-1] + 1 - left, rows[-1] + 1 - top], np.float64)
    return None


def detector_losses(model: Any, scenes: list[Scene], frames: Frame, batch: int, device: str) -> LossesOf:
    """RT-DETR's own loss."""
    import torch

    labels = []
    for scene in scenes:
        box = person_box(scene)
        boxes = [] if box is None else [[box[0] + box[2] / 2, box[1] + box[3] / 2, box[2], box[3]]]
        labels.append(
            {
                "class_labels": torch.zeros(len(boxes), dtype=torch.int64, device=device),
                "boxes": torch.tensor(boxes, dtype=torch.float32, device=device).reshape(-1, 4) / world.SIZE_PX,
            }
        )

    def losses(draw: Draw) -> Losses:
        chosen = draw.numpy.integers(len(frames), size=batch)
        x = (data.to_tensor(rough(frames[chosen], draw.numpy), device) + 1) / 2
        # Its denoising noise comes from torch's global generator.
        torch.manual_seed(draw.torch.initial_seed())
        return {"loss": model(pixel_values=x, labels=[labels[i] for i in chosen]).loss}

    return losses


def detector_score(model: Any, scenes: list[Scene], device: str) -> str:
    """At the usual threshold of 0.5: persons found with an IoU of 0.5 or more, and those found that aren't there."""
    import torch

    x = (data.to_tensor(rough(data.pictures(scenes), np.random.default_rng(0)), device) + 1) / 2
    with torch.inference_mode():
        out = model(pixel_values=x)
    scores = out.logits[..., 0].sigmoid().cpu().numpy()
    boxes = out.pred_boxes.cpu().numpy() * world.SIZE_PX
    found, invented, persons = 0, 0, 0
    for scene, score, box in zip(scenes, scores, boxes, strict=True):
        truth = person_box(scene)
        hits = [b for s, b in zip(score, box, strict=True) if s >= 0.5]
        good = [b for b in hits if truth is not None and _iou(b, truth) >= 0.5]
        persons += truth is not None
        found += bool(good)
        invented += len(hits) - bool(good)
    return f"found {found} of {persons} persons, invented or doubled {invented} in {len(scenes)} pictures"


def _iou(centred: NDArray, box: NDArray) -> float:
    left, top = np.maximum(centred[:2] - centred[2:] / 2, box[:2])
    right, low = np.minimum(centred[:2] + centred[2:] / 2, box[:2] + box[2:])
    shared = max(0.0, right - left) * max(0.0, low - top)
    return float(shared / (centred[2] * centred[3] + box[2] * box[3] - shared))


# --- pose ------------------------------------------------------------------------------------------------------------


def pose_model() -> tuple[Any, Any]:
    """VitPose on 4 thin layers; a person is seen as 128×96 px in patches of 8, heatmaps are 64×48."""
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation, VitPoseImageProcessor

    backbone = VitPoseBackboneConfig(
        image_size=[128, 96],
        patch_size=[8, 8],
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        mlp_ratio=2,
        out_indices=[4],
    )
    config = VitPoseConfig(
        backbone_config=backbone,
        id2label=dict(enumerate(COCO_KEYPOINTS)),
        label2id={name: label for label, name in enumerate(COCO_KEYPOINTS)},
    )
    return VitPoseForPoseEstimation(config), VitPoseImageProcessor(size={"height": 128, "width": 96})


def coco_joints(scene: Scene) -> NDArray[np.float64]:
    """COCO's 17 points of the scene's person, px: (17, 2)."""
    points = world.joints(scene)
    if points is None:
        raise ValueError("no person in the scene")
    return points[list(_OPENPOSE)].astype(np.float64)


def pose_losses(model: Any, processor: Any, scenes: list[Scene], frames: Frame, batch: int, device: str) -> LossesOf:
    """Squared error of the heatmaps; each picture is cropped once, to a box that is as inexact as a detector's."""
    import torch

    rng = np.random.default_rng(5)
    frames = rough(frames, rng)
    boxes = [_jitter(box, rng) for scene in scenes if (box := person_box(scene)) is not None]
    crops = torch.cat(
        [
            processor(images=[frame], boxes=[[box.tolist()]], return_tensors="pt", input_data_format="channels_last")[
                "pixel_values"
            ]
            for frame, box in zip(frames, boxes, strict=True)
        ]
    )
    centres = np.stack(
        [_in_heatmap(coco_joints(scene), box, processor) for scene, box in zip(scenes, boxes, strict=True)]
    )

    def losses(draw: Draw) -> Losses:
        chosen = draw.numpy.integers(len(crops), size=batch)
        x = crops[chosen].to(device)
        x = x + 0.05 * torch.randn(x.shape, generator=draw.torch).to(device)
        target = torch.from_numpy(_heatmaps(centres[chosen])).to(device)
        predicted = model(pixel_values=x).heatmaps.float()
        return {"heatmaps": 100 * ((predicted - target) ** 2 * (0.2 + target)).mean()}

    return losses


def _jitter(box: NDArray, rng: np.random.Generator) -> NDArray:
    return box + rng.normal(0, 0.03, 4) * box[[2, 3, 2, 3]]


def _in_heatmap(points: NDArray, box: NDArray, processor: Any) -> NDArray:
    """Points of the picture, px, in cells of the heatmap that VitPose's processor makes of the box: (17, 2)."""
    width, height = processor.size["width"], processor.size["height"]
    # As the processor's box_to_center_and_scale: the box at the crop's aspect, and a quarter larger.
    centre = box[:2] + box[2:] / 2
    tall = 1.25 * max(box[3], box[2] * height / width)
    sides = np.array([tall * width / height, tall])
    return (points - centre + sides / 2) / sides * (np.array([width, height]) / 2 - 1)


def _heatmaps(centres: NDArray) -> NDArray[np.float32]:
    """Gaussians of height 1 at `centres` (N, 17, 2): (N, 17, 64, 48)."""
    x = np.exp(-((np.arange(48) - centres[..., :1]) ** 2) / (2 * _HEATMAP_SIGMA**2))
    y = np.exp(-((np.arange(64) - centres[..., 1:]) ** 2) / (2 * _HEATMAP_SIGMA**2))
    return (y[..., :, None] * x[..., None, :]).astype(np.float32)


def pose_score(model: Any, processor: Any, scenes: list[Scene], device: str) -> str:
    """Share of joints within 10 % of the person's height, and mean score, given the exact box."""
    import torch

    rng = np.random.default_rng(0)
    near, scores = [], []
    for scene, frame in zip(scenes, rough(data.pictures(scenes), rng), strict=True):
        box = person_box(scene)
        assert box is not None
        crop = [[_jitter(box, rng).tolist()]]
        inputs = processor(images=[frame], boxes=crop, return_tensors="pt", input_data_format="channels_last")
        with torch.inference_mode():
            out = model(**inputs.to(device))
        pose = processor.post_process_pose_estimation(out, boxes=crop)[0][0]
        distance = np.linalg.norm(pose["keypoints"].numpy() - coco_joints(scene), axis=1)
        near.append(distance < 0.1 * box[3])
        scores.append(pose["scores"].numpy())
    return f"{100 * np.mean(near):.1f} % of joints within 10 % of the height, mean score {np.mean(scores):.2f}"


def _bias(layer: Any, value: float) -> None:
    import torch

    with torch.no_grad():
        layer.bias.fill_(value)


def _half_generated(run: Run, scenes: list[Scene]) -> Frame:
    """Pictures of the scenes, every second one as a generated frame looks."""
    frames = data.pictures(scenes)
    frames[::2] = data.as_generated(load_vae(run), frames[::2], run.device, seed=7)
    return frames


# --- stages -----------------------------------------------------------------------------------------------------------


def train_depth(run: Run) -> None:
    model, processor = depth_model()
    losses = depth_losses(model.to(run.device), data.scenes(21, run.count(5000)), RECIPES["depth"].batch, run.device)
    held_out = data.scenes(22, run.count(100))
    fit_stage(
        run,
        "depth",
        model,
        losses,
        lambda step: _tell("depth", step, depth_score(model, held_out, run.device)),
    )
    _keep_annotator(run, "depth", model, processor)


def train_detector(run: Run) -> None:
    model, processor = detector_model()
    scenes, held_out = (_detector_scenes(seed, run.count(count)) for seed, count in ((31, 5000), (32, 200)))
    frames = _half_generated(run, scenes)
    losses = detector_losses(model.to(run.device), scenes, frames, RECIPES["detector"].batch, run.device)
    fit_stage(
        run, "detector", model, losses,
        lambda step: _tell("detector", step, detector_score(model, held_out, run.device)),
    )  # fmt: skip
    _keep_annotator(run, "detector", model, processor)


def _detector_scenes(seed: int, count: int) -> list[world.Scene]:
    """As many with a person as without; some persons are beside another thing."""
    half = count // 2
    lone, beside = half * 3 // 4, half - half * 3 // 4
    persons = data.scenes(seed, lone, subject="person") + data.scenes(seed + 1000, beside, subject="person", count=2)
    others = [scene for scene in data.scenes(seed + 2000, 2 * half + 20) if person_box(scene) is None]
    return persons + others[: count - half]


def train_pose(run: Run) -> None:
    model, processor = pose_model()
    scenes, held_out = (
        data.scenes(seed, run.count(count), subject="person") for seed, count in ((41, 4000), (42, 100))
    )
    frames = _half_generated(run, scenes)
    losses = pose_losses(model.to(run.device), processor, scenes, frames, RECIPES["pose"].batch, run.device)
    fit_stage(
        run, "pose", model, losses,
        lambda step: _tell("pose", step, pose_score(model, processor, held_out, run.device)),
    )  # fmt: skip
    _keep_annotator(run, "pose", model, processor)


def _tell(name: str, step: int, score: str) -> None:
    click.echo(f"{name} {step}: {score}")


def _keep_annotator(run: Run, name: str, model: Any, processor: Any) -> None:
    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    keep(run, name, save)
