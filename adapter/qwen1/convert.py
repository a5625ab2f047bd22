"""First-generation Qwens as Qwen2s: `qwenlora convert-qwen1 Qwen-7B-Chat Qwen-7B-Chat-as-qwen2`.

Their own code does not run on today's transformers; Qwen2's architecture computes the same within the length
that they were trained on. See docs/qwen1.md.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from qwenlora.adapter.outputs import free_folder, staging
from qwenlora.adapter.qwen1.adapter import convert_adapter
from qwenlora.adapter.qwen1.tokenizer import VOCABULARY, convert_tokenizer
from qwenlora.adapter.qwen1.weights import plan_weights, write_weights
from qwenlora.adapter.subject import ADAPTER_CONFIG
from qwenlora.adapter.weight_files import SafetensorsWriter, open_weights, parse_size
from qwenlora.data.turns import END_OF_TEXT, TURN_END
from qwenlora.run.format import count, size
from qwenlora.trainer.model.damage import Keys, check_model, read_json

# keys of config.json as the first release spelled them
OLD_KEYS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
}
# properties that Qwen2's architecture shares; all released models have them
EXPECTED = {
    "rotary_pct": 1.0,
    "no_bias": True,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "apply_residual_connection_post_layernorm": False,
}
# keys of generation_config.json to keep: always, and if tokens are sampled
KEPT, SAMPLING = ("do_sample", "repetition_penalty", "max_new_tokens"), ("top_k", "top_p", "temperature")


def convert(source: Path, out: Path, *, max_shard_size: str) -> int:
    """Write a Qwen-1 model, or an adapter for it, as Qwen2's into the new folder out; return the exit code.

    Raises: ValueError, without making out, when source is no Qwen-1, incomplete, or does what Qwen2 cannot.
    """
    transformers_logging.set_verbosity_error()
    source = source.expanduser()
    if not source.is_dir():
        raise ValueError(f"{source} is no folder; name the one that holds the model's or adapter's files")
    out = free_folder(out, read=(source,))
    if (source / ADAPTER_CONFIG).is_file():
        with staging(out, sum(file.stat().st_size for file in source.glob("adapter_model.*"))) as folder:
            base = convert_adapter(source, folder)
        print(f"{out}: the adapter for Qwen2's architecture; its base ({base}) has to be converted, too")
        print(f"next: qwenlora verify {out} --base CONVERTED_BASE")
        return 0
    shard_size = parse_size(max_shard_size)
    config = qwen2_config(source)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    check_model(source)
    with open_weights(str(source)) as files:
        try:
            planned = plan_weights(files, model)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        tokenizer = _tokenizer(source, config)
        generation = _generation_config(source, tokenizer)
        specs = {name: spec for name, (_, spec) in planned.items()}
        with staging(out, sum(spec.size for spec in specs.values())) as folder:
            with SafetensorsWriter(folder, specs, shard_size) as writer:
                write_weights(files, planned, writer)
            tokenizer.save_pretrained(folder)
            generation.save_pretrained(folder)
            config.architectures = [type(model).__name__]
            config.dtype = specs["model.embed_tokens.weight"].dtype
            config.eos_token_id, config.pad_token_id = generation.eos_token_id[0], generation.pad_token_id
            (folder / "config.json").write_text(_config_text(config), encoding="utf-8")
    written = count(len(writer.files), "file")
    print(
        f"{out}: {size(writer.size)} of weights in {written}, as they were; tokenizer with {len(tokenizer)}"
        " ids"
    )
    print(
        f"equal to the original up to {config.max_position_embeddings} tokens, the length it was trained on;"
        " what Qwen-1 does for longer texts (use_dynamic_ntk, use_logn_attn), Qwen2 does not"
    )
    print(f"next: qwenlora train CONFIG model.name_or_path={out}")
    return 0


def qwen2_config(source: Path) -> Qwen2Config:
    """Return a Qwen-1's config as Qwen2's. Raises: ValueError when Qwen2 has no setting for it."""
    file = source / "config.json"
    old = {OLD_KEYS.get(key, key): value for key, value in _read_config(source).items()}
    for key, expected in EXPECTED.items():
        if old.get(key, expected) != expected:
            raise ValueError(f"{file} has {key}={old[key]}, Qwen2's architecture has {expected}")

    def number(key: str, kind: type = int) -> Any:
        value = old.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value == kind(value):
            raise ValueError(f"{file} has {key}={value}, expected a number above 0")
        return kind(value)

    hidden_size, heads = number("hidden_size"), number("num_attention_heads")
    if number("kv_channels") * heads != hidden_size:
        raise ValueError(
            f"{file}: kv_channels={old['kv_channels']} times num_attention_heads={heads} is not"
            f" hidden_size={hidden_size}"
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
        initializer_range=old.get("initializer_range", 0.02),
        tie_word_embeddings=False,
    )


def _config_text(config: Qwen2Config) -> str:
    """Return config.json, also with the keys for engines that are older than transformers 5."""
    keys = json.loads(config.to_json_string())
    keys |= {"rope_theta": keys["rope_parameters"]["rope_theta"], "torch_dtype": keys["dtype"]}
    return json.dumps(keys, indent=2, sort_keys=True) + "\n"


def _read_config(source: Path) -> Keys:
    """Return config.json. Raises: ValueError unless it is a Qwen-1's, in full precision, for text."""
    config = read_json(source / "config.json")
    kind = config.get("model_type")
    if kind != "qwen":
        newer = isinstance(kind, str) and kind.startswith("qwen")
        raise ValueError(
            f"{source} is of type {kind}, not of Qwen-1's type qwen"
            + ("; it needs no conversion, name it as model.name_or_path" if newer else "")
        )
    for sense in ("visual", "audio"):
        if config.get(sense) is not None:
            raise ValueError(f"{source} is no text model: its config.json has {sense}")
    if quantization := config.get("quantization_config"):
        raise ValueError(
            f"{source} is quantised ({quantization.get('quant_method')}); name the model it was made from, as"
            " Qwen-7B-Chat for Qwen-7B-Chat-Int4"
        )
    return config


def _tokenizer(source: Path, config: Qwen2Config) -> Any:
    file = source / VOCABULARY
    if not file.is_file():
        raise ValueError(f"{source} has no {file.name}, the vocabulary; download it again")
    tokenizer = convert_tokenizer(file, config.max_position_embeddings)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{file} has {len(tokenizer)} ids, the model only {config.vocab_size}; they do not belong"
            " together"
        )
    return tokenizer


def _generation_config(source: Path, tokenizer: Any) -> GenerationConfig:
    """Return how the model samples; it stops at the end of a turn or text, as Qwen-1's code does."""
    file = source / "generation_config.json"
    old = read_json(file) if file.is_file() else {}
    kept = [*KEPT, *(SAMPLING if old.get("do_sample") else ())]
    return GenerationConfig(
        **{key: old[key] for key in kept if key in old},
        eos_token_id=tokenizer.convert_tokens_to_ids([TURN_END, END_OF_TEXT]),
        pad_token_id=tokenizer.pad_token_id,
    )
