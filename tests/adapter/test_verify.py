"""`qwenlora verify`: an adapter that is not whole, does not fit or holds nothing is never taken for one that
does."""

import json
import re
import shutil

import pytest
import torch
from parts import SIZES, make_base, untie
from peft import LoraConfig, get_peft_model
from run_facts import make_facts
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config

from qwenlora.adapter.adapter_file import read_adapter
from qwenlora.adapter.loading import load
from qwenlora.adapter.ordinary import ordinary_base, ordinary_shapes
from qwenlora.adapter.subject import find, read_adapter_config
from qwenlora.adapter.tensors import tensor_of
from qwenlora.adapter.verify import check_adapter, notes_on, print_check
from qwenlora.configs.load import to_yaml
from qwenlora.configs.schema import Config, Data, Lora, Model
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.model.head import NOTE, has_own_head

FP8 = torch.float8_e5m2
LAYER = "base_model.model.model.layers"
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "embeddings": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "lora on embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "some tokens": {"trainable_token_indices": [7, 3]},
    "bias": {"bias": "lora_only"},
}


def make(folder, base, **settings):
    """Write an adapter with random numbers in it."""
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"]} | settings
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    for values in model.parameters():
        if values.requires_grad:
            values.data += 0.02 * torch.randn_like(values)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


@pytest.fixture
def adapter(tiny, tmp_path):
    make(tmp_path / "adapter", tiny)
    return tmp_path / "adapter"


def changed(folder, change):
    """Write an adapter's tensors anew, changed."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_known_and_loads_as_it_was_saved(tiny, tmp_path, kind):
    saved = make(tmp_path / "a", tiny, **KINDS[kind])
    facts = check_adapter(find(str(tmp_path / "a")))
    assert facts.numbers == sum(values.numel() for values in load_file(facts.file).values())
    assert facts.same_weights is None
    ids = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        apart = (load(find(str(tmp_path / "a"))).model(ids).logits - saved(ids).logits).abs().max()
    assert apart <= (1e-6 if kind == "some tokens" else 0), "logits of trained rows are products of their own"


def shapes_known_without_peft(folder):
    base = ordinary_base(find(str(folder)))
    return base and ordinary_shapes(read_adapter_config(folder), base.config)


@pytest.mark.parametrize("config", [Qwen2Config(**SIZES), Qwen3Config(**SIZES, head_dim=24)])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["v_proj", "o_proj", "up_proj"]])
def test_an_ordinary_adapter_has_the_shapes_that_peft_made(tmp_path, config, targets):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    make(tmp_path / "a", tmp_path / "base", target_modules=targets)
    saved = {
        name: values.shape for name, values in load_file(tmp_path / "a" / "adapter_model.safetensors").items()
    }
    assert shapes_known_without_peft(tmp_path / "a") == saved


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_peft_decides_about_adapters_that_are_not_ordinary(tiny, tmp_path, kind):
    make(tmp_path / "a", tiny, **KINDS[kind])
    assert (shapes_known_without_peft(tmp_path / "a") is None) is (kind not in ("lora", "rslora"))


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama"},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"num_key_value_heads": None},
        {"head_dim": "32"},
        {"architectures": []},
    ],
)
def test_transformers_reads_bases_that_are_not_ordinary(tiny, tmp_path, change):
    base = shutil.copytree(tiny, tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    assert ordinary_base(find(str(base)))
    (base / "config.json").write_text(json.dumps(settings | change))
    assert ordinary_base(find(str(base))) is None


def test_a_head_that_the_config_calls_tied_is_noted_without_transformers(tmp_path):
    base = make_base(tmp_path / "base", "qwen2")
    assert notes_on(find(str(base))) == []
    untie(base)
    has_own_head.cache_clear()
    assert ordinary_base(find(str(base))).notes == notes_on(find(str(base))) == [NOTE]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.float8_e5m2]
)
def test_numbers_are_read_as_torch_reads_them(adapter, dtype):
    changed(adapter, lambda t: t.update({name: (9 * values).to(dtype) for name, values in t.items()}))
    file, held = read_adapter(adapter)
    for name, values in load_file(file).items():
        assert held[name].dtype == str(dtype).removeprefix("torch.")
        read = tensor_of(held[name])
        assert read.dtype == dtype
        assert torch.equal(read.float(), values.float())
        if dtype != FP8:
            assert torch.equal(torch.tensor(held[name].numbers).float(), values.float().flatten())


def test_a_bfloat16_that_is_not_finite_is_found_and_a_negative_zero_is_zero(adapter):
    changed(adapter, lambda t: t.update({name: values.bfloat16() for name, values in t.items()}))
    assert check_adapter(find(str(adapter))).dtypes == ("bfloat16",)
    changed(adapter, lambda t: [values.mul_(-0.0) for name, values in t.items() if "lora_B" in name])
    with pytest.raises(ValueError, match="every lora_B is zero"):
        check_adapter(find(str(adapter)))
    changed(adapter, lambda t: t[f"{LAYER}.3.mlp.down_proj.lora_B.weight"][0].fill_(float("-inf")))
    with pytest.raises(ValueError, match=r"layers.3.mlp.down_proj.lora_B.weight holds numbers that are not"):
        check_adapter(find(str(adapter)))


def test_a_missing_tensor_is_named(adapter):
    changed(adapter, lambda t: t.pop(f"{LAYER}.2.mlp.down_proj.lora_A.weight"))
    with pytest.raises(ValueError, match=rf"lacks {LAYER}.2.mlp.down_proj.lora_A.weight, which its"):
        check_adapter(find(str(adapter)))


def test_a_tensor_too_many_is_named(adapter):
    changed(adapter, lambda t: t.update({f"{LAYER}.9.mlp.down_proj.lora_A.weight": torch.ones(4, 8)}))
    with pytest.raises(ValueError, match=rf"has {LAYER}.9.mlp.down_proj.lora_A.weight, which .* has no"):
        check_adapter(find(str(adapter)))


def test_another_base_is_told_by_shapes(adapter, tmp_path):
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"weight is 4 x 768, .*other needs 4 x 64; it was trained on another base"
    ):
        check_adapter(find(str(adapter), base=str(tmp_path / "other")))


def test_a_number_that_is_none_is_found(adapter):
    def spoil(tensors):
        tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][0, 0] = float("nan")

    changed(adapter, spoil)
    with pytest.raises(
        ValueError, match=r"layers.1.self_attn.q_proj.lora_B.weight holds numbers that are not finite;"
    ):
        check_adapter(find(str(adapter)))


def test_an_adapter_that_changes_nothing_is_refused(adapter):
    changed(adapter, lambda t: [values.zero_() for name, values in t.items() if "lora_B" in name])
    with pytest.raises(ValueError, match="every lora_B is zero, or as it began, so the adapter"):
        check_adapter(find(str(adapter)))


def test_a_module_that_was_not_trained_is_told(adapter):
    changed(adapter, lambda t: [v.zero_() for n, v in t.items() if "layers.3" in n and "lora_B" in n])
    assert len(check_adapter(find(str(adapter))).unchanged) == 2


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_cut_file_is_refused(adapter, size):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(
        ValueError, match=r"adapter_model.safetensors is (empty|cut short|no safetensors file)"
    ):
        check_adapter(find(str(adapter)))


def test_files_that_are_not_there_or_hold_something_else(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="but no adapter_model.safetensors"):
        check_adapter(find(str(adapter)))
    torch.save([1, 2], adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        check_adapter(find(str(adapter)))
    torch.save({"a": eval}, adapter / "adapter_model.bin")  # would run code if it were simply unpickled
    with pytest.raises(ValueError, match=r"adapter_model.bin cannot be read"):
        check_adapter(find(str(adapter)))


@pytest.mark.parametrize("recorded", ["", "bitsandbytes, 4 bits"])
def test_a_run_over_quantised_files_fits_the_model_that_they_were_made_from(tiny, tmp_path, recorded, capsys):
    four, run = shutil.copytree(tiny, tmp_path / "four"), RunFolder(tmp_path / "run")
    settings = json.loads((four / "config.json").read_text())
    how = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (four / "config.json").write_text(json.dumps(settings | how))
    make(run.adapter, tiny)
    model, lora = Model(name_or_path=str(four)), Lora(r=4, lora_alpha=8)
    run.config.write_text(to_yaml(Config(run_dir="r", model=model, data=Data(train="example"), lora=lora)))
    run.write_facts(make_facts(base=str(four), base_quantised=recorded))
    if recorded:
        shutil.rmtree(four)
    subject = find(str(run.path), base=str(tiny))
    assert check_adapter(subject).same_weights is None
    assert print_check(subject) == 0
    assert (
        "trained over quantised files (bitsandbytes, 4 bits); that they were made from"
        in capsys.readouterr().err
    )
    run.write_facts(make_facts(base=str(tiny)))
    with pytest.raises(ValueError, match="was trained on a base with other weights"):
        check_adapter(subject)


def test_a_model_is_no_adapter(tiny):
    with pytest.raises(ValueError, match="is a model, not an adapter"):
        check_adapter(find(str(tiny)))


@pytest.mark.slow
def test_a_runs_adapter_is_as_it_was_written_on_the_base_it_was_trained_on(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    assert check_adapter(find(str(run))).same_weights
    assert check_adapter(find(str(run / "checkpoint-40"))).tensors == 56

    weights = run / "adapter" / "adapter_model.safetensors"
    for file in (weights, run / "checkpoint-40" / weights.name):
        held = bytearray(file.read_bytes())
        held[len(held) // 2] ^= 1  # one bit of one number
        file.write_bytes(held)
        with pytest.raises(
            ValueError, match="has adapter_model.safetensors with other bytes than were written"
        ):
            check_adapter(find(str(file.parent)))

    shutil.copytree(tiny_run[0] / "adapter", run / "adapter", dirs_exist_ok=True)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    for key, value in (
        ("lora_alpha", 2 * config["lora_alpha"]),
        ("use_rslora", not config["use_rslora"]),
        ("alpha_pattern", {"q_proj": 640}),
        ("init_lora_weights", "pissa"),
    ):
        (run / "adapter" / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(
            ValueError, match=re.escape(f"says {key}={value}, the run was trained with {config[key]}")
        ):
            check_adapter(find(str(run)))
    (run / "adapter" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "elsewhere"})
    )
    assert check_adapter(find(str(run))).same_weights, "the base's name may be mended by hand"

    changed_base = load_file(run / "base_model" / "model.safetensors")
    next(iter(changed_base.values())).mul_(1.5)
    save_file(changed_base, run / "base_model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="was trained on a base with other weights"):
        check_adapter(find(str(run)))


@pytest.mark.slow
def test_verify_says_which_base_an_adapter_needs(tiny_run, qwenlora):
    answer = qwenlora("verify", tiny_run[0], COLUMNS="200")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "whole: 56 tensors, 622,592 numbers, float32, 2.5 MB" in answer.stdout
    assert (
        f"{tiny_run[0] / 'base_model'} (Qwen3ForCausalLM): names and shapes fit, and has the weights"
        in answer.stdout
    )
    refused = qwenlora("verify", tiny_run[0] / "base_model")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1


def test_integers_and_matrices_of_the_base_are_refused(adapter):
    changed(
        adapter, lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(2048, 256)})
    )
    with pytest.raises(
        ValueError, match=r"has base_model.model.model.embed_tokens.weight besides, a matrix of the base"
    ):
        check_adapter(find(str(adapter)))
    changed(adapter, lambda t: t.pop("base_model.model.model.embed_tokens.weight"))
    changed(adapter, lambda t: t.update({f"{LAYER}.0.mlp.down_proj.lora_B.weight": torch.ones(256, 4).int()}))
    with pytest.raises(
        ValueError, match=r"down_proj.lora_B.weight is torch.int32, expected float32, float64"
    ):
        check_adapter(find(str(adapter)))


def test_an_adapter_without_a_first_factor_changes_nothing(adapter):
    changed(adapter, lambda t: [values.zero_() for name, values in t.items() if "lora_A" in name])
    with pytest.raises(ValueError, match="every lora_A is zero, or lora_alpha is"):
        check_adapter(find(str(adapter)))
