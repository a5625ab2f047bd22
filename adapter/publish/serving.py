"""What servers take of an adapter: export.py says it on the card, docs/serving.md gives the commands.

Read in their sources: vLLM 0.33.0 (lora/peft_helper.py, config/lora.py, lora/utils.py), SGLang 0.5.23
(srt/lora/lora.py, lora_config.py, lora_manager.py, utils.py), llama.cpp as of llama-cpp-python 0.3.36
(convert_lora_to_gguf.py, src/llama-adapter.h), which Ollama runs. What none of them takes can be merged.
"""

from collections.abc import Collection, Mapping
from typing import Any

VLLM, SGLANG, LLAMA_CPP = "vLLM", "SGLang", "llama.cpp"
SERVERS = (VLLM, SGLANG, LLAMA_CPP)
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank of vLLM may be
REQUIRED = ("r", "lora_alpha", "target_modules")
# what changes what an adapter means, and no server knows
FOREIGN = ("lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
PLAIN_STARTS = (
    "gaussian",
    "eva",
    "orthogonal",
    "mica",
    "lora_ga",
)  # of init_lora_weights: the base stays as it is


def max_lora_rank(config: Mapping[str, Any]) -> int | None:
    """Return what vLLM's --max-lora-rank has to be for an adapter: the smallest that it knows; None: none is
    enough."""
    needed = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return next((rank for rank in MAX_LORA_RANKS if rank >= needed), None)


def obstacles(config: Mapping[str, Any], names: Collection[str]) -> dict[str, list[str]]:
    """Return {server: why it cannot serve an adapter unmerged}; servers that can are left out.

    config: adapter_config.json. names: of the tensors in adapter_model.safetensors.
    """
    found: dict[str, list[str]] = {server: [] for server in SERVERS}

    def say(why: str, *servers: str) -> None:
        for server in servers or SERVERS:
            found[server].append(why)

    if missing := [key for key in REQUIRED if config.get(key) is None]:
        say(f"adapter_config.json lacks {', '.join(missing)}")
        return found
    if config.get("use_dora"):
        say("it is a DoRA adapter")
    if whole := config.get("modules_to_save"):
        say(f"it holds whole modules ({', '.join(whole)})")
    if config.get("use_rslora"):
        say("its scaling is rsLoRA's, which would be taken for alpha / r without a word", SGLANG, LLAMA_CPP)
    if config.get("bias", "none") != "none":
        say(f"it has biases (bias: {config['bias']})")
    if config.get("target_parameters"):
        say("it is for parameters that are no linear layers (target_parameters)")
    if foreign := [key for key in FOREIGN if config.get(key)]:
        say(f"it uses {', '.join(foreign)}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        say(f"its start changed the base (init_lora_weights: {start})")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        say("its modules differ in rank or alpha", SGLANG, LLAMA_CPP)
    if isinstance(config["target_modules"], str) and config["target_modules"] not in ("all", "all-linear"):
        say("its target_modules are a pattern, not names", SGLANG)
    if max_lora_rank(config) is None:
        say(f"its rank {config['r']} is above {MAX_LORA_RANKS[-1]}", VLLM)
    if any(".lm_head." in name for name in names):
        say("it changes the head, which many bases share with the embeddings", LLAMA_CPP)
    if not config.get("use_dora") and not whole and (odd := next(filter(_is_odd, names), None)):
        say(f"it has a tensor that is neither lora_A nor lora_B ({odd})")
    return {server: why for server, why in found.items() if why}


def _is_odd(name: str) -> bool:
    ours = name.startswith("base_model.model.")
    return not (
        ours and name.endswith((".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B"))
    )
