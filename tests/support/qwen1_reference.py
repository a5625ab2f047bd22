"""A first-generation Qwen in plain torch, from the description of its architecture, and its files; for small
models.

Of the Qwen technical report (https://arxiv.org/abs/2309.16609), section 2.3, and of its files' names: a
pre-norm decoder, RMSNorm, rotary positions over all of a head, bias in q, k and v alone, SwiGLU whose two
halves are w1 and w2, embeddings and head apart. Within the trained length: what Qwen-1 does for longer texts
is not here.
"""

import base64
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.convert_slow_tokenizer import bytes_to_unicode

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,  # of w1 and w2 together
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "seq_length": 96,
    "rotary_emb_base": 10000,
    "layer_norm_epsilon": 1e-6,
    "vocab_size": 512,
}
CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "no_bias": True,
    "onnx_safe": None,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
}
GENERATION = {
    "chat_format": "chatml",
    "eos_token_id": 151643,
    "pad_token_id": 151643,
    "max_window_size": 6144,
    "max_new_tokens": 512,
    "do_sample": True,
    "top_k": 0,
    "top_p": 0.8,
    "repetition_penalty": 1.1,
    "transformers_version": "4.31.0",
}


class Norm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt()


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.heads, self.base = config["num_attention_heads"], config["rotary_emb_base"]
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.c_attn(x).split(x.shape[-1], dim=-1)
        )
        scores = self.turned(q) @ self.turned(k).transpose(-1, -2) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        return self.c_proj((weights @ v).transpose(1, 2).flatten(-2))

    def turned(self, x: Tensor) -> Tensor:
        """Return x with each pair of numbers, i and i + half, turned by position / base^(i / half)."""
        half = x.shape[-1] // 2
        speeds = self.base ** -(torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(x.shape[-2], dtype=torch.float64), speeds)
        pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], dim=-1).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"] // 2
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(width, inner, bias=False)
        self.c_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.w2(x)
        return self.c_proj(self.w1(x) * gate * gate.sigmoid())


class Block(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, epsilon = config["hidden_size"], config["layer_norm_epsilon"]
        self.ln_1, self.attn = Norm(width, epsilon), Attention(config)
        self.ln_2, self.mlp = Norm(width, epsilon), MLP(config)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), visible)
        return x + self.mlp(self.ln_2(x))


class Qwen1(nn.Module):
    """Its state_dict has the names of the released files. config: as in config.json."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config["vocab_size"], width),
                "h": nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"])),
                "ln_f": Norm(width, config["layer_norm_epsilon"]),
            }
        )
        self.lm_head = nn.Linear(width, config["vocab_size"], bias=False)

    def forward(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        """Return logits [batch, length, vocabulary]. real: bool [batch, length], false where padding
        stands."""
        visible = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        if real is not None:
            visible = visible & real[:, None, None, :] | torch.eye(ids.shape[1], dtype=torch.bool)
        x = self.transformer["wte"](ids)
        for block in self.transformer["h"]:
            x = block(x, visible)
        return self.lm_head(self.transformer["ln_f"](x))


def make_model(**sizes: Any) -> Qwen1:
    """Return a model with random numbers in all its weights, of sizes at which each of them moves the
    logits."""
    torch.manual_seed(0)
    model = Qwen1(CONFIG | SIZES | sizes)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def bytes_alone() -> list[bytes]:
    """Return the smallest vocabulary."""
    return [bytes([byte]) for byte in range(256)]


def tokens_of(vocabulary: dict[str, int]) -> list[bytes]:
    """Return the tokens of a byte-level BPE in the order of their ids."""
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return [
        bytes(byte_of[letter] for letter in token) for token in sorted(vocabulary, key=vocabulary.__getitem__)
    ]


def write_tiktoken(file: Path, tokens: list[bytes]) -> Path:
    """Write a vocabulary as qwen.tiktoken is written."""
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return file


def write_model(
    folder: Path,
    model: Qwen1,
    *,
    tokens: list[bytes] | None = None,
    kind: str = "safetensors",
    shards: int = 1,
) -> Path:
    """Write a model's folder as it was released. tokens: default, bytes alone, with 208 special ids to
    come."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    write_tiktoken(folder / "qwen.tiktoken", tokens or bytes_alone())
    weights = {name: values.detach().clone() for name, values in model.state_dict().items()}
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    names, weight_map = sorted(weights), {}
    for number in range(shards):
        ending = f"-{number + 1:05}-of-{shards:05}" if shards > 1 else ""
        file = folder / f"{stem}{ending}.{kind}"
        part = {name: weights[name] for name in names[number::shards]}  # not in the model's order
        weight_map |= dict.fromkeys(part, file.name)
        if kind == "bin":
            torch.save(part, file)
        else:
            save_file(part, file, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder
