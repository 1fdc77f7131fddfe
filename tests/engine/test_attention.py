"""Cross-frame attention: put in, put back, refused where it can't be covered."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0, AttnProcessor2_0

from t2vz.engine.attention import AnchorProcessor, AnchorState, anchor_attention
from t2vz.errors import UnsupportedModel


@pytest.fixture
def unet(tiny_model):
    return UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet").eval()


def test_processors_are_put_back_after_an_exception(unet):
    before = dict(unet.attn_processors)

    def fail_inside():
        with anchor_attention([unet], branches=2):
            assert all(isinstance(p, AnchorProcessor) for p in unet.attn_processors.values())
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_inside()
    assert unet.attn_processors == before


def test_a_layer_that_cannot_be_covered_is_named_and_nothing_is_installed(unet):
    other = UNet2DConditionModel.from_config(unet.config)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    other.get_submodule(name).processor = AttnAddedKVProcessor2_0()
    before = dict(unet.attn_processors)
    with pytest.raises(UnsupportedModel, match=name), anchor_attention([unet, other], branches=2):
        pass
    assert unet.attn_processors == before


@torch.no_grad()
def test_self_attention_equals_plain_attention_over_the_anchor():
    torch.manual_seed(0)
    attn = Attention(query_dim=32, heads=4, dim_head=8)
    hidden = torch.randn(2, 3, 10, 32)  # branches, frames, positions, channels
    ours = AnchorProcessor(AnchorState(branches=2))(attn, hidden.flatten(0, 1)).unflatten(0, (2, 3))
    for branch in range(2):
        for frame in range(3):
            theirs = AttnProcessor2_0()(attn, hidden[branch, frame][None], hidden[branch, 0][None])
            torch.testing.assert_close(ours[branch, frame][None], theirs, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_later_chunks_read_what_the_anchor_wrote():
    torch.manual_seed(0)
    attn = Attention(query_dim=32, heads=4, dim_head=8)
    hidden = torch.randn(2, 3, 10, 32)
    state = AnchorState(branches=2)
    processor = AnchorProcessor(state)
    whole = processor(attn, hidden.flatten(0, 1)).unflatten(0, (2, 3))
    first = processor(attn, hidden[:, :1].flatten(0, 1))
    state.write = False
    rest = processor(attn, hidden[:, 1:].flatten(0, 1)).unflatten(0, (2, 2))
    torch.testing.assert_close(torch.cat([first[:, None], rest], dim=1), whole, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_lora_layers_keep_their_effect(unet):
    from peft import LoraConfig

    x, text = torch.randn(2, 4, 8, 8), torch.randn(1, 77, 64)

    def predict():
        with anchor_attention([unet], branches=1):
            return unet(x, 500, encoder_hidden_states=text).sample

    plain = predict()
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    assert (predict() - plain).abs().max() > 1e-3
    unet.disable_adapters()
    torch.testing.assert_close(predict(), plain)
