"""One clip's frames split over several processes, one a device.

Each process makes its part, and evaluates the anchors that its frames attend to beside: so nothing is exchanged until
the end. The price is an extra evaluation a step for each anchor that a process doesn't own: one, but for scenes.

One process leads: it reads manifests, decodes, encodes. The others follow: they hold the model and make their part of
each clip that they are told of. They are started here (`leading`), or by `accelerate launch`, on several machines too.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from t2vz.errors import DeviceLost, T2VZError, UnexpectedError, translate
from t2vz.models import loading
from t2vz.models.loading import Components
from t2vz.modes import Generated, Request, generate
from t2vz.processes import die_with_parent, launched

_STOP_S = 20.0
_SHARED_BYTES = 1 << 20  # larger arrays go through a file, which all processes map into memory


@dataclass(frozen=True)
class Task:
    """A clip, as followers are told of it. compiled: see `render.Settings`."""

    request: Request
    compiled: bool


@dataclass(frozen=True)
class _Stored:
    path: str


def generate_split(components: Components, request: Request) -> Generated:
    """`generate`, called in every process with the same request. Every process returns the whole clip.

    evaluations: of all processes together. Snapshots are of a process's own frames. With gloo, torch's threads abort
    about one process in ten at its very end, when all is done: leave with `os._exit`. Raises, in every process, what
    the first of them failed of.
    """
    from accelerate import PartialState

    state = PartialState()
    parts = min(state.num_processes, request.frames)  # more processes than frames: the rest has nothing to do
    mine: list[Generated | T2VZError] = []
    if state.process_index < parts:
        try:
            made = generate(components, replace(request, part=(state.process_index, parts)))
            mine.append(replace(made, latents=made.latents.cpu()))
        except Exception as error:  # the others wait: they are to know
            mine.append(translate(error, "generate"))
    finished = []
    for each in _from_all(mine):
        if isinstance(each, T2VZError):
            raise each
        finished.append(each)
    frames: dict[int, torch.Tensor] = {}
    for made in finished:
        for number, latent in zip(made.indices, made.latents, strict=True):
            frames.setdefault(number, latent)  # an anchor is the first's that made it; the others have the same
    return Generated(
        torch.stack([frames[number] for number in range(request.frames)]),
        tuple(range(request.frames)),
        sum(made.evaluations for made in finished),
        tuple(dict.fromkeys(warning for made in finished for warning in made.warnings)),
    )


def lead(components: Components, request: Request, *, compiled: bool, workspace: Path) -> Generated:
    """`generate_split` in the leading process, which tells the followers. workspace: a folder that all of them see."""
    files: list[Path] = []
    try:
        plain = replace(request, on_step=_nothing, on_snapshot=_nothing, start=None)
        _tell(Task(_stored(plain, workspace, files), compiled))
        return generate_split(components, request)
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def follow(device: str) -> None:
    """In every process but the leading one: make parts of clips until there are no more. Failures are the leader's to
    tell."""
    while (task := _tell(None)) is not None:
        try:
            request = _restored(task.request)
            components = loading.load(request.spec, device, compiled=task.compiled)
        except Exception as error:
            _from_all([translate(error, "generate")])
            continue
        try:
            generate_split(components, request)
        except T2VZError:
            continue  # its own was sent, the others' come to the leader, too


@contextmanager
def leading(processes: int, device: str) -> Iterator[None]:
    """While the block runs, `processes` of this machine work on each clip that is given to `lead`: this one and
    followers, which are started here and die with it. Under `accelerate launch` they are there already. Afterwards
    this process should end by `os._exit` (see `generate_split`). Raises UnexpectedError if there are fewer GPUs."""
    if processes == 1:
        yield
        return
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if launched() == 1 and 0 < gpus < processes:  # a follower without one would die, and be waited for
        raise UnexpectedError(f"split: {processes} processes, but {gpus} GPUs: one each at most", stage="settings")
    started: list[subprocess.Popen[bytes]] = []
    before = dict(os.environ)
    if launched() == 1:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        group |= {"LOCAL_WORLD_SIZE": str(processes)}
        for rank in range(1, processes):
            started.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "t2vz.modes.split", device],
                    env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    preexec_fn=die_with_parent,
                    start_new_session=True,  # out of reach of the terminal's Ctrl-C: the leader decides
                )
            )
        os.environ.update(group | {"RANK": "0", "LOCAL_RANK": "0"})
    try:
        _join(device)
        yield
        _tell(None)
        for process in started:
            process.wait(_STOP_S)
    finally:
        for process in started:
            process.kill()
            process.wait()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _join(device: str) -> Any:
    from accelerate import PartialState

    threads = torch.get_num_threads()
    with warnings.catch_warnings():  # that it has set the threads, which is done below
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")
        # Not told so, accelerate takes one process for all there is where there is no GPU.
        state = PartialState(cpu=True) if device == "cpu" or not torch.cuda.is_available() else PartialState()
    if state.device.type == "cpu":  # those of a machine share its cores
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        torch.set_num_threads(max(1, threads // beside))
    return state


@cache
def _group() -> Any:
    """A group for what goes between the processes. Not NCCL: a process that is gone would be waited for. What is idle
    for days is not lost."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


def _tell(task: Task | None) -> Task | None:
    """From the leading process to the others; every process calls it."""
    told = [task]
    with _all_there():
        dist.broadcast_object_list(told, src=0, group=_group())
    return told[0]


def _from_all(mine: list[Any]) -> list[Any]:
    """The lists of all processes, joined; every process calls it."""
    if not dist.is_initialized():
        return mine
    lists: list[Any] = [None] * dist.get_world_size()
    with _all_there():
        dist.all_gather_object(lists, mine, group=_group())
    return [each for found in lists for each in found]


@contextmanager
def _all_there() -> Iterator[None]:
    """Raises DeviceLost if a process is gone: none of the next clips could be made whole either."""
    try:
        yield
    except RuntimeError as error:
        raise DeviceLost("a process that makes a part of each clip has ended") from error


def _nothing(*_: object) -> None:
    pass


def _stored(value: Any, folder: Path, files: list[Path]) -> Any:
    """The request with its large arrays in files."""
    if isinstance(value, np.ndarray) and value.nbytes > _SHARED_BYTES:
        files.append(folder / f"shared-{len(files)}.npy")
        np.save(files[-1], value)
        return _Stored(str(files[-1]))
    if isinstance(value, tuple):
        return tuple(_stored(each, folder, files) for each in value)
    if isinstance(value, Request):
        return replace(value, **{name: _stored(each, folder, files) for name, each in vars(value).items()})
    return value


def _restored(value: Any) -> Any:
    """The inverse of `_stored`."""
    if isinstance(value, _Stored):
        loaded: NDArray[Any] = np.load(value.path, mmap_mode="r")
        return loaded
    if isinstance(value, tuple):
        return tuple(map(_restored, value))
    if isinstance(value, Request):
        return replace(value, **{name: _restored(each) for name, each in vars(value).items()})
    return value


def main(device: str) -> NoReturn:
    """A follower's process."""
    try:
        follow(str(_join(device).device))
    except DeviceLost as error:  # the leader is gone, however it ended
        sys.stderr.write(f"process {os.environ.get('RANK')} of a split clip ends: {error.message}\n")
        os._exit(1)
    os._exit(0)  # see `generate_split`


if __name__ == "__main__":
    main(sys.argv[1])
