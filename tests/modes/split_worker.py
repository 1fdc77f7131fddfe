"""What each process of a launch runs in test_split.py: MODEL CONTROLNET OUT."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from t2vz.models import loading
from t2vz.modes import Request
from t2vz.modes.split import generate_split
from t2vz.spec import JobSpec

FRAMES = 5


def cases(controlnet):
    """(columns, what a request has beside) of each case."""
    pictures = np.random.default_rng(0).integers(0, 256, (FRAMES, 64, 64, 3), dtype=np.uint8)
    control = {"mode": "control", "source": "unused", "condition": "edge", "controlnet": controlnet}
    return {
        "text": ({"scheduler": "euler_a"}, {}),
        "control": (control, {"conditions": (pictures,)}),
        "scenes": ({**control, "attention_anchor": "scene"}, {"conditions": (pictures,), "scenes": (0, 3)}),
    }


def request(model, columns, beside):
    spec = JobSpec(prompt="a red ball", model=model, num_inference_steps=6, chunk_size=2, **columns)
    return loading.load(spec, "cpu"), Request(spec, 11, 64, 64, FRAMES, **beside)


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, controlnet, out = sys.argv[1:]
    state = PartialState(cpu=True)
    for name, (columns, beside) in cases(controlnet).items():
        made = generate_split(*request(model, columns, beside))
        file = Path(out) / f"{name}-{state.process_index}.pt"
        torch.save({"latents": made.latents, "evaluations": made.evaluations}, file)
    # All is written. Threads of torch's that are still there at the interpreter's end abort about one process in ten,
    # after `destroy_process_group`, too.
    os._exit(0)
