"""Prompts to embeddings, against diffusers' own, and what is said of a prompt that is too long."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from t2vz.models import loading
from t2vz.models import prompt as prompts_of
from t2vz.spec import JobSpec

# `ball` is one token of the tiny model's tokenizer; start and end take two of the 77.
FULL = " ".join(["ball"] * 75)


@pytest.fixture
def components(tiny_model):
    return loading.load(JobSpec(prompt="x", model=str(tiny_model)), "cpu")


def encode(components, *prompts):
    made = prompts_of.encode(components, list(prompts), width=64, height=64)
    assert made.added == {}
    return made.text, made.warnings


@pytest.mark.parametrize("negative", ["", "blue snow"])
@pytest.mark.parametrize("prompt", ["a red ball on the grass", FULL + " red dog", "ほげ 🐼 é"])
def test_embeddings_equal_diffusers(tiny_model, components, negative, prompt):
    made, _ = encode(components, negative, prompt)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    positive, negatives = pipeline.encode_prompt(prompt, "cpu", 1, True, negative_prompt=negative)
    assert made.shape == (2, 77, 64)
    assert torch.equal(made, torch.cat([negatives, positive]))


def test_77_tokens_are_read_whole(components):
    assert len(components.tokenizer(FULL).input_ids) == 77
    assert encode(components, FULL)[1] == []


def test_what_is_cut_is_named(components):
    made, warnings = encode(components, "", FULL + " red dog")
    assert warnings == ["prompt longer than 77 tokens; without effect: “red dog”"]
    assert torch.equal(made[1], encode(components, FULL)[0][0])


def test_a_prompt_that_several_branches_share_is_warned_of_once(components):
    long = FULL + " snow"
    assert len(encode(components, long, long, "a ball")[1]) == 1
    assert len(encode(components, long, FULL + " dog")[1]) == 2


def test_a_tokenizer_that_states_no_limit(components, tiny_model, tmp_path):
    """Folders without a tokenizer_config.json are about; transformers then says 1e30."""
    (tmp_path / "tokenizer.json").write_bytes((tiny_model / "tokenizer/tokenizer.json").read_bytes())
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length > 1e20
    made, warnings = encode(replace(components, tokenizer=tokenizer), FULL + " red dog")
    assert made.shape == (1, 77, 64)
    assert len(warnings) == 1
