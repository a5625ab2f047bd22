"""MLPs that keep less have the same gradients, to the bit."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qwenlora.trainer.model import lean_mlp
from qwenlora.trainer.model.lean_mlp import keep_less

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def model_of(kind: str, *, lean: bool, **lora):
    torch.manual_seed(0)
    if kind == "qwen2":
        base = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    else:
        base = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))
    model = get_peft_model(base, LoraConfig(**{"target_modules": "all-linear"} | lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert keep_less(model) == 2 if lean else True
    return model


def gradients_of(model, ids, *, bf16=False):
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"lora_dropout": 0.3},
        {"use_dora": True},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["down_proj"], "lora_bias": True},
    ],
    ids=["plain", "dropout", "DoRA", "attention alone", "biases"],
)
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_losses_and_gradients_are_the_same_to_the_bit(kind, lora, bf16):
    ids = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(0))
    loss, gradients = gradients_of(model_of(kind, lean=False, **lora), ids, bf16=bf16)
    lean_loss, lean_gradients = gradients_of(model_of(kind, lean=True, **lora), ids, bf16=bf16)
    assert torch.equal(loss, lean_loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, lean_gradients[name]), name


@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 20)), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_of_any_shape(shape, seed):
    ids = torch.randint(100, shape, generator=torch.Generator().manual_seed(seed))
    _, gradients = gradients_of(MODELS[False], ids)
    _, lean = gradients_of(MODELS[True], ids)
    assert all(torch.equal(gradient, lean[name]) for name, gradient in gradients.items())


MODELS = {lean: model_of("qwen3", lean=lean) for lean in (False, True)}


def test_what_can_be_made_again_is_gone_after_the_forward_pass(monkeypatch):
    made, forget = [], lean_mlp._Made.forget

    def forgotten(self):
        made.extend(weakref.ref(tensor) for tensor in (self.activated, self.product))
        forget(self)

    monkeypatch.setattr(lean_mlp._Made, "forget", forgotten)
    ids = torch.randint(100, (2, 50), generator=torch.Generator().manual_seed(0))
    loss = MODELS[True](input_ids=ids, labels=ids).loss
    assert [tensor() for tensor in made] == [None] * 4, "of two layers"
    loss.backward()
