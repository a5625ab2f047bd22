"""Small rows, configs and trainers for tests of trainer/."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwenlora.configs.schema import Config, Data, Launch, Lora, Model, Train
from qwenlora.data.prepared import Side
from qwenlora.run.folder import RunFolder
from qwenlora.run.records import Identity, Parameters
from qwenlora.trainer.loop.arguments import order_of, training_arguments
from qwenlora.trainer.loop.batches import Rows
from qwenlora.trainer.loop.saver import Saver
from qwenlora.trainer.loop.trainer import LoraTrainer, Services

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
NO_IDENTITY = Identity(config={}, data="", base="")


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
    """Return parameter counts, in the record's order."""
    sizes = [name for name in Parameters.model_fields if name not in ("work", "kinds", "active")]
    return Parameters(**dict(zip(sizes, counts, strict=True)))


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
    """Return a trainer with the tiny model and a new adapter; its checkpoints go to folder.

    services: Services' fields besides the saver.
    """
    torch.manual_seed(0)
    lora = LoraConfig(target_modules="all-linear", lora_dropout=config.lora.lora_dropout)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), lora)
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
