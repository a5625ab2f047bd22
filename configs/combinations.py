"""The settings that cannot run together, why, and what to set instead. Nothing here loads a model: the
trainer refuses what depends on the base (attention heads)."""

from collections.abc import Callable
from typing import NamedTuple

from qwenlora.configs.schema import Config

ZERO = ("zero1", "zero2", "zero3")
# optimizers that update each number by itself, and make their state at the first step
FLAT = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "lion_32bit")
SHARDED = ("zero3", "fsdp")  # the base is in parts


class Machine(NamedTuple):
    """The machine of a run. processes, gpus: of a node; gpu_bytes: of the smallest GPU, 0: unknown; nvlink:
    whether it links all GPUs of a node with each other."""

    nodes: int
    processes: int
    gpus: int
    gpu_bytes: int = 0
    nvlink: bool = False

    @property
    def world_size(self) -> int:
        """Ranks of all nodes."""
        return self.nodes * self.processes


class Rule(NamedTuple):
    """A combination that is refused. what: for the docs' table; settings: its keys and values, a template for
    str.format with config, strategy and machine; instead: what to set."""

    name: str
    what: str
    applies: Callable[[Config, Machine], bool]
    settings: str
    why: str
    instead: str

    def message(self, config: Config, machine: Machine) -> str:
        """Return the refusal, on one line."""
        settings = self.settings.format(config=config, strategy=config.strategy, machine=machine)
        return f"{settings}: {self.why}; {self.instead}"


def packs_rows(config: Config, *, on_gpu: bool) -> bool:
    """Return whether rows are packed. auto is on where attention keeps packed rows apart at no cost: on a
    GPU, unless ranks share sequences (sdpa then gets whole packs, without a mask)."""
    apart = config.strategy.sequence_parallel == 1 or config.model.attn_implementation.startswith("flash")
    return config.data.packing == "on" or (config.data.packing == "auto" and on_gpu and apart)


_NAME = "strategy.name={strategy.name}"
_EXPERTS = "strategy.expert_parallel={strategy.expert_parallel}"
_WHOLE_BASE = "set strategy.name: zero2 or ddp"

RULES = (
    Rule(
        "fsdp-quantization",
        "`fsdp` with `quantization: nf4` or `int8`",
        lambda c, m: c.strategy.name == "fsdp" and c.strategy.quantization != "none",
        f"{_NAME} with strategy.quantization={{strategy.quantization}}",
        "FSDP2 makes DTensors of the weights, and bitsandbytes' layers lose their quantisation state by that",
        "set strategy.name: ddp, zero1, zero2 or (nf4) zero3, or strategy.quantization: none",
    ),
    Rule(
        "zero3-int8",
        "`zero3` with `quantization: int8`",
        lambda c, m: c.strategy.name == "zero3" and c.strategy.quantization == "int8",
        f"{_NAME} with strategy.quantization=int8",
        "bitsandbytes keeps each int8 weight whole for its kernels besides, so nothing would be saved",
        "set strategy.quantization: nf4, or strategy.name: ddp, zero1 or zero2",
    ),
    Rule(
        "float16",
        "`zero1` to `zero3`, `fsdp` with `model.dtype: float16`",
        lambda c, m: c.strategy.name in (*ZERO, "fsdp") and c.model.dtype == "float16",
        f"{_NAME} with model.dtype=float16",
        "float16 needs its loss scaled, which only ddp does",
        "set model.dtype: bfloat16 (of a run that began otherwise: with --allow-config-change model.dtype),"
        " or strategy.name: ddp",
    ),
    Rule(
        "sharded-dora",
        "`zero3`, `fsdp` with `lora.use_dora`",
        lambda c, m: c.strategy.name in SHARDED and c.lora.use_dora,
        f"{_NAME} with lora.use_dora=true",
        "DoRA takes the norm of whole base weights in each forward pass, and here a GPU has parts",
        _WHOLE_BASE,
    ),
    Rule(
        "zero3-modules-to-save",
        "`zero3` with `lora.modules_to_save`",
        lambda c, m: c.strategy.name == "zero3" and bool(c.lora.modules_to_save),
        f"{_NAME} with lora.modules_to_save={{config.lora.modules_to_save}}",
        "the copy that is trained is made of the whole matrix, and here a GPU has parts",
        "set strategy.name: fsdp, zero2 or ddp",
    ),
    Rule(
        "zero3-trainable-tokens",
        "`zero3` with `lora.trainable_token_indices`",
        lambda c, m: c.strategy.name == "zero3" and bool(c.lora.trainable_token_indices),
        f"{_NAME} with lora.trainable_token_indices",
        "the rows that are trained begin as the base's, and here a GPU has parts",
        "set strategy.name: fsdp, zero2 or ddp",
    ),
    Rule(
        "zero3-eva",
        "`zero3` with `lora.init_lora_weights: eva`",
        lambda c, m: c.strategy.name == "zero3" and c.lora.init_lora_weights == "eva",
        f"{_NAME} with lora.init_lora_weights=eva",
        "rows are computed before DeepSpeed's engine is made, without which a base in parts cannot be called",
        "set strategy.name: fsdp, zero2 or ddp, or lora.init_lora_weights: pissa",
    ),
    Rule(
        "offload-auto",
        "`auto` with `offload`",
        lambda c, m: c.strategy.name == "auto" and c.strategy.offload != "none",
        f"{_NAME} with strategy.offload={{strategy.offload}}",
        "auto looks for what fits the GPUs without host memory",
        "name a strategy: zero2 or zero3 (optimizer), zero3 or fsdp (params); or set strategy.offload: none",
    ),
    Rule(
        "offload-ddp",
        "`ddp` with `offload`",
        lambda c, m: c.strategy.name == "ddp" and c.strategy.offload != "none",
        f"{_NAME} with strategy.offload={{strategy.offload}}",
        "ddp keeps everything on each GPU",
        "set strategy.name: zero2 (optimizer) or zero3 (optimizer, params), or strategy.offload: none",
    ),
    Rule(
        "offload-params-zero1-zero2",
        "`zero1`, `zero2` with `offload: params`",
        lambda c, m: c.strategy.name in ("zero1", "zero2") and c.strategy.offload == "params",
        f"{_NAME} with strategy.offload=params",
        "its base is whole on each GPU, and only a base in parts can wait in host memory",
        "set strategy.name: zero3 or fsdp, or strategy.offload: optimizer",
    ),
    Rule(
        "offload-optimizer-fsdp",
        "`fsdp` with `offload: optimizer`",
        lambda c, m: c.strategy.name == "fsdp" and c.strategy.offload == "optimizer",
        f"{_NAME} with strategy.offload=optimizer",
        "there the optimizer's state is the adapter's, small and whole on each GPU",
        "set strategy.offload: params or none, or strategy.name: zero3",
    ),
    Rule(
        "offload-params-fsdp-cpu",
        "`fsdp` with `offload: params`, without a GPU",
        lambda c, m: c.strategy.name == "fsdp" and c.strategy.offload == "params" and not m.gpus,
        f"{_NAME} with strategy.offload=params on a machine without GPUs",
        "everything is in host memory already",
        "set strategy.offload: none",
    ),
    Rule(
        "shard-group-whole-base",
        "`ddp`, `zero1`, `zero2` with `shard_group: node`",
        lambda c, m: c.strategy.shard_group == "node" and c.strategy.name in ("ddp", "zero1", "zero2"),
        f"{_NAME} with strategy.shard_group=node",
        "nothing of the base is in parts there",
        "set strategy.name: zero3 or fsdp, or strategy.shard_group: global",
    ),
    Rule(
        "shard-group-one-process",
        "`shard_group: node` on several nodes with one process each",
        lambda c, m: (
            c.strategy.shard_group == "node"
            and c.strategy.name in SHARDED
            and m.nodes > 1
            and m.processes == 1
        ),
        "strategy.shard_group=node on {machine.nodes} nodes with 1 process each",
        "the one process of a node would hold the whole base",
        "set strategy.shard_group: global, or strategy.name: ddp",
    ),
    Rule(
        "shard-group-zero3-quantization",
        "`zero3` with `shard_group: node` and `quantization`",
        lambda c, m: (
            c.strategy.shard_group == "node"
            and c.strategy.name == "zero3"
            and c.strategy.quantization == "nf4"
        ),
        f"{_NAME} with strategy.shard_group=node and strategy.quantization={{strategy.quantization}}",
        "DeepSpeed's second, node-wide partition (hpZ) knows nothing of quantised weights",
        "set strategy.shard_group: global, or strategy.name: ddp",
    ),
    Rule(
        "deepspeed-config",
        "`auto`, `ddp`, `fsdp` with `deepspeed_config`",
        lambda c, m: c.strategy.deepspeed_config is not None and c.strategy.name not in ZERO,
        f"{_NAME} with strategy.deepspeed_config={{strategy.deepspeed_config}}",
        "that file is DeepSpeed's, which only zero1, zero2 and zero3 use",
        "name one of them, or remove strategy.deepspeed_config",
    ),
    Rule(
        "zero-optim",
        f"`zero1` to `zero3` with another `train.optim` than {', '.join(FLAT)}",
        lambda c, m: c.strategy.name in ZERO and c.train.optim not in FLAT,
        f"{_NAME} with train.optim={{config.train.optim}}",
        "ZeRO hands an optimizer flat pieces of all parameters, and others look at rows and columns, keep"
        " blocks of few bits, or prepare for whole parameters",
        "set train.optim: adamw_torch_fused, or strategy.name: ddp or fsdp",
    ),
    Rule(
        "expert-parallel-strategy",
        "`expert_parallel` over 1 with another `name` than `auto`, `ddp`",
        lambda c, m: c.strategy.expert_parallel > 1 and c.strategy.name not in ("auto", "ddp"),
        f"{_EXPERTS} with {_NAME}",
        "experts are divided by themselves, and all else is whole on each GPU",
        "set strategy.name: ddp, or strategy.expert_parallel: 1",
    ),
    Rule(
        "expert-parallel-divides",
        "`expert_parallel` that does not divide the processes of a node",
        lambda c, m: m.processes % c.strategy.expert_parallel != 0,
        f"{_EXPERTS} on {{machine.processes}} processes of a node",
        "the processes of a node are cut into groups of that size",
        "set it to a divisor of their number",
    ),
    Rule(
        "expert-parallel-int8",
        "`expert_parallel` over 1 with `quantization: int8`",
        lambda c, m: c.strategy.expert_parallel > 1 and c.strategy.quantization == "int8",
        f"{_EXPERTS} with strategy.quantization=int8",
        "bitsandbytes reads a whole base for int8, which leaves experts as they are",
        "set strategy.quantization: nf4 or none, or strategy.expert_parallel: 1",
    ),
    Rule(
        "expert-parallel-float16",
        "`expert_parallel` over 1 with `model.dtype: float16`",
        lambda c, m: c.strategy.expert_parallel > 1 and c.model.dtype == "float16",
        f"{_EXPERTS} with model.dtype=float16",
        "float16 needs its loss scaled by what all gradients are, of which a GPU has some",
        "set model.dtype: bfloat16, or strategy.expert_parallel: 1",
    ),
    Rule(
        "expert-parallel-optim",
        f"`expert_parallel` over 1 with another `train.optim` than {', '.join(FLAT)}",
        lambda c, m: c.strategy.expert_parallel > 1 and c.train.optim not in FLAT,
        f"{_EXPERTS} with train.optim={{config.train.optim}}",
        "other optimizers look at whole parameters, and here a GPU has parts",
        "set train.optim: adamw_torch_fused, or strategy.expert_parallel: 1",
    ),
    Rule(
        "expert-parallel-eva",
        "`expert_parallel` over 1 with `lora.init_lora_weights: eva`",
        lambda c, m: c.strategy.expert_parallel > 1 and c.lora.init_lora_weights == "eva",
        f"{_EXPERTS} with lora.init_lora_weights=eva",
        "rows are computed before ranks exchange what their experts have",
        "set lora.init_lora_weights: pissa, or strategy.expert_parallel: 1",
    ),
    Rule(
        "sequence-parallel-divides",
        "`sequence_parallel` that does not divide the number of processes",
        lambda c, m: m.world_size % c.strategy.sequence_parallel != 0,
        "strategy.sequence_parallel={strategy.sequence_parallel} on {machine.world_size} processes"
        " ({machine.nodes} x {machine.processes})",
        "the processes are cut into groups of that size",
        "set it to a divisor of their number",
    ),
    Rule(
        "sequence-parallel-eager",
        "`sequence_parallel` over 1 with `attn_implementation: eager`",
        lambda c, m: c.strategy.sequence_parallel > 1 and c.model.attn_implementation == "eager",
        "strategy.sequence_parallel={strategy.sequence_parallel} with model.attn_implementation=eager",
        "it needs a mask over the whole sequence, of which a GPU has a part",
        "set model.attn_implementation: sdpa or flash_attention_2",
    ),
    # with packing: auto, rows are not packed in this case: packs_rows()
    Rule(
        "sequence-parallel-packing",
        "`sequence_parallel` over 1 with `data.packing: on` and `attn_implementation: sdpa`",
        lambda c, m: (
            c.strategy.sequence_parallel > 1
            and c.data.packing == "on"
            and c.model.attn_implementation == "sdpa"
        ),
        "strategy.sequence_parallel={strategy.sequence_parallel} with data.packing=on and"
        " model.attn_implementation=sdpa",
        "its kernel sees whole packs, and only flash attention's keep the rows in them apart",
        "set data.packing: off, or model.attn_implementation: flash_attention_2",
    ),
)


def problems(config: Config, machine: Machine) -> list[str]:
    """Return one line for each rule that refuses the config on this machine."""
    return [rule.message(config, machine) for rule in RULES if rule.applies(config, machine)]


def refuse(config: Config, machine: Machine) -> None:
    """Raise ValueError, one line a combination, when the config cannot run on this machine."""
    if lines := problems(config, machine):
        raise ValueError("\n".join(lines))


def check_simulated(config: Config, name: str) -> None:
    """Refuse to simulate ranks that compute with what others send. name: of the strategy, auto if it is not
    decided yet. Raises: ValueError."""
    shared = {key: getattr(config.strategy, key) for key in ("sequence_parallel", "expert_parallel")}
    what = [f"strategy.{key}={size}" for key, size in shared.items() if size > 1]
    what += [f"strategy.name={name}"] if name not in ("ddp", "auto") else []
    if what:
        raise ValueError(
            f"--simulate-world: with {what[0]} a rank computes with what others send it, and none are there;"
            " set strategy.name: ddp, without sequence_parallel and expert_parallel"
        )
