"""Prompts to embeddings, against diffusers' own, and what is said of a prompt that is too long."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from t2vz.models.prompt import encode_prompts

# `ball` is one token of the tiny model's tokenizer; start and end take two of the 77.
FULL = " ".join(["ball"] * 75)


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return StableDiffusionPipeline.from_pretrained(tiny_model)


def encode(pipeline, *prompts):
    return encode_prompts(pipeline.tokenizer, pipeline.text_encoder, list(prompts))


@pytest.mark.parametrize("negative", ["", "blue snow"])
@pytest.mark.parametrize("prompt", ["a red ball on the grass", FULL + " red dog", "ほげ 🐼 é"])
def test_embeddings_equal_diffusers(pipeline, negative, prompt):
    made, _ = encode(pipeline, negative, prompt)
    positive, negatives = pipeline.encode_prompt(prompt, "cpu", 1, True, negative_prompt=negative)
    assert made.shape == (2, 77, 64)
    assert torch.equal(made, torch.cat([negatives, positive]))


def test_77_tokens_are_read_whole(pipeline):
    assert len(pipeline.tokenizer(FULL).input_ids) == 77
    assert encode(pipeline, FULL)[1] == []


def test_what_is_cut_is_named(pipeline):
    made, warnings = encode(pipeline, "", FULL + " red dog")
    assert warnings == ["prompt longer than 77 tokens; without effect: “red dog”"]
    assert torch.equal(made[1], encode(pipeline, FULL)[0][0])


def test_a_prompt_that_several_branches_share_is_warned_of_once(pipeline):
    long = FULL + " snow"
    assert len(encode(pipeline, long, long, "a ball")[1]) == 1
    assert len(encode(pipeline, long, FULL + " dog")[1]) == 2


def test_a_tokenizer_that_states_no_limit(pipeline, tiny_model, tmp_path):
    """Folders without a tokenizer_config.json are about; transformers then says 1e30."""
    (tmp_path / "tokenizer.json").write_bytes((tiny_model / "tokenizer/tokenizer.json").read_bytes())
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length > 1e20
    made, warnings = encode_prompts(tokenizer, pipeline.text_encoder, [FULL + " red dog"])
    assert made.shape == (1, 77, 64)
    assert len(warnings) == 1
