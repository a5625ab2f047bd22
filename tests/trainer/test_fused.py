"""Fused layers compute what peft's and transformers' do: losses and gradients, of all kinds of adapters."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qwenlora.trainer.model import fused_lora
from qwenlora.trainer.model.fused import Fused, fuse

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
KINDS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16)),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# adapters, and how many layers of Qwen3 with two layers are fused, and how many are not
ADAPTERS = {
    "all-linear": ({}, 14, 0),
    "rank-stabilised": ({"use_rslora": True, "lora_alpha": 3}, 14, 0),
    "attention alone": ({"target_modules": ATTENTION}, 8, 0),
    "down alone": ({"target_modules": ["down_proj"]}, 2, 0),
    "with the head": ({"target_modules": [*ATTENTION, "lm_head"]}, 9, 0),
    "DoRA": ({"use_dora": True}, 0, 14),
    "trained biases": ({"lora_bias": True}, 0, 14),
}


def plain_model(kind="qwen3", dtype=torch.float32, **lora):
    torch.manual_seed(0)
    base = KINDS[kind]().to(dtype)
    model = get_peft_model(base, LoraConfig(**{"target_modules": "all-linear"} | lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif "norm" in name or "bias" in name:  # they begin as ones and zeros, which hide mistakes
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def rows(*shape, seed=0):
    return torch.randint(100, shape, generator=torch.Generator().manual_seed(seed))


def losses_and_gradients(model, ids, *, autocast=False):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_alike(one, other, *, at=1e-5):
    (loss, gradients), (other_loss, others) = one, other
    assert abs(loss - other_loss) <= at
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == others[name].dtype == torch.float32
        apart = (gradient - others[name]).norm() / gradient.norm()
        assert apart <= at, f"{name} {apart:.1e}"


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_peft(kind):
    model, ids = plain_model(kind), rows(2, 9)
    plain = losses_and_gradients(model, ids)
    assert fuse(model).mlps == {"qwen3_moe": 1}.get(kind, 2)
    assert_alike(losses_and_gradients(model, ids), plain)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_of_each_kind_of_adapter(adapter):
    lora, layers, left = ADAPTERS[adapter]
    model, ids = plain_model(**lora), rows(2, 9)
    plain = losses_and_gradients(model, ids)
    fused = fuse(model)
    assert (fused.layers, fused.plain) == (layers, left)
    assert_alike(losses_and_gradients(model, ids), plain)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_base_in_bfloat16_is_as_near_to_float32_as_it_is_in_peft(kind):
    ids = rows(3, 20)
    model = plain_model(kind, torch.bfloat16)
    exact = plain_model(kind)
    exact.load_state_dict(model.state_dict())
    _, right = losses_and_gradients(exact, ids)
    loss, peft = losses_and_gradients(model, ids, autocast=True)
    fuse(model)
    fused_loss, fused = losses_and_gradients(model, ids, autocast=True)
    assert abs(loss - fused_loss) < 0.02
    apart = {
        name: [(g[name] - right[name]).norm() / right[name].norm() for g in (peft, fused)] for name in right
    }
    for name, (of_peft, of_fused) in apart.items():
        assert of_fused < 1.5 * of_peft + 0.01, (name, of_peft, of_fused)


def test_dropout_is_that_of_peft_when_it_draws_the_same_masks(monkeypatch):
    """With masks that depend on nothing but the shape, both ways leave out the same numbers."""

    def mask_for(x):
        return torch.rand(x.shape, generator=torch.Generator().manual_seed(x.shape[-1])) > 0.3

    monkeypatch.setattr(
        torch.nn.Dropout, "forward", lambda self, x: x * mask_for(x.view(-1, x.shape[-1])).view_as(x) / 0.7
    )
    monkeypatch.setattr(
        fused_lora.torch, "native_dropout", lambda x, p, train: (x * mask_for(x) / (1 - p), mask_for(x))
    )
    model, ids = plain_model(lora_dropout=0.3), rows(2, 9)
    plain = losses_and_gradients(model, ids)
    assert fuse(model).layers == 14
    assert_alike(losses_and_gradients(model, ids), plain)


def test_dropout_leaves_out_its_share_in_training_and_nothing_in_evaluation():
    model, ids = plain_model(lora_dropout=0.3), rows(2, 9)
    fuse(model)
    assert model(input_ids=ids).logits.ne(model(input_ids=ids).logits).any()
    model.eval()
    still = model(input_ids=ids).logits
    assert torch.equal(still, model(input_ids=ids).logits)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.train()
    x = torch.ones(2000, 32)
    _, low = fused_lora._project(*_arguments(layer, x))
    assert 0.68 < low.mask.float().mean() < 0.72


def _arguments(layer, x):
    projection, pair = fused_lora.projection_of(layer)
    return projection, x, pair


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_activation_checkpointing(reentrant):
    model, ids = plain_model(), rows(2, 9)
    plain = losses_and_gradients(model, ids)
    fuse(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert_alike(losses_and_gradients(model, ids), plain)


@pytest.mark.parametrize("off", ["disabled", "merged"])
def test_an_adapter_that_is_off_or_merged_is_seen(off):
    model, ids = plain_model().eval(), rows(2, 9)
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids).logits
    fuse(model)
    with torch.no_grad():
        tuned = model(input_ids=ids).logits
        assert (tuned - base).abs().max() > 1e-2
        if off == "merged":
            model.merge_adapter()
            torch.testing.assert_close(model(input_ids=ids).logits, tuned, rtol=0, atol=1e-4)
        else:
            with model.disable_adapter():
                torch.testing.assert_close(model(input_ids=ids).logits, base, rtol=0, atol=1e-5)


@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 20)), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_of_any_shape(shape, seed):
    ids = rows(*shape, seed=seed)
    plain, fused = (losses_and_gradients(model_of(way), ids) for way in ("plain", "fused"))
    if shape[1] > 1:  # of one token there is no loss
        assert_alike(fused, plain)


@cache
def model_of(way):
    model = plain_model()
    if way == "fused":
        fuse(model)
    return model


def test_a_mistake_in_a_kernel_is_seen(monkeypatch):
    """What these tests would say if the gradient of B forgot the scaling."""
    real = fused_lora._gradients

    def broken(*args):
        of_x, of_a, of_b = real(*args)
        return of_x, of_a, of_b * 1.001

    plain = losses_and_gradients(model_of("plain"), rows(2, 9))
    monkeypatch.setattr(fused_lora, "_gradients", broken)
    with pytest.raises(AssertionError, match="lora_B"):
        assert_alike(losses_and_gradients(model_of("fused"), rows(2, 9)), plain)


def test_what_is_kept_for_the_backward_pass():
    """Of a layer: its input, q and k before and after norm and rotation, v, attention's output, the MLP's
    input, gate and up, seven low-rank products, and single numbers a token: of norms and of attention."""
    kept = {
        way: numbers_kept(model_of(way).base_model.model.model, rows(1, 64)) for way in ("plain", "fused")
    }
    queries, keys, r = 2 * 16, 16, 8
    layer = 32 + 3 * queries + 3 * keys + 32 + 2 * 64 + 7 * r + (2 + 2 + 1) + 2
    ends = 32 + 1 + 2 * 16  # the last norm, cos and sin
    assert kept["fused"] == 64 * (2 * layer + ends)
    assert kept["plain"] > 1.4 * kept["fused"]


def numbers_kept(body, ids):
    """Return how many numbers autograd keeps of a forward pass, the weights left out."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        body(input_ids=ids).last_hidden_state.sum().backward()
    weights = {p.untyped_storage().data_ptr() for p in body.parameters()}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in kept}
    return sum(size for place, size in sizes.items() if place not in weights)


def test_what_the_table_says():
    assert str(Fused(14, 0, 2, 5, True)) == "LoRA, MLPs, norms and RoPE fused"
    assert str(Fused(8, 6, 0, 5, True)) == "LoRA, norms and RoPE fused; 6 of 14 layers with LoRA as in peft"
    assert str(Fused(rope=True)) == "RoPE fused"
    assert str(Fused()) == "none fused"
