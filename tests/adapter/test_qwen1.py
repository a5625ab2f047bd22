"""`qwenlora convert-qwen1`: a first-generation Qwen computes the same as a Qwen2, reads the same text, and
trains."""

import json
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import tiktoken
import torch
from hypothesis import example, given, seed, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from qwenlora.adapter.loading import load
from qwenlora.adapter.qwen1 import convert as qwen1
from qwenlora.adapter.qwen1 import tokenizer as qwen1_tokenizer
from qwenlora.adapter.qwen1 import weights as qwen1_weights
from qwenlora.adapter.subject import find
from qwenlora.adapter.verify import check_adapter

sys.path.append(str(Path(__file__).parents[1] / "support"))
from qwen1_reference import Qwen1, bytes_alone, make_model, tokens_of, write_model, write_tiktoken

BOUND = 1e-5
SHAPES = {
    "7B-like": {},
    "two wide heads": {"num_attention_heads": 2, "kv_channels": 32},
    "72B-like": {"num_attention_heads": 8, "kv_channels": 8, "rotary_emb_base": 1000000, "seq_length": 160},
    "first release": {"layer_norm_epsilon": 1e-5, "num_hidden_layers": 1},
}
FILES = {
    "safetensors": {},
    "safetensors in three": {"shards": 3},
    "bin": {"kind": "bin"},
    "bin in two": {"kind": "bin", "shards": 2},
}


def convert(source, out, max_shard_size="5GB"):
    assert qwen1.convert(source, out, max_shard_size=max_shard_size) == 0
    return out


@pytest.fixture(scope="module")
def original() -> Qwen1:
    return make_model()


@pytest.fixture(scope="module")
def source(original, tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("qwen1") / "in", original)


@pytest.fixture(scope="module")
def converted(source) -> Path:
    return convert(source, source.with_name("out"))


@pytest.fixture
def mine(source, tmp_path) -> Path:
    """A copy of the model, to spoil."""
    return Path(shutil.copytree(source, tmp_path / "in"))


def logits(model, ids, **more):
    with torch.no_grad():
        found = model(ids, **more)
    return getattr(found, "logits", found)


def ids_of(model, *size):
    return torch.randint(model.config["vocab_size"], size, generator=torch.Generator().manual_seed(1))


# ---- the model


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_converted_model_has_the_logits_of_the_original_up_to_the_trained_length(tmp_path, shape, files):
    model = make_model(**SHAPES[shape])
    convert(write_model(tmp_path / "in", model, **FILES[files]), tmp_path / "out", "40KB")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for length in (1, 17, model.config["seq_length"]):
        ids = ids_of(model, 2, length)
        expected = logits(model, ids)
        assert expected.std() > 0.3
        assert (logits(found, ids) - expected).abs().max() < BOUND


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_as_alone(original, converted, side):
    found = AutoModelForCausalLM.from_pretrained(converted)
    rows = [ids_of(original, length) for length in (50, 31, 7)]
    ids, real = torch.zeros(3, 50, dtype=torch.long), torch.zeros(3, 50, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(50 - len(row), None) if side == "left" else slice(len(row))
        ids[number, place], real[number, place] = row, True
    batch = logits(found, ids, attention_mask=real.long())
    assert (batch - logits(original, ids, real=real))[real].abs().max() < BOUND
    for number, row in enumerate(rows):
        assert (batch[number][real[number]] - logits(original, row.unsqueeze(0))[0]).abs().max() < BOUND


def test_it_generates_what_the_original_says_token_by_token(original, converted):
    found = AutoModelForCausalLM.from_pretrained(converted)
    ids = ids_of(original, 1, 5)
    generated = found.generate(
        ids, max_new_tokens=40, do_sample=False, repetition_penalty=1.0, eos_token_id=None
    )
    while ids.shape[1] < generated.shape[1]:
        ids = torch.cat([ids, logits(original, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stay_the_same_bits(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("qwenlora.adapter.qwen1.weights.SLICE", 1000)  # a real matrix is read in many slices
    model = make_model().to(dtype)
    convert(write_model(tmp_path / "in", model, kind="bin"), tmp_path / "out")
    new, old = load_file(tmp_path / "out" / "model.safetensors"), model.state_dict()
    name = "model.layers.1.self_attn"
    for kind in ("weight", "bias"):
        three = torch.cat([new[f"{name}.{part}_proj.{kind}"] for part in "qkv"])
        assert torch.equal(three, old[f"transformer.h.1.attn.c_attn.{kind}"])
    assert torch.equal(new["model.layers.2.mlp.gate_proj.weight"], old["transformer.h.2.mlp.w2.weight"])
    assert torch.equal(new["model.embed_tokens.weight"], old["transformer.wte.weight"])
    assert sum(values.numel() for values in new.values()) == sum(values.numel() for values in old.values())
    assert {values.dtype for values in new.values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


def test_the_config_says_the_trained_length_and_where_replies_end(converted):
    config = json.loads((converted / "config.json").read_text())
    generation = json.loads((converted / "generation_config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert (
        config["max_position_embeddings"] == 96
    )  # not the 8192 of Qwen-1's own key, which is past what was trained
    assert config["intermediate_size"] == 96
    assert "auto_map" not in config
    assert (config["rope_theta"], config["torch_dtype"]) == (
        10000,
        "float32",
    )  # as engines of 2024 look for them
    assert generation["eos_token_id"] == [258, 256]
    assert generation["pad_token_id"] == 256
    assert (generation["top_p"], generation["top_k"], generation["repetition_penalty"]) == (0.8, 0, 1.1)


def test_a_model_that_does_not_sample_says_so(mine, tmp_path):
    (mine / "generation_config.json").write_text('{"do_sample": false, "top_p": 0.5, "max_new_tokens": 9}')
    generation = json.loads((convert(mine, tmp_path / "out") / "generation_config.json").read_text())
    assert (generation["do_sample"], generation["max_new_tokens"]) == (False, 9)


def test_keys_of_the_first_release_are_understood(mine, original, tmp_path):
    config = json.loads((mine / "config.json").read_text())
    for old, new in qwen1.OLD_KEYS.items():
        config[old] = config.pop(new)
    (mine / "config.json").write_text(json.dumps(config))
    found = AutoModelForCausalLM.from_pretrained(convert(mine, tmp_path / "out"))
    ids = ids_of(original, 1, 30)
    assert (logits(found, ids) - logits(original, ids)).abs().max() < BOUND


def test_every_number_of_the_released_7b_has_a_place(mine):
    """Its index says total_size 15442649088, of two bytes each."""
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    change(mine, **sizes, kv_channels=128, vocab_size=151936, seq_length=8192)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(qwen1.qwen2_config(mine))
    assert sum(values.numel() for values in model.parameters()) == 15442649088 // 2
    assert set(qwen1_weights.row_blocks(32)) == {name for name, _ in model.named_parameters()}


def test_files_are_no_larger_than_asked(source, tmp_path):
    out = convert(source, tmp_path / "out", "100KB")
    files = sorted(out.glob("model-*.safetensors"))
    largest = 512 * 64 * 4  # the embeddings, which are one tensor
    assert len(files) > 3
    assert all(file.stat().st_size < max(100_000, largest) + 2000 for file in files)
    assert set(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].values()) == {
        file.name for file in files
    }


def test_what_can_be_computed_is_left_out(mine, tmp_path):
    weights = load_file(mine / "model.safetensors")
    weights["transformer.rotary_emb.inv_freq"] = torch.ones(8)
    weights["transformer.h.0.attn.masked_bias"] = torch.tensor([-1e4])
    save_file(weights, mine / "model.safetensors")
    assert not any(
        "rotary" in name for name in load_file(convert(mine, tmp_path / "out") / "model.safetensors")
    )


def test_a_model_is_converted_in_little_memory(source, tmp_path):
    model = make_model(
        hidden_size=512, kv_channels=128, intermediate_size=4096, vocab_size=30000, num_hidden_layers=6
    )
    write_model(tmp_path / "in", model, shards=2)
    code = (
        "import sys; from pathlib import Path; from qwenlora.adapter.qwen1.convert import convert\n"
        "from qwenlora.trainer.model.base_files import peak_memory\n"
        "convert(Path(sys.argv[1]), Path('small'), max_shard_size='5GB'); before = peak_memory()\n"
        "convert(Path('in'), Path('out'), max_shard_size='5GB'); print(peak_memory() - before)"
    )
    command = [sys.executable, "-c", code, source]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (
        int(answer.stdout.split()[-1]) < 110e6 < (tmp_path / "out" / "model.safetensors").stat().st_size / 2
    )


# ---- what is refused


def change(folder, **keys):
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def shards(folder):
    write_model(folder.with_name("other"), make_model(), kind="bin", shards=2)
    (folder / "model.safetensors").unlink()
    for file in folder.with_name("other").glob("pytorch_model*"):
        shutil.copy(file, folder)


def cut(file, share=0.5):
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


SPOILT = {
    "a Qwen2": (lambda f: change(f, model_type="qwen2"), "of type qwen2, .*needs no conversion"),
    "another model": (lambda f: change(f, model_type="llama"), "of type llama, not of Qwen-1's type qwen$"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "a list as config": (lambda f: (f / "config.json").write_text("[]"), "config.json holds no keys"),
    "a broken generation config": (
        lambda f: (f / "generation_config.json").write_text("{"),
        "generation_config.json cannot be read",
    ),
    "Int4": (lambda f: change(f, quantization_config={"quant_method": "gptq"}), r"quantised \(gptq\)"),
    "VL": (lambda f: change(f, visual={}), "no text model: its config.json has visual"),
    "partly turned": (lambda f: change(f, rotary_pct=0.5), "rotary_pct=0.5, Qwen2's architecture has 1.0"),
    "biases": (lambda f: change(f, no_bias=False), "no_bias=False"),
    "tied": (lambda f: change(f, tie_word_embeddings=True), "tie_word_embeddings=True"),
    "narrow heads": (
        lambda f: change(f, kv_channels=8),
        "kv_channels=8 times num_attention_heads=4 is not hidden",
    ),
    "a size that is none": (
        lambda f: change(f, seq_length="long"),
        "seq_length=long, expected a number above 0",
    ),
    "a size that is missing": (lambda f: change(f, hidden_size=None), "hidden_size=None, expected a number"),
    "another depth": (
        lambda f: change(f, num_hidden_layers=2),
        "hold transformer.h.2.attn.c_attn.bias and 7 more",
    ),
    "another width": (
        lambda f: change(f, intermediate_size=200),
        "mlp.w1.weight is 96 x 64; its .* says 100 x 64",
    ),
    "a tensor too few": (
        lambda f: change_weights(f, lambda w: w.pop("transformer.h.1.attn.c_attn.bias")),
        "lack transformer.h.1.attn.c_attn.bias; download",
    ),
    "a tensor too many": (
        lambda f: change_weights(f, lambda w: w.update({"transformer.h.1.mlp.w3.weight": torch.ones(2)})),
        "hold transformer.h.1.mlp.w3.weight, which",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "weights cut short": (lambda f: cut(f / "model.safetensors"), "cut short"),
    "a pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs"),
        "is a Git LFS pointer",
    ),
    "a missing file": (
        lambda f: (shards(f), (f / "pytorch_model-00002-of-00002.bin").unlink()),
        "pytorch_model-00002-of-00002.bin",
    ),
    "a file cut short": (
        lambda f: (shards(f), cut(f / "pytorch_model-00002-of-00002.bin")),
        "pytorch_model-00002-of-00002.bin is cut short",
    ),
    "a file of something else": (
        lambda f: (shards(f), (f / "pytorch_model-00002-of-00002.bin").write_text("hello")),
        "pytorch_model-00002-of-00002.bin cannot be read",
    ),
    "no vocabulary": (lambda f: (f / "qwen.tiktoken").unlink(), "no qwen.tiktoken"),
    "a vocabulary cut short": (
        lambda f: write_tiktoken(f / "qwen.tiktoken", bytes_alone()[:100]),
        "no token for the byte 0x64",
    ),
    "another vocabulary": (
        lambda f: write_tiktoken(f / "qwen.tiktoken", [*bytes_alone(), *(bytes([97, n]) for n in range(49))]),
        "has 513 ids, the model only 512",
    ),
    "no vocabulary at all": (
        lambda f: (f / "qwen.tiktoken").write_text("hello\n"),
        "line 1: .* is not a token",
    ),
    "ranks with a hole": (
        lambda f: (f / "qwen.tiktoken").write_bytes((f / "qwen.tiktoken").read_bytes() + b"YWI= 300\n"),
        "its 257 ranks are not 0, 1, 2",
    ),
    "a token out of nothing": (
        lambda f: write_tiktoken(f / "qwen.tiktoken", [*bytes_alone(), b"abc"]),
        "token 256 .* is made of no two tokens",
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_is_no_whole_qwen1_is_refused_and_nothing_is_left(mine, tmp_path, how):
    spoil, message = SPOILT[how]
    spoil(mine)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message) as raised:
        convert(mine, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_is_there_is_not_written_into(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(ValueError, match="is there already"):
        convert(source, tmp_path / "out")
    with pytest.raises(ValueError, match="lies within"):
        convert(source, source / "out")
    with pytest.raises(ValueError, match="is no folder"):
        convert(tmp_path / "nowhere", tmp_path / "new")
    with pytest.raises(ValueError, match="max-shard-size"):
        convert(source, tmp_path / "new", "big")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_full_is_noticed_before(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(ValueError, match="GB free, .* needs"):
        convert(source, tmp_path / "deep" / "out")


def test_what_breaks_half_way_leaves_no_folder(source, tmp_path, monkeypatch):
    def fail(*arguments, **more):
        raise OSError("no space left")

    monkeypatch.setattr(qwen1_weights.SafetensorsWriter, "finish", fail)
    with pytest.raises(ValueError, match="cannot be made: no space left"):
        convert(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- the tokenizer

WORDS = [
    *("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|extra_7|>", "<|extra_205|>", "<|im_end", "|>"),
    *(" ", "  ", "\n", "\r\n", "\t", "\u3000", "\u00a0", "é", "e\u0301", "한", "\u1112\u1161\u11ab", "Å"),
    *(
        "你好",
        "世界",
        "，",
        "。",
        "def f(x):\n    return x",
        "    ",
        "123",
        "4",
        "😀",
        "👩‍👩‍👧",
        "it's",
        "IT'LL",
        "--->",
        "aaaaaaa",
    ),
]
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(WORDS), max_size=20).map("".join))


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizers):
    """A vocabulary of 2045 tokens: Qwen-1's way to read it, and the converted one."""
    file = tmp_path_factory.mktemp("small") / "qwen.tiktoken"
    vocabulary = json.loads(tokenizers["tiny"].backend_tokenizer.to_str())["model"]["vocab"]
    return _two(file, tokens_of(vocabulary))


@pytest.fixture(scope="module")
def real(tmp_path_factory, assets):
    """Qwen-1's own vocabulary, which is Qwen2.5's."""
    vocabulary = json.loads((assets / "tokenizers" / "qwen2.5" / "tokenizer.json").read_text())["model"][
        "vocab"
    ]
    return _two(tmp_path_factory.mktemp("real") / "qwen.tiktoken", tokens_of(vocabulary))


def _two(file, tokens):
    write_tiktoken(file, tokens)
    special = {token: len(tokens) + number for number, token in enumerate(qwen1_tokenizer.SPECIAL)}
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(
        "qwen", pat_str=PRETOKENIZE_REGEX, mergeable_ranks=ranks, special_tokens=special
    )
    qwen1_tokenizer.convert_tokenizer(file, 8192).save_pretrained(file.with_name("tokenizer"))
    return encoding, AutoTokenizer.from_pretrained(file.with_name("tokenizer"))


def as_qwen1(encoding, text):
    return encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")


@seed(0)
@settings(max_examples=400, deadline=None)
@example("".join(WORDS))
@given(TEXTS)
def test_a_small_vocabulary_reads_any_text_as_tiktoken_does(small, text):
    encoding, tokenizer = small
    assert tokenizer(text)["input_ids"] == as_qwen1(encoding, text)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == encoding.decode(as_qwen1(encoding, text))


@seed(0)
@settings(max_examples=400, deadline=None)
@example("".join(WORDS))
@given(TEXTS)
def test_qwen1s_own_vocabulary_reads_any_text_as_tiktoken_does(real, text):
    encoding, tokenizer = real
    assert tokenizer(text)["input_ids"] == as_qwen1(encoding, text)


def test_qwen1s_own_vocabulary_becomes_qwen2s_merge_by_merge(real, assets):
    def model(tokenizer):
        return json.loads(tokenizer.backend_tokenizer.to_str())["model"]

    theirs = model(AutoTokenizer.from_pretrained(assets / "tokenizers" / "qwen2.5"))
    ours = model(real[1])
    assert len(ours["merges"]) == 151387
    assert ours["merges"] == theirs["merges"]
    assert ours["vocab"] == theirs["vocab"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"]
    assert real[1].convert_tokens_to_ids(tokens) == [151643, 151644, 151645, 151646, 151850]


def test_a_chat_is_the_tokens_that_qwen1s_code_made(small):
    encoding, tokenizer = small
    start, end = (encoding.encode_single_token(token) for token in ("<|im_start|>", "<|im_end|>"))
    newline = encoding.encode("\n")

    def turn(role, text):
        return [start, *encoding.encode(role), *newline, *encoding.encode(text), end]

    expected = [*turn("system", "You are a helpful assistant."), *newline, *turn("user", "你好"), *newline]
    expected += [*turn("assistant", "Hello."), *newline, *turn("user", "1+1?"), *newline]
    expected += [start, *encoding.encode("assistant"), *newline]
    said = [("user", "你好"), ("assistant", "Hello."), ("user", "1+1?")]
    messages = [{"role": role, "content": text} for role, text in said]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == expected
    own = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, messages[0]], tokenize=False
    )
    assert own.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


# ---- adapters

KINDS = {
    "lora": {"target_modules": ["c_attn", "attn.c_proj", "w1", "w2"]},
    "both c_proj, rslora": {"target_modules": ["c_attn", "c_proj"], "use_rslora": True},
    "dora": {"target_modules": ["c_attn", "c_proj", "w1", "w2"], "use_dora": True},
    "whole modules": {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head", "ln_1", "ln_f"]},
    "embeddings": {"target_modules": ["c_attn", "wte", "lm_head"]},
    "some layers": {"target_modules": ["c_attn"], "layers_to_transform": [0, 2], "layers_pattern": "h"},
    "by name": {"target_modules": ["transformer.h.1.attn.c_attn", "transformer.h.0.mlp.w2"]},
    "by expression": {"target_modules": r".*\.h\.[01]\..*(c_attn|c_proj)"},
}


def make_adapter(folder, **settings):
    """Return Qwen-1 with a random adapter, which was written as peft does."""
    model = get_peft_model(make_model(), LoraConfig(r=4, lora_alpha=8, **settings))
    for name, values in model.named_parameters():
        if values.requires_grad and "original_module" not in name:
            values.data += 0.1 * torch.randn_like(values)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_for_qwen1_does_on_the_converted_base_what_it_did(converted, tmp_path, kind, original):
    tuned = make_adapter(tmp_path / "in", **KINDS[kind])
    convert(tmp_path / "in", tmp_path / "out")
    subject = find(str(tmp_path / "out"), base=str(converted))
    check_adapter(subject)
    ids = ids_of(original, 2, 40)
    expected = logits(tuned, ids)
    assert (expected - logits(original, ids)).abs().max() > 0.1
    assert (logits(load(subject).model, ids) - expected).abs().max() < BOUND
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(converted), tmp_path / "out"
    ).eval()
    assert (logits(plain, ids) - expected).abs().max() < BOUND


def test_lora_by_hand_is_the_converted_adapter(converted, tmp_path):
    """W + alpha / r * B A, written as a peft of 2023 wrote it."""
    torch.manual_seed(3)
    model, weights = make_model(), {}
    for name in ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"):
        for layer in range(3):
            module = model.get_submodule(f"transformer.h.{layer}.{name}")
            a, b = 0.1 * torch.randn(4, module.in_features), 0.05 * torch.randn(module.out_features, 4)
            module.weight.data += 16 / 4 * b @ a
            key = f"base_model.model.transformer.h.{layer}.{name}"
            weights |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    (tmp_path / "in").mkdir()
    torch.save(weights, tmp_path / "in" / "adapter_model.bin")
    config = {
        "base_model_name_or_path": "Qwen/Qwen-7B-Chat",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["c_attn", "c_proj", "w1", "w2"],
        "task_type": "CAUSAL_LM",
    }
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(config))
    convert(tmp_path / "in", tmp_path / "out")
    found = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(converted), tmp_path / "out"
    ).eval()
    ids = ids_of(model, 2, 96)
    assert (logits(found, ids) - logits(model, ids)).abs().max() < BOUND


def test_a_converted_adapter_asks_for_its_base(tmp_path):
    make_adapter(tmp_path / "in", target_modules=["c_attn"])
    convert(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match="name it with --base"):
        find(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type=IA3"),
        ({"bias": "all"}, "bias=all, which convert-qwen1 cannot carry over"),
        ({"rank_pattern": {"c_attn": 8}}, "rank_pattern="),
        ({"alpha_pattern": {"c_attn": 8}}, "alpha_pattern="),
        ({"enable_lora": [True, False, True]}, "enable_lora="),
        ({"modules_to_save": ["score"]}, "modules_to_save=score"),
    ],
)
def test_an_adapter_that_cannot_be_carried_over_is_refused(tmp_path, keys, message):
    make_adapter(tmp_path / "in", target_modules=["c_attn"])
    file = tmp_path / "in" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", torch.ones(4, 64), "needs no conversion"),
        ("transformer.h.0.mlp.w3.lora_A.weight", torch.ones(4, 64), "a Qwen-1 has no place for"),
        ("transformer.h.0.attn.c_attn.lora_B.weight", torch.ones(64, 4), r"of shape \[64, 4\]"),
    ],
)
def test_an_adapter_for_another_model_is_refused(tmp_path, name, values, message):
    make_adapter(tmp_path / "in", target_modules=["c_attn"])
    weights = load_file(tmp_path / "in" / "adapter_model.safetensors")
    save_file(weights | {f"base_model.model.{name}": values}, tmp_path / "in" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "in", tmp_path / "out")


# ---- all of it


def test_a_converted_model_trains(qwenlora, tmp_path, tokenizers):
    vocabulary = json.loads(tokenizers["tiny"].backend_tokenizer.to_str())["model"]["vocab"]
    model = make_model(vocab_size=2304, seq_length=512)
    write_model(tmp_path / "in", model, tokens=tokens_of(vocabulary))
    answer = qwenlora("convert-qwen1", "in", "out", "--max-shard-size", "500KB")
    assert answer.returncode == 0, answer.stderr
    assert "up to 512 tokens" in answer.stdout
    (tmp_path / "run.yaml").write_text(
        "run_dir: runs/one\nmodel: {name_or_path: out}\ndata: {train: example, eval: example}\n"
        "train: {max_steps: 3, global_batch_size: 4, per_device_train_batch_size: 4}\n"
    )
    answer = qwenlora("train", "run.yaml")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert (
        check_adapter(find(str(tmp_path / "runs" / "one"), base=str(tmp_path / "out"))).architecture
        == "Qwen2ForCausalLM"
    )
