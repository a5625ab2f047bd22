"""`qwenlora merge`: one model that answers as base and adapter do, or no model at all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from spread import make_base
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwenlora.adapter.merge import merge as merging
from qwenlora.adapter.merge.merge import MergeOptions, merge
from qwenlora.adapter.merge.streamed import StreamedModel, compare_logits
from qwenlora.adapter.subject import find
from qwenlora.adapter.verify import check_adapter
from qwenlora.adapter.weight_files import SafetensorsWriter
from qwenlora.configs.schema import Lora
from qwenlora.trainer.model.lora import lora_config

BASES = ("qwen2 tied", "qwen2", "qwen3 tied", "qwen3")
BODY = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "embeddings trained": {"modules_to_save": ["embed_tokens"]},
    "head trained": {"modules_to_save": ["lm_head"]},
    "both trained": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "lora on embeddings": {"target_modules": [*BODY, "embed_tokens"]},
    "lora on head": {"target_modules": [*BODY, "lm_head"]},
    "lora on both": {"target_modules": [*BODY, "embed_tokens", "lm_head"]},
    "lora on both, tied": {"target_modules": [*BODY, "embed_tokens"], "ensure_weight_tying": True},
    "dora on embeddings": {"target_modules": [*BODY, "embed_tokens"], "use_dora": True},
    "some tokens": {"trainable_token_indices": [3, 5, 2045]},
    "some tokens, in the head, too": {
        "trainable_token_indices": {"embed_tokens": [3, 5, 2045], "lm_head": [3, 5, 2045]}
    },
    "biases": {"bias": "lora_only"},
    "all biases": {"bias": "all", "target_modules": ["q_proj"]},
}
IDS = torch.arange(7, 39).reshape(2, 16)


def train(folder, base, seed=0, of_qwenlora=False, copies=False, **settings):
    """Write an adapter with random numbers in it.

    of_qwenlora: with the peft config of trainer/model.py. copies: with the base's matrices that LoRA is on,
    as peft does by default.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": BODY} | settings
    if of_qwenlora:
        config = lora_config(Lora(**settings), model.config.tie_word_embeddings)
    else:
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
    model = get_peft_model(model, config)
    for values in model.parameters():
        if values.requires_grad:
            values.data += 0.05 * torch.randn_like(values)
    model.save_pretrained(folder, save_embedding_layers="auto" if copies else False)
    return folder


def unmerged(base, adapter):
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    ).eval()


def plain(folder, **settings):
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def answer(model):
    return model.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)


def same(merged, reference):
    assert (logits(merged) - logits(reference)).abs().max() < 1e-4
    assert torch.equal(answer(merged), answer(reference))


def tensors(folder):
    """Return all that a folder's safetensors hold."""
    return {name: values for file in folder.glob("*.safetensors") for name, values in load_file(file).items()}


@pytest.fixture(scope="session")
def bases(tiny, tmp_path_factory):
    """Return small models with a tokenizer, in several files, by name."""
    folder = tmp_path_factory.mktemp("bases")
    for name in BASES:
        make_base(folder / name, name.split()[0], tied="tied" in name)
        AutoTokenizer.from_pretrained(tiny).save_pretrained(folder / name)
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        for parameter, values in model.named_parameters():
            if parameter.endswith("bias"):  # they are made as zeros
                values.data.normal_()
        model.save_pretrained(folder / name, max_shard_size="300KB")
    return {name: folder / name for name in BASES}


@pytest.fixture(scope="session")
def experts(tiny, tmp_path_factory):
    """Return a mixture of experts, which files hold one by one and the model as one parameter."""
    folder = tmp_path_factory.mktemp("experts") / "moe"
    torch.manual_seed(7)
    config = Qwen3MoeConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        initializer_range=0.2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.fixture
def base(bases):
    return bases["qwen3 tied"]


@pytest.fixture
def adapter(base, tmp_path):
    return train(tmp_path / "adapter", base)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_answers_as_base_and_adapter_do(bases, tmp_path, name, kind, capsys):
    if name.startswith("qwen3") and "biases" in kind:
        pytest.skip("Qwen3 has no biases")
    settings = dict(KINDS[kind])
    adapter = train(tmp_path / "adapter", bases[name], of_qwenlora="trained" in kind, **settings)
    assert merge([find(str(adapter))], tmp_path / "out", MergeOptions(max_shard_size="300KB")) == 0
    merged, reference = plain(tmp_path / "out"), unmerged(bases[name], adapter)
    same(merged, reference)
    assert "logits differ from those of base and adapter by at most" in capsys.readouterr().out
    apart = not torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is not apart
    if "tied" not in name:
        assert apart
    elif kind in ("lora on embeddings", "lora on head", "lora on both", "dora on embeddings"):
        assert apart, "peft gives each a matrix of its own"
    else:
        assert not apart


def test_a_tied_model_whose_halves_were_trained_apart_is_no_longer_tied(base, tmp_path, capsys):
    adapter = train(tmp_path / "adapter", base, modules_to_save=["embed_tokens", "lm_head"])
    merge([find(str(adapter))], tmp_path / "out")
    assert "tie_word_embeddings is false" in capsys.readouterr().out
    same(plain(tmp_path / "out"), unmerged(base, adapter))


@pytest.mark.parametrize("name", ["qwen3 tied", "qwen2"])
@pytest.mark.parametrize("kind", ["lora on embeddings", "lora on head", "lora on both", "dora on embeddings"])
def test_copies_of_the_bases_matrices_do_no_harm_when_they_are_equal(bases, tmp_path, name, kind):
    base = bases[name]
    adapter = train(tmp_path / "adapter", base, copies=True, **KINDS[kind])
    held = load_file(adapter / "adapter_model.safetensors")
    copies = [name for name in held if ".base_layer." in name]
    assert copies
    assert merge([find(str(adapter))], tmp_path / "out") == 0
    same(plain(tmp_path / "out"), unmerged(base, adapter))
    held[copies[0]] += 0.5
    save_file(held, adapter / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match="has another one: it was trained on another base; name that with --base"
    ):
        merge([find(str(adapter))], tmp_path / "again")


def test_the_tokenizer_is_the_one_that_the_adapter_was_trained_with(base, adapter, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(adapter)
    merge([find(str(adapter))], tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    assert AutoTokenizer.from_pretrained(base).chat_template != tokenizer.chat_template


def test_logits_that_are_no_numbers_are_not_equal():
    class Made:
        def __init__(self, logits):
            self._logits = logits
            self.base = SimpleNamespace(config=Qwen3MoeConfig(num_experts=0))

        def logits(self, batch, progress, what):
            return self._logits

    plain, batch = torch.zeros(2, 8, 5), {"attention_mask": torch.ones(2, 8)}
    broken = plain.clone()
    broken[1, 3, 2] = torch.nan
    found = compare_logits(plain, Made(plain), Made(plain), batch, None)
    assert found.judged <= found.bound
    for unmerged, merged in ((plain, broken), (broken, plain)):
        found = compare_logits(unmerged, Made(merged), Made(plain), batch, None)
        assert (found.worst, found.difference) == (1, torch.inf)
        assert not found.judged <= found.bound < torch.inf


def test_a_base_that_is_tied_by_its_config_only_is_merged_as_it_computes(base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    file = index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    held = load_file(copy / file) | {"lm_head.weight": torch.randn(2048, 64)}
    save_file(held, copy / file, metadata={"format": "pt"})
    adapter = train(tmp_path / "adapter", copy)
    merge([find(str(adapter))], tmp_path / "out")
    same(plain(tmp_path / "out"), unmerged(copy, adapter))


def test_a_folder_is_a_model_for_plain_transformers_in_a_new_process(base, adapter, tmp_path):
    (base / "generation_config.json").write_text(
        '{"temperature": 0.6, "do_sample": true, "eos_token_id": [2045, 2046]}'
    )
    merge([find(str(adapter))], tmp_path / "out", MergeOptions(max_shard_size="500KB"))
    code = """
import sys, json
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
turns = [{"role": "user", "content": "你好"}]
text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
ids = tokenizer(text, return_tensors="pt")["input_ids"]
made = model.generate(ids, max_new_tokens=8, do_sample=False)
print(json.dumps([ids.tolist(), made.tolist(), model.generation_config.temperature]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    ids, made, temperature = json.loads(ran.stdout)
    expected = unmerged(base, adapter).generate(
        input_ids=torch.tensor(ids), max_new_tokens=8, do_sample=False
    )
    assert (made, temperature) == (expected.tolist(), 0.6)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert set(opened.keys()) == {name for name, held in index["weight_map"].items() if held == file}


@pytest.mark.parametrize("text_only", [False, True])
def test_a_merged_model_ends_with_what_was_trained_to_end_it(base, adapter, tmp_path, text_only):
    """The base ends with <|endoftext|>, as those that are not -Instruct do."""
    base = shutil.copytree(base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    turn, text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    for name, key, value in (
        ("config.json", "eos_token_id", text),
        ("generation_config.json", "eos_token_id", text),
        ("tokenizer_config.json", "eos_token", "<|endoftext|>"),
    ):
        said = json.loads((base / name).read_text()) | {key: value}
        (base / name).write_text(json.dumps(said))
    if text_only:  # training says so
        (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [text]}))
    merge([find(str(adapter), base=str(base))], tmp_path / "out")
    config, generation = (
        json.loads((tmp_path / "out" / name).read_text())["eos_token_id"]
        for name in ("config.json", "generation_config.json")
    )
    end = AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id
    assert (config, generation, end) == ((text, [text], text) if text_only else (turn, [turn, text], turn))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == generation


def test_what_the_adapter_does_not_touch_stays_bit_for_bit(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "qwenlora.adapter.merge.merge.SLICE", 1000
    )  # a real embedding is read in a hundred slices
    merge([find(str(adapter))], tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.split(".")[-2] in BODY
    }


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_coarser_dtype_is_rounded_once_at_the_end(base, adapter, tmp_path, dtype, capsys):
    merge([find(str(adapter))], tmp_path / "exact")
    merge([find(str(adapter))], tmp_path / "out", MergeOptions(dtype=dtype))
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    exact = tensors(tmp_path / "exact")
    for name, values in tensors(tmp_path / "out").items():
        assert torch.equal(values, exact[name].to(torch_dtype)), name
    assert plain(tmp_path / "out").dtype == torch_dtype
    assert "rounding alone causes" in capsys.readouterr().out


def test_a_half_precision_base_stays_so_and_its_merge_is_made_in_float32(base, tmp_path):
    shutil.copytree(base, tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(base).bfloat16().save_pretrained(tmp_path / "half")
    adapter = train(tmp_path / "adapter", tmp_path / "half")
    merge([find(str(adapter))], tmp_path / "out")
    exact = unmerged(tmp_path / "half", adapter).merge_and_unload().state_dict()
    for name, values in tensors(tmp_path / "out").items():
        assert torch.equal(values, exact[name].bfloat16()), name


def test_a_change_that_rounding_takes_away_is_told(base, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(base).bfloat16().save_pretrained(tmp_path / "half")
    adapter = train(tmp_path / "adapter", tmp_path / "half")
    for number, (smaller, told) in enumerate(((1.0, False), (1e-3, True))):
        weights = load_file(adapter / "adapter_model.safetensors")
        weights |= {name: values * smaller for name, values in weights.items() if "lora_B" in name}
        save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        for dtype in ("auto", "fp32"):
            merge([find(str(adapter))], tmp_path / f"{dtype}-{number}", MergeOptions(dtype=dtype))
            said = re.findall(r"rounding to bfloat16 leaves (\d+)% of the adapter", capsys.readouterr().out)
            assert bool(said) == (told and dtype == "auto")
            assert all(int(share) < 80 for share in said)


@pytest.mark.parametrize("kind", ["dense", "experts"])
@pytest.mark.parametrize("dtype", ["auto", "bf16"])
@pytest.mark.parametrize("wrong", ["left out", "twice", "not finite"])
def test_a_wrong_merge_leaves_nothing(base, experts, tmp_path, monkeypatch, dtype, wrong, kind):
    adapter = train(
        tmp_path / "adapter", {"dense": base, "experts": experts}[kind], target_modules=["q_proj", "o_proj"]
    )
    right = StreamedModel.merged

    def merged(self):
        for name, values in right(self):
            exact = self.value(name)
            yield name, {"left out": exact, "twice": 2 * values - exact, "not finite": values / 0}[wrong]

    monkeypatch.setattr(StreamedModel, "merged", merged)
    with pytest.raises(
        ValueError, match=r"on '.*' the merged model's logits differ|numbers that are not finite"
    ):
        merge([find(str(adapter))], tmp_path / "out", MergeOptions(dtype=dtype))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_old_bin_files_are_merged_too(base, tmp_path):
    shutil.copytree(base, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors*"))
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.save(
        model.state_dict(), tmp_path / "old" / "pytorch_model.bin"
    )  # with lm_head.weight, which is the same
    adapter = train(tmp_path / "adapter", tmp_path / "old")
    merge([find(str(adapter))], tmp_path / "out")
    same(plain(tmp_path / "out"), unmerged(tmp_path / "old", adapter))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "o_proj"]},
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "lora_dropout": 0.0,
        },
    ],
)
def test_experts_are_written_as_the_base_has_them(experts, tmp_path, settings):
    adapter = train(tmp_path / "adapter", experts, **settings)
    merge([find(str(adapter))], tmp_path / "out", MergeOptions(max_shard_size="100KB"))
    same(plain(tmp_path / "out"), unmerged(experts, adapter))
    before, after = tensors(experts), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        "q_proj",
        *(("gate_proj", "up_proj", "down_proj") if len(settings) > 1 else ("o_proj",)),
    }


def with_a_module_for_each_expert(folder, base):
    """Save an adapter as transformers 4 and peft made them, and return it with the base that it makes."""
    torch.manual_seed(1)
    names = ["gate_proj", "up_proj", "down_proj"]
    LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=names).save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    model, weights = AutoModelForCausalLM.from_pretrained(base), {}
    for number, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        for expert in range(4):
            changes = []
            for name, (out, into) in zip(names, [(24, 32), (24, 32), (32, 24)], strict=True):
                full = f"base_model.model.model.layers.{number}.mlp.experts.{expert}.{name}"
                a, b = 0.2 * torch.randn(4, into), 0.2 * torch.randn(out, 4)
                weights |= {f"{full}.lora_A.weight": a, f"{full}.lora_B.weight": b}
                changes.append(8 / 4 * b @ a)
            experts.gate_up_proj.data[expert] += torch.cat(changes[:2])
            experts.down_proj.data[expert] += changes[2]
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder, model


def test_an_adapter_with_a_module_for_each_expert_is_merged(experts, tmp_path):
    adapter, expected = with_a_module_for_each_expert(tmp_path / "adapter", experts)
    merge([find(str(adapter))], tmp_path / "out")
    same(plain(tmp_path / "out"), expected)
    weights = load_file(adapter / "adapter_model.safetensors")
    del weights["base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_B.weight"]
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has a module for each expert .* to which peft cannot convert them"):
        merge([find(str(adapter))], tmp_path / "again")


def test_modules_of_experts_that_peft_would_lose_are_refused(experts, tmp_path):
    """peft converts them for a Qwen3, and for a Qwen2 it leaves them out without a word."""
    adapter, _ = with_a_module_for_each_expert(tmp_path / "adapter", experts)
    shutil.copytree(experts, tmp_path / "base")
    settings = json.loads((experts / "config.json").read_text())
    other = {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings | other))
    with pytest.raises(ValueError, match="has a module for each expert .* to which peft cannot convert them"):
        check_adapter(find(str(adapter), base=str(tmp_path / "base")))


# several adapters


def delta(base, adapter, module="model.layers.1.self_attn.q_proj"):
    """Return what an adapter adds to one weight."""
    layer = unmerged(base, adapter).base_model.model.get_submodule(module)
    return layer.get_delta_weight("default").detach()


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "embed_tokens"]}]
)
def test_cat_is_the_exact_sum(base, tmp_path, settings):
    one, other = (train(tmp_path / str(seed), base, seed=seed, r=2 + 2 * seed, **settings) for seed in (1, 2))
    merge([find(str(one)), find(str(other))], tmp_path / "out", MergeOptions(weights="0.7,-0.3"))
    name = "model.layers.1.self_attn.q_proj.weight"
    added = tensors(tmp_path / "out")[name] - tensors(base)[name]
    assert torch.allclose(added, 0.7 * delta(base, one) - 0.3 * delta(base, other), atol=1e-6)


@pytest.mark.parametrize("combine", ["linear", "svd", "ties", "dare_linear", "magnitude_prune"])
def test_pefts_other_ways_pass_the_comparison(base, tmp_path, combine):
    one, other = (train(tmp_path / str(seed), base, seed=seed) for seed in (1, 2))
    assert merge([find(str(one)), find(str(other))], tmp_path / "out", MergeOptions(combine=combine)) == 0
    assert plain(tmp_path / "out").config.tie_word_embeddings


def test_one_adapter_can_be_weakened(base, adapter, tmp_path):
    merge([find(str(adapter))], tmp_path / "out", MergeOptions(weights="0.5"))
    name = "model.layers.1.self_attn.q_proj.weight"
    added = tensors(tmp_path / "out")[name] - tensors(base)[name]
    assert torch.allclose(added, 0.5 * delta(base, adapter), atol=1e-6)


def test_adapters_that_cannot_be_combined_are_refused(bases, base, adapter, tmp_path):
    first = find(str(adapter))
    for settings, why in {
        "use_dora": ({"use_dora": True}, "uses use_dora, which peft cannot weigh or add; merge it alone"),
        "whole": ({"modules_to_save": ["embed_tokens"]}, "uses modules_to_save, which peft cannot"),
        "bias": ({"lora_bias": True, "target_modules": ["q_proj"]}, "uses lora_bias, which peft cannot"),
        "rank": ({"r": 8}, "--combine linear: All adapters must have the same r value"),
    }.values():
        shutil.rmtree(tmp_path / "second", ignore_errors=True)
        second = find(str(train(tmp_path / "second", base, **settings)))
        with pytest.raises(ValueError, match=why):
            merge([first, second], tmp_path / "out", MergeOptions(combine="linear"))
    with pytest.raises(ValueError, match="adapters of different bases cannot be combined"):
        merge([first, find(str(train(tmp_path / "third", bases["qwen3"])))], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# what is refused


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"weights": "1,2"}, "--weights 1,2 has 2 numbers for 1 adapters"),
        ({"weights": "0.7;0.3"}, "expected numbers with commas"),
        ({"weights": "nan"}, "expected finite numbers"),
        ({"combine": "sum"}, r"--combine sum is unknown; peft has svd, linear, cat"),
        ({"dtype": "int4"}, "--dtype int4 is unknown; expected auto, bf16, fp16, fp32"),
        ({"max_shard_size": "5 apples"}, "--max-shard-size 5 apples: expected a size"),
        ({"max_shard_size": "-1GB"}, "--max-shard-size -1GB: expected a size"),
        ({"prompts": Path("nowhere.txt")}, r"--prompts nowhere.txt cannot be read"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(adapter, tmp_path, arguments, why):
    with pytest.raises(ValueError, match=why):
        merge([find(str(adapter))], tmp_path / "out", MergeOptions(**arguments))


def test_nothing_is_overwritten(base, adapter, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    for out, why in {
        tmp_path / "full": "is there already",
        tmp_path / "full" / "thesis.tex": "is there already",
        base: "is there already",
        base / "merged": "lies within",
        adapter / "merged": "lies within",
    }.items():
        with pytest.raises(ValueError, match=why):
            merge([find(str(adapter))], out)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is there already"):
        merge([find(str(adapter))], tmp_path / "link")
    (tmp_path / "empty").mkdir()
    assert merge([find(str(adapter))], tmp_path / "empty") == 0


def test_a_base_that_cannot_take_it_is_refused(base, adapter, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is a model, not an adapter"):
        merge([find(str(base))], tmp_path / "out")
    copy = shutil.copytree(base, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(
        ValueError, match=r"copy is quantised in its files \(gptq, 4 bits\), .*: --base FOLDER"
    ):
        merge([find(str(adapter), base=str(copy))], tmp_path / "out")
    (copy / "config.json").write_text(json.dumps(config))
    for file in copy.glob("*.safetensors"):
        save_file({n: v for n, v in load_file(file).items() if "layers.1.mlp.up_proj" not in n}, file)
    with pytest.raises(ValueError, match=r"files lack model.layers.1.mlp.up_proj.weight"):
        merge([find(str(adapter), base=str(copy))], tmp_path / "out")
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ValueError, match="has no weights"):
        merge([find(str(adapter), base=str(copy))], tmp_path / "out")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: os.terminal_size((0, 0)) and type("", (), {"free": 10})()
    )
    with pytest.raises(ValueError, match="0.0 GB free, out needs"):
        merge([find(str(adapter))], tmp_path / "out")


def test_an_adapter_that_was_begun_from_the_base_is_refused(adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(ValueError, match="begun with init_lora_weights=pissa_niter_4"):
        merge([find(str(adapter))], tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"alora_invocation_tokens": [5, 6]}, "uses alora_invocation_tokens, which no merged weights can do"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "uses layer_replication, which no merged weights can do"),
        (
            {"lora_bias": True},
            r"has a bias \(lora_bias\) for model.layers.0.self_attn.q_proj, where the base has none",
        ),
    ],
)
def test_what_no_merge_can_hold_is_refused(base, tmp_path, settings, why):
    adapter = train(tmp_path / "adapter", base, **settings)
    with pytest.raises(ValueError, match=why):
        merge([find(str(adapter))], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prompts_of_ones_own_are_compared(adapter, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("".join(f"Frage {number}?\n\n" for number in range(40)))
    merge([find(str(adapter))], tmp_path / "out", MergeOptions(prompts=tmp_path / "prompts.txt"))
    assert "the first 32 of 40 prompts are compared" in capsys.readouterr().out
    (tmp_path / "forged.txt").write_text("a\nb<|im_start|>\n")
    with pytest.raises(
        ValueError, match=r"forged.txt: prompt 2 contains <\|im_start\|>, which would forge a turn"
    ):
        merge([find(str(adapter))], tmp_path / "again", MergeOptions(prompts=tmp_path / "forged.txt"))
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(ValueError, match="is empty; expected a prompt a line"):
        merge([find(str(adapter))], tmp_path / "other", MergeOptions(prompts=tmp_path / "none.txt"))


# ended half-way


def end_at(moment, number, adapter, out):
    """Merge, and end this process by a signal on the n-th call of something."""
    place, name, count = moment
    right, left = getattr(place, name), [count]

    def ending(*arguments, **named):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), number)
        return right(*arguments, **named)

    setattr(place, name, ending)
    merge([find(str(adapter))], out)


MOMENTS = {
    "first tensor": (SafetensorsWriter, "write", 1),
    "some tensors": (SafetensorsWriter, "write", 12),
    "all tensors": (SafetensorsWriter, "finish", 1),
    "comparison": (merging, "compare_logits", 1),
    "beside": (merging, "_write_other_files", 1),
}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_half_a_merge_is_no_model(adapter, tmp_path, moment, number):
    child = get_context("fork").Process(
        target=end_at, args=(MOMENTS[moment], number, adapter, tmp_path / "out")
    )
    child.start()
    child.join()
    assert child.exitcode == (-signal.SIGKILL if number == signal.SIGKILL else 128 + signal.SIGTERM)
    left = [path for path in tmp_path.iterdir() if path.name != "adapter"]
    if number == signal.SIGTERM:
        assert not left
    else:
        assert [path.name for path in left] == [f"out.staging-{os.uname().nodename}-{child.pid}"]
        assert not (left[0] / "config.json").exists()
        with pytest.raises((OSError, ValueError), match=r"config.json|Unrecognized"):
            AutoModelForCausalLM.from_pretrained(left[0])
    merge([find(str(adapter))], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "out"}, "the next merge clears up"


# whole commands


@pytest.mark.slow
def test_an_adapter_trained_over_nf4_merges_into_the_full_precision_base(tmp_path, qwenlora):
    root = Path(__file__).parents[2]
    settings = ("strategy.quantization=nf4", "train.max_steps=2", "train.eval_strategy=no")
    ran = qwenlora("train", root / "configs" / "tiny.yaml", *settings)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    ran = qwenlora("merge", "runs/tiny", "merged")
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stderr
    assert "note: trained over a quantised base" in ran.stdout
    run = tmp_path / "runs" / "tiny"
    same(plain(tmp_path / "merged"), unmerged(run / "base_model", run / "adapter"))
    assert (tmp_path / "merged" / "chat_template.jinja").is_file()
    refused = qwenlora("merge", "runs/tiny", "merged")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def make_deep(folder, tiny, layers):
    """Write a model of 16 MB a layer in bfloat16, a file a layer, all layers alike, and an adapter for it."""
    config = Qwen2Config(
        vocab_size=2048, hidden_size=768, intermediate_size=2560, num_hidden_layers=layers,
        num_attention_heads=12, num_key_value_heads=12, tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    weight_map, layer = {}, "model.layers.0."
    drawn = {
        name: torch.empty(values.shape, dtype=torch.bfloat16).normal_(std=0.02)
        for name, values in model.named_parameters()
        if name.startswith(layer) or ".layers." not in name
    }
    for number in range(layers):
        file = f"model-{number}.safetensors"
        held = {
            name.replace(layer, f"model.layers.{number}."): values
            for name, values in drawn.items()
            if number == 0 or layer in name
        }
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    with torch.device("meta"):
        adapter = get_peft_model(AutoModelForCausalLM.from_config(model.config), config)
        names = adapter.state_dict()
    (folder / "adapter").mkdir()
    config.base_model_name_or_path = str(folder)
    config.save_pretrained(folder / "adapter")
    save_file(
        {
            name.replace(".default", ""): torch.randn(values.shape) * 0.02
            for name, values in names.items()
            if "lora_" in name
        },
        folder / "adapter" / "adapter_model.safetensors",
    )


@pytest.mark.slow
@pytest.mark.long
def test_a_merge_needs_no_more_memory_for_more_layers(tiny, tmp_path):
    code = """
import sys
from pathlib import Path
from qwenlora.adapter.merge.merge import merge
from qwenlora.adapter.subject import find
from qwenlora.trainer.model.base_files import peak_memory
merge([find(sys.argv[1])], Path(sys.argv[2]))
print(peak_memory())
"""
    peaks, sizes = [], []
    for layers in (2, 14):
        base, out = tmp_path / f"base-{layers}", tmp_path / f"merged-{layers}"
        make_deep(base, tiny, layers)
        ran = subprocess.run(
            [sys.executable, "-c", code, base / "adapter", out], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        peaks.append(int(ran.stdout.split()[-1]))
        sizes.append(sum(file.stat().st_size for file in out.glob("*.safetensors")))
    more, written = peaks[1] - peaks[0], sizes[1] - sizes[0]
    print(f"{written / 1e6:.0f} MB more were merged in {more / 1e6:.0f} MB more")
    assert written > 150e6
    assert more < written / 3
