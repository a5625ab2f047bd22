"""What servers cannot serve is said before they are asked, and the commands of the docs are whole."""

from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from qwenlora.adapter.publish.serving import (
    LLAMA_CPP,
    MAX_LORA_RANKS,
    SERVERS,
    SGLANG,
    VLLM,
    max_lora_rank,
    obstacles,
)

PLAIN = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj"], "bias": "none", "init_lora_weights": True}
NAMES = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{letter}.weight" for letter in "AB"]


def made(tiny, **how) -> dict[str, list[str]]:
    """Return what is in the way of an adapter that peft makes."""
    config = LoraConfig(task_type="CAUSAL_LM", **{"target_modules": "all-linear"} | how)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    names = list(get_peft_model_state_dict(model, save_embedding_layers=False))
    return obstacles(model.peft_config["default"].to_dict(), names)


def test_a_plain_adapter_is_taken_by_all(tiny):
    assert made(tiny, r=8) == {}
    assert made(tiny, r=8, target_modules=["q_proj", "embed_tokens"]) == {}


@pytest.mark.parametrize(
    ("how", "servers", "why"),
    [
        ({"use_dora": True}, SERVERS, "it is a DoRA adapter"),
        ({"modules_to_save": ["embed_tokens"]}, SERVERS, r"it holds whole modules (embed_tokens)"),
        ({"trainable_token_indices": [7]}, SERVERS, "it holds embeddings of single tokens"),
        ({"use_rslora": True}, (SGLANG, LLAMA_CPP), "silently be taken for alpha / r"),
        ({"target_modules": r".*\.(q|k)_proj"}, (SGLANG,), "a pattern"),
        ({"target_modules": ["q_proj", "lm_head"]}, (LLAMA_CPP,), "it changes the head"),
        ({"rank_pattern": {"q_proj": 4}}, (SGLANG, LLAMA_CPP), "its modules differ in rank"),
        ({"lora_bias": True}, SERVERS, "it uses lora_bias"),
        ({"bias": "all"}, SERVERS, "it has biases"),
        ({"r": 513}, (VLLM,), "its rank 513 is above 512"),
    ],
)
def test_what_is_in_the_way_is_named_by_server(tiny, how, servers, why):
    found = made(tiny, **how)
    assert set(found) == set(servers)
    assert all(any(why in one for one in found[server]) for server in servers)


def test_a_config_or_a_name_that_no_server_knows_is_named():
    assert obstacles({"r": 8}, NAMES)[VLLM] == ["adapter_config.json lacks lora_alpha, target_modules"]
    odd = "base_model.model.model.norm.weight"
    assert obstacles(PLAIN, [*NAMES, odd])[LLAMA_CPP] == [
        f"it has a tensor that is neither lora_A nor lora_B ({odd})"
    ]
    assert "init_lora_weights: pissa" in obstacles(PLAIN | {"init_lora_weights": "pissa"}, NAMES)[VLLM][0]
    assert obstacles(PLAIN | {"init_lora_weights": "gaussian"}, NAMES) == {}


def test_the_smallest_rank_that_vllm_knows_is_taken():
    ranks = {r: max_lora_rank(PLAIN | {"r": r}) for r in (1, 2, 8, 9, 16, 24, 64, 65, 300, 512, 513)}
    assert ranks == {1: 1, 2: 8, 8: 8, 9: 16, 16: 16, 24: 32, 64: 64, 65: 128, 300: 320, 512: 512, 513: None}
    assert max_lora_rank(PLAIN | {"rank_pattern": {"q_proj": 40}}) == 64


def test_the_docs_say_what_the_code_does():
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    assert ", ".join(map(str, MAX_LORA_RANKS)) in text
    for said in (
        "use_dora",
        "modules_to_save",
        "use_rslora",
        "--max-lora-rank",
        "--lora-paths",
        "convert_lora_to_gguf.py",
    ):
        assert said in text
