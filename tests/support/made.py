"""Small rows, configs and trainers for tests of trainer/."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from qwenlora.configs.schema import Config, Data, Launch, Lora, Model, Train
from qwenlora.data.prepared import Side
from qwenlora.run.folder import RunFolder
from qwenlora.run.records import Identity, Parameters
from qwenlora.trainer.loop.arguments import order_of, training_arguments
from qwenlora.trainer.loop.batches import Rows
from qwenlora.trainer.loop.saver import Saver
from qwenlora.trainer.loop.trainer import LoraTrainer, Services
from qwenlora.trainer.model.architecture import class_of

_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
# the kinds of Qwen with gated delta nets beside attention, and what a small one has
HYBRIDS: dict[str, dict[str, Any]] = {
    kind: experts
    | {f"linear_num_{part}_heads": number for part, number in (("key", 2), ("value", 4))}
    | {f"linear_{part}_head_dim": 16 for part in ("key", "value")}
    | {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    for kind, experts in (("qwen3_next", _EXPERTS), ("qwen3_5_text", {}), ("qwen3_5_moe_text", _EXPERTS))
}
_OF_TEXT = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.2},
}
_OF_VISION = {
    **{"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 4},
    **{"spatial_merge_size": 2, "out_hidden_size": 32},
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_NETS = {name: value for name, value in HYBRIDS["qwen3_5_text"].items() if name.startswith("linear")} | {
    "layer_types": ["linear_attention", "full_attention"]
}
_PLACES = {"num_position_embeddings": 16}
# the kinds of Qwen with a vision part, and what their text and vision parts have
WITH_VISION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": (_MROPE, {"fullatt_block_indexes": [1], "window_size": 16}),
    "qwen3_vl": (_MROPE, _PLACES | {"deepstack_visual_indexes": [0]}),
    "qwen3_vl_moe": (
        _MROPE | _EXPERTS | {"moe_intermediate_size": 24},
        _PLACES | {"deepstack_visual_indexes": [0]},
    ),
    "qwen3_5": (_NETS, _PLACES),
    "qwen3_5_moe": (_NETS | _EXPERTS, _PLACES),
}
NO_IDENTITY = Identity(config={}, data="", base="")


def config_with_vision(kind: str, vocabulary: int, *, tied: bool = False) -> Any:
    """Return transformers' config of a small model with a vision part."""
    text, vision = WITH_VISION[kind]
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return AutoConfig.for_model(
        kind,
        text_config=_OF_TEXT | text | {"vocab_size": vocabulary} | ends,
        vision_config=_OF_VISION | vision,
        tie_word_embeddings=tied,
    )


def make_with_vision(folder: Path, kind: str, words: Path | None = None, *, tied: bool = False) -> Path:
    """Write a small model with a vision part, its experts as Qwen's own files have them. words: a folder
    with a tokenizer for it."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(words) if words else None
    config = config_with_vision(kind, len(tokenizer) if tokenizer else 2048, tied=tied)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    if tokenizer:
        tokenizer.save_pretrained(folder)
    if kind == "qwen3_vl_moe":
        file = folder / "model.safetensors"
        turned = {
            name: t.mT.contiguous() if ".experts." in name else t for name, t in load_file(file).items()
        }
        save_file(turned, file, {"format": "pt"})
    return folder


def side_of(count: int, seed: int = 0) -> Side:
    """Return rows of ragged lengths, each with its own share of trained tokens."""
    random = np.random.RandomState(seed)
    lengths = random.randint(4, 40, count)
    ids = random.randint(300, 2000, lengths.sum()).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    trained = random.rand(len(ids)) < random.rand(count).repeat(lengths)
    trained[starts[1:] - 1] = True
    trained[starts[:-1]] = False
    trained_lengths = np.add.reduceat(trained, starts[:-1], dtype=np.int32)
    row_of, places = np.arange(count, dtype=np.int32), np.zeros((count, 3), np.int32)
    return Side(ids, trained, starts[:-1], lengths.astype(np.int32), trained_lengths, row_of, places)


def weighted(side: Side, seed: int = 0) -> Side:
    """Return rows whose trained tokens have weights."""
    random = np.random.RandomState(seed)
    return with_weights(side, random.lognormal(0, 2, len(side.ids)))


def with_weights(side: Side, weights: Any) -> Side:
    """Return rows with a weight for each token that is trained."""
    return Side(*side[:7], (weights * side.trained).astype(np.float32))


def plain_loss_and_gradients(
    model: Any, side: Side, rows: Iterable[int]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the mean loss over all trained tokens of rows, by their weights, and its gradients: one row at a
    time, in plain torch."""
    losses, weights = [], []
    for row in map(side.row, rows):
        ids = torch.from_numpy(row.ids.astype("int64"))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").double())
        of_tokens = row.trained if side.weights is None else row.weights
        weights.append(torch.from_numpy(of_tokens[1:].astype("float64")))
    weight = torch.cat(weights)
    loss = (torch.cat(losses) * weight).sum() / weight.sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


def parameters_of(*counts: int) -> Parameters:
    """Return parameter counts, in the record's order; the last may be left out."""
    return Parameters(**dict(zip(Parameters.model_fields, counts, strict=False)))


def config_of(**train) -> Config:
    settings = {
        "global_batch_size": 8,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
    }
    return Config(
        run_dir="unused",
        model=Model(name_or_path="tiny"),
        data=Data(train="unused", eval="unused"),
        lora=Lora(),
        train=Train(**settings | {"save_strategy": "no", "warmup_steps": 0.0} | train),
        launch=Launch(),
    )


def trainer_of(
    tiny: Path,
    folder: Path,
    side: Side,
    config: Config,
    eval_: Side | None = None,
    packs=None,
    place=str,
    **services,
):
    """Return a trainer with a new adapter; its checkpoints go to folder.

    tiny: the tiny model, or another one; services: Services' fields besides the saver.
    """
    torch.manual_seed(0)
    lora = LoraConfig(target_modules="all-linear", lora_dropout=config.lora.lora_dropout)
    model = get_peft_model(class_of(AutoConfig.from_pretrained(tiny)).from_pretrained(tiny), lora)
    run = RunFolder(folder)
    limit = config.train.save_total_limit
    saver = Saver(run, NO_IDENTITY, 1, limit=limit, in_background=True, timeout_s=600)
    return LoraTrainer(
        model,
        config,
        training_arguments(config, run, len(packs or side), 1, evaluates=eval_ is not None),
        Rows(order_of(config, side, packs), side, eval_, place),
        Services(saver, **services),
        processing_class=AutoTokenizer.from_pretrained(tiny),
    )
