"""Adapters as older peft wrote them: adapter_model.bin by torch.save, fewer keys in adapter_config.json, or
gone ones.

The keys and tensor names are those of files that peft 0.3.0, 0.5.0 and 0.10.0 wrote.
"""

import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qwenlora.adapter.loading import load
from qwenlora.adapter.subject import find
from qwenlora.adapter.verify import check_adapter
from qwenlora.configs.schema import Lora
from qwenlora.trainer.model.lora import add_lora

PEFT_0_2 = {
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "merge_weights": False,
}
PEFT_0_3 = {"bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True}
PEFT_0_5 = PEFT_0_3 | dict.fromkeys(("auto_mapping", "layers_pattern", "layers_to_transform", "revision"))
PEFT_0_10 = PEFT_0_5 | {
    "alpha_pattern": {},
    "layer_replication": None,
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "rank_pattern": {},
    "use_dora": False,
    "use_rslora": False,
}
WRITERS = {"0.2": PEFT_0_2, "0.3": PEFT_0_3, "0.5": PEFT_0_5, "0.10": PEFT_0_10}
LORA = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
KINDS = {
    "lora": (LORA, "0.2"),
    "lora on embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "0.3"),
    "embeddings whole": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "0.3"),
    "rslora": (LORA | {"use_rslora": True}, "0.10"),
    "dora": (LORA | {"use_dora": True}, "0.10"),
}


def write(folder, base, writer, **settings):
    """Write an adapter as an old peft; return the model with it, and its tensors."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings),
    )
    for values in model.parameters():
        if values.requires_grad:
            values.data += 0.05 * torch.randn_like(values)
    folder.mkdir()
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    torch.save(weights, folder / "adapter_model.bin")
    shared = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    config = (
        WRITERS[writer]
        | {"modules_to_save": None}
        | shared
        | settings
        | {"base_model_name_or_path": str(base)}
    )
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    return model.eval(), weights


def logits(model):
    with torch.no_grad():
        return model(torch.arange(40).reshape(2, 20) + 300).logits


@pytest.mark.parametrize(
    ("kind", "writer"),
    [
        (kind, writer)
        for kind, (_, first) in KINDS.items()
        for writer in list(WRITERS)[list(WRITERS).index(first) :]
    ],
)
def test_an_adapter_of_an_older_peft_fits_and_loads(tiny, tmp_path, kind, writer):
    saved, weights = write(tmp_path / "old", tiny, writer, **KINDS[kind][0])
    subject = find(str(tmp_path / "old"))
    assert check_adapter(subject).tensors == len(weights)
    loaded = load(subject)
    assert torch.equal(logits(loaded.model), logits(saved))
    with loaded.model.disable_adapter():
        assert (logits(loaded.model) - logits(saved)).abs().max() > 0.01


def test_what_it_does_is_the_formula(tiny, tmp_path):
    _, weights = write(tmp_path / "old", tiny, "0.3", **LORA)
    by_hand = AutoModelForCausalLM.from_pretrained(tiny)
    for name, values in weights.items():
        if "lora_A" in name:
            module = by_hand.get_submodule(
                name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            )
            module.weight.data += 8 / 4 * weights[name.replace("lora_A", "lora_B")] @ values
    assert (logits(load(find(str(tmp_path / "old"))).model) - logits(by_hand)).abs().max() < 1e-5


@pytest.mark.parametrize("how", ["before zip files", "half precision"])
def test_files_of_other_kinds_load(tiny, tmp_path, how):
    saved, weights = write(tmp_path / "old", tiny, "0.3", **LORA)
    file = tmp_path / "old" / "adapter_model.bin"
    if how == "half precision":
        torch.save({name: values.bfloat16() for name, values in weights.items()}, file)
    else:
        torch.save(weights, file, _use_new_zipfile_serialization=False)
    subject = find(str(tmp_path / "old"))
    check_adapter(subject)
    assert (logits(load(subject).model) - logits(saved)).abs().max() < (
        0.1 if how == "half precision" else 1e-9
    )


def test_training_goes_on_from_one(tiny, tmp_path):
    saved, _ = write(tmp_path / "old", tiny, "0.3", **LORA)
    lora = Lora(init_from=str(tmp_path / "old"), r=4, lora_alpha=8, lora_dropout=0.0, **LORA)
    assert torch.equal(
        logits(add_lora(AutoModelForCausalLM.from_pretrained(tiny), lora).eval()), logits(saved)
    )


def test_trained_biases_of_before_are_refused_rather_than_left_out(tmp_path):
    """peft 0.3 to 0.5 called them q_proj.bias; today's looks for q_proj.base_layer.bias, and passes over the
    others."""
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    base = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=1, num_key_value_heads=2, **sizes))
    base.save_pretrained(tmp_path / "base")
    _, weights = write(
        tmp_path / "old", tmp_path / "base", "0.3", target_modules=["q_proj"], bias="lora_only"
    )
    weights = {name.replace(".base_layer.bias", ".bias"): values for name, values in weights.items()}
    torch.save(weights, tmp_path / "old" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"lacks .*q_proj\.base_layer\.bias, which its adapter_config.json"):
        load(find(str(tmp_path / "old")))


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


def test_a_pickle_that_would_run_code_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, weights = write(tmp_path / "old", tiny, "0.3", **LORA)
    torch.save(weights | {"payload": Payload()}, tmp_path / "old" / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.bin cannot be read"):
        load(find(str(tmp_path / "old")))
    assert not (tmp_path / "payload-ran").exists()
