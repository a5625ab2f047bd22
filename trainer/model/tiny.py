"""The embedded default model: a Qwen3 of 3.6 million random parameters, to train on two CPU cores. It is an
ordinary model folder, the same bytes each time, made without a download."""

import json
import os
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3Config
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from qwenlora.configs.schema import Data
from qwenlora.data.survey import rows_of_side
from qwenlora.data.turns import TURN_END, TURN_START

VOCABULARY = 2048
SEED = 0
PAD = "<|endoftext|>"


def build_tiny(folder: Path, tokenizer: Any = None, *, weights: bool = True) -> None:
    """Write the tiny model into folder, unless it is there. tokenizer: by default trained on example data.
    weights: without them, torch is not needed."""
    if (folder / "config.json").is_file():
        return
    staging = folder.with_name(f"{folder.name}.staging-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    tokenizer = tokenizer or train_tokenizer()
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        # at the usual 0.02 the frozen, tied head caps the logits, and LoRA alone learns nothing
        initializer_range=0.08,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    if weights:
        _save_random_model(config, staging)
    else:
        config.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    try:
        staging.rename(folder)
    except OSError:  # another process was faster, with the same bytes
        if not (folder / "config.json").is_file():
            raise
        shutil.rmtree(staging)


def _save_random_model(config: Qwen3Config, folder: Path) -> None:
    import torch
    from transformers import Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = config.eos_token_id
    model.generation_config.pad_token_id = config.pad_token_id
    model.save_pretrained(folder)


def train_tokenizer() -> Any:
    """Return a Qwen2Tokenizer, a byte-level BPE trained on the texts of the example data."""
    bpe = Tokenizer(models.BPE())
    # as Qwen2Tokenizer rebuilds them after loading: with others, a loaded tokenizer would give other ids
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 3,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rows = [row for _, row in rows_of_side(Data(train="example"), "train")]
    bpe.train_from_iterator([message["content"] for row in rows for message in row.messages], trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        eos_token=TURN_END,
        pad_token=PAD,
        unk_token=None,
        additional_special_tokens=[TURN_START, TURN_END],
    )
    template = resources.files("qwenlora.trainer.model") / "tiny.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8").rstrip("\n")
    return tokenizer
