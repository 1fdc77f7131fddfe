"""Models for the tests of conditions: the embedded ones, and controlnet-aux's classes with weights made here."""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from t2vz.conditions import ConditionOptions
from t2vz.models.table import resolve


@pytest.fixture(scope="session")
def clip(real_clips):
    """A real clip of 8 frames, uint8 (8, 512, 512, 3)."""
    import av

    with av.open(str(real_clips / "clip-girl_dancing.mp4")) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="session")
def options():
    return ConditionOptions(
        depth_model=resolve("mini/depth"),
        pose_model=resolve("mini/pose"),
        person_detector=resolve("mini/detector"),
        annotators="",
    )


@pytest.fixture(scope="session")
def annotators():
    """Options with a folder of weights as controlnet-aux reads them: HED passes red on, the others are random."""
    import torch
    from controlnet_aux.hed import ControlNetHED_Apache2
    from controlnet_aux.lineart import Generator
    from controlnet_aux.open_pose.body import bodypose_model

    # Removed at once, as OpenPose's are 100 MB.
    with tempfile.TemporaryDirectory() as name, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        folder = Path(name)
        hed = {key: torch.zeros_like(value) for key, value in ControlNetHED_Apache2().state_dict().items()}
        for key in ("block1.convs.0.weight", "block1.convs.1.weight"):
            hed[key][0, 0, 1, 1] = 1.0
        hed["block1.projection.weight"][0, 0] = 1.0
        torch.save(hed, folder / "ControlNetHED.pth")
        for file in ("sk_model.pth", "sk_model2.pth"):
            torch.save(Generator(3, 1, 3).state_dict(), folder / file)
        # The checkpoint's keys lack the first part of the model's.
        body = {key.split(".", 1)[1]: value.half() for key, value in bodypose_model().state_dict().items()}
        torch.save(body, folder / "body_pose_model.pth")
        yield ConditionOptions(depth_model="", pose_model="", person_detector="", annotators=name)


@pytest.fixture
def noise():
    """Frames of noise, the right half darker: uint8 (5, 90, 130, 3), no side a multiple of 64."""
    frames = np.random.default_rng(0).integers(0, 256, (5, 90, 130, 3), dtype=np.uint8)
    frames[:, :, 65:] //= 4
    return frames
