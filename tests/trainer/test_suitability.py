"""Bases that are refused, or that the user is told about, by their config.json."""

import re

import pytest
from transformers import Qwen2Config

from qwenlora.configs.schema import Config, Data, Model
from qwenlora.trainer.model import suitability

SIZES = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000, "rope_theta": 1e6}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}


def config_of(base="base") -> Config:
    return Config(run_dir="run", model=Model(name_or_path=str(base)), data=Data(train="x"))


def model_of(rope=None, **more):
    return Qwen2Config(
        **SIZES, max_position_embeddings=1000, **({"rope_parameters": rope} if rope else {}), **more
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Qwen3Model", "a model without a head, as those that make embeddings are"),
        ("Qwen2ForSequenceClassification", "made to classify texts, not to write them"),
        ("Qwen2ForTokenClassification", "made to classify tokens"),
        ("Qwen2ForRewardModel", "made to rate answers"),
    ],
)
def test_a_base_that_writes_no_text_is_refused(name, said):
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        suitability.check_task(config_of(), model_of(architectures=[name]))
    assert f"model.name_or_path=base is a {name} by its config.json" in str(refusal.value)


@pytest.mark.parametrize(
    "names", [None, [], ["Qwen2ForCausalLM"], ["Qwen3_5ForConditionalGeneration"], ["QWenLMHeadModel"]]
)
def test_models_for_text_generation_pass(names):
    suitability.check_task(config_of(), model_of(architectures=names))


def test_rope_that_depends_on_the_batch_is_refused_where_a_row_reaches_it():
    suitability.check_lengths(config_of(), model_of(DYNAMIC), 1000)
    with pytest.raises(ValueError, match=re.escape("set data.max_length: 1000, or rope_type yarn there")):
        suitability.check_lengths(config_of(), model_of(DYNAMIC), 1001)


@pytest.mark.parametrize(("rope", "longest"), [(None, 1000), (YARN, 4000)])
def test_rows_longer_than_the_base_is_made_for_are_said(rope, longest):
    suitability.check_lengths(config_of(), model_of(rope), longest + 1)
    assert suitability.notes_on_lengths(model_of(rope), longest) == []
    (note,) = suitability.notes_on_lengths(model_of(rope), longest + 1)
    assert note.startswith(
        f"the longest row has {longest + 1:,} tokens, and the base is made for {longest:,}"
    )
    assert note.endswith(
        f"set data.max_length: {longest}, or stretch its positions (YaRN, rope_scaling with factor 2 in its"
        " config.json)"
    )
