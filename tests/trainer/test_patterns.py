"""Ranks, alphas, layers and modules of one's own reach the model, and plain peft and verify read them; what
names nothing is refused."""

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qwenlora.adapter.subject import find
from qwenlora.adapter.verify import check_adapter
from qwenlora.configs.schema import Lora
from qwenlora.trainer.model.files import without_peft_s_own
from qwenlora.trainer.model.lora import add_lora

SIZES = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 16, "layer_types": ["full_attention"] * 2}
EXPERTS_OLD = ["q_proj", "gate_proj", "up_proj", "down_proj"]  # as transformers 4 had them
IDS = torch.arange(24).reshape(2, 12) + 30


@pytest.fixture(scope="module")
def bases(tiny, tmp_path_factory):
    torch.manual_seed(0)
    folders = {}
    for kind, more in {"qwen3": {}, "qwen3_moe": EXPERTS, "qwen3_next": SHARED}.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        config = AutoConfig.for_model(kind, **SIZES | HEADS | more, initializer_range=0.3)
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[kind])
        AutoTokenizer.from_pretrained(tiny).save_pretrained(folders[kind])
    return folders


def adapted(folder, **lora):
    return add_lora(AutoModelForCausalLM.from_pretrained(folder), Lora(r=4, **lora))


def ranks(model):
    """Return {module: its rank} of a model with an adapter."""
    sizes = {name: p.shape for name, p in model.named_parameters() if "lora_B" in name}
    return {
        name.partition(".lora_B")[0].removeprefix("base_model.model.model."): s[1]
        for name, s in sizes.items()
    }


WAYS = [
    ("qwen3", {"rank_pattern": {"down_proj": 8, r"layers\.0\.self_attn\.q_proj": 2}}),
    ("qwen3", {"alpha_pattern": {"down_proj": 5}, "init_lora_weights": "gaussian"}),
    ("qwen3", {"exclude_modules": ["o_proj"], "layers_to_transform": [1]}),
    ("qwen3", {"exclude_modules": r".*layers\.0\..*", "init_lora_weights": "orthogonal"}),
    ("qwen3", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]}),
    ("qwen3_moe", {"rank_pattern": {"experts.gate_up_proj": 8}, "layers_to_transform": [1]}),
    ("qwen3_moe", {"exclude_modules": [r"layers.0.mlp.experts"]}),
    ("qwen3_next", {"rank_pattern": {"experts.down_proj": 8}}),
    ("qwen3_next", {"experts": "shared", "init_lora_weights": "orthogonal"}),
    ("qwen3_next", {"rank_pattern": {r"gate_proj(\.weight)?": 8}, "layers_to_transform": [1]}),
]


@pytest.mark.parametrize(("kind", "lora"), WAYS, ids=str)
def test_what_is_saved_is_read_by_plain_peft_verified_and_gone_on_from(bases, tmp_path, kind, lora):
    torch.manual_seed(1)
    model = adapted(bases[kind], **lora)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    logits = model(IDS).logits
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[kind]), tmp_path)
    assert torch.allclose(again(IDS).logits, logits, atol=1e-5)
    assert check_adapter(find(str(tmp_path), base=str(bases[kind]))).numbers == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert torch.equal(adapted(bases[kind], init_from=str(tmp_path), **lora)(IDS).logits, logits)


def test_ranks_layers_and_modules_are_those_asked_for(bases):
    found = ranks(adapted(bases["qwen3"], rank_pattern={"down_proj": 8, r"layers\.0\.self_attn\.q_proj": 2}))
    assert {name for name, r in found.items() if r == 8} == {f"layers.{n}.mlp.down_proj" for n in (0, 1)}
    assert {name for name, r in found.items() if r == 2} == {"layers.0.self_attn.q_proj"}
    found = ranks(adapted(bases["qwen3"], exclude_modules=["o_proj"], layers_to_transform=[1]))
    assert len(found) == 6
    assert all(name.startswith("layers.1.") and not name.endswith("o_proj") for name in found)
    found = ranks(adapted(bases["qwen3_moe"], layers_to_transform=[1]))
    assert sorted(name for name in found if "experts" in name) == [
        "layers.1.mlp.experts", "layers.1.mlp.experts.base_layer"
    ]  # fmt: skip
    assert not any("layers.0" in name for name in found)


@pytest.mark.parametrize(
    ("kind", "lora", "said"),
    [
        (
            "qwen3",
            {"rank_pattern": {"c_attn": 8}},
            r"lora\.rank_pattern: c_attn matches no module with LoRA; they",
        ),
        (
            "qwen3",
            {"alpha_pattern": {"o_proj": 8}, "target_modules": ["q_proj"]},
            r"alpha_pattern: o_proj matches no",
        ),
        ("qwen3", {"rank_pattern": {"(": 8}}, r"rank_pattern: \( is no regular expression"),
        (
            "qwen3",
            {"rank_pattern": {"up_proj": 8, "layers.0.mlp.up_proj": 2}},
            r"both up_proj and layers\.0\.mlp\.up_proj match .* alphabetical",
        ),
        (
            "qwen3_moe",
            {"target_modules": EXPERTS_OLD, "alpha_pattern": {"experts.gate_up_proj": 16}},
            r"alpha_pattern: experts\.gate_up_proj matches .* peft itself sets .*name them in target_param",
        ),
        (
            "qwen3_moe",
            {"target_modules": EXPERTS_OLD, "rank_pattern": {r".*\.gate_up_proj": 16}},
            r"rank_pattern: \.\*\\\.gate_up_proj matches .* peft itself sets",
        ),
        ("qwen3", {"target_modules": "("}, r"target_modules: \( is no regular expression"),
        ("qwen3", {"exclude_modules": ["mlp"]}, r"exclude_modules: the model has no linear layer mlp;"),
        ("qwen3", {"layers_to_transform": [2]}, r"the model has no layer 2; its last is 1$"),
        (
            "qwen3_moe",
            {
                "target_modules": ["q_proj"],
                "target_parameters": ["experts.down_proj"],
                "layers_to_transform": [1],
            },
            r"do not reach lora\.target_parameters, here model\.layers\.0\.mlp\.experts\.down_proj;",
        ),
        (
            "qwen3_moe",
            {"init_lora_weights": "orthogonal"},
            r"orthogonal does not go with parameters \(mlp\.exp",
        ),
        (
            "qwen3_next",
            {"rank_pattern": {"up_proj": 8}},
            r"peft will know .*up_proj\.weight when .*write up_proj\(",
        ),
    ],
)
def test_what_names_nothing_or_something_else_is_refused(bases, kind, lora, said):
    with pytest.raises(ValueError, match=said):
        adapted(bases[kind], **lora)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"init_lora_weights": "orthogonal", "r": 3}, "needs even ranks, and 3 is odd"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "does not go with a pattern"),
        ({"experts": "none", "target_modules": ["q_proj"]}, "experts=none has no effect without"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_the_schema(lora, said):
    with pytest.raises(ValidationError, match=said):
        Lora(**lora)


def test_an_adapter_with_other_patterns_is_not_gone_on_from(bases, tmp_path):
    adapted(bases["qwen3"], rank_pattern={"q_proj": 8}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has rank_pattern=\{'q_proj': 8\}, the config says \{\}; set lora"):
        adapted(bases["qwen3"], init_from=str(tmp_path))


def test_peft_s_own_patterns_are_told_from_the_user_s():
    own, users = {r".*\.gate_up_proj": 64}, {"experts.gate_up_proj": 128, r".*\.gate_up_proj": 128}
    both = {"alpha_pattern": own, "rank_pattern": {r".*\.gate_up_proj": 32}}
    assert without_peft_s_own(both, Lora(), "alpha_pattern") == {}
    assert without_peft_s_own(both | {"alpha_pattern": users}, Lora(), "alpha_pattern") == users
    assert without_peft_s_own(both, Lora(alpha_pattern=own), "alpha_pattern") == own
    assert without_peft_s_own({"alpha_pattern": own}, Lora(), "alpha_pattern") == own, "peft doubles both"


@pytest.mark.parametrize("use_dora", [False, True])
def test_orthogonal_begins_at_the_base_in_bfloat16_too(bases, use_dora):
    base = AutoModelForCausalLM.from_pretrained(bases["qwen3"], dtype=torch.bfloat16)
    model = add_lora(base, Lora(r=4, init_lora_weights="orthogonal", use_dora=use_dora))
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    assert (a.dtype, b.dtype, a.requires_grad, b.requires_grad) == (torch.float32, torch.float32, True, True)
    assert a.abs().max() > 0.01 < b.abs().max()
    assert (b @ a).abs().max() < 1e-7
    if use_dora:
        magnitude = layer.lora_magnitude_vector.default.weight
        norms = torch.linalg.norm(layer.base_layer.weight.float(), dim=1)
        assert torch.allclose(magnitude, norms, rtol=1e-6)
        assert magnitude.requires_grad


def test_all_linear_is_written_in_any_case_as_peft_has_it():
    assert Lora(target_modules="All-Linear", experts="none").target_modules == "all-linear"
