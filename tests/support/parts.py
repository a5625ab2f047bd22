"""Small bases on disk, and what each of several ranks has after loading its shard of one."""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from qwenlora.configs.schema import Config, Data, Lora, Model, Strategy
from qwenlora.trainer.loop.state import check_alike
from qwenlora.trainer.model import base_files
from qwenlora.trainer.model.lora import add_lora
from qwenlora.trainer.ranks.faults import TrainingFault
from qwenlora.trainer.spread import sharded_loading
from qwenlora.trainer.spread.strategy import check_same_base

WHOLE_BASE = sharded_loading.WholeBase
# no size is divisible by 2 or 4: every shard has padding
SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 97,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.08,
}


def drifted(rank_with_other_bits: int) -> str:
    """Return the fault that a rank raises when one holds an adapter that differs in one bit; else empty."""
    adapter = {"a": torch.ones(3, 5), "b": torch.zeros(7)}
    if dist.get_rank() == rank_with_other_bits:
        adapter["b"].view(torch.int32)[6] = 1
    try:
        check_alike(adapter, torch.device("cpu"))
    except TrainingFault as fault:
        return str(fault)
    return ""


def other_base(rank_with_another: int) -> str:
    """Return the refusal that a rank raises when one has read other weights; else empty."""
    model = torch.nn.Linear(70, 90).requires_grad_(False)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(model.bias)
    if dist.get_rank() == rank_with_another:
        model.weight.data *= 1.001
    try:
        check_same_base(model)
    except ValueError as refusal:
        return str(refusal)
    return ""


def make_base(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write a base of several safetensors files. kind: qwen2 (tied), qwen3 (not tied), moe."""
    torch.manual_seed(0)
    if kind == "qwen2":
        config: Any = Qwen2Config(**SIZES, tie_word_embeddings=True)
    elif kind == "qwen3":
        config = Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False)
    else:
        few = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        config = Qwen3MoeConfig(**SIZES, **few, head_dim=16, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():  # else norms and biases are ones and zeros, whichever file is read
        parameter.data += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def config_of(
    base: Path, lora: dict[str, Any] | None = None, dtype: str = "float32", **strategy: Any
) -> Config:
    model = Model(name_or_path=str(base), dtype=dtype)
    lora = {"lora_dropout": 0.0, "r": 4} | (lora or {})
    return Config(
        run_dir="unused",
        model=model,
        data=Data(train="unused"),
        lora=Lora(**lora),
        strategy=Strategy(**strategy),
    )


def tensors_in(base: Path) -> dict[str, Tensor]:
    """Return all tensors of a base's files, read by safetensors."""
    return {name: t for file in base.glob("*.safetensors") for name, t in load_file(file).items()}


def in_turn(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[Any]:
    """Return what function returns for each of some arguments, one after the other in the same ranks."""
    results = []
    for arguments in calls:
        Watched.reads, Watched.total = [], 0
        results.append(function(*arguments))
        gc.collect()  # engines and their models are full of cycles
    return results


class Watched(base_files.BaseFiles):
    """Records what is read."""

    reads: list[tuple[str, int, int]] = []  # noqa: RUF012
    total = 0

    def copy(self, name: str, start: int, to: Tensor) -> None:
        self.reads.append((name, start, start + to.numel()))
        before = self.bytes_read
        super().copy(name, start, to)
        type(self).total += self.bytes_read - before


def part_of_fsdp(
    base: Path, shape: tuple[int, ...], lora: dict[str, Any] | None = None, dtype: str = "float32"
):
    """Return what a rank has after load_fsdp, and after training steps with an adapter."""
    sharded_loading.BaseFiles = Watched
    names = ("replicas", "shards")[-len(shape) :]
    config = config_of(base, lora, dtype)
    model = sharded_loading.load_fsdp(config, str(base), init_device_mesh("cpu", shape, mesh_dim_names=names))
    result = {"held": _held(model), "reads": Watched.reads, "bytes": Watched.total}
    result["tied"] = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    result["frozen"] = not any(p.requires_grad for p in model.parameters())
    result["buffers"] = {name: b.clone() for name, b in model.named_buffers()}
    whole = {
        n: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for n, p in model.named_parameters()
    }
    result["whole"] = whole if dist.get_rank() == 0 else None
    result |= _trained(model, config, base)
    result["held after"] = sum(_bytes(p) for n, p in model.named_parameters() if "lora_" not in n)
    return result


def _bytes(parameter: Any) -> int:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.untyped_storage().nbytes()


def _held(model: Any) -> int:
    return sum(_bytes(p) for p in model.parameters())


def _trained(model: Any, config: Config, base: Path) -> dict[str, Any]:
    """Compare two steps' losses and gradients, and an evaluation, with those of the whole model."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=next(model.parameters()).dtype)
    models, outcomes = [model, plain], [[], []]
    for index, base_model in enumerate(models):
        base_model.config.use_cache = False
        base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        models[index] = add_lora(base_model, config.lora)
        random_lora(models[index])
    batches = torch.randint(131, (3, 2, 12), generator=torch.Generator().manual_seed(dist.get_rank()))
    for adapted, outcome in zip(models, outcomes, strict=True):
        adapted.train()
        for batch in batches[:2]:
            adapted.zero_grad()
            loss = adapted(input_ids=batch, labels=batch).loss
            loss.backward()
            gradients = [p.grad.clone() for p in adapted.parameters() if p.requires_grad]
            for gradient in gradients:
                dist.all_reduce(gradient)
            outcome.append((loss.item(), torch.cat([g.flatten() for g in gradients])))
            adapted.eval()
            with torch.no_grad():
                outcome.append((adapted(input_ids=batches[2], labels=batches[2]).loss.item(), torch.zeros(1)))
            adapted.train()
        adapted(input_ids=batches[2], labels=batches[2]).loss.backward()
    ours, theirs = outcomes
    return {
        "loss differs": max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)),
        "gradient differs": max((a[1] - b[1]).abs().max().item() for a, b in zip(ours, theirs, strict=True)),
        "gradient": max(b[1].abs().max().item() for b in theirs),
        "adapter": sorted(
            (n, str(p.dtype), tuple(p.shape)) for n, p in models[0].named_parameters() if "lora_" in n
        ),
        "plain adapter": sorted(
            (n, str(p.dtype), tuple(p.shape)) for n, p in models[1].named_parameters() if "lora_" in n
        ),
        "plain buffers": {name: b.clone() for name, b in plain.named_buffers()},
    }


def random_lora(model: Any) -> None:
    """Fill the trained parameters, B's zeros too; the same on all ranks and for any model of these shapes."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad and "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def part_of_zero3(base: Path, settings: dict[str, Any], dtype: str = "float32"):
    """Return what a rank has after load_zero3, and after a step."""
    from qwenlora.trainer.spread.zero import start_communication

    start_communication()
    import deepspeed

    sharded_loading.BaseFiles = Watched
    sent = _counted(deepspeed.comm, "broadcast")
    config = config_of(base, dtype=dtype)
    zero = {"stage": 3} | settings
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if dtype == "bfloat16":
        ds_config["bf16"] = {"enabled": True}
    model = sharded_loading.load_zero3(config, str(base), ds_config)
    result: dict[str, Any] = {"sent": len(sent), "reads": Watched.reads, "bytes": Watched.total}
    result["held"] = sum(p.ds_tensor.untyped_storage().nbytes() + _bytes(p) for p in model.parameters())
    result["tied"] = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    result["buffers"] = {name: b.clone() for name, b in model.named_buffers()}
    for turn in ("whole", "whole again"):  # the second time, hpZ gathers from a node's own copy
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            whole = {n: p.detach().clone() for n, p in model.named_parameters()}
        result[turn] = whole if dist.get_rank() == 0 else None
    result["secondary"] = [p.ds_secondary_tensor is not None for p in model.parameters()]
    torch.manual_seed(dist.get_rank())  # DeepSpeed is to make rank 0's adapter everyone's
    peft_model = add_lora(model, config.lora)
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    engine = deepspeed.initialize(
        model=peft_model,
        optimizer=torch.optim.SGD(trained, lr=0.1),
        model_parameters=trained,
        config=ds_config,
        dist_init_required=False,
    )[0]
    with deepspeed.zero.GatheredParameters(trained):
        adapter = torch.cat([p.detach().float().flatten() for p in trained])
    result["adapter"] = adapter
    batch = torch.randint(131, (2, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        loss = engine(input_ids=batch, labels=batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    result["losses"] = losses
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=model.dtype)
    with torch.no_grad():  # a new adapter changes nothing
        result["plain loss"] = plain(input_ids=batch, labels=batch, use_cache=False).loss.item()
    return result


def _counted(module: Any, name: str) -> list[Any]:
    calls, real = [], getattr(module, name)

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        return real(*arguments, **named)

    setattr(module, name, counted)
    return calls


def turns(base: Path):
    """Return the gathered parameters after load_fsdp, and when this rank began and ended to load a whole
    base."""
    times = []

    class Timed(WHOLE_BASE):
        def __init__(self, *arguments: Any) -> None:
            times.append(time.time())
            super().__init__(*arguments)
            time.sleep(0.2)
            times.append(time.time())

    sharded_loading.WholeBase = Timed
    model = sharded_loading.load_fsdp(
        config_of(base), str(base), init_device_mesh("cpu", (dist.get_world_size(),))
    )
    whole = {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}
    return {"times": times, "whole": whole, "held": _held(model)}


def rename(base: Path) -> None:
    """Replace a base's safetensors by pytorch's own format."""
    tensors = tensors_in(base)
    for file in base.glob("*.safetensors*"):
        file.unlink()
    torch.save(tensors, base / "pytorch_model.bin")


def untie(base: Path) -> None:
    """Give a tied base's files a head that differs from its embeddings."""
    file = next(f for f in base.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(f))
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})


def read_in_two(files: base_files.BaseFiles, weight: sharded_loading.Weight) -> Tensor:
    """Return a parameter's values, flattened, read in two parts that meet within an expert's matrix."""
    whole = torch.empty(weight.parameter.shape).flatten()
    third = len(whole) // 3
    copy = sharded_loading._source_of(files, weight)
    assert copy is not None, weight.names
    copy(0, whole[:third])
    copy(third, whole[third:])
    return whole
