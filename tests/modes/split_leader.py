"""What test_split.py runs to have a clip led over processes: MODEL CONTROLNET OUT PROCESSES."""

import os
import sys
from pathlib import Path

import torch
from split_worker import cases, request

from t2vz.errors import T2VZError
from t2vz.modes.split import lead, leading

if __name__ == "__main__":
    torch.set_num_threads(1)
    model, controlnet, out, processes = sys.argv[1:]
    with leading(int(processes), "cpu"):
        for name, (columns, beside) in cases(controlnet).items():
            made = lead(*request(model, columns, beside), compiled=False, workspace=Path(out))
            torch.save({"latents": made.latents, "evaluations": made.evaluations}, Path(out) / f"{name}-0.pt")
        try:
            anchored = request(model, {"attention_anchor": "first_previous"}, {})  # which can't be split
            lead(*anchored, compiled=False, workspace=Path(out))
        except T2VZError as error:
            (Path(out) / "error.txt").write_text(str(error))
        made = lead(*request(model, {}, {}), compiled=False, workspace=Path(out))  # all go on after a failure
        torch.save(made.latents, Path(out) / "after.pt")
    os._exit(0)
