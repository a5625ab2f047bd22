"""The loss that the head makes chunk by chunk is the loss of all logits, with the same gradients."""

import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sharing import model_of
from torch.nn.functional import cross_entropy
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwenlora.configs.schema import Lora
from qwenlora.trainer.loop import chunked_loss
from qwenlora.trainer.loop.chunked_loss import own_the_loss, summed_loss
from qwenlora.trainer.model.base import IGNORED
from qwenlora.trainer.spread.sequence import Team

VOCABULARY, CLOSE = 211, 1e-6
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}
BODY = ["q_proj", "v_proj", "down_proj"]
ADAPTERS = {
    "frozen": Lora(target_modules=BODY),
    "lora on the head": Lora(target_modules=[*BODY, "lm_head"]),
    "dora on the head": Lora(target_modules=[*BODY, "lm_head"], use_dora=True),
    "lora on both": Lora(target_modules=[*BODY, "embed_tokens", "lm_head"]),
    "head trained": Lora(target_modules=BODY, modules_to_save=["lm_head"]),
    "both trained": Lora(target_modules=BODY, modules_to_save=["embed_tokens", "lm_head"]),
    "lora on the head alone": Lora(target_modules=["lm_head"]),
}


@cache
def model(adapter="frozen", tied=False, bias=False, kind="qwen2"):
    torch.manual_seed(0)
    cls, config = {"qwen2": (Qwen2ForCausalLM, Qwen2Config), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}[kind]
    base = cls(config(**SIZES, tie_word_embeddings=tied)).requires_grad_(False)
    if bias:
        base.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY), requires_grad=False)
    made = model_of(base, ADAPTERS[adapter])
    assert own_the_loss(made, accepts=True, weighted=True) == ""
    return made


def a_batch(lengths, share=0.5, weighted=False, seed=0):
    """Return rows padded on the right, a share of whose tokens is trained."""
    random = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    ids = torch.randint(VOCABULARY, shape, generator=random)
    attended = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    trained = attended & (torch.rand(shape, generator=random) < share)
    batch = {"input_ids": ids, "labels": ids.where(trained, IGNORED), "attention_mask": attended.long()}
    if weighted:
        weights = torch.rand(shape, generator=random).exp() * trained
        batch["loss_weights"] = torch.cat([weights[:, 1:], torch.zeros(shape[0], 1)], 1)
    return batch


def gradients_of(made, loss):
    made.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in made.named_parameters() if p.requires_grad}


def plain_loss(made, batch, number):
    """Return the loss from all logits, as transformers computes it."""
    inputs = {name: values for name, values in batch.items() if name in ("input_ids", "attention_mask")}
    labels = batch["labels"][:, 1:].flatten()
    losses = cross_entropy(
        made(**inputs).logits[:, :-1].float().flatten(0, 1), labels, ignore_index=IGNORED, reduction="none"
    )
    weights = batch["loss_weights"][:, :-1].flatten() if "loss_weights" in batch else 1
    return (losses * weights).sum() / number


def assert_same(made, batch, number=17.0):
    expected = plain_loss(made, batch, number)
    expected_gradients = gradients_of(made, expected)
    output = made(**batch, num_items_in_batch=torch.tensor(number))
    assert output.logits is None
    assert output.loss.item() == pytest.approx(expected.item(), rel=CLOSE, abs=CLOSE)
    found = gradients_of(made, output.loss)
    for name, gradient in expected_gradients.items():
        assert found[name] is not None, name
        scale = max(1.0, gradient.abs().max().item())
        assert (found[name] - gradient).abs().max().item() <= CLOSE * scale, name
    return expected_gradients


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    share=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    weighted=st.booleans(),
    at_once=st.integers(1, 40),
    adapter=st.sampled_from(list(ADAPTERS)),
    tied=st.booleans(),
    bias=st.booleans(),
    kind=st.sampled_from(["qwen2", "qwen3"]),
)
def test_loss_and_gradients_are_those_of_all_logits(
    lengths, share, weighted, at_once, adapter, tied, bias, kind
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_loss, "LOGITS_AT_ONCE", at_once * 4 * VOCABULARY)
        assert_same(model(adapter, tied, bias, kind), a_batch(lengths, share, weighted))
