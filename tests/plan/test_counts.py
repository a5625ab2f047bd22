"""A plan counts the numbers of a base and its adapter as the preparation counts them in the model."""

import json

import pytest
from made import WITH_VISION, config_with_vision
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


def counts_of(tmp_path, lora):
    config = Config.model_validate(
        {"run_dir": "r", "model": {"name_or_path": str(tmp_path)}, "data": {"train": "example"}, "lora": lora}
    )
    return count(shape_of(read_values(tmp_path), "base"), config.lora), count_parameters(
        config, str(tmp_path)
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_counted_as_transformers_makes_it(tmp_path, kind, tied):
    planned, counted = shape_and_counts(tmp_path, kind, {}, tie_word_embeddings=tied)
    assert planned == counted


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_file_leaves_out_is_as_transformers_fills_it_in(tmp_path, kind):
    wide = SIZES | HEADS | FAMILIES[kind] | {"model_type": kind, "hidden_size": 128}
    few = {key: value for key, value in wide.items() if key not in (*LINEAR, "head_dim")}
    (tmp_path / "config.json").write_text(json.dumps(few))
    planned, counted = counts_of(tmp_path, {})
    assert planned == counted


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_windows_and_biases_are_counted(tmp_path, kind):
    odd = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2, "attention_bias": True}
    planned, counted = shape_and_counts(tmp_path, kind, {}, **odd)
    assert planned == counted


@pytest.mark.parametrize("lora", [{}, {"modules_to_save": ["embed_tokens"]}])
@pytest.mark.parametrize("kind", WITH_VISION)
def test_the_text_of_a_base_with_vision_is_counted_by_the_names_of_its_full_class(tmp_path, kind, lora):
    config_with_vision(kind, 320, tied=True).save_pretrained(tmp_path)
    planned, counted = counts_of(
        tmp_path, lora | {"rank_pattern": {r"model\.language_model\.layers\.0\..*": 4}}
    )
    assert planned == counted


def test_a_name_of_the_vision_part_is_refused_since_that_is_not_trained(tmp_path):
    config_with_vision("qwen2_5_vl", 320).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the base has no qkv"):
        count(shape_of(read_values(tmp_path), "base"), Lora(target_modules=["q_proj", "qkv"]))
    config = Config.model_validate(
        {
            "run_dir": "r",
            "model": {"name_or_path": str(tmp_path)},
            "data": {"train": "example"},
            "lora": {"target_modules": ["q_proj", "qkv"]},
        }
    )
    with pytest.raises(ValueError, match="the model has no qkv"):
        count_parameters(config, str(tmp_path))


def test_a_file_of_qwen2_5_vl_that_has_its_text_beside_its_vision_is_read(tmp_path):
    values = config_with_vision("qwen2_5_vl", 320).to_dict()
    text = values.pop("text_config")
    (tmp_path / "config.json").write_text(json.dumps({**text, **values}))
    planned, counted = counts_of(tmp_path, {})
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
        ("qwen2_moe", {"modules_to_save": ["gate"]}),
        ("qwen3", {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3]}}),
        ("qwen3", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("qwen3", {"modules_to_save": ["norm", "q_proj"]}),
        ("qwen3", {"modules_to_save": ["mlp"]}),
        ("qwen3", {"init_lora_weights": "pissa", "modules_to_save": ["q_proj", "norm"]}),
        ("qwen2_moe", {"modules_to_save": ["mlp"], "target_modules": ["q_proj", "o_proj"]}),
        ("qwen3_next", {"modules_to_save": ["linear_attn", "shared_expert"], "experts": "none"}),
        ("qwen3_next", {"modules_to_save": ["norm"]}),
        ("qwen3_next", {"experts": "none", "use_dora": True}),
        ("qwen3_5_moe_text", {"experts": "shared", "lora_dropout": 0.1}),
    ],
)
def test_settings_of_the_adapter_are_counted_as_peft_reads_them(tmp_path, kind, lora):
    planned, counted = shape_and_counts(tmp_path, kind, lora)
    assert planned == counted


@pytest.mark.parametrize(
    ("kind", "lora", "message"),
    [
        ("qwen3", {"target_modules": ["o_proj", "qq_proj"]}, "the base has no qq_proj; did you mean q_proj?"),
        ("qwen3", {"target_modules": ["up_proj"], "modules_to_save": ["mlp"]}, "names no layer of the base"),
        ("qwen3", {"modules_to_save": ["layers"]}, "the base has no layers; names in it end in"),
        ("qwen3", {"target_modules": ".*nothing"}, "names no layer"),
        ("qwen3", {"target_modules": "[bad"}, r"lora.target_modules: \[bad is no regular expression"),
        ("qwen3", {"modules_to_save": ["score"]}, "the base has no score"),
        ("qwen3", {"target_parameters": ["experts.down_proj"]}, "the base has no experts.down_proj"),
        ("qwen3", {"exclude_modules": ["mlp"]}, "the base has no linear layer mlp"),
        ("qwen3", {"layers_to_transform": [0, 4]}, "no layer 4; its last is 3"),
        ("qwen3", {"rank_pattern": {"qq_proj": 4}}, "qq_proj matches no layer"),
        ("qwen3", {"trainable_token_indices": [320]}, "expected ids below 320"),
        ("qwen2_moe", {"lora_dropout": 0.1}, "lora_dropout=0.1 does not go with LoRA on .*experts"),
        (
            "qwen3_next",
            {"experts": "shared", "use_dora": True},
            "use_dora=true does not go with LoRA on .*expert",
        ),
        (
            "qwen3_next",
            {"target_modules": ["q_proj", "shared_expert.down_proj"]},
            "takes shared_expert.down_proj",
        ),
        ("qwen3_moe", {"target_modules": ["gate"]}, "takes gate for"),
    ],
)
def test_what_a_start_refuses_and_what_only_a_start_can_count_is_refused(tmp_path, kind, lora, message):
    AutoConfig.for_model(kind, **SIZES | HEADS | FAMILIES[kind]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        count(shape_of(read_values(tmp_path), "base"), Lora(**lora))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "wide"}, "base: hidden_size: "),
        ({"num_attention_heads": 0}, "base: num_attention_heads: "),
        ({"layer_types": ["full_attention"]}, "1 layer_types and num_hidden_layers=4"),
        ({"layer_types": ["full_attention"] * 3 + ["wide"]}, "layer_types: expected .*, not wide"),
        ({"num_experts": None}, "has no num_experts"),
        ({"shared_expert_intermediate_size": None}, "has no shared_expert_intermediate_size"),
        ({"text_config": "none"}, "text_config=none, expected an object"),
        ({"model_type": None}, "model_type=None is no family"),
        ({"quantization_config": {"quant_method": "awq"}}, "its files are quantised"),
    ],
)
def test_a_file_that_is_damaged_or_of_quantised_weights_is_refused_by_name(change, message):
    values = SIZES | HEADS | FAMILIES["qwen2_moe"] | {"model_type": "qwen2_moe"}
    with pytest.raises(ValueError, match=message):
        shape_of(values | change, "base")


def test_what_a_file_has_to_say_is_not_guessed():
    values = SIZES | HEADS | {"model_type": "qwen3"}
    for key in ("num_key_value_heads", "intermediate_size"):
        with pytest.raises(ValueError, match=f"it has no {key}"):
            shape_of({name: value for name, value in values.items() if name != key}, "base")
