"""The FLOPs behind MFU are those that torch counts, in every family of Qwens."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from qwenlora.configs.schema import Lora
from qwenlora.plan.flops import flops
from qwenlora.run.records import Work
from qwenlora.trainer.loop.chunked_loss import own_the_loss
from qwenlora.trainer.model.loading import IGNORED
from qwenlora.trainer.model.lora import add_lora
from qwenlora.trainer.model.work import work_of

LENGTHS = np.array([64, 192])  # whole chunks of linear attention
CHUNK = 64
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SHARED = MOE | {"shared_expert_intermediate_size": 40}
HYBRID = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "layer_types": ["linear_attention", "full_attention"],
}
KINDS = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen2_moe": SHARED,
    "qwen3_moe": MOE | {"mlp_only_layers": [1]},
    "qwen3_next": SHARED | HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": SHARED | HYBRID,
}
# no experts: peft computes whole matrices for them
ADAPTED = r".*\.((self_attn\.[qvo]|linear_attn\.out)_proj|in_proj_qkvz?)"


class NoModules(nullcontext):
    """In place of torch's table of modules: all is one."""

    parents = frozenset({"Global"})


def model_of(kind, lora, **sizes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | KINDS[kind] | sizes)
    base = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    return add_lora(base, lora), config


def counted(model, trained):
    """Return the FLOPs that torch counts for rows one by one; of each row the last `trained` are trained."""
    model.enable_input_require_grads()  # else the lowest layer costs less
    own_the_loss(model, accepts=True, weighted=False)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()  # torch's would follow the head's gradients, and cannot
    with counter:
        for length in LENGTHS:
            ids = torch.arange(length)[None] + 300
            labels = ids.clone()
            labels[:, :-trained] = IGNORED
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    return counter.get_total_flops()


def more_than_useful(config, work):
    """Return the FLOPs of torch's plain kernels that nothing is learnt from: attention to later tokens, and
    the products of all tokens of a chunk in linear attention."""
    square = sum(4 * width for width in work.attention.values())
    more = 3 * square * (LENGTHS**2 - LENGTHS * (LENGTHS + 1) // 2).sum()
    if work.recurrence:
        keys, values = config.linear_key_head_dim, config.linear_value_head_dim
        products = 3 * (4 * keys + 2 * values) + 2 * (keys + values)  # and the triangular solution's gradient
        more += LENGTHS.sum() * config.linear_num_value_heads * CHUNK * products
    return more


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_that_torch_counts(kind):
    model, config = model_of(kind, Lora(target_modules=ADAPTED, lora_dropout=0.0, r=16))
    work = work_of(model, config)
    useful = flops(work, LENGTHS, 2 * 40)
    assert useful + more_than_useful(config, work) == pytest.approx(counted(model, 40), rel=0.02)
    assert bool(work.recurrence) == (kind in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"))


@pytest.mark.parametrize(
    "lora", [Lora(modules_to_save=["lm_head"]), Lora(target_modules=["lm_head", "q_proj"])], ids=str
)
def test_a_trained_head_counts_at_trained_tokens(lora):
    model, config = model_of("qwen3", lora.model_copy(update={"lora_dropout": 0.0, "r": 16}))
    work = work_of(model, config)
    useful = flops(work, LENGTHS, 2 * 40)
    assert work.head_trained > 0
    assert useful + more_than_useful(config, work) == pytest.approx(counted(model, 40), rel=0.02)


def test_a_token_passes_only_the_experts_that_it_meets():
    peft = LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    config = AutoConfig.for_model("qwen3_moe", **SIZES | MOE)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        alone = work_of(base.requires_grad_(False), config)
        work = work_of(get_peft_model(base, peft), config)
    expert = 2 * 48 * 64 + 64 * 48
    attention = 2 * 64 * 64 + 2 * 32 * 64
    router = 8 * 64
    assert alone.frozen == work.frozen == 2 * (attention + router + 2 * expert)
    assert work.trained == 2 * 2 * 4 * ((64 + 2 * 48) + (48 + 64))  # layers, experts, r


def test_the_flops_of_a_7b_are_the_published_ones():
    # 4 (N_b + N_h) + 6 P + 6 s d L; Qwen2.5-7B at r 16 and s 4096, for which 31.0 GFLOP is published
    work = Work(
        frozen=6_525_621_760,
        trained=40_370_176,
        head_frozen=544_997_376,
        head_trained=0,
        attention={0: 28 * 3584},
    )
    assert flops(work, np.array([4096]), 4096) / 4096 == pytest.approx(31.0e9, rel=0.01)


def test_a_window_bounds_what_a_query_sees():
    config = AutoConfig.for_model(
        "qwen2", **SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=1
    )
    with torch.device("meta"):
        work = work_of(AutoModelForCausalLM.from_config(config), config)
    assert work.attention == {0: 64, 3: 64}
    pairs = Work(frozen=0, trained=0, head_frozen=0, head_trained=0, attention={3: 1})
    assert flops(pairs, np.array([5, 2]), 0) == 3 * 4 * ((1 + 2 + 3 + 3 + 3) + (1 + 2))
