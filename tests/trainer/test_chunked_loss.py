"""The loss that the head makes chunk by chunk is the loss of all logits, with the same gradients."""

import math
import weakref
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from sharing import Sharing, make_base, model_of, run_all
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qwenlora.configs.schema import Lora
from qwenlora.trainer.loop import blocked_loss, chunked_loss
from qwenlora.trainer.loop.chunked_loss import own_the_loss, summed_loss
from qwenlora.trainer.model.loading import IGNORED
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
    "embeddings trained": Lora(target_modules=BODY, modules_to_save=["embed_tokens"]),
    "lora on embeddings": Lora(target_modules=[*BODY, "embed_tokens"]),
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
        assert (found[name] - gradient).abs().max().item() <= 3 * CLOSE * scale, name
    return expected_gradients


@settings(max_examples=40)
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
        patch.setattr(blocked_loss, "POSITIONS", at_once)
        patch.setattr(blocked_loss, "WORDS", 5 * at_once)
        patch.setattr(blocked_loss, "OTHERS_WORDS", 5 * at_once)
        assert_same(model(adapter, tied, bias, kind), a_batch(lengths, share, weighted))


def test_a_chunk_is_as_large_as_its_logits_may_be(monkeypatch):
    made, seen, chunk = model(bias=True), [], chunked_loss._chunk
    monkeypatch.setattr(chunked_loss, "_chunk", lambda *args: seen.append(len(args[1])) or chunk(*args))
    for at_once in (3, 5, 1000):
        monkeypatch.setattr(chunked_loss, "LOGITS_AT_ONCE", at_once * 4 * VOCABULARY + 3)
        seen.clear()
        made(**a_batch([11], share=1.0))  # ten positions predict a trained token
        assert max(seen) <= at_once
        assert sum(seen) == 10
        assert len(seen) == math.ceil(10 / at_once)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_nothing_trained_gives_a_loss_of_zero_with_gradients_of_zeros(adapter):
    made = model(adapter)
    for weighted in (False, True):
        output = made(**a_batch([7, 3], share=0, weighted=weighted), num_items_in_batch=torch.tensor(5))
        gradients = gradients_of(made, output.loss)
        assert output.loss.item() == 0
        assert gradients
        assert all(gradient is not None and not gradient.any() for gradient in gradients.values())


def test_slices_of_shared_sequences_add_up_to_the_whole():
    made, batch = model(), a_batch([9, 6], weighted=True)
    whole = made(**batch, num_items_in_batch=3).loss
    head, total = made.get_output_embeddings(), 0
    states = made.get_base_model().model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    for rank in range(2):
        cut = Team(2, rank).cut(batch, 0)
        some = torch.nn.functional.pad(states, (0, 0, 0, 1))[:, rank * 5 :][:, :5]
        given = {name: values for name, values in cut.items() if name in ("labels", "shift_labels")}
        with pytest.MonkeyPatch.context() as patch:
            decoder = type(made.get_base_model().model)
            output = _Output(some)
            patch.setattr(decoder, "forward", lambda *_, output=output, **__: output)
            sliced = made(input_ids=cut["input_ids"], loss_weights=cut["loss_weights"], **given)
        total = total + sliced.loss * cut["loss_weights"].sum() / 3
    assert head(states).ndim == 3
    assert total.item() == pytest.approx(whole.item(), rel=CLOSE)


class _Output:
    past_key_values = hidden_states = attentions = None

    def __init__(self, states):
        self.last_hidden_state = states


def test_evaluation_is_a_sum_over_tokens_and_makes_no_gradient(monkeypatch):
    made, batch = model("head trained"), a_batch([12, 5, 9])
    monkeypatch.setattr(chunked_loss, "LOGITS_AT_ONCE", 4 * 4 * VOCABULARY)
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("a gradient was made"))
    with torch.no_grad():
        loss = made(**batch, num_items_in_batch=1).loss
        assert loss.item() == pytest.approx(plain_loss(made, batch, 1).item(), rel=CLOSE)
        mean = made(**batch).loss  # as transformers: over the trained tokens
    assert mean.item() == pytest.approx(loss.item() / (batch["labels"][:, 1:] != IGNORED).sum().item())


def test_logits_are_whole_where_no_loss_is_asked_for():
    made, batch = model(), a_batch([5])
    assert made(input_ids=batch["input_ids"]).logits.shape == (1, 5, VOCABULARY)
    with pytest.raises(RuntimeError):
        made.get_output_embeddings()(torch.zeros(1, 5, 3))
    assert made(input_ids=batch["input_ids"]).logits.shape == (1, 5, VOCABULARY)


@pytest.mark.parametrize("weighted", [False, True])
def test_autocast_gives_what_all_logits_give_up_to_rounding(weighted):
    made, batch = model("lora on the head"), a_batch([12, 9], weighted=weighted)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain_loss(made, batch, 10.0)
        expected_gradients = gradients_of(made, expected)
        loss = made(**batch, num_items_in_batch=10.0).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in gradients_of(made, loss).items():
        assert (gradient - expected_gradients[name]).norm() <= 0.02 * expected_gradients[name].norm(), name


def test_gradients_in_float16_do_not_vanish_before_the_scaler_s_factor():
    head = torch.nn.Linear(16, VOCABULARY, bias=False).half().requires_grad_(False)
    states = torch.randn(20, 16).half().requires_grad_()
    loss = summed_loss(head, states, torch.arange(20)) / 1e6  # of so many tokens
    (loss * 2.0**16).backward()
    plain = states.detach().float().requires_grad_()
    (cross_entropy(plain @ head.weight.float().T, torch.arange(20), reduction="sum") / 1e6).backward()
    assert (states.grad.float() / 2**16 - plain.grad).norm() <= 0.01 * plain.grad.norm()


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made and still there. peak: the most at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if (
            isinstance(result, torch.Tensor)
            and (storage := result.untyped_storage())._cdata not in self.known
        ):
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, which, size):
        self.known.discard(which)
        self.now -= size


def test_8192_tokens_need_a_tenth_of_the_memory_of_all_logits():
    plain = 3 * 4 * 151_936 * 8192  # float32 of logits, their log-softmax, and its gradient
    head = torch.nn.Linear(8, 151_936, bias=False).requires_grad_(False)
    states = torch.randn(500, 8).requires_grad_()  # more than two chunks; more chunks need no more
    for blocks, least, most in ((False, chunked_loss.LOGITS_AT_ONCE / 2, 0.1), (True, 0, 0.003)):
        with Live() as live:
            loss = summed_loss(head, states, torch.arange(500), blocks=blocks)
        assert least < live.peak <= most * plain
        assert sum(saved.nbytes for saved in loss.grad_fn.saved_tensors) == states.nbytes


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("unlikely", [8, 8999])
def test_logits_far_apart_give_the_exact_loss(monkeypatch, blocks, unlikely):
    # the largest is in all blocks, in the second, in the last, in none; float32 keeps exp() of 88 and no more
    monkeypatch.setattr(blocked_loss, "WORDS", 4096)
    head = torch.nn.Linear(1, 9000, bias=False).requires_grad_(False)
    head.weight.fill_(-500)
    head.weight[5000], head.weight[8999] = 500, 499
    states = torch.tensor([[1.0], [-1.0], [0.0], [0.5], [0.9], [-0.9]]).requires_grad_()
    labels = torch.tensor([5000, 8, 8999, 8999, unlikely, 5000])
    loss = summed_loss(head, states, labels, blocks=blocks)
    loss.backward()
    exact = states.detach().double().requires_grad_()
    expected = cross_entropy(exact @ head.weight.double().T, labels, reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(states.grad.double(), exact.grad, rtol=1e-4, atol=5e-3)


def test_unlikely_labels_in_float16_have_finite_gradients_of_a_frozen_head():
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 5000, bias=False).half().requires_grad_(False)
    states = (torch.randn(16, 64) * 10).half().requires_grad_()
    labels = torch.arange(16)
    loss = summed_loss(head, states, labels)
    loss.backward()
    plain = states.detach().float().requires_grad_()
    expected = cross_entropy(plain @ head.weight.float().T, labels, reduction="sum")
    expected.backward()
    assert 12 < loss.item() / 16 < 20, "exp() of that is more than float16 keeps, and less than float32 does"
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert (states.grad.float() - plain.grad).norm() <= 0.01 * plain.grad.norm()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_makes_the_loss_not_finite(value):
    head = torch.nn.Linear(4, 9000, bias=False).requires_grad_(False)
    states = torch.zeros(3, 4)
    states[1, 2] = value
    assert not summed_loss(head, states, torch.arange(3)).isfinite()


# ---- which models

PLAIN = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "experts": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=16, output_router_logits=True)
    ),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_models_that_hand_over_their_logits_are_known(kind):
    torch.manual_seed(0)
    made, batch = PLAIN[kind](), a_batch([9, 4])
    expected = made(**batch, num_items_in_batch=7).loss
    assert own_the_loss(made, accepts=True, weighted=False) == ""
    output = made(**batch, num_items_in_batch=7)
    assert output.logits is None
    assert output.loss.item() == pytest.approx(expected.item(), rel=CLOSE)  # with the routers' loss


def capped():
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=1.0))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_model_that_caps_its_logits_keeps_them_and_says_so(weighted):
    made, batch = capped(), a_batch([9, 4], weighted=weighted)
    expected = plain_loss(made, batch, 7)
    note = own_the_loss(made, accepts=True, weighted=weighted)
    assert note == (
        "Gemma2ForCausalLM changes its logits before the loss: the logits of all positions are kept, about"
        " 0.0025 MB a token"
    )
    output = made(**batch, num_items_in_batch=7)
    assert output.logits.shape == (2, 9, VOCABULARY)
    assert output.loss.item() == pytest.approx(expected.item(), rel=CLOSE)


class Unreadable(Qwen2ForCausalLM):
    exec("def forward(self, *args, **options):\n    return Qwen2ForCausalLM.forward(self, *args, **options)")


def test_a_model_whose_code_cannot_be_read_keeps_its_logits():
    assert own_the_loss(Unreadable(Qwen2Config(**SIZES)), accepts=True, weighted=False)


# ---- ranks

WAYS = ("lora on the head", "head trained")
TRAINED = [("zero2", WAYS[1]), ("zero3", WAYS[0]), ("fsdp", WAYS[1])]


@pytest.fixture(scope="module")
def trained_heads(tmp_path_factory, tiny):
    """Return what one rank and two did. Their chunks are of 20 positions, more of them on one rank."""
    folder = tmp_path_factory.mktemp("heads")
    base = make_base(folder / "base", "qwen2")

    def runs(names, ranks):
        return {
            (name, way): Sharing(
                base,
                str(folder / f"{ranks}-{name}-{way}"),
                steps=1,
                strategy=name,
                weighted=True,
                lora=ADAPTERS[way],
                positions=20,
            )
            for name, way in names
        }

    one = run_ranks(run_all, 1, runs([("ddp", way) for way in WAYS], 1), str(tiny))
    return one[0], run_ranks(run_all, 2, runs(TRAINED, 2), str(tiny))[0]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), TRAINED)
def test_two_ranks_train_a_head_as_one_does(trained_heads, name, way):
    one, two = trained_heads[0]["ddp", way], trained_heads[1][name, way]
    assert two["losses"] == pytest.approx(one["losses"], abs=CLOSE)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-4)
    assert any("lm_head" in key for key in one["adapter"])
    for key, values in one["adapter"].items():
        assert abs(two["adapter"][key] - values).max() <= 1e-5, key
