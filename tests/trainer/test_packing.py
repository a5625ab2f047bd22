"""Packed rows are trained as if each were alone; a model that lets them see each other is refused."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import HYBRIDS, side_of
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    masking_utils,
)
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from qwenlora.data.chat import Tokens
from qwenlora.data.order import Order
from qwenlora.data.packing import pack
from qwenlora.data.prepared import Side
from qwenlora.trainer.loop.batches import StepLoader, collate, collate_packs
from qwenlora.trainer.loop.evaluation import eval_batches
from qwenlora.trainer.model import row_attention, varlen
from qwenlora.trainer.model.checks import check_isolation, isolates_rows
from qwenlora.trainer.model.loading import IGNORED
from qwenlora.trainer.model.row_attention import (
    attend_row_by_row,
    attend_to_padded_rows,
    takes_rows_end_to_end,
)
from qwenlora.trainer.model.row_states import keep_states_apart

PAD, ROW_BY_ROW = 0, "row by row"


def model_of(kind: str, attention: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 200,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
    }
    sizes |= HYBRIDS.get(kind, {})
    config = AutoConfig.for_model(kind, head_dim=16, **sizes)
    attention, row_by_row = ("sdpa", True) if attention == ROW_BY_ROW else (attention, False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()
    model.config.use_cache = False
    apart = keep_states_apart(model)
    assert apart == (kind in HYBRIDS)
    assert not row_by_row or attend_row_by_row(model, states_apart=apart)
    return model


def rows_of(*lengths: int, seed: int = 0) -> list[Tokens]:
    random = np.random.RandomState(seed)
    rows = []
    for length in lengths:
        trained = random.rand(length) < 0.6
        trained[0] = False
        rows.append(Tokens(random.randint(1, 200, length).astype(np.int32), trained))
    return rows


def losses(model, batch) -> torch.Tensor:
    """Return the loss of every trained token, in the order of rows."""
    with torch.no_grad():
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits
    labels = batch["labels"][:, 1:]
    values = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none"
    )
    return values[labels.flatten() != IGNORED]


@pytest.mark.parametrize("attention", ["sdpa", "eager", ROW_BY_ROW])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", *HYBRIDS])
@pytest.mark.parametrize("flat", [False, True])
def test_every_token_has_the_loss_it_has_alone(kind, attention, flat):
    model = model_of(kind, attention)
    packs = [rows_of(5, 17, 1, 2), rows_of(9, 3, seed=1), rows_of(30, seed=2)]
    alone = torch.cat([losses(model, collate([row], PAD)) for pack in packs for row in pack])
    packed = losses(model, collate_packs([list(chain.from_iterable(packs))] if flat else packs, PAD))
    assert alone.shape == packed.shape
    assert (alone - packed).abs().max() <= 1e-5


def test_without_restarting_positions_rows_leak(monkeypatch):
    """Without the positions that restart, the same comparison fails by far: the test above can see a leak."""
    model, pack = model_of("qwen3", "sdpa"), rows_of(5, 17, 8)
    alone = torch.cat([losses(model, collate([row], PAD)) for row in pack])
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    assert (alone - losses(model, collate_packs([pack], PAD))).abs().max() > 0.01


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_row_by_row_gradients_are_those_of_a_padded_batch(lengths, seed):
    rows, gradients = rows_of(*lengths, seed=seed), []
    for attention, batch in (("sdpa", collate(rows, PAD)), (ROW_BY_ROW, collate_packs([rows], PAD))):
        model = model_of("qwen3", attention)
        model(**batch, num_items_in_batch=1).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    padded, end_to_end = gradients
    scale = max(gradient.abs().max() for gradient in padded.values())
    for name, gradient in padded.items():
        assert (gradient - end_to_end[name]).abs().max() <= 1e-5 * scale, name


def test_row_by_row_makes_no_mask_and_computes_no_padding():
    shapes = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_scaled_dot_product" in str(function):
                shapes.append((args[0].shape[2], (kwargs or {}).get("attn_mask")))
            return function(*args, **kwargs or {})

    with torch.no_grad(), Seen():
        model_of("qwen2", ROW_BY_ROW)(**collate_packs([rows_of(30, 2, 1)], PAD))
    assert shapes == [(length, None) for length in (30, 2, 1)] * 3, "of three layers"


def test_row_by_row_attention_under_autocast_takes_queries_of_another_dtype():
    """With trained embeddings, queries and keys are float32, and values bfloat16."""
    model = model_of("qwen3", ROW_BY_ROW, torch.bfloat16)
    model.get_input_embeddings().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(**collate_packs([rows_of(30, 2, 1)], PAD)).logits.isfinite().all()


def varlen_attn(query, key, value, ends, key_ends, most, most_keys, *, scale, window_size, enable_gqa):
    """Stands for torch's kernel, which needs a GPU: the same arguments, each row by itself."""
    assert (window_size, enable_gqa, most) == ((-1, 0), True, most_keys), "causal"
    assert ends is key_ends
    assert most == ends.diff().max()
    rows = zip(*(tensor.split(ends.diff().tolist()) for tensor in (query, key, value)), strict=True)
    heads_first = ([tensor.transpose(0, 1) for tensor in row] for row in rows)
    parts = [
        scaled_dot_product_attention(*row, is_causal=True, scale=scale, enable_gqa=True)
        for row in heads_first
    ]
    return torch.cat(parts, 1).transpose(0, 1)


@given(packs=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=15, deadline=None)
def test_all_rows_in_one_call_have_the_gradients_of_rows_in_turn(packs):
    rows, gradients = [rows_of(*lengths) for lengths in packs], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen.varlen, "varlen_attn", varlen_attn)
        for kernel in (row_attention.KERNELS["cpu"], varlen.attend):
            patch.setitem(row_attention.KERNELS, "cpu", kernel)
            model = model_of("qwen3", ROW_BY_ROW)
            model(**collate_packs(rows, PAD), num_items_in_batch=1).loss.backward()
            gradients.append({name: p.grad for name, p in model.named_parameters()})
    scale = max(gradient.abs().max() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() <= 1e-5 * scale, name


def test_a_kernel_for_all_rows_is_tried_before_it_is_used(monkeypatch):
    def leaks(query, key, value, ends, *args, **options):
        whole = torch.tensor([0, int(ends[-1])])
        return varlen_attn(query, key, value, whole, whole, int(ends[-1]), int(ends[-1]), **options)

    def has_no_gradient(*args, **options):
        return varlen_attn(*args, **options).detach()

    def is_older(query, key, value, ends, key_ends, most, most_keys, is_causal=False):
        raise AssertionError("it knows no window_size")

    asked = (4, 2, 16, torch.bfloat16, torch.device("cpu"))
    assert not varlen.works(*asked), "torch has no such kernel for CPUs"
    for kernel, works in ((varlen_attn, True), (leaks, False), (has_no_gradient, False), (is_older, False)):
        monkeypatch.setattr(varlen.varlen, "varlen_attn", kernel)
        assert varlen.works(*asked) == works, kernel.__name__


def test_without_a_split_row_by_row_attention_leaks(monkeypatch):
    monkeypatch.setattr(row_attention, "_of_line", lambda positions: [len(positions)])
    with pytest.raises(ValueError, match="rows would see each other"):
        check_isolation(model_of("qwen3", ROW_BY_ROW))


@pytest.mark.parametrize(
    ("config", "made"),
    [
        (Qwen3Config, Qwen3ForCausalLM),
        (Qwen3MoeConfig, Qwen3MoeForCausalLM),
        (MistralConfig, MistralForCausalLM),
    ],
)
def test_layers_that_look_at_more_than_their_row_keep_their_own_attention(config, made):
    """Qwen3-MoE and Mistral do not say by layer_types that they have a window."""
    sizes = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    window = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
    model = made(config(**sizes, **window, num_key_value_heads=4, intermediate_size=64))
    assert not attend_row_by_row(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_in_which_rows_see_each_other_gets_padded_rows_again(monkeypatch):
    monkeypatch.setattr(row_attention, "_of_line", lambda positions: [len(positions)])
    model = model_of("qwen3", ROW_BY_ROW)
    assert not isolates_rows(model)
    attend_to_padded_rows(model)
    assert not takes_rows_end_to_end(model)
    assert isolates_rows(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager", ROW_BY_ROW])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", *HYBRIDS])
def test_the_check_accepts_attention_that_isolates_rows(kind, attention, dtype):
    model = model_of(kind, attention, dtype).train()
    state = torch.get_rng_state()
    check_isolation(model)
    assert model.training
    assert torch.equal(state, torch.get_rng_state()), "the check draws no random numbers"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_check_refuses_attention_that_leaks(monkeypatch, attention, dtype):
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    message = (
        rf"packed rows would see each other: with model\.attn_implementation={attention} .* set"
        rf" data\.packing: off"
    )
    with pytest.raises(ValueError, match=message):
        check_isolation(model_of("qwen3", attention, dtype))


def test_a_pack_restarts_its_positions_and_trains_no_row_from_the_one_before():
    batch = collate_packs([rows_of(3, 2), rows_of(4, seed=1)], PAD)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert (
        batch["labels"][0, 0]
        == batch["labels"][0, 3]
        == batch["labels"][1, 0]
        == batch["labels"][1, 4]
        == IGNORED
    )
    assert "attention_mask" not in batch


def test_a_rank_without_work_gets_one_blank_token():
    batch = collate_packs([], PAD)
    assert batch["input_ids"].tolist() == [[PAD]]
    assert batch["labels"].tolist() == [[IGNORED]]


def test_the_check_refuses_a_model_whose_logits_are_nan():
    model = model_of("qwen3", "sdpa")
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="packed rows would see each other"):
        check_isolation(model)


def test_the_check_refuses_a_small_leak(monkeypatch):
    """A tenth of what attention without isolation leaks is refused, too."""
    model = model_of("qwen3", "sdpa")
    forward, calls = model.forward, []

    def leaking(**inputs):
        output = forward(**inputs)
        calls.append(output.logits)
        if len(calls) == 2:
            output.logits = output.logits + 0.1 * output.logits.std()
        return output

    monkeypatch.setattr(model, "forward", leaking)
    with pytest.raises(ValueError, match="packed rows would see each other"):
        check_isolation(model)


@pytest.mark.parametrize("flat", [False, True])
def test_flash_attention_gets_one_long_sequence_the_others_a_row_for_each_pack(flat):
    rows = rows_of(5, 6, 7, 8)
    lengths = np.array([len(row.ids) for row in rows], np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1].astype(np.int64)
    ids, trained = (np.concatenate([row[part] for row in rows]) for part in (0, 1))
    side = Side(ids, trained, starts, lengths, lengths, np.arange(4), np.zeros((4, 3), np.int32))
    order = Order(lengths, 2, 2, 0, pack(lengths, 13), 13)
    (batch,) = StepLoader(side, order, 1, 0, 1, PAD, flat=flat)
    assert batch["input_ids"].shape == ((1, 26) if flat else (2, 13))


@pytest.mark.parametrize("flat", [False, True])
def test_rows_that_are_not_packed_lie_end_to_end_too_where_attention_keeps_them_apart(flat):
    side = side_of(4)
    (batch,) = StepLoader(side, Order(side.lengths, 4, 4, 0), 1, 0, 1, PAD, flat=flat)
    (evaluated,) = eval_batches(side, 4, 1, 0, PAD, flat=flat)
    for each in (batch, evaluated):
        total, longest = int(side.lengths.sum()), int(side.lengths.max())
        assert each["input_ids"].shape == ((1, total) if flat else (4, longest))
        assert ("attention_mask" in each) != flat


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", ROW_BY_ROW, "flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_on_a_gpu_rows_of_a_pack_are_kept_apart(kind, attention):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed: pip install flash-attn")
    if attention == "flash_attention_3" and not is_flash_attn_3_available():
        pytest.skip("FlashAttention 3 is not installed (Hopper GPUs)")
    model = model_of(kind, attention, torch.bfloat16).cuda()
    check_isolation(model)
    rows = rows_of(5, 170, 33, 2)
    alone = torch.cat([losses(model, on_gpu(collate([row], PAD))) for row in rows])
    packed = losses(model, on_gpu(collate_packs([rows], PAD)))
    assert (alone - packed).abs().max() <= 0.05, (
        "bfloat16 rounds differently for other shapes; a leak is 0.4 and more"
    )


def on_gpu(batch):
    return {name: value.cuda() for name, value in batch.items()}
