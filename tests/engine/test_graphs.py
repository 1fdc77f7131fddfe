"""Recording of batches: when, with which inputs, and what happens if it can't be. The device's part is simulated here
by running a recorded computation again; tests/modes/test_gpu.py has the real one."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from small_unet import make_unet

from t2vz.engine.attention import anchor_attention
from t2vz.engine.graphs import Graphs


class Device:
    """Stands in for CUDA's recording: a replay is another run of what was computed while it recorded."""

    def __init__(self, monkeypatch):
        self.recorded, self.replayed, self.fails = 0, 0, None
        self.running = None
        device = self

        class CUDAGraph:
            def pool(self):
                return "pool"

            def replay(self):
                device.replayed += 1
                device.output.copy_(device.compute(device.static))

        @contextmanager
        def graph(graph, pool, capture_error_mode):
            device.recorded += 1
            device.pool = pool
            yield
            if device.fails is not None:
                raise device.fails

        monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
        monkeypatch.setattr(torch.cuda, "graph", graph)

    def doubles(self, inputs):
        """A computation that remembers what it was last recorded with."""
        self.compute, self.static = lambda static: static[0] * 2, inputs
        self.output = inputs[0] * 2
        return self.output


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def test_the_third_call_is_recorded_and_those_after_it_replayed(device):
    run = Graphs()
    for value in range(1, 6):
        out = run("doubles", device.doubles, [torch.full((2,), float(value))])
        assert out.tolist() == [2.0 * value] * 2
    assert (device.recorded, device.replayed) == (1, 3)


def test_other_shapes_are_other_batches(device):
    run = Graphs()
    for size in (1, 2, 1, 2, 1):
        run("doubles", device.doubles, [torch.ones(size)])
    assert device.recorded == 1
    assert len(run.calls) == 2


@pytest.mark.parametrize(
    ("error", "told"),
    [(RuntimeError("not while recording"), True), (torch.cuda.OutOfMemoryError("CUDA out of memory"), False)],
)
def test_what_cannot_be_recorded_goes_on_without(device, error, told, caplog):
    device.fails = error
    run = Graphs()
    for value in range(1, 6):
        assert run("doubles", device.doubles, [torch.tensor([float(value)])]).item() == 2 * value
    assert device.recorded == 1  # not tried again
    assert not run.recorded
    assert ("could not be recorded" in caplog.text) == told


def test_forgetting_gives_the_recordings_back(device):
    run = Graphs()
    for _ in range(3):
        run("doubles", device.doubles, [torch.ones(1)])
    assert run.recorded
    run.forget()
    assert not run.recorded
    run("doubles", device.doubles, [torch.ones(1)])
    assert device.recorded == 1  # it warms up again first


@pytest.mark.parametrize("in_place", [False, True])
def test_keys_and_values_stay_in_their_place_for_recordings(in_place):
    unet = make_unet()
    text = torch.randn(2, 5, 32)
    with anchor_attention([unet], 2, in_place=in_place) as state:
        places, values = [], []
        for seed in (1, 2):
            torch.manual_seed(seed)
            unet(torch.randn(4, 4, 8, 8), torch.tensor(500), encoder_hidden_states=text)
            anchors = [layer.anchor for layer in state.layers if layer.anchor is not None]
            assert len(anchors) == 4  # self-attention layers
            places.append([tensor.data_ptr() for anchor in anchors for tensor in anchor])
            values.append([tensor.clone() for anchor in anchors for tensor in anchor])
    assert (places[0] == places[1]) == in_place
    assert not any(torch.equal(a, b) for a, b in zip(*values, strict=True))  # of the second call, not the first's
