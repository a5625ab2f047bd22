"""Gated delta nets keep rows apart that lie end to end, as if each were trained alone by transformers and
peft."""

import copy

import numpy as np
import pytest
import torch
from made import HYBRIDS
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, Lfm2Config, Qwen3NextConfig, Qwen4ExpConfig
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next

from qwenlora.configs.schema import Config, Data, Model
from qwenlora.data.chat import Tokens
from qwenlora.trainer.loop.batches import collate, collate_packs
from qwenlora.trainer.model import row_states
from qwenlora.trainer.model.checks import check_isolation
from qwenlora.trainer.model.fused import fuse
from qwenlora.trainer.model.row_attention import attend_row_by_row
from qwenlora.trainer.model.row_states import check, keep_states_apart, make_rows, notes_on

LENGTHS = (70, 130, 1, 3, 64, 17, 2)  # the rule takes 64 tokens at once, the convolution 4
CPU = torch.device("cpu")
CONFIG = Config(run_dir="unused", model=Model(name_or_path="my-qwen"), data=Data(train="unused"))


def model_of(kind: str):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 200,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "initializer_range": 0.1,
    }
    config = AutoConfig.for_model(kind, **sizes | HYBRIDS[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    names = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    lora = LoraConfig(target_modules=[name for name in names if name != "lm_head"], init_lora_weights=False)
    return get_peft_model(model, lora)


def rows_of(*lengths: int) -> list[Tokens]:
    random = np.random.RandomState(1)
    return [Tokens(random.randint(1, 200, size).astype(np.int32), np.arange(size) > 0) for size in lengths]


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def losses_of(model, batch) -> torch.Tensor:
    """Return the loss of every trained token."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits, labels = model(**inputs, use_cache=False).logits[:, :-1], batch["labels"][:, 1:]
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses[labels.flatten() >= 0]


@pytest.mark.parametrize("kind", HYBRIDS)
def test_losses_and_gradients_are_those_of_rows_alone_in_plain_peft(kind):
    rows, plain = rows_of(*LENGTHS), model_of(kind)
    ours = copy.deepcopy(plain)
    alone = torch.cat([losses_of(plain, collate([row], 0)) for row in rows])
    alone.sum().backward()
    scale = max(gradient.abs().max() for gradient in gradients_of(plain).values())
    assert attend_row_by_row(ours.base_model.model, states_apart=keep_states_apart(ours))
    assert fuse(ours).layers
    batches = [collate_packs([rows], 0), collate_packs([rows[:3], rows[3:6], rows[6:]], 0)]
    for batch in batches:
        ours.zero_grad()
        losses = losses_of(ours, batch)
        losses.sum().backward()
        assert (losses - alone).abs().max() <= 1e-5
        for name, gradient in gradients_of(ours).items():
            assert (gradient - gradients_of(plain)[name]).abs().max() <= 1e-5 * scale, name


def test_padding_enters_no_state():
    """Not even the last one of a row, which is where a batch's padding begins."""
    model, rows = model_of("qwen3_5_text").base_model.model, rows_of(9, 21, 5)
    keep_states_apart(model)
    for one, other in (
        (collate(rows, 0), collate(rows, 7)),
        (collate_packs([rows[:2], rows[2:]], 0), collate_packs([rows[:2], rows[2:]], 7)),
    ):
        assert torch.equal(losses_of(model, one), losses_of(model, other))


def inputs_of(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 8), (2, 8), (4, 8), (4,), (4,)]
    query, key, value, g, beta = (torch.randn(1, tokens, *size, generator=generator) for size in sizes)
    return [query, key, value, -g.abs(), beta.sigmoid()]


def test_kernels_get_the_rows_as_they_take_them():
    """cu_seqlens and seq_idx of one long line, as flash-linear-attention and causal-conv1d document them.
    Functions stand in for them, which run on GPUs alone."""
    rows, inputs = make_rows(list(LENGTHS), CPU), inputs_of(sum(LENGTHS))
    two_lines = [tensor.repeat(2, 1, *[1] * (tensor.ndim - 2)) for tensor in inputs]
    rows_twice = make_rows([*LENGTHS, *LENGTHS], CPU)

    def rule(query, key, value, g, beta, cu_seqlens, **options):
        assert len(query) == 1
        sizes = cu_seqlens.diff().tolist()
        parts = zip(*(tensor.split(sizes, 1) for tensor in (query, key, value, g, beta)), strict=True)
        own = modeling_qwen3_next.torch_chunk_gated_delta_rule
        return torch.cat([own(q, k, v, g=g, beta=b)[0] for q, k, v, g, b in parts], 1), None

    def convolve(x, weight, bias=None, *, seq_idx, activation):
        assert x.stride(1) == 1, "channels last, which seq_idx needs"
        assert seq_idx.shape == (1, x.shape[2])
        assert seq_idx.dtype == torch.int32
        sizes = torch.bincount(seq_idx[0]).tolist()
        own = modeling_qwen3_next.causal_conv1d_fn
        return torch.cat([own(part, weight, bias, activation=activation) for part in x.split(sizes, 2)], 2)

    torch_rule = modeling_qwen3_next.torch_chunk_gated_delta_rule
    made = [
        row_states._rule(own, kernel=kernel)(*two_lines, **{row_states.ROWS: rows_twice})[0]
        for own, kernel in ((rule, True), (torch_rule, False))
    ]
    assert made[0].shape == two_lines[2].shape
    assert (made[0] - made[1]).abs().max() < 1e-6
    x, weight = inputs[2].flatten(2).transpose(1, 2), torch.randn(32, 4)
    made = [
        row_states._convolution(own, kernel=kernel)(x, weight, activation="silu", **{row_states.ROWS: rows})
        for own, kernel in ((convolve, True), (modeling_qwen3_next.causal_conv1d_fn, False))
    ]
    assert made[0].shape == x.shape
    assert (made[0] - made[1]).abs().max() < 1e-6


@pytest.mark.parametrize("part", ["_rule", "_convolution"])
def test_a_state_that_leaks_over_a_rows_end_is_seen(monkeypatch, part):
    """Each part by itself: the rule's state, and the convolution's last three tokens."""
    model = model_of("qwen3_5_text").base_model.model
    name = {"_rule": row_states.RULE, "_convolution": row_states.CONVOLUTION}[part]
    keep_states_apart(model)
    check_isolation(model)
    apart = getattr(modeling_qwen3_5, name)
    monkeypatch.setattr(
        modeling_qwen3_5, name, lambda *inputs, **options: apart(*inputs, **options | {row_states.ROWS: None})
    )
    with pytest.raises(ValueError, match=r"packed rows would see each other.*; set data\.packing: off$"):
        check_isolation(model)


def test_layers_whose_states_cannot_be_kept_apart_are_refused_by_the_config():
    check(CONFIG, Qwen3NextConfig())
    for other in (Qwen4ExpConfig(), Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"])):
        with pytest.raises(ValueError, match=r"model\.name_or_path=my-qwen has layers of .*, which carry a"):
            check(CONFIG, other)


def test_missing_kernels_are_named_where_there_is_a_gpu(monkeypatch):
    assert notes_on(Qwen3NextConfig()) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (note,) = notes_on(Qwen3NextConfig())
    assert note.endswith("the same numbers: pip install flash-linear-attention causal-conv1d")
    monkeypatch.setattr(row_states, "is_flash_linear_attention_available", lambda: True)
    (note,) = notes_on(Qwen3NextConfig())
    assert note.endswith("pip install causal-conv1d")
