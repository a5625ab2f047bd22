"""A model that is traced without its memory takes the bytes and operations of a real one, and a plan's
formulas are near them."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qwenlora.configs.combinations import Machine
from qwenlora.configs.estimate import Sizes, need
from qwenlora.configs.schema import Config, Lora
from qwenlora.plan.bases import known
from qwenlora.plan.counts import count
from qwenlora.plan.flops import flops
from qwenlora.plan.shape import shape_of
from qwenlora.trainer.model import fused_experts
from qwenlora.trainer.model.loading import load_base
from qwenlora.trainer.trace import build, follow, trace, with_adapter

LAYERS, TOKENS, TRAINED = 4, 512, 100
# one of each family, with its published widths
BASES = (
    *("Qwen2.5-7B", "Qwen2.5-72B", "Qwen3-0.6B", "Qwen3-8B", "Qwen1.5-MoE-A2.7B", "Qwen3-30B-A3B"),
    *("Qwen3-Next-80B-A3B", "Qwen3.5-0.8B", "Qwen3.5-35B-A3B", "Qwen3-VL-30B-A3B"),
)
SMALL = {"vocab_size": 2000, "hidden_size": 256, "num_hidden_layers": 2} | {"num_experts": 8}


def cut(name, small=False):
    """Return a known base with few layers, and small widths if wanted."""
    values = known()[name]
    text = values.get("text_config", values)
    fewer = {key: value for key, value in SMALL.items() if small and key in text}
    text = text | {"num_hidden_layers": LAYERS} | fewer
    # the vision part is made, before it is left out
    return values | {"text_config": text, "vision_config": {"depth": 1}} if "text_config" in values else text


@pytest.mark.parametrize("recomputed", [0, 2])
@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen3-0.6B", "Qwen3-30B-A3B", "Qwen3.5-0.8B"])
def test_a_trace_has_the_bytes_and_operations_of_a_real_micro_batch(monkeypatch, name, recomputed):
    # the trace is a GPU's, where A and B are multiplied in the base's dtype
    monkeypatch.setattr(fused_experts.Matrices, "low_dtype", fused_experts.Matrices.dtype)
    values = cut(name, small=True)
    settings = {"dtype": torch.bfloat16, "recomputed": recomputed}
    traced = trace(values, Lora(), tokens=TOKENS, trained=TRAINED, **settings)
    real = follow(*build(values, Lora(), **settings), TOKENS, TRAINED)
    assert traced.weights == real.weights
    assert traced.gradients == real.gradients > 0
    assert traced.flops == real.flops
    assert traced.kept == pytest.approx(real.kept, rel=0.03)
    assert traced.peak == pytest.approx(real.peak, rel=0.03)


@pytest.mark.parametrize(
    ("name", "matrix"), [("Qwen3-0.6B", 3072 * 256), ("Qwen3-30B-A3B", 8 * 2 * 768 * 256)]
)
def test_a_base_in_nf4_takes_what_is_traced_and_its_largest_matrix_in_16_bits(
    monkeypatch, tmp_path, name, matrix
):
    monkeypatch.setattr(fused_experts.Matrices, "low_dtype", fused_experts.Matrices.dtype)
    values = cut(name, small=True)
    traced = trace(values, Lora(), tokens=TOKENS, trained=TRAINED)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.bfloat16).save_pretrained(
        tmp_path
    )
    config = config_of(str(tmp_path), Lora(), strategy={"quantization": "nf4"}, dtype="bfloat16")
    real = follow(*with_adapter(load_base(config, str(tmp_path)), Lora()), TOKENS, TRAINED)
    assert traced.kept == pytest.approx(real.kept, rel=0.03)
    assert traced.peak + 2 * matrix == pytest.approx(real.peak, rel=0.01)
    parameters = count(shape_of(values, name), Lora())
    needed = need(config, Sizes.of(parameters), "ddp", Machine(1, 1, 0))
    assert needed.weights == pytest.approx(real.weights - 4 * parameters.trainable, rel=0.03)


def config_of(name, lora, strategy=None, dtype="auto"):
    return Config.model_validate(
        {
            "run_dir": "r",
            "model": {"name_or_path": name, "dtype": dtype},
            "data": {"train": "example", "max_length": TOKENS, "packing": "on"},
            "lora": lora,
            "train": {"gradient_checkpointing": False},
            "strategy": strategy or {},
        }
    )


def planned(name, values, lora, strategy="ddp"):
    """Return what formulas say of a base that is cut, and its counts."""
    parameters = count(shape_of(values, name), lora)
    return need(
        config_of(name, lora), Sizes.of(parameters), strategy, Machine(1, 1, 1, 80 * 10**9)
    ), parameters


@pytest.mark.parametrize(
    ("name", "experts"), [(name, "all") for name in BASES] + [(name, "shared") for name in BASES[4:6]]
)
def test_formulas_are_within_8_percent_of_what_is_traced(name, experts):
    values, lora = cut(name), Lora(experts=experts)
    traced = trace(values, lora, tokens=TOKENS, trained=TRAINED)
    needed, parameters = planned(name, values, lora)
    assert needed.weights == pytest.approx(traced.weights - 4 * parameters.trainable, rel=0.001)
    assert needed.activations == pytest.approx(traced.kept, rel=0.08)
    assert needed.weights + needed.activations == pytest.approx(
        traced.weights - 4 * parameters.trainable + traced.kept, rel=0.05
    )
    assert traced.peak < 1.1 * needed.activations + needed.logits + traced.gradients
    assert traced.gradients == 4 * parameters.trainable
    useful = flops(parameters.work, np.array([TOKENS]), TRAINED)
    assert traced.flops == pytest.approx(useful, rel=0.1)


@pytest.mark.parametrize("name", ["Qwen2.5-7B", "Qwen3-8B"])
@pytest.mark.parametrize(
    ("strategy", "lora"),
    [
        ("zero3", Lora()),
        ("ddp", Lora(lora_dropout=0.1)),
        ("ddp", Lora(use_dora=True)),
    ],
)
def test_what_is_kept_with_dropout_with_dora_and_by_pefts_layers_is_within_10_percent(name, strategy, lora):
    values = cut(name)
    traced = trace(values, lora, tokens=TOKENS, trained=TRAINED, sharded_by_deepspeed=strategy == "zero3")
    needed, _ = planned(name, values, lora, strategy)
    assert needed.activations == pytest.approx(traced.kept, rel=0.1)
