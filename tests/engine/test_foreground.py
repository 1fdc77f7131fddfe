"""Background smoothing and the masks it needs, by hand-made numbers and diffusers' own attention."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor

from t2vz.engine import foreground
from t2vz.engine.attention import AnchorState, anchor_attention


def test_smoothing_mixes_the_background_only():
    own, background = torch.full((2, 3, 2, 2), 10.0), torch.full((2, 3, 2, 2), 20.0)
    masks = torch.tensor([[[True, False], [False, False]], [[True, True], [True, True]]])
    out = foreground.smooth(own, background, masks, 0.4)
    assert out[0, 1].tolist() == [[10, 16], [16, 16]]
    assert torch.equal(out[1], own[1])


def test_a_cell_is_foreground_if_any_of_its_pixels_is():
    masks = np.zeros((2, 16, 24), bool)
    masks[0, 7, 8] = masks[0, 15, 23] = True
    expected = [[[False, True, False], [False, False, True]], [[False] * 3] * 2]
    assert foreground.to_cells(masks, (2, 3)).tolist() == expected


def test_words_are_sequences_of_tokens():
    assert foreground.positions([9, 1, 2, 3, 1, 2, 8], [1, 2]) == [1, 2, 4, 5]
    assert foreground.positions([9, 1, 3, 2, 8], [1, 2]) == []
    assert foreground.positions([1, 1, 1], [1, 1]) == [0, 1, 2]


def test_the_maps_are_diffusers_attention(tiny_model, monkeypatch):
    unet = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet").eval()
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 4, 16, 16, generator=generator)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    tokens = [2, 3, 70]
    sample, t = latent.repeat(2, 1, 1, 1), torch.tensor(100)
    with torch.no_grad(), anchor_attention([unet], branches=2) as state:
        with foreground.watching(state, tokens) as seen:
            unet(sample, t, encoder_hidden_states=text)
        assert state.on_text is None

    expected: dict[int, torch.Tensor] = {}
    scores = Attention.get_attention_scores

    def collect(self, query, key, attention_mask=None):
        shares = scores(self, query, key, attention_mask)  # (branches · heads, n, m)
        if shares.shape[-1] == 77:
            share = shares.chunk(2)[1][..., tokens].sum(-1).mean(0)
            expected[len(share)] = expected.get(len(share), 0) + share
        return shares

    monkeypatch.setattr(Attention, "get_attention_scores", collect)
    unet.set_attn_processor(AttnProcessor())
    with torch.no_grad():
        unet(sample, t, encoder_hidden_states=text)
    assert set(seen.maps) == set(expected)
    assert len(expected) > 1
    for places, share in expected.items():
        torch.testing.assert_close(seen.maps[places], share, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("latent_size", [(64, 64), (48, 90)])
def test_the_mask_is_where_attention_is_high_in_the_medium_layers(latent_size):
    h, w = latent_size
    rows, columns = -(-h // 4), -(-w // 4)
    share = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.1
    share[rows // 4 : rows // 2, columns // 2 : -2] += 0.5
    misleading = torch.rand(h * w, generator=torch.Generator().manual_seed(2))
    seen = foreground.WordMaps([1], {h * w: misleading, rows * columns: share.flatten(), 4: torch.ones(4)})
    mask = seen.mask(latent_size)
    assert mask.shape == latent_size
    inside = mask[4 * (rows // 4) + 2 : 4 * (rows // 2) - 2, 4 * (columns // 2) + 2 : w - 10]
    assert inside.all()
    assert mask.float().mean() < 0.25  # where the share is high, and a cell around


def test_even_attention_has_no_foreground():
    seen = foreground.WordMaps([1], {64: torch.full((64,), 0.3)})
    assert not seen.mask((32, 32)).any()


def test_watching_ends_with_an_exception():
    state = AnchorState(branches=2)
    with pytest.raises(KeyError), foreground.watching(state, [1]):
        raise KeyError
    assert state.on_text is None
