"""One clip's frames split over the processes of `accelerate launch`, one a device.

Each process makes its part, and evaluates the anchors that its frames attend to beside: so nothing is exchanged until
the end. The price is an extra evaluation a step for each anchor that a process doesn't own: one, but for scenes.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from t2vz.models.loading import Components
from t2vz.modes import Generated, Request, generate


def generate_split(components: Components, request: Request) -> Generated:
    """`generate`, called in every process with the same request. Every process returns the whole clip.

    evaluations: of all processes together. Snapshots are of a process's own frames. With
    gloo, torch's threads abort about one process in ten at its very end, when all is done: leave with `os._exit`.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    parts = min(state.num_processes, request.frames)  # more processes than frames: the rest has nothing to do
    mine = []
    if state.process_index < parts:
        made = generate(components, replace(request, part=(state.process_index, parts)))
        mine.append(replace(made, latents=made.latents.cpu()))
    everyone: list[Generated] = gather_object(mine) if state.num_processes > 1 else mine
    frames: dict[int, torch.Tensor] = {}
    for made in everyone:
        for number, latent in zip(made.indices, made.latents, strict=True):
            frames.setdefault(number, latent)  # an anchor is the first's that made it; the others have the same
    return Generated(
        torch.stack([frames[number] for number in range(request.frames)]),
        tuple(range(request.frames)),
        sum(made.evaluations for made in everyone),
        tuple(dict.fromkeys(warning for made in everyone for warning in made.warnings)),
    )
