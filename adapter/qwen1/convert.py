"""First-generation Qwens as Qwen2s: `qwenlora convert-qwen1 Qwen-7B-Chat Qwen-7B-Chat-as-qwen2`.

Their own code does not run on today's transformers, and Qwen2's architecture does the same within the length
they were trained on. A model's weights are qwen1_weights.py's, its tokenizer qwen1_tokenizer.py's; an adapter
is qwen1_adapter.py's. See docs/qwen1.md.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from qwenlora.adapter.outputs import free_folder, staging
from qwenlora.adapter.qwen1 import adapter as qwen1_adapter
from qwenlora.adapter.qwen1 import tokenizer as qwen1_tokenizer
from qwenlora.adapter.qwen1 import weights as qwen1_weights
from qwenlora.adapter.subject import CONFIG as ADAPTER_CONFIG
from qwenlora.adapter.weight_files import MergedFiles, opened, size_of
from qwenlora.data.turns import TURN_END

# keys of config.json as the first release spelled them
OLD_KEYS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
}
# what Qwen2's architecture has, too; all released models say so
EXPECTED = {
    "rotary_pct": 1.0,
    "no_bias": True,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "apply_residual_connection_post_layernorm": False,
}
# of generation_config.json: always, and where tokens are sampled
KEPT, SAMPLING = ("do_sample", "repetition_penalty", "max_new_tokens"), ("top_k", "top_p", "temperature")


def convert(source: Path, out: Path, *, max_shard_size: str) -> int:
    """Write a Qwen-1 model, or an adapter for one, as one of Qwen2's architecture; return the exit code.

    out: a folder that is not there yet; it is seen whole or not at all. max_shard_size: of a weight file, as
    "5GB".
    Raises: ValueError when source is no Qwen-1, is not whole, or does what Qwen2 does not; out is then not
    there.
    """
    transformers_logging.set_verbosity_error()
    source = source.expanduser()
    if not source.is_dir():
        raise ValueError(f"{source} is no folder; name the one that holds the model's or adapter's files")
    out = free_folder(out, read=(source,))
    if (source / ADAPTER_CONFIG).is_file():
        with staging(out, sum(file.stat().st_size for file in source.glob("adapter_model.*"))) as folder:
            base = qwen1_adapter.convert(source, folder)
        print(f"{out}: the adapter for Qwen2's architecture; its base ({base}) has to be converted, too")
        print(f"next: qwenlora verify {out} --base CONVERTED_BASE")
        return 0
    shard_size = size_of(max_shard_size)
    config = qwen2_config(source)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    with opened(str(source)) as files:
        try:
            planned = qwen1_weights.plan(files, model)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        tokenizer = _tokenizer(source, config)
        generation = _generation(source, tokenizer)
        entries = {name: entry for name, (_, entry) in planned.items()}
        size = sum(entry.size for entry in entries.values())
        with staging(out, size) as folder:
            with MergedFiles(folder, entries, shard_size) as made:
                qwen1_weights.write(files, planned, made)
            tokenizer.save_pretrained(folder)
            generation.save_pretrained(folder)
            config.architectures = [type(model).__name__]
            config.dtype = entries["model.embed_tokens.weight"].dtype
            config.eos_token_id, config.pad_token_id = generation.eos_token_id[0], generation.pad_token_id
            (folder / "config.json").write_text(_spelled_twice(config), encoding="utf-8")
    count = "1 file" if len(made.files) == 1 else f"{len(made.files)} files"
    held = f"{size / 1e9:,.1f} GB" if size > 1e9 else f"{size / 1e6:,.1f} MB"
    print(f"{out}: {held} of weights in {count}, as they were; tokenizer with {len(tokenizer)} ids")
    print(
        f"equal to the original up to {config.max_position_embeddings} tokens, the length it was trained on;"
        " what Qwen-1 does for longer texts (use_dynamic_ntk, use_logn_attn), Qwen2 does not"
    )
    print(f"next: qwenlora train CONFIG model.name_or_path={out}")
    return 0


def qwen2_config(source: Path) -> Qwen2Config:
    """Return what a Qwen-1's config.json says, in Qwen2's words. Raises: ValueError when that cannot be
    said."""
    said = _config(source)
    said = {OLD_KEYS.get(key, key): value for key, value in said.items()}
    for key, expected in EXPECTED.items():
        if said.get(key, expected) != expected:
            raise ValueError(
                f"{source / 'config.json'} has {key}={said[key]}, Qwen2's architecture has {expected}"
            )

    def number(key: str, kind: type = int) -> Any:
        value = said.get(key)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or value <= 0
            or kind(value) != value
        ):
            raise ValueError(f"{source / 'config.json'} has {key}={value}, expected a number above 0")
        return kind(value)

    hidden_size, heads = number("hidden_size"), number("num_attention_heads")
    if number("kv_channels") * heads != hidden_size:
        raise ValueError(
            f"{source / 'config.json'}: kv_channels={said['kv_channels']} times num_attention_heads={heads}"
            f" is not hidden_size={hidden_size}"
        )
    return Qwen2Config(
        vocab_size=number("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=number("intermediate_size") // 2,  # Qwen-1 counts w1 and w2 together
        num_hidden_layers=number("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=number("seq_length"),
        rms_norm_eps=number("layer_norm_epsilon", float),
        rope_parameters={"rope_type": "default", "rope_theta": number("rotary_emb_base", float)},
        initializer_range=said.get("initializer_range", 0.02),
        tie_word_embeddings=False,
    )


def _spelled_twice(config: Qwen2Config) -> str:
    """Return config.json with what engines of before transformers 5 look for, too."""
    said = json.loads(config.to_json_string())
    said |= {"rope_theta": said["rope_parameters"]["rope_theta"], "torch_dtype": said["dtype"]}
    return json.dumps(said, indent=2, sort_keys=True) + "\n"


def _config(source: Path) -> dict[str, Any]:
    """Return config.json, once it is a Qwen-1's in full precision that reads text."""
    said = _read(source / "config.json")
    kind = said.get("model_type")
    if kind != "qwen":
        newer = isinstance(kind, str) and kind.startswith("qwen")
        raise ValueError(
            f"{source} is of type {kind}, not of Qwen-1's type qwen"
            + ("; it needs no conversion, name it as model.name_or_path" if newer else "")
        )
    for sense in ("visual", "audio"):
        if said.get(sense) is not None:
            raise ValueError(f"{source} is no text model: its config.json has {sense}")
    if quantised := said.get("quantization_config"):
        raise ValueError(
            f"{source} is quantised ({quantised.get('quant_method')}); name the model it was made from, as"
            " Qwen-7B-Chat for Qwen-7B-Chat-Int4"
        )
    return said


def _tokenizer(source: Path, config: Qwen2Config) -> Any:
    file = source / qwen1_tokenizer.FILE
    if not file.is_file():
        raise ValueError(f"{source} has no {file.name}, the vocabulary; download it again")
    tokenizer = qwen1_tokenizer.convert(file, config.max_position_embeddings)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{file} has {len(tokenizer)} ids, the model only {config.vocab_size}; they are not of one model"
        )
    return tokenizer


def _generation(source: Path, tokenizer: Any) -> GenerationConfig:
    """Return how the model samples; it stops where Qwen-1's code does, at a turn's end or the text's."""
    file = source / "generation_config.json"
    said = _read(file) if file.is_file() else {}
    kept = [*KEPT, *(SAMPLING if said.get("do_sample") else ())]
    return GenerationConfig(
        **{key: said[key] for key in kept if key in said},
        eos_token_id=tokenizer.convert_tokens_to_ids([TURN_END, qwen1_tokenizer.END_OF_TEXT]),
        pad_token_id=tokenizer.pad_token_id,
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read: {error}; IN is a Qwen-1's folder, or an adapter's"
        ) from None
    if not isinstance(said, dict):
        raise ValueError(f"{file} holds no keys; download it again")
    return said
