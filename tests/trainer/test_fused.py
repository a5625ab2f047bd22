"""Fused layers compute what peft's and transformers' do: losses and gradients, of all kinds of adapters."""

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
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
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe

from qwenlora.configs.estimate import FUSED, WITH_DROPOUT
from qwenlora.trainer.loop.chunked_loss import own_the_loss
from qwenlora.trainer.model import fused_lora, fused_rope
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
    "biases of LoRA": ({"lora_bias": True}, 0, 14),
}


@pytest.fixture(autouse=True)
def transformers_own_rope():
    """What fuse() replaces in transformers' modules is put back, or plain models would use it, too."""
    modules = (modeling_qwen2, modeling_qwen3, modeling_qwen3_moe)
    own = [module.apply_rotary_pos_emb for module in modules]
    yield
    for module, function in zip(modules, own, strict=True):
        module.apply_rotary_pos_emb = function


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
        apart = (gradient - others[name]).norm() / gradient.norm().clamp(min=1e-3)
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
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_of_any_shape(shape, seed):
    ids = rows(*shape, seed=seed)
    plain, fused = (losses_and_gradients(_made(way), ids) for way in ("plain", "fused"))
    if shape[1] > 1:  # of one token there is no loss
        assert_alike(fused, plain)


def model_of(way):
    model = _made(way)
    if way == "fused":
        fused_rope.fuse_rope(model)  # which the fixture undoes after each test
    return model


@cache
def _made(way):
    model = plain_model()
    if way == "fused":
        fuse(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_embeddings_are_transformers_own(dtype):
    torch.manual_seed(0)
    cos, sin = (torch.randn(2, 5, 16).to(dtype) for _ in range(2))
    made = []
    for rotate in (modeling_llama.apply_rotary_pos_emb, fused_rope.rotate):
        torch.manual_seed(1)
        q, k = (torch.randn(2, heads, 5, 16).to(dtype).requires_grad_() for heads in (4, 2))
        turned = rotate(q, k, cos, sin)
        sum((x.float() ** 3).sum() for x in turned).backward()
        made.append([*turned, q.grad, k.grad])
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.25)


@pytest.mark.parametrize("bits", [4, 8])
def test_bases_in_4_and_8_bits_with_biases(bits):
    import bitsandbytes as bnb

    def layers(fused):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(2)))
        for name, linear in list(model.named_children()):
            if bits == 4:
                small = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
            else:
                small = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
            small.load_state_dict(linear.state_dict())
            setattr(model, name, small.to("cpu"))
        model = get_peft_model(model, LoraConfig(target_modules=["0", "1"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        assert not fused or fuse(model).layers == 2
        x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = (model(x) ** 2).mean()
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        return loss.detach(), gradients | {"x": x.grad}

    assert_alike(layers(fused=True), layers(fused=False))


@pytest.mark.parametrize("shape", [(0, 32), (1, 0, 32), (32,), (3, 2, 32)])
def test_inputs_of_any_shape_and_outputs_that_are_changed_in_place(shape):
    model = plain_model()
    fuse(model)
    layer = model.base_model.model.model.layers[0]
    for module in (layer.self_attn.q_proj, layer.mlp):
        x = torch.ones(shape, requires_grad=True)
        output = module(x)
        assert output.shape == shape
        output.mul_(2).sum().backward()
        assert x.grad.shape == shape


def test_a_batch_without_a_trained_position_trains_a_head_with_lora():
    model, ids = plain_model(target_modules=["q_proj", "lm_head"]), rows(1, 9)
    fuse(model)
    own_the_loss(model, accepts=True, weighted=False)
    loss = model(input_ids=ids, labels=torch.full_like(ids, -100), num_items_in_batch=torch.tensor(1)).loss
    loss.backward()
    assert loss == 0


def test_a_norms_output_that_was_changed_is_not_made_again():
    model = plain_model()
    gradients = []
    for way in ("plain", "fused"):
        if way == "fused":
            fuse(model)
        layer = model.base_model.model.model.layers[0]
        model.zero_grad()
        normed = layer.input_layernorm(rows(1, 9, 32).float())
        layer.self_attn.q_proj(normed.mul_(3)).pow(2).sum().backward()
        gradients.append(layer.self_attn.q_proj.lora_A["default"].weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=0)


def test_a_layer_that_computes_in_its_own_way_is_left_to_peft():
    """A library may put another forward into a layer of torch, whose weight is then not what it seems."""
    model, ids = plain_model(target_modules=["q_proj", "down_proj"]), rows(2, 9)
    for layer in model.base_model.model.model.layers:
        for base in (layer.self_attn.q_proj.base_layer, layer.mlp.gate_proj):
            base.forward = lambda x, base=base: torch.nn.functional.linear(x, -base.weight)
    plain = losses_and_gradients(model, ids)
    fused = fuse(model)
    assert (fused.layers, fused.plain, fused.mlps) == (2, 2, 0)
    assert_alike(losses_and_gradients(model, ids), plain)


def test_a_layer_with_hooks_is_called_in_an_mlp():
    model, calls = plain_model(), []
    model.base_model.model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    fuse(model)
    model(input_ids=rows(1, 9))
    assert calls == [1]


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


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize(("dropout", "share"), [(0.0, FUSED), (0.1, WITH_DROPOUT)])
def test_a_layer_keeps_what_the_estimate_says(kind, dropout, share):
    """In the proportions of a Qwen2.5-7B, in 16 bits."""
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 1352, "num_attention_heads": 8}
    kept = []
    for layers in (1, 3):
        own = sizes | {"num_hidden_layers": layers}
        if kind == "qwen2":
            base = Qwen2ForCausalLM(Qwen2Config(**own))
        else:
            base = Qwen3ForCausalLM(Qwen3Config(**own, head_dim=32))
        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_dropout=dropout, target_modules="all-linear")
        model = get_peft_model(base.bfloat16(), config)
        fuse(model)
        kept.append(4 * numbers_kept(model.base_model.model.model, rows(1, 64)) / 64)
    normed = (256 + 32) * (kind == "qwen3")
    estimated = 2 * (4 * 256 + 2 * 32 + 2 * 1352 + normed)
    assert (kept[1] - kept[0]) / 2 / estimated == pytest.approx(share, rel=0.05)


def test_what_the_table_says():
    assert str(Fused(14, 0, 2, 5, True)) == "LoRA, MLPs, norms and RoPE"
    assert str(Fused(8, 6, 0, 5, True)) == "LoRA, norms and RoPE; 6 of 14 layers with LoRA as in peft"
    assert str(Fused(rope=True)) == "RoPE"
    assert str(Fused(plain=3)) == "nothing; 3 of 3 layers with LoRA as in peft"
