"""Body pose by transformers' models: persons are detected, their keypoints estimated, skeletons drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2vz.clip import allocate
from t2vz.conditions import ConditionOptions, Extracted, Frames
from t2vz.conditions.loading import load, transformers_model
from t2vz.conditions.skeleton import draw_skeleton
from t2vz.errors import UnsupportedModel

NOBODY = "no person found in the clip: the pose condition is black"

_COCO_KEYPOINTS = 17
# COCO's index of each OpenPose keypoint but the neck (1), which COCO hasn't.
_FROM_COCO = {0: 0, 2: 6, 3: 8, 4: 10, 5: 5, 6: 7, 7: 9, 8: 12, 9: 14, 10: 16, 11: 11, 12: 13, 13: 15,
              14: 2, 15: 1, 16: 4, 17: 3}  # fmt: skip
_LEFT_SHOULDER, _RIGHT_SHOULDER = 5, 6
# Smaller detections, in pixels, hold no pose, and an empty one makes VitPose's affine transform singular.
_MIN_SIDE_PX = 2.0


def extract(frames: Frames, options: ConditionOptions) -> Extracted:
    """Skeletons: uint8 (F, H, W, 3) from RGB frames of that shape. A frame without persons is black."""
    _, height, width, _ = frames.shape
    out = allocate(frames.shape, options.workspace)
    found = False
    for start in range(0, len(frames), options.batch_size):
        batch = np.asarray(frames[start : start + options.batch_size])
        boxes = detect_persons(batch, options)
        people = estimate(batch, boxes, options)
        for index, person in enumerate(people, start):
            found |= len(person) > 0
            out[index] = draw_skeleton(openpose_from_coco(person), height, width, options.keypoint_threshold)
    if not found:
        return out, (NOBODY,)
    if not out.any():
        return out, ("persons found, but no keypoint is certain enough: the pose condition is black",)
    return out, ()


def detect_persons(frames: Frames, options: ConditionOptions) -> list[NDArray[np.float64]]:
    """Each frame's persons as boxes, smallest first: float64 (N, 4), x_px, y_px, width_px, height_px.

    Boxes are clipped to the frame.
    """
    import torch

    processor, model = load(_load_detector, options.person_detector, options.device, "person_detector")
    person = _person_label(model.config, options.person_detector)
    height, width = frames.shape[1:3]
    inputs = processor(images=list(frames), input_data_format="channels_last", return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs.to(options.device))
    detections = processor.post_process_object_detection(
        outputs, threshold=options.person_threshold, target_sizes=[(height, width)] * len(frames)
    )
    found = []
    for each in detections:
        corners = each["boxes"][each["labels"] == person].double().cpu().numpy()
        corners = corners.clip(0, [width, height, width, height])
        boxes = np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]])
        boxes = boxes[(boxes[:, 2:] >= _MIN_SIDE_PX).all(axis=1)]
        # The larger, as a rule the nearer, are drawn over the others. (They come by score, which flickers.)
        found.append(boxes[np.argsort(boxes[:, 2] * boxes[:, 3], kind="stable")])
    return found


def estimate(frames: Frames, boxes: list[NDArray[np.float64]], options: ConditionOptions) -> list[NDArray[np.float64]]:
    """COCO keypoints of each frame's boxes: float64 (N, 17, 3), x_px, y_px, score 0–1."""
    import torch

    people = [np.zeros((len(each), _COCO_KEYPOINTS, 3)) for each in boxes]
    persons = [(frame, number) for frame, each in enumerate(boxes) for number in range(len(each))]
    if not persons:  # VitPose raises IndexError for none
        return people
    processor, model = load(_load_pose, options.pose_model, options.device, "pose_model")
    for start in range(0, len(persons), options.batch_size):
        batch = persons[start : start + options.batch_size]
        crops = [[boxes[frame][number].tolist()] for frame, number in batch]
        inputs = processor(
            images=[frames[frame] for frame, _ in batch],
            boxes=crops,
            input_data_format="channels_last",
            return_tensors="pt",
        ).to(options.device)
        if getattr(model.config.backbone_config, "num_experts", 1) > 1:  # VitPose+; its expert 0 is COCO's
            inputs["dataset_index"] = torch.zeros(len(batch), dtype=torch.int64, device=options.device)
        with torch.inference_mode():
            outputs = model(**inputs)
        poses = processor.post_process_pose_estimation(outputs, boxes=crops)
        for (frame, number), (pose,) in zip(batch, poses, strict=True):
            people[frame][number, :, :2] = pose["keypoints"].numpy()
            people[frame][number, :, 2] = pose["scores"].numpy()
    return people


def openpose_from_coco(people: NDArray[np.float64]) -> NDArray[np.float64]:
    """OpenPose's 18 keypoints (N, 18, 3) from COCO's 17 (N, 17, 3).

    The neck is midway between the shoulders, and as certain as the less certain of them.
    """
    out = np.empty((len(people), len(_FROM_COCO) + 1, 3))
    out[:, list(_FROM_COCO)] = people[:, list(_FROM_COCO.values())]
    shoulders = people[:, [_LEFT_SHOULDER, _RIGHT_SHOULDER]]
    out[:, 1, :2] = shoulders[..., :2].mean(axis=1)
    out[:, 1, 2] = shoulders[..., 2].min(axis=1)
    return out


def _person_label(config: Any, reference: str) -> int:
    for label, name in config.id2label.items():
        if name.lower() == "person":
            return int(label)
    raise UnsupportedModel(f"person_detector {reference}: it has no class `person`; name one trained on COCO")


def _load_detector(reference: str, device: str) -> tuple[Any, Any]:
    return transformers_model("AutoModelForObjectDetection", reference, device)


def _load_pose(reference: str, device: str) -> tuple[Any, Any]:
    processor, model = transformers_model("VitPoseForPoseEstimation", reference, device)
    if model.config.num_labels != _COCO_KEYPOINTS:
        raise UnsupportedModel(
            f"pose_model {reference}: it has {model.config.num_labels} keypoints; "
            f"name one with COCO's {_COCO_KEYPOINTS}"
        )
    return processor, model
