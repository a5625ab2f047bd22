"""Rows of embeddings and head that are trained for a few tokens."""

import pytest
import torch
from spread import make_base
from transformers import AutoModelForCausalLM

from qwenlora.configs.schema import Lora
from qwenlora.trainer.loop.chunked_loss import own_the_loss
from qwenlora.trainer.loop.state import adapter_of
from qwenlora.trainer.model.fused import fuse
from qwenlora.trainer.model.lora import add_lora

BOTH = {"embed_tokens": [5, 9, 2000], "lm_head": [9, 5]}
IDS = torch.randint(0, 2048, (2, 20), generator=torch.Generator().manual_seed(1))
IDS[0, 3], IDS[0, 9], IDS[1, 7] = 5, 9, 2000


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return make_base(folder, "qwen3", tied=request.param), request.param


def adapted(folder, tokens, **lora):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    return add_lora(model, Lora(trainable_token_indices=tokens, **lora)).train()


def gradients_of(model):
    own_the_loss(model, accepts=True, weighted=False)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tokens", [[5, 9, 2000], BOTH], ids=["list", "both"])
def test_trained_rows_compute_as_in_peft_without_a_copy_of_the_matrix(base, tokens):
    folder, tied = base
    if tied and tokens is BOTH:
        tokens = BOTH["embed_tokens"]
    loss, expected = gradients_of(adapted(folder, tokens))
    model = adapted(folder, tokens)
    assert fuse(model).tokens == (2 if tied or tokens is BOTH else 1)
    made = []
    copied = torch.Tensor.index_copy
    torch.Tensor.index_copy = lambda self, *given, **named: (
        made.append(self.shape) or copied(self, *given, **named)
    )
    try:
        own, gradients = gradients_of(model)
    finally:
        torch.Tensor.index_copy = copied
    assert own == pytest.approx(loss, abs=1e-6)
    assert all((gradients[name] - expected[name]).abs().max() <= 1e-6 for name in expected)
    of_tokens = {name: of for name, of in gradients.items() if "trainable_tokens" in name}
    assert len(of_tokens) == (2 if tokens is BOTH else 1)
    assert all(of.abs().amax(1).min() > 0 for of in of_tokens.values()), "each token learns"
    assert (2048, 64) not in map(tuple, made)
    with model.disable_adapter(), torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
        assert torch.equal(model(IDS).logits, plain)


def test_an_adapter_holds_the_rows_alone(base):
    folder, _ = base
    held = {name: of for name, of in adapter_of(adapted(folder, [7, 1])).items() if "lora_" not in name}
    assert {name.partition(".model.")[2]: tuple(of.shape) for name, of in held.items()} == {
        "model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 64)
    }
    matrix = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    assert all(torch.equal(of, matrix[[7, 1]]) for of in held.values())


@pytest.mark.parametrize(
    ("tokens", "lora", "why"),
    [
        ([2048], {}, r"trainable_token_indices=\[2048\]: the base has 2,048 embeddings, expected ids below"),
        ([7], {"target_modules": ["embed_tokens"]}, "does not go with LoRA on the same matrix: leave embed_"),
        ([7], {"modules_to_save": ["embed_tokens"]}, "trains all of embed_tokens; leave it out there"),
        ([7, 1, 7], {}, r"each token once \(7 stands there twice\)"),
    ],
)
def test_tokens_that_cannot_be_trained_are_refused(base, tokens, lora, why):
    with pytest.raises(ValueError, match=why):
        adapted(base[0], tokens, **lora)


def test_a_head_that_is_the_embeddings_is_not_named(base):
    folder, tied = base
    if not tied:
        assert len(adapter_of(adapted(folder, BOTH))) == len(adapter_of(adapted(folder, [1]))) + 1
        return
    with pytest.raises(ValueError, match=r"this base's head is its embeddings; write \[9, 5\], which trains"):
        adapted(folder, BOTH)
    with pytest.raises(ValueError, match=r"lora\.modules_to_save trains all of lm_head; leave one of them"):
        adapted(folder, [7], modules_to_save=["lm_head"])


def test_an_adapter_is_trained_further_with_the_same_tokens(base, tmp_path):
    folder, _ = base
    first = adapted(folder, [7, 1])
    for name, parameter in first.named_parameters():
        if parameter.requires_grad:
            parameter.data += 1.0 if "tokens" in name else 0.0
    first.save_pretrained(tmp_path / "first", save_embedding_layers=False)
    again = adapter_of(adapted(folder, [7, 1], init_from=str(tmp_path / "first")))
    assert all(torch.equal(again[name], of) for name, of in adapter_of(first).items())
    with pytest.raises(ValueError, match=r"has trainable_token_indices=\[7, 1\], the config says \[7\]; set"):
        adapted(folder, [7], init_from=str(tmp_path / "first"))
