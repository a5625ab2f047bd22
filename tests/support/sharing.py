"""Small runs whose ranks share sequences, and their attention to packs; for run_ranks."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from made import NO_IDENTITY, side_of, weighted
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwenlora.configs.estimate import LOGITS_AT_ONCE
from qwenlora.configs.schema import Config, Data, Lora, Model, Strategy, Train
from qwenlora.data.packing import pack
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.loop import chunked_loss
from qwenlora.trainer.loop.arguments import order_of, training_arguments
from qwenlora.trainer.loop.batches import Rows, collate_packs
from qwenlora.trainer.loop.saver import Saver
from qwenlora.trainer.loop.state import adapter_of
from qwenlora.trainer.loop.trainer import LoraTrainer, Services
from qwenlora.trainer.model.fused import fuse
from qwenlora.trainer.model.lora import add_lora, count_parameters
from qwenlora.trainer.ranks import faults
from qwenlora.trainer.record.metrics import Metrics
from qwenlora.trainer.spread import sequence, strategy

ROWS, EVAL_ROWS = 51, 11  # of 8 a step: an epoch's last step, the seventh, has 3


def make_base(folder: Path, kind: str, heads: int = 4, kv_heads: int = 2) -> str:
    """Write a small random model; its heads are 16 wide."""
    torch.manual_seed(7)
    sizes: dict[str, Any] = {
        "vocab_size": 2048,
        "hidden_size": 16 * heads,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
        "initializer_range": 0.08,
        "tie_word_embeddings": True,
    }
    if kind == "qwen3":
        Qwen3ForCausalLM(Qwen3Config(head_dim=16, **sizes)).save_pretrained(folder)
    else:
        Qwen2ForCausalLM(Qwen2Config(**sizes)).save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class Sharing:
    """One run. size: ranks that share a sequence; resume: a checkpoint to go on from; weighted: rows have
    weights; pack: tokens of a pack, 0: none are packed."""

    base: str
    folder: str
    size: int = 1
    steps: int = 8
    resume: str = ""
    dropout: float = 0.0
    recompute: bool = False
    strategy: str = "ddp"
    weighted: bool = False
    pack: int = 0
    lora: Lora | None = None  # instead of the default with dropout
    positions: int = 0  # that the head takes at a time; 0: as many as it would

    @property
    def config(self) -> Config:
        train: dict[str, Any] = {
            "global_batch_size": 8,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "max_steps": self.steps,
            "learning_rate": 2e-4,
            "warmup_steps": 0.0,
            "max_grad_norm": 0.0,  # clipping would hide a gradient that is too large
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_strategy": "steps",
            "save_steps": 4,
            "gradient_checkpointing": self.recompute,
            # runs with weights are compared with a plain loss, which has no noise
            "neftune_noise_alpha": None if self.weighted else 5.0,
        }
        return Config(
            run_dir=self.folder,
            model=Model(name_or_path=self.base),
            data=Data(train="unused", eval="unused", **({"max_length": self.pack} if self.pack else {})),
            lora=self.lora or Lora(lora_dropout=self.dropout),
            train=Train(**train),
            strategy=Strategy(name=self.strategy, sequence_parallel=self.size),
        )


def run_all(runs: dict[str, Sharing], tokenizer: str, packs: str = "") -> dict[str, Any]:
    """Return what each run did, one after the other, each with new teams. packs: a base for
    pack_in_two_ways."""
    results = {name: run(sharing, tokenizer) for name, sharing in runs.items()}
    if dist.get_world_size() > 1:
        results["broken"] = broken(2)
    if packs:
        results["packs"] = pack_in_two_ways(packs)
    return results


def model_of(base: Any, lora: Lora) -> Any:
    """Return a base with an adapter that trains all its parts from the first step."""
    torch.manual_seed(0)
    model = add_lora(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # at its usual zeros, lora_A has no gradient
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def run(sharing: Sharing, tokenizer: str) -> dict[str, Any]:
    """Return losses and evaluations by step, gradients of the first step, norms, adapter, tokens counted."""
    rank, world = dist.get_rank(), dist.get_world_size()
    config, folder = sharing.config, RunFolder(sharing.folder)
    chunked_loss.LOGITS_AT_ONCE = 4 * 2048 * sharing.positions or LOGITS_AT_ONCE
    if rank == 0:
        folder.path.mkdir(parents=True, exist_ok=True)
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    parameters = count_parameters(config, sharing.base)
    spread = strategy.choose(config, parameters)
    base = strategy.load_base(config, sharing.base, spread)
    model = model_of(base, config.lora)
    fuse(model, sharded_by_deepspeed=spread.name == "zero3")
    team = sequence.team_of(sharing.size)
    sequence.share_attention(base, team)
    side, eval_ = side_of(ROWS), side_of(EVAL_ROWS, 1)
    if sharing.weighted:
        side, eval_ = weighted(side), weighted(eval_)
    packs = pack(side.lengths, sharing.pack) if sharing.pack else None
    units = len(packs or side)
    arguments = training_arguments(config, folder, units, world, evaluates=True, name=sharing.strategy)
    arguments.logging_steps = 1
    saver = (
        Saver(folder, NO_IDENTITY, world, limit=None, in_background=True, timeout_s=600)
        if rank == 0
        else None
    )
    trainer = LoraTrainer(
        model,
        config,
        arguments,
        Rows(order_of(config, side, packs), side, eval_),
        Services(saver),
        team=team,
        deepspeed=spread.deepspeed,
        processing_class=AutoTokenizer.from_pretrained(tokenizer),
    )
    if saver:
        saver.constant({})
    if not spread.deepspeed:
        trainer.create_optimizer()
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        if not gradients:
            gradients.update(
                {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
            )

    if not spread.deepspeed:
        trainer.optimizer.register_step_pre_hook(keep)
    counting = _Counting(None, trainer, parameters.work)
    trainer.add_callback(counting)
    if sharing.resume:
        trainer.load(Path(sharing.resume))
    trainer.train(resume_from_checkpoint=sharing.resume or None)
    if saver:
        saver.wait()
        assert not saver.failure, saver.failure
    with trainer.whole():
        adapter = {
            name: tensor.detach().numpy().copy() for name, tensor in adapter_of(trainer.peft_model).items()
        }
    history = trainer.state.log_history
    return {
        "losses": {h["step"]: h["loss"] for h in history if "loss" in h},
        "eval": {h["step"]: h["eval_loss"] for h in history if "eval_loss" in h},
        "gradients": {name: gradient.numpy() for name, gradient in gradients.items()},
        "norms": {h["step"]: float(h["grad_norm"]) for h in history if "loss" in h},
        "adapter": adapter,
        "tokens": counting.seen,
    }


class _Counting(Metrics):
    """Metrics that keep the tokens of each step."""

    seen: list[int]

    def _start(self) -> None:
        self.seen = [*getattr(self, "seen", []), getattr(self, "_tokens", 0)]
        super()._start()


def attend_to_rows(
    module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
) -> tuple[Any, None]:
    """Attend as flash attention does to packs: to one sequence, whose rows start where position_ids are 0."""
    positions = options["position_ids"]
    assert mask is None
    assert positions.shape == (1, query.shape[2]), "positions of the whole sequence"
    assert module.config._attn_implementation == "flash_by_rows"
    rows = (positions[0] == 0).cumsum(0)
    causal = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
    mask = (rows[:, None] == rows[None, :]) & causal
    key, value = (tensor.repeat_interleave(module.num_key_value_groups, 1) for tensor in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=options["scaling"])
    return out.transpose(1, 2).contiguous(), None


def pack_in_two_ways(base: str) -> tuple[float, float, float]:
    """Return a pack's loss on one rank, the sum of the ranks' losses, and how far their gradients are
    apart."""
    ALL_ATTENTION_FUNCTIONS.register("flash_by_rows", attend_to_rows)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config._attn_implementation = "flash_by_rows"
    side = side_of(4)
    batch = collate_packs([[side.row(number) for number in range(4)]], 0)
    losses, gradients = [], []
    for shared in (False, True):
        team = sequence.team_of(dist.get_world_size() if shared else 1)
        sequence.share_attention(model, team)
        model.zero_grad()
        loss = model(**team.cut(batch, 0), num_items_in_batch=torch.tensor(10), use_cache=False).loss
        loss.backward()
        own = torch.cat([p.grad.flatten() for p in model.parameters()])
        if shared:
            loss = loss.detach()
            dist.all_reduce(loss)
            dist.all_reduce(own)
        losses.append(loss.item())
        gradients.append(own)
    return losses[0], losses[1], (gradients[0] - gradients[1]).abs().max().item()


def broken(size: int) -> list[int]:
    """Return which micro-batches all ranks call broken, when the last team's second one is."""
    team = sequence.team_of(size)
    last = team.number == team.teams - 1
    return faults.broken_micro_batches(
        [torch.tensor(1.0), torch.tensor(float("nan") if last else 2.0)], team.number, team.teams
    )
