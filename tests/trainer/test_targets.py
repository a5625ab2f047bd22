"""all-linear has the same kinds of layers of each mixture of experts, never the router, and plain peft reads
what is saved; adapters that peft's own all-linear made are gone on from."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from qwenlora.adapter import loading as after_training
from qwenlora.configs.schema import Config, Lora
from qwenlora.trainer.model import loading
from qwenlora.trainer.model.kinds import count_kinds, count_trained
from qwenlora.trainer.model.lora import add_lora
from qwenlora.trainer.record.startup_table import _of_which

SIZES = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 16}
LINEAR = {f"linear_{what}": 2 for what in ("num_key_heads", "num_value_heads")} | {
    f"linear_{what}_head_dim": 16 for what in ("key", "value")
}
HYBRID = SHARED | LINEAR | {"layer_types": ["linear_attention", "full_attention"]}
FAMILIES = {
    "qwen2_moe": SHARED | {"mlp_only_layers": [0]},
    "qwen3_moe": EXPERTS | {"mlp_only_layers": [0]},
    "qwen3_next": HYBRID,
    "qwen3_5_moe_text": HYBRID,
}
IDS = torch.arange(24).reshape(2, 12) + 30


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return made(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return made("qwen3_next", tmp_path_factory)


def made(kind, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(kind)
    config = AutoConfig.for_model(kind, **SIZES | HEADS | FAMILIES[kind], initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def base_of(folder, **how):
    return AutoModelForCausalLM.from_pretrained(folder, **how)


def learnt(model):
    """Return the model with an adapter that changes something."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return model


@pytest.mark.parametrize("experts", ["all", "shared", "none"])
def test_all_linear_is_whole_kinds_and_never_the_router(family, experts):
    base = base_of(family)
    kinds = count_kinds(base)
    found = count_trained(add_lora(base, Lora(r=4, experts=experts)), kinds)
    left_out = {"all": set(), "shared": {"experts"}, "none": {"experts", "shared experts"}}[experts]
    left_out |= {"router", "head", "embeddings", "other"}
    assert {kind for kind, of in found.items() if not of.trained} == left_out & set(found)
    assert all(of.adapted == of.matrices for kind, of in found.items() if kind not in left_out)
    trained = sum(p.numel() for p in base.parameters() if p.requires_grad)
    assert sum(of.trained for of in found.values()) == trained


def test_plain_peft_reads_what_is_saved_and_it_is_gone_on_from(family, tmp_path):
    model = learnt(add_lora(base_of(family), Lora(r=4)))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert not json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    logits = model(IDS).logits
    assert (logits - base_of(family)(IDS).logits).abs().max() > 0.1
    in_peft = PeftModel.from_pretrained(base_of(family), tmp_path)(IDS).logits
    assert torch.allclose(in_peft, logits, atol=1e-5)
    assert torch.equal(add_lora(base_of(family), Lora(r=4, init_from=str(tmp_path)))(IDS).logits, logits)


def test_adapters_of_peft_s_own_all_linear_are_gone_on_from(family, tmp_path):
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules="all-linear")
    theirs = learnt(get_peft_model(base_of(family), settings))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    names = {name for name, p in theirs.named_parameters() if p.requires_grad}
    has = any(".experts." in name for name in names)
    right, wrong = ("all", "shared") if has else ("shared", "all")
    init_from = {"r": 4, "init_from": str(tmp_path)}
    ours = add_lora(base_of(family), Lora(experts=right, **init_from))
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    with pytest.raises(ValueError, match=f"lora.experts={wrong}; set lora.experts: {right}$"):
        add_lora(base_of(family), Lora(experts=wrong, **init_from))
    resumed = add_lora(base_of(family), Lora(r=4), saved=tmp_path)  # a checkpoint of an older version
    assert {name for name, p in resumed.named_parameters() if p.requires_grad} == names


def test_shared_experts_are_linear_layers_of_a_quantised_base_after_training_too(hybrid, tmp_path):
    settings = {"model": {"name_or_path": str(hybrid)}, "strategy": {"quantization": "nf4"}}
    config = Config(run_dir="x", data={"train": "x"}, **settings)
    model = learnt(add_lora(loading.load_base(config, str(hybrid)), Lora(r=4, experts="shared")))
    layer = "base_model.model.model.layers.1.mlp.shared_expert.up_proj"
    assert type(model.get_submodule(layer)).__name__ == "Linear4bit"
    model.peft_config["default"].init_lora_weights = "orthogonal"  # which peft cannot make of integers
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    subject = SimpleNamespace(base=str(hybrid), adapter=tmp_path, config=config, run=None)
    loaded = after_training.load(subject, tokenizer=object()).model
    assert type(loaded.get_submodule(layer)).__name__ == "Linear4bit"
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


GATES = ["gate.weight", "shared_expert_gate.weight"]


def test_parameters_that_are_named_besides_all_linear_are_trained(hybrid, tmp_path):
    lora = {"r": 4, "experts": "shared", "target_parameters": GATES, "layers_to_transform": [0]}
    model = learnt(add_lora(base_of(hybrid), Lora(**lora)))
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    kinds = {name: type(part).__module__.rpartition(".")[2] for name, part in mlp.named_children()}
    assert {name for name, kind in kinds.items() if kind == "layer"} == {"gate", "shared_expert_gate"}
    assert type(mlp.gate).__name__ == type(mlp.shared_expert_gate).__name__ == "ParamWrapper"
    assert type(mlp.shared_expert.up_proj).__name__ == "Linear"
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    logits = model(IDS).logits
    in_peft = PeftModel.from_pretrained(base_of(hybrid), tmp_path)(IDS).logits
    assert torch.allclose(in_peft, logits, atol=1e-5)
    again = add_lora(base_of(hybrid), Lora(**lora, init_from=str(tmp_path)))
    assert torch.equal(again(IDS).logits, logits)
    with pytest.raises(ValueError, match=r"has no LoRA on model\.layers\.1\.mlp\.gate\.weight; leave it out"):
        add_lora(base_of(hybrid), Lora(**lora | {"layers_to_transform": [0, 1]}, init_from=str(tmp_path)))


def test_a_checkpoint_is_gone_on_from_with_the_config_s_alphas(hybrid, tmp_path):
    add_lora(base_of(hybrid), Lora(r=4)).save_pretrained(tmp_path, save_embedding_layers=False)
    model = add_lora(base_of(hybrid), Lora(r=4, alpha_pattern={"q_proj": 64}), saved=tmp_path)
    attention = model.get_submodule("base_model.model.model.layers.1.self_attn")
    assert (attention.q_proj.scaling, attention.k_proj.scaling) == ({"default": 16.0}, {"default": 8.0})


@pytest.mark.parametrize("some", [True, False])
def test_all_linear_is_refused_where_layers_are_not_linear_to_torch(hybrid, some):
    base = base_of(hybrid)
    for name, module in list(base.named_modules()):
        if isinstance(module, torch.nn.Linear) and (not some or name.endswith("layers.1.self_attn.q_proj")):
            other = torch.nn.Module()  # as with GPTQ and AWQ
            other.in_features = module.in_features
            base.set_submodule(name, other)
    with pytest.raises(ValueError, match=r"of the base model\.layers\..* is not one.*name the layers"):
        add_lora(base, Lora(r=4))


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({}, r"mlp\.experts\.down_proj and 4 more.*: \[in_proj_ba, .*q_proj, v_proj\]$"),
        (
            {"experts": "shared", "target_parameters": GATES},
            r"without lora\.target_parameters and lora\.experts$",
        ),
        (
            {"target_modules": ["gate_proj", "up_proj"]},
            r"gate_up_proj, which.*leave them out of lora\.target_m",
        ),
    ],
)
def test_dropout_that_plain_peft_could_not_load_is_refused(hybrid, lora, said):
    with pytest.raises(
        ValueError, match=r"lora_dropout=0\.1 does not go with LoRA on .*set it to 0, or"
    ) as no:
        add_lora(base_of(hybrid), Lora(lora_dropout=0.1, **lora))
    assert re.search(said, str(no.value))
    assert add_lora(base_of(hybrid), Lora(lora_dropout=0.1, experts="none"))


def test_half_of_a_kind_is_said(hybrid):
    base = base_of(hybrid)
    kinds = count_kinds(base)
    found = count_trained(add_lora(base, Lora(r=4, target_modules=["q_proj", "k_proj"])), kinds)
    assert _of_which(SimpleNamespace(kinds=found)) == (
        "attention 576 (2 of 4 matrices); frozen: embeddings, linear attention, router, experts, shared"
        " experts, head"
    )
