"""The embedded model is built fast, the same each time, and is an ordinary folder."""

import hashlib
import subprocess
import sys
import time

from transformers import AutoModelForCausalLM, AutoTokenizer

from qwenlora.trainer.model import tiny as tiny_module
from qwenlora.trainer.model.tiny import build_tiny


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_another_process_with_another_thread_count_builds_the_same_bytes(tiny, tmp_path):
    code = (
        "import sys; from pathlib import Path; from qwenlora.trainer.model.tiny import build_tiny as b;"
        " b(Path(sys.argv[1]))"
    )
    environment = {
        "OMP_NUM_THREADS": "2",
        "RAYON_NUM_THREADS": "2",
        "PYTHONHASHSEED": "7",
        "PATH": "/usr/bin:/bin",
    }
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], env=environment, check=True)
    assert digests(tmp_path / "again") == digests(tiny)


def test_it_is_built_in_under_five_seconds_and_once(tmp_path):
    start = time.perf_counter()
    build_tiny(tmp_path / "model")
    assert time.perf_counter() - start < 5
    before = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    build_tiny(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_plain_transformers_loads_it(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert model.config.model_type == "qwen3"
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(tokenizer) <= model.config.vocab_size


def test_its_tokenizer_gives_the_same_ids_before_and_after_saving(tiny):
    made, loaded = tiny_module.train_tokenizer(), AutoTokenizer.from_pretrained(tiny)
    text = "<|im_start|>user\n成年人 2 天, it's ①  ok\n\n<|im_end|>\n"
    assert made(text).input_ids == loaded(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_it_takes_a_given_tokenizer(assets, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(assets / "tokenizers" / "qwen3")
    build_tiny(tmp_path / "model", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("你好").input_ids == tokenizer("你好").input_ids
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.vocab_size == 151680
