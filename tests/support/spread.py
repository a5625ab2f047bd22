"""Runs of a small Qwen under one strategy after the other, in the same ranks; for run_ranks."""

import gc
import hashlib
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from made import HYBRIDS, NO_IDENTITY, side_of
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qwenlora.configs.schema import Config, Data, Lora, Model, Strategy, Train
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.final_adapter import constant_files, save_adapter
from qwenlora.trainer.loop import eva
from qwenlora.trainer.loop.arguments import order_of, training_arguments
from qwenlora.trainer.loop.batches import Rows
from qwenlora.trainer.loop.saver import Saver
from qwenlora.trainer.loop.trainer import LoraTrainer, Services
from qwenlora.trainer.model.fused import fuse
from qwenlora.trainer.model.lora import add_lora, count_parameters
from qwenlora.trainer.model.row_attention import attend_row_by_row
from qwenlora.trainer.model.row_states import keep_states_apart
from qwenlora.trainer.spread import strategy
from qwenlora.trainer.spread.experts import divide

STEPS, SAVED = 8, 4
ROWS, EVAL_ROWS = 51, 11  # of 8 a step: an epoch's last step has 3


@dataclass(frozen=True)
class Cell:
    """One run, in the order of trainer/attempt.py. folder: its run folder; resume: a checkpoint to resume
    from; end_to_end: rows are not padded, as in real runs.

    broken: a step whose loss is NaN on rank 0; processes: of a node, 0: all ranks are on one node.
    """

    base: str
    folder: str
    name: str = "ddp"
    quantization: str = "none"
    end_to_end: bool = False
    resume: str = ""
    shard_group: str = "global"
    offload: str = "none"
    deepspeed_config: str = ""
    dropout: float = 0.0
    dtype: str = "float32"
    steps: int = STEPS
    save_steps: int = SAVED
    broken: int = 0
    processes: int = 0
    expert_parallel: int = 1
    train: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)

    def under(self, name: str, folder: str | Path, **more: Any) -> "Cell":
        return replace(self, name=name, folder=str(folder), **more)

    @property
    def config(self) -> Config:
        train = {
            "global_batch_size": 8,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "max_steps": self.steps,
            "learning_rate": 2e-4,
            "warmup_steps": 0.0,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_strategy": "steps",
            "save_steps": self.save_steps,
            "save_total_limit": None,
            # where a gradient is rounding alone, Adam makes a whole step of its sign
            "adam_epsilon": 1e-6,
        }
        return Config(
            run_dir=self.folder,
            model=Model(name_or_path=self.base, dtype=self.dtype),
            data=Data(train="unused", eval="unused"),
            lora=Lora(**{"lora_dropout": self.dropout} | self.lora),
            train=Train(**train | self.train),
            strategy=Strategy(
                name=self.name,
                quantization=self.quantization,
                shard_group=self.shard_group,
                offload=self.offload,
                deepspeed_config=self.deepspeed_config or None,
                expert_parallel=self.expert_parallel,
            ),
        )


def make_base(folder: Path, kind: str, *, tied: bool) -> Path:
    """Write a small random model in several files, without a tokenizer."""
    torch.manual_seed(7)
    sizes: dict[str, Any] = {
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.08,
        "tie_word_embeddings": tied,
    }
    model: Any
    if kind == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, head_dim=16, **sizes | experts))
    elif kind in HYBRIDS:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, head_dim=16, **sizes | HYBRIDS[kind])
        )
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(head_dim=16, **sizes))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    model.save_pretrained(folder, max_shard_size="300KB")
    return folder


def run_cells(cells: list[Cell], tokenizer: str) -> list[dict[str, Any]]:
    """Run cells one after the other; return what each did, as run_cell says."""
    results = []
    for cell in cells:
        results.append(run_cell(cell, tokenizer))
        gc.collect()  # engines and their models are full of cycles
    return results


def run_cell(cell: Cell, tokenizer: str) -> dict[str, Any]:
    """Return losses, evaluations and norms by step, what this rank held, and the final adapter's hash."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    os.environ |= {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(cell.processes or world),
        "MASTER_ADDR": "127.0.0.1",
    }
    config, run = cell.config, RunFolder(cell.folder)
    if rank == 0:
        run.path.mkdir(parents=True, exist_ok=True)
    side, eval_ = side_of(ROWS), side_of(EVAL_ROWS, 1)
    parameters = count_parameters(config, cell.base)
    spread = strategy.choose(config, parameters)
    base = strategy.load_base(config, cell.base, spread)
    assert not cell.end_to_end or attend_row_by_row(base, states_apart=keep_states_apart(base))
    torch.manual_seed(config.train.seed)
    model = add_lora(base, config.lora, saved=Path(cell.resume) if cell.resume else None)
    if config.lora.init_lora_weights == "eva" and not cell.resume:
        eva.begin(model, config, order_of(config, side), side, lambda: None)
    fused = fuse(model, sharded_by_deepspeed=spread.name == "zero3")
    divided = divide(model, config)
    words = AutoTokenizer.from_pretrained(tokenizer)
    saver = (
        Saver(run, NO_IDENTITY, world, limit=None, in_background=True, timeout_s=600) if rank == 0 else None
    )
    arguments = training_arguments(config, run, len(side), world, evaluates=True, name=spread.name)
    arguments.logging_steps = 1
    warnings: list[str] = []
    trainer = LoraTrainer(
        model,
        config,
        arguments,
        Rows(order_of(config, side), side, eval_),
        Services(saver, warn=warnings.append),
        deepspeed=spread.deepspeed,
        experts=divided,
        processing_class=words,
    )
    if saver:
        saver.constant(constant_files(model, words, {}))
    if cell.broken and rank == 0:
        head = model.get_output_embeddings()
        head.register_forward_hook(
            lambda module, inputs, logits: (
                logits * (math.nan if trainer.state.global_step + 1 == cell.broken else 1)
            )
        )
    trainer.make_engine()
    if cell.resume:
        trainer.load(Path(cell.resume))
    trainer.train(resume_from_checkpoint=cell.resume or None)
    if saver:
        saver.wait()
        assert not saver.failure, saver.failure
    with trainer.whole():
        if rank == 0:
            save_adapter(trainer.peft_model, words, {}, run)
        moved = sum(p.float().abs().sum().item() for n, p in model.named_parameters() if "lora_B" in n)
    history = trainer.state.log_history
    return {
        "warnings": warnings,
        "losses": {h["step"]: h["loss"] for h in history if "loss" in h},
        "norms": {h["step"]: float(h["grad_norm"]) for h in history if "loss" in h},
        "router": {h["step"]: h["router_aux_loss"] for h in history if "router_aux_loss" in h},
        "eval": {h["step"]: h["eval_loss"] for h in history if "eval_loss" in h},
        "moved": moved,
        "fused": str(fused),
        "held": held(trainer, model),
        "adapter": digest(run.adapter) if rank == 0 else "",
    }


def held(trainer: LoraTrainer, model: Any) -> dict[str, Any]:
    """Return what this rank holds: bytes of the base, numbers in the optimizer, kinds of weights."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    local = [p.to_local() if hasattr(p, "to_local") else p for p in frozen]
    # ZeRO-3 has a parameter's shard in ds_tensor, unless it is gathered at the moment
    local = [p if p.numel() or not hasattr(p, "ds_tensor") else p.ds_tensor for p in local]
    moments = [
        value.numel()
        for state in trainer._adam.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.numel() > 1
    ]
    return {
        "base_bytes": sum(tensor.nbytes for tensor in local),
        "base_numbers": sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in frozen),
        "optimizer_numbers": sum(moments),
        "kinds": sorted({type(p).__name__ for p in frozen}),
        "dtypes": sorted({str(p.dtype) for p in frozen}),
    }


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def measure_alone(cell: Cell, tokenizer: str) -> dict[str, Any]:
    """Return what run_cell returns in a new process without ranks, with seconds and the GPU's peak memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_measured, cell, tokenizer).result()


def _measured(cell: Cell, tokenizer: str) -> dict[str, Any]:
    start = time.perf_counter()
    result = run_cell(cell, tokenizer)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return result | {"seconds": time.perf_counter() - start, "gpu_bytes": peak}
