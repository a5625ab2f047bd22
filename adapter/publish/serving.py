"""Which servers take an adapter unmerged: export.py says it on the card, docs/serving.md gives the commands.

From their sources: vLLM 0.33.0 (lora/peft_helper.py, config/lora.py, lora/utils.py), SGLang 0.5.23
(srt/lora/lora.py, lora_config.py, lora_manager.py, utils.py), llama.cpp as of llama-cpp-python 0.3.36
(convert_lora_to_gguf.py, src/llama-adapter.h), which Ollama runs.
"""

from collections.abc import Collection, Iterator

from qwenlora.adapter.subject import AdapterConfig

VLLM, SGLANG, LLAMA_CPP = "vLLM", "SGLang", "llama.cpp"
SERVERS = (VLLM, SGLANG, LLAMA_CPP)
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of vLLM's --max-lora-rank
REQUIRED = ("r", "lora_alpha", "target_modules")
# keys that change what an adapter does, and that no server knows
FOREIGN = ("lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
# values of init_lora_weights that leave the base as it is
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")

_Reason = tuple[str, tuple[str, ...]]


def max_lora_rank(config: AdapterConfig) -> int | None:
    """Return vLLM's smallest --max-lora-rank that is enough for an adapter; None if all are too small."""
    needed = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return next((rank for rank in MAX_LORA_RANKS if rank >= needed), None)


def obstacles(config: AdapterConfig, names: Collection[str]) -> dict[str, list[str]]:
    """Return {server: why it cannot serve the adapter unmerged}, less those that can. names: of tensors."""
    if missing := [key for key in REQUIRED if config.get(key) is None]:
        return {server: [f"adapter_config.json lacks {', '.join(missing)}"] for server in SERVERS}
    reasons = [*_config_reasons(config), *_tensor_reasons(config, names)]
    by_server = {server: [why for why, servers in reasons if server in servers] for server in SERVERS}
    return {server: whys for server, whys in by_server.items() if whys}


def _config_reasons(config: AdapterConfig) -> Iterator[_Reason]:
    """Yield (reason, the servers that it stops), from the adapter's settings."""
    if config.get("use_dora"):
        yield "it is a DoRA adapter", SERVERS
    if whole := config.get("modules_to_save"):
        yield f"it holds whole modules ({', '.join(whole)})", SERVERS
    if config.get("trainable_token_indices"):
        yield "it holds embeddings of single tokens (trainable_token_indices)", SERVERS
    if config.get("use_rslora"):
        why = "its scaling is rsLoRA's, which would silently be taken for alpha / r"
        yield why, (SGLANG, LLAMA_CPP)
    if config.get("bias", "none") != "none":
        yield f"it has biases (bias: {config['bias']})", SERVERS
    if config.get("target_parameters"):
        yield "it is for parameters that are no linear layers (target_parameters)", SERVERS
    yield from _unusual_settings(config)


def _unusual_settings(config: AdapterConfig) -> Iterator[_Reason]:
    if foreign := [key for key in FOREIGN if config.get(key)]:
        yield f"it uses {', '.join(foreign)}", SERVERS
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        yield f"its start changed the base (init_lora_weights: {start})", SERVERS
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        yield "its modules differ in rank or alpha", (SGLANG, LLAMA_CPP)


def _tensor_reasons(config: AdapterConfig, names: Collection[str]) -> Iterator[_Reason]:
    """Yield (reason, the servers that it stops), from the adapter's modules, rank and tensors."""
    if isinstance(config["target_modules"], str) and config["target_modules"] not in ("all", "all-linear"):
        yield "its target_modules are a pattern, not names", (SGLANG,)
    if max_lora_rank(config) is None:
        yield f"its rank {config['r']} is above {MAX_LORA_RANKS[-1]}", (VLLM,)
    if any(".lm_head." in name for name in names):
        yield "it changes the head, which many bases share with the embeddings", (LLAMA_CPP,)
    plain = not any(map(config.get, ("use_dora", "modules_to_save", "trainable_token_indices")))
    if plain and (odd := next(filter(_is_odd, names), None)):
        yield f"it has a tensor that is neither lora_A nor lora_B ({odd})", SERVERS


def _is_odd(name: str) -> bool:
    ours = name.startswith("base_model.model.")
    return not (
        ours and name.endswith((".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B"))
    )
