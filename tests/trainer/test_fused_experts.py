"""Fused experts compute what peft's way with their parameters does: losses, and gradients of A, B and x."""

from contextlib import nullcontext

import pytest
import torch
from gradients import apart, losses_and_gradients
from largest import Largest
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen2_moe import modeling_qwen2_moe
from transformers.models.qwen3_moe import modeling_qwen3_moe

from qwenlora.trainer.model import fused_experts
from qwenlora.trainer.model.fused import Fused, fuse

EXPERTS = 8
SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
SHARED = {"shared_expert_intermediate_size": 16}
HYBRID = SHARED | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
KINDS = {"qwen2_moe": SHARED, "qwen3_moe": {}, "qwen3_next": HYBRID, "qwen3_5_moe_text": HYBRID}
UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


@pytest.fixture(autouse=True)
def transformers_own_rope():
    """What fuse() replaces in transformers' modules is put back."""
    modules = (modeling_qwen2_moe, modeling_qwen3_moe)
    own = [module.apply_rotary_pos_emb for module in modules]
    yield
    for module, function in zip(modules, own, strict=True):
        module.apply_rotary_pos_emb = function


def plain_model(kind="qwen3_moe", dtype=torch.float32, **lora):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | KINDS[kind])).to(dtype)
    settings = {"r": 8, "target_modules": ["q_proj"], "target_parameters": [UP, DOWN]} | lora
    model = get_peft_model(base, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def assert_fused_as_plain(model, ids, **more):
    loss, gradients = losses_and_gradients(model, ids, **more)
    assert fuse(model).experts == 2
    fused_loss, fused = losses_and_gradients(model, ids, **more)
    assert abs(loss - fused_loss) <= 1e-5
    assert sum("experts" in name for name in fused) >= 4
    for name, of_name in apart(fused, gradients).items():
        assert of_name <= 1e-5, f"{name} {of_name:.1e}"


def rows(*shape):
    return torch.randint(100, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_peft(kind):
    assert_fused_as_plain(plain_model(kind), rows(2, 9))


@pytest.mark.parametrize(
    "lora",
    [
        {"target_parameters": [UP], "r": 3},
        {"target_parameters": [DOWN], "r": 4, "lora_alpha": 3},
        {"use_rslora": True, "r": 16},
        {"target_modules": ["k_proj", "gate"]},  # the router, too
    ],
    ids=str,
)
def test_of_each_kind_of_adapter(lora):
    assert_fused_as_plain(plain_model(**lora), rows(2, 9))


def test_rows_in_one_pack():
    assert_fused_as_plain(plain_model(), rows(1, 9), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]]))


def test_with_activation_checkpointing():
    model, ids = plain_model(), rows(2, 9)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_fused_as_plain(model.train(), ids)


def test_experts_without_a_token_get_no_gradient():
    model, ids = plain_model(), rows(1, 2)
    assert_fused_as_plain(model, ids)
    _, gradients = losses_and_gradients(model, ids)
    of_a = next(g for name, g in gradients.items() if "layers.0.mlp.experts" in name and "lora_A" in name)
    used = of_a.view(EXPERTS, -1).any(1).sum()
    assert 2 <= used <= 4


def test_a_base_in_bfloat16_is_as_near_to_float32_as_it_is_in_peft():
    ids, model, exact = rows(3, 20), plain_model(dtype=torch.bfloat16), plain_model()
    exact.load_state_dict(model.state_dict())
    loss, gradients = losses_and_gradients(model, ids, autocast=True)
    of_peft = apart(gradients, losses_and_gradients(exact, ids)[1])
    assert fuse(model).experts == 2
    fused_loss, gradients = losses_and_gradients(model, ids, autocast=True)
    of_fused = apart(gradients, losses_and_gradients(exact, ids)[1])
    assert abs(loss - fused_loss) < 0.02
    for name, gradient in gradients.items():
        assert gradient.dtype == (torch.bfloat16 if name == "x" else torch.float32)
        assert of_fused[name] < 1.5 * of_peft[name] + 0.01, (name, of_peft[name], of_fused[name])


@pytest.mark.parametrize("off", ["disabled", "merged"])
def test_an_adapter_that_is_off_or_merged_is_seen(off):
    model, ids = plain_model().eval(), rows(2, 9)
    with torch.no_grad():
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        tuned = model(input_ids=ids).logits
        fuse(model)
        if off == "merged":
            model.merge_adapter()
        with model.disable_adapter() if off == "disabled" else nullcontext():
            logits = model(input_ids=ids).logits
    assert (tuned - base).abs().max() > 1e-3
    torch.testing.assert_close(logits, base if off == "disabled" else tuned, rtol=0, atol=1e-5)


@pytest.mark.parametrize("unusual", ["two adapters", "trained base", "another forward"])
def test_what_is_unusual_keeps_peft_s_way(unusual):
    model = plain_model()
    experts = model.base_model.model.model.layers[0].mlp.experts
    if unusual == "two adapters":
        model.add_adapter("second", model.peft_config["default"])
    elif unusual == "trained base":
        experts.get_base_layer().down_proj.requires_grad_()
    else:
        experts.get_base_layer().forward = lambda x, *_: x
    fused = fuse(model)
    assert (fused.experts, fused.plain_experts) == ((0, 2) if unusual == "two adapters" else (1, 1))


def test_a_copy_of_the_experts_is_never_made():
    model, ids = plain_model(), rows(1, 3)
    weight = model.base_model.model.model.layers[0].mlp.experts.get_base_layer().down_proj.numel()
    assert largest_made(model, ids) > weight
    fuse(model)
    assert largest_made(model, ids) < weight


def largest_made(model, ids):
    with Largest() as largest:
        model.base_model.model.model(input_ids=ids).last_hidden_state.sum().backward()
    return largest.numbers


def test_an_expert_whose_gradient_is_dropped_is_seen(monkeypatch):
    """What these tests would say if the last expert were forgotten."""
    real = fused_experts._outer

    def broken(left, right, ends):
        products = real(left, right, ends)
        products[-1] = 0
        return products

    monkeypatch.setattr(fused_experts, "_outer", broken)
    with pytest.raises(AssertionError, match="experts"):
        assert_fused_as_plain(plain_model(), rows(2, 9))


def test_what_the_table_says():
    assert str(Fused(14, norms=5, rope=True, experts=2)) == "LoRA, experts, norms and RoPE"
    assert str(Fused(14, rope=True, plain_experts=2)) == (
        "LoRA and RoPE; experts of 2 layers as in peft, which copies them in each step"
    )
