"""Token merging: what is alike is merged without loss, and never more than asked for."""

import pytest
import torch

from t2vz.engine.merging import bipartite


def test_like_tokens_are_merged_without_loss():
    quarter = torch.randn(2, 4, 4, 16)
    tokens = quarter.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)  # each four times, in 2 × 2 cells
    merge, unmerge = bipartite(tokens, 8, 8, 0.75)
    assert merge(tokens).shape == (2, 16, 16)
    torch.testing.assert_close(unmerge(merge(tokens)), tokens)


@pytest.mark.parametrize(("h", "w"), [(8, 8), (6, 10), (5, 7), (1, 4)])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75])
def test_as_many_go_as_asked_for_and_all_come_back_in_place(h, w, ratio):
    torch.manual_seed(0)
    tokens = torch.randn(3, h * w, 8)
    merge, unmerge = bipartite(tokens, h, w, ratio)
    merged = merge(tokens)
    corners = -(-h // 2) * -(-w // 2)
    assert merged.shape[1] == max(h * w - int(ratio * h * w), corners)
    back = unmerge(merged)
    assert back.shape == tokens.shape
    untouched = (back == tokens).all(-1).sum(1)
    assert (untouched >= merged.shape[1] - corners).all()


def test_a_merged_token_is_the_mean_and_goes_to_the_likest():
    # Corner tokens of two cells, one along x and one along y; the others lean to one of them.
    tokens = torch.tensor([[[1.0, 0.0], [3.0, 0.1], [0.0, 1.0], [0.1, 5.0]]])
    merge, unmerge = bipartite(tokens, 1, 4, 0.5)
    assert merge(tokens).tolist() == [[[2.0, pytest.approx(0.05)], [pytest.approx(0.05), 3.0]]]
    assert unmerge(torch.tensor([[[1.0, 1.0], [2.0, 2.0]]])).tolist() == [
        [[1.0, 1.0], [1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    ]


def test_frames_are_merged_each_by_itself():
    torch.manual_seed(1)
    tokens = torch.randn(4, 36, 8)
    merge, unmerge = bipartite(tokens, 6, 6, 0.5)
    alone = [bipartite(tokens[i : i + 1], 6, 6, 0.5) for i in range(4)]
    together = unmerge(merge(tokens))
    for i, (merge_one, unmerge_one) in enumerate(alone):
        torch.testing.assert_close(together[i : i + 1], unmerge_one(merge_one(tokens[i : i + 1])))
