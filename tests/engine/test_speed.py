"""Speed changes nothing but time: shared beginnings and compiled regions give what the plain engine gives."""

from __future__ import annotations

import pytest
import torch
from diffusers import ControlNetModel
from small_unet import make_unet
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from t2vz.engine.attention import anchor_attention
from t2vz.engine.speed import compile_regions, shared_beginning

T = torch.tensor(500)


def clip(unet, same, *, attends="anchor", shared=False, cut_off=False):
    """Two steps of three frames, in chunks of two and one; cut_off: the second with the last branch alone."""
    outs = []
    torch.manual_seed(1)
    inputs = torch.randn(len(same), 3, unet.config.in_channels, 8, 8)
    inputs = torch.stack([inputs[first] for first in same])  # alike where `same` says so
    text = torch.randn(len(same), 5, 32)
    with (
        anchor_attention([unet], len(same), attends=attends) as state,
        shared_beginning([unet], state, same if shared else range(len(same))),
    ):
        for step in range(2):
            kept = slice(-1, None) if cut_off and step else slice(None)
            state.select(len(text[kept]))
            for frames in (slice(0, 2), slice(2, 3)):
                state.write = frames.start == 0
                sample = inputs[kept, frames].flatten(0, 1)
                outs.append(unet(sample, T, encoder_hidden_states=text[kept], return_dict=False)[0])
                state.commit()
    return torch.cat(outs)


def clip_and_flops(*args, **settings):
    with FlopCounterMode(display=False) as work:
        out = clip(*args, **settings)
    return out, work.get_total_flops()


@pytest.mark.parametrize(
    ("same", "attends"),
    [((0, 0), "anchor"), ((0, 1, 1), "anchor"), ((0, 0, 2, 2), "anchor_previous"), ((0, 1, 1), "self")],
)
def test_branches_share_their_beginning(same, attends):
    unet = make_unet()
    plain, all_work = clip_and_flops(unet, same, attends=attends)
    shared, less_work = clip_and_flops(unet, same, attends=attends, shared=True)
    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=0)
    assert less_work < 0.98 * all_work


def test_nothing_is_shared_once_guidance_is_cut_off():
    unet = make_unet()
    plain = clip(unet, (0, 0), cut_off=True)
    shared = clip(unet, (0, 0), shared=True, cut_off=True)
    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=0)


def test_a_controlnet_embeds_its_condition_once():
    controlnet = ControlNetModel.from_unet(make_unet(), conditioning_embedding_out_channels=(16, 16, 16, 16))
    torch.manual_seed(2)
    for layer in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
        torch.nn.init.normal_(layer.weight, std=0.05)
    sample, text = torch.randn(2, 4, 8, 8).repeat(2, 1, 1, 1), torch.randn(2, 5, 32)
    picture = torch.rand(2, 3, 64, 64).repeat(2, 1, 1, 1)
    outs, works = [], []
    for same in ((0, 1), (0, 0)):
        with (
            torch.no_grad(),
            anchor_attention([controlnet], 2) as state,
            shared_beginning([controlnet], state, same),
            FlopCounterMode(display=False) as work,
        ):
            down, mid = controlnet(sample, T, text, picture, return_dict=False)
        outs.append([*down, mid])
        works.append(work.get_total_flops())
    for plain, shared in zip(*outs, strict=True):
        torch.testing.assert_close(shared, plain, atol=1e-5, rtol=0)
    assert works[1] < 0.8 * works[0]


def test_all_is_put_back_after_an_exception():
    unet = make_unet()
    originals = dict(unet.attn_processors)
    with (
        pytest.raises(KeyError),
        anchor_attention([unet], 2) as state,
        shared_beginning([unet], state, (0, 0)),
    ):
        raise KeyError
    assert unet.attn_processors == originals
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def test_compiled_regions_have_a_graph_for_writing_and_one_for_reading():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    unet, counter = make_unet(), CompileCounter()
    plain = clip(unet, (0, 0), shared=True)
    compile_regions(unet, backend=counter)
    compiled = clip(unet, (0, 0), shared=True)
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=0)
    assert not torch._dynamo.utils.counters["graph_break"]
    first_clip = counter.frame_count
    assert first_clip > 0
    again = clip(unet, (0, 0), shared=True)
    torch.testing.assert_close(again, plain, atol=1e-5, rtol=0)
    assert counter.frame_count == first_clip  # a clip after the first compiles nothing
