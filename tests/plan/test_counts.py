"""A plan counts the numbers of a base and its adapter as the preparation counts them in the model."""

import pytest
from made import WITH_VISION, make_with_vision
from transformers import AutoConfig

from qwenlora.configs.schema import Config, Lora
from qwenlora.plan.counts import count
from qwenlora.plan.shape import read_values, shape_of
from qwenlora.trainer.model.lora import count_parameters

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 40}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
FAMILIES = {
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen2_moe": SHARED | {"mlp_only_layers": [0]},
    "qwen3_moe": EXPERTS | {"head_dim": 32, "decoder_sparse_step": 2},
    "qwen3_next": SHARED | LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": SHARED | LINEAR,
}


def shape_and_counts(tmp_path, kind, lora, **more):
    AutoConfig.for_model(kind, **SIZES | HEADS | FAMILIES[kind] | more).save_pretrained(tmp_path)
    return counts_of(tmp_path, lora)


def counts_of(folder, lora):
    config = Config.model_validate(
        {"run_dir": "r", "model": {"name_or_path": str(folder)}, "data": {"train": "example"}, "lora": lora}
    )
    return count(shape_of(read_values(folder), "base"), config.lora), count_parameters(config, str(folder))


@pytest.mark.parametrize("kind", WITH_VISION)
def test_of_a_model_that_sees_the_text_part_is_counted(tmp_path, kind):
    planned, counted = counts_of(make_with_vision(tmp_path, kind), {})
    assert planned == counted


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_counted_as_transformers_makes_it(tmp_path, kind, tied):
    planned, counted = shape_and_counts(tmp_path, kind, {}, tie_word_embeddings=tied)
    assert planned == counted


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("qwen2", {"target_modules": ["q_proj", "v_proj"], "r": 4}),
        ("qwen2", {"target_modules": r".*\.layers\.[01]\..*_proj"}),
        ("qwen2", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("qwen3", {"use_dora": True}),
        ("qwen3", {"target_modules": ["q_proj", "lm_head"]}),
        ("qwen3", {"rank_pattern": {"down_proj": 32, r"layers\.0\..*": 4}}),
        ("qwen3", {"exclude_modules": ["o_proj"], "layers_to_transform": [2, 3]}),
        ("qwen3_moe", {"experts": "shared"}),
        ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
        ("qwen3_next", {"experts": "none"}),
        ("qwen3_next", {"experts": "shared"}),
        ("qwen3_5_moe_text", {"target_parameters": ["gate.weight"]}),
        ("qwen2_moe", {"rank_pattern": {"experts.down_proj": 8}}),
    ],
)
def test_settings_of_the_adapter_are_counted_as_peft_reads_them(tmp_path, kind, lora):
    planned, counted = shape_and_counts(tmp_path, kind, lora)
    assert planned == counted


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["qq_proj"]}, "the base has no qq_proj"),
        ({"target_modules": ".*nothing"}, "names no layer"),
        ({"modules_to_save": ["score"]}, "the base has no score"),
    ],
)
def test_names_that_the_base_lacks_are_refused(tmp_path, lora, message):
    AutoConfig.for_model("qwen3", **SIZES | HEADS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        count(shape_of(read_values(tmp_path), "base"), Lora(**lora))
