"""CUDA graphs of the denoiser's batches: what the host would launch anew for every batch, kernel by kernel, is recorded
once and replayed.

In half precision at 512² a UNet call of a few frames takes a modern GPU less time than the host needs to launch it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from t2vz.errors import is_out_of_memory

_log = logging.getLogger(__name__)

Compute = Callable[[Sequence[Tensor]], Tensor]


def eager(key: Hashable, compute: Compute, inputs: Sequence[Tensor]) -> Tensor:
    """Compute, and record nothing."""
    return compute(inputs)


@dataclass
class _Recording:
    graph: Any
    inputs: list[Tensor]
    output: Tensor

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given)
        self.graph.replay()
        return self.output


@dataclass
class Graphs:
    """Runs computations of one clip, and records each at its third call: the first two warm up (workspaces, compiled
    regions, whose guards see only in the second that keys and values of the step before are there).

    A computation may read and write tensors beside its inputs, as the attention layers do with the anchor's keys and
    values, if they stay where they are (`AnchorState.in_place`). It must not wait for the GPU. One that can't be
    recorded goes on as it is, and a warning is logged.
    """

    calls: Counter[Hashable] = field(default_factory=Counter)
    recorded: dict[Hashable, _Recording] = field(default_factory=dict)
    possible: bool = True

    def __call__(self, key: Hashable, compute: Compute, inputs: Sequence[Tensor]) -> Tensor:
        """compute(inputs). key: equal for calls that launch the same kernels; shapes need not be in it.

        The result is overwritten by the next call.
        """
        key = (key, *((each.shape, each.dtype) for each in inputs))
        self.calls[key] += 1
        if self.possible and self.calls[key] == 3:
            self._record(key, compute, inputs)
        if (recording := self.recorded.get(key)) is not None:
            return recording.replay(inputs)
        return compute(inputs)

    def forget(self) -> None:
        """Give back the memory that the recordings hold."""
        self.recorded.clear()
        self.calls.clear()

    def _record(self, key: Hashable, compute: Compute, inputs: Sequence[Tensor]) -> None:
        static = [each.clone() for each in inputs]
        graph = torch.cuda.CUDAGraph()
        # One pool: they run one after the other, and each one's output is used before the next begins.
        pool = next((recording.graph.pool() for recording in self.recorded.values()), None)
        try:
            # "thread_local": other rows decode and encode on the same GPU, in other threads.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                output = compute(static)
        except RuntimeError as error:
            self.possible = False
            self.forget()
            if is_out_of_memory(error):
                _log.debug("no memory to record a batch: the clip goes on without CUDA graphs")
            else:
                _log.warning("a batch could not be recorded as a CUDA graph (%s); the clip goes on without", error)
            return
        self.recorded[key] = _Recording(graph, static, output)
