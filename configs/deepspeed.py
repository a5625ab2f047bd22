"""DeepSpeed's config for zero1 to zero3: made from the run's, or a user's file, completed from the run's.

Where both have a value, it must be the same, since the run's config is printed, kept and compared.
Source: https://www.deepspeed.ai/docs/config-json/ and deepspeed.runtime; a test compares its keys with these.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qwenlora.configs.schema import Config
from qwenlora.configs.wording import did_you_mean, show

Settings = dict[str, object]  # DeepSpeed's config, or a block of it

BUCKET = 50_000_000  # numbers that are sent at once, 200 MB: an adapter's gradients are little more
NEVER = 2**31 - 1

# keys, of values and of blocks, that a file may have
KNOWN = tuple(
    """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping
    managed_gradient_accumulation steps_per_print dump_state disable_python_gc disable_allgather
    communication_data_type seq_parallel_communication_data_type prescale_gradients
    gradient_predivide_factor gradient_allreduce_op zero_optimization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer fp16 bf16 bfloat16 torch_autocast optimizer scheduler
    wall_clock_breakdown memory_breakdown flops_profiler comms_logger autotuning hybrid_engine
    pipeline data_efficiency checkpoint data_types aio dataloader_drop_last log_level
    weight_quantization compile timers tensor_parallel expert_parallel tensorboard wandb csv_monitor
    comet activation_checkpointing sequence_parallel_size vocabulary_size
    use_data_before_expert_parallelism datastates_ckpt
    """.split()  # noqa: SIM905 (as a list it is 60 lines)
)
ZERO_KEYS = tuple(
    """
    stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
    allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights
    elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size cpu_offload_param
    cpu_offload_use_pin_memory cpu_offload stage3_prefetch_bucket_size prefetch_bucket_size
    stage3_param_persistence_threshold param_persistence_threshold
    stage3_model_persistence_threshold model_persistence_threshold stage3_max_live_parameters
    max_live_parameters stage3_max_reuse_distance max_reuse_distance
    stage3_gather_16bit_weights_on_model_save gather_16bit_weights_on_model_save
    stage3_module_granularity_threshold module_granularity_threshold
    stage3_use_all_reduce_for_fetch_params use_all_reduce_for_fetch_params
    stage3_allgather_sequential allgather_sequential stage3_gather_fp16_weights_on_model_save
    ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment
    zero_hpz_partition_size zero_quantized_weights zero_quantized_nontrainable_weights
    zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint
    override_module_apply log_trace_cache_warnings enable_sanity_checks
    save_muon_momentum_buffer_in_memory leaf_module
    """.split()  # noqa: SIM905 (as a list it is 60 lines)
)
_NUMBERS = ("_size", "_threshold", "_distance", "_parameters")
# keys of older versions: DeepSpeed itself refuses them, later and with a long message
REMOVED = (
    *("nebula", "compression_training", "amp", "quantize_training", "sparse_gradients", "eigenvalue"),
    *("sparse_attention", "elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop"),
)
# blocks for what qwenlora does in another way: a file may have them switched off
OTHERWISE = {
    "optimizer": "set train.optim, train.learning_rate and train.weight_decay",
    "scheduler": "set train.lr_scheduler_type and train.warmup_steps",
    "fp16": "the base's dtype is model.dtype, and all that is trained is float32",
    "bf16": "the base's dtype is model.dtype, and all that is trained is float32",
    "bfloat16": "the base's dtype is model.dtype, and all that is trained is float32",
    "torch_autocast": "the base's dtype is model.dtype, and all that is trained is float32",
    "activation_checkpointing": "set train.gradient_checkpointing",
    "autotuning": "set train.per_device_train_batch_size",
    "hybrid_engine": "it is for reinforcement learning",
    "pipeline": "layers are not spread over GPUs; strategy.name: zero3 spreads weights",
    "data_efficiency": "rows and their order are data's",
    "weight_quantization": "set strategy.quantization",
    "compile": "it is not tried with qwenlora",
    "tensor_parallel": "it is not tried with qwenlora",
    "expert_parallel": "it is not tried with qwenlora",
    "wandb": "set log.wandb",
    "zero_optimization.zenflow": "it is not tried with qwenlora",
    "zero_optimization.cpu_offload": "set strategy.offload: optimizer",
    "zero_optimization.cpu_offload_param": "set strategy.offload: params",
    "zero_optimization.cpu_offload_use_pin_memory": "set pin_memory in offload_optimizer and offload_param",
    "zero_optimization.elastic_checkpoint": "checkpoints are qwenlora's, for any number of processes",
}


class Fixed(NamedTuple):
    """A value that the run's config decides. why: key and value of the run's config, or the reason."""

    value: object
    why: str


def deepspeed_config(config: Config, name: str, processes: int, accumulation: int) -> Settings:
    """Return DeepSpeed's config for zero1 to zero3. processes: of a node; accumulation: micro-batches a step.
    Raises: ValueError when strategy.deepspeed_config cannot be read, or contradicts config."""
    made = _made(config, name, processes, accumulation)
    if config.strategy.deepspeed_config is None:
        return made
    path = config.strategy.deepspeed_config
    theirs = user_file(path)
    if problems := _problems(theirs, _fixed(config, name, processes, accumulation)):
        raise ValueError("\n".join(f"strategy.deepspeed_config={path}: {line}" for line in problems))
    merged = _merged(made, theirs)
    merged.pop("train_batch_size", None)  # DeepSpeed would count each of the ranks that share a sequence
    return merged


def user_file(path: str | Path) -> Settings:
    """Return a user's DeepSpeed config, which is strict JSON. Raises: ValueError."""
    key = f"strategy.deepspeed_config={path}"
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(
            f"{key}: no such file (looked in {Path.cwd()}); name a JSON file, or remove the key"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise ValueError(
            f"{key}: cannot be read: {error.strerror}; name a JSON file, or remove the key"
        ) from None
    try:
        values = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{key}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}; correct it there"
        ) from None
    except RecursionError:
        raise ValueError(f"{key}: nested too deeply; expected DeepSpeed's config") from None
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{key}: found {_show(values)}, expected an object; begin the file with {{")
    return values


def as_comment(settings: Settings) -> str:
    """Return the config as lines of JSON behind `# `, to be printed beneath YAML."""
    return "".join(f"# {line}\n" for line in json.dumps(settings, indent=2).splitlines())


def _made(config: Config, name: str, processes: int, accumulation: int) -> Settings:
    stage = int(name.removeprefix("zero"))
    zero: Settings = {
        "stage": stage,
        "contiguous_gradients": True,
        # stage 3 fetches base weights during computation; 1 and 2 have one small reduction a step
        "overlap_comm": stage == 3,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    offload = {"device": "cpu", "pin_memory": True}
    if config.strategy.offload != "none":
        zero["offload_optimizer"] = dict(offload)
    if config.strategy.offload == "params":
        zero["offload_param"] = dict(offload)
    if config.strategy.shard_group == "node" and stage == 3:
        zero["zero_hpz_partition_size"] = processes
    return {
        "train_micro_batch_size_per_gpu": config.train.per_device_train_batch_size,
        "gradient_accumulation_steps": _steps(config, accumulation),
        "gradient_clipping": config.train.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's CPU Adam is compiled at the start, and gives other numbers than torch's
        "zero_force_ds_cpu_optimizer": False,
        # trained parameters are float32, the base keeps its own dtype
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
    }


def _steps(config: Config, accumulation: int) -> int | str:
    """Return DeepSpeed's gradient_accumulation_steps: auto until the size of a micro-batch is found."""
    return "auto" if config.train.per_device_train_batch_size == "auto" else accumulation


def _fixed(config: Config, name: str, processes: int, accumulation: int) -> dict[str, Fixed]:
    """Return the values, by dotted key, that a file may only repeat."""
    strategy, train = config.strategy, config.train
    in_nodes = strategy.shard_group == "node" and name == "zero3"
    optimizer, params = (
        "cpu" if strategy.offload in kinds else "none" for kinds in (("optimizer", "params"), "params")
    )
    grouped = (
        f"strategy.shard_group={strategy.shard_group}" + f" with {processes} processes a node" * in_nodes
    )
    full, exact = "gradients travel and are summed in float32", "numbers are the same under every strategy"
    sums = "gradients are averaged and clipped by qwenlora's rules"
    return {
        "train_micro_batch_size_per_gpu": Fixed(
            train.per_device_train_batch_size,
            f"train.per_device_train_batch_size={train.per_device_train_batch_size}",
        ),
        "gradient_accumulation_steps": Fixed(
            _steps(config, accumulation),
            f"train.global_batch_size={train.global_batch_size} over all processes",
        ),
        "train_batch_size": Fixed(
            train.global_batch_size, f"train.global_batch_size={train.global_batch_size}"
        ),
        "gradient_clipping": Fixed(train.max_grad_norm, f"train.max_grad_norm={train.max_grad_norm:g}"),
        "sequence_parallel_size": Fixed(
            strategy.sequence_parallel, f"strategy.sequence_parallel={strategy.sequence_parallel}"
        ),
        "zero_optimization.stage": Fixed(int(name.removeprefix("zero")), f"strategy.name={name}"),
        "zero_optimization.offload_optimizer.device": Fixed(
            optimizer, f"strategy.offload={strategy.offload}"
        ),
        "zero_optimization.offload_param.device": Fixed(params, f"strategy.offload={strategy.offload}"),
        "zero_optimization.zero_hpz_partition_size": Fixed(processes if in_nodes else 1, grouped),
        "zero_allow_untested_optimizer": Fixed(True, "the optimizer is torch's"),
        "zero_force_ds_cpu_optimizer": Fixed(False, "the optimizer is torch's"),
        "managed_gradient_accumulation": Fixed(True, sums),
        "gradient_allreduce_op": Fixed("mean", sums),
        "prescale_gradients": Fixed(False, sums),
        "gradient_predivide_factor": Fixed(1.0, sums),
        "zero_optimization.compute_grad_norm": Fixed(
            True, "the norm shows whether a step's gradients are finite"
        ),
        "communication_data_type": Fixed("fp32", full),
        "seq_parallel_communication_data_type": Fixed("fp32", full),
        "data_types.grad_accum_dtype": Fixed("fp32", "gradients are summed in float32"),
        "zero_optimization.zero_quantized_weights": Fixed(False, exact),
        "zero_optimization.zero_quantized_nontrainable_weights": Fixed(False, exact),
        "zero_optimization.zero_quantized_gradients": Fixed(False, exact),
    }


def _problems(theirs: Settings, fixed: dict[str, Fixed]) -> list[str]:
    """Return one line for each key of a file that DeepSpeed does not know, or that contradicts fixed."""
    return [
        *_unknown_keys(theirs),
        *_zero_problems(theirs.get("zero_optimization", {})),
        *_otherwise(theirs),
        *_contradictions(theirs, fixed),
    ]


def _unknown_keys(theirs: Settings) -> Iterator[str]:
    for key in theirs:
        if key in REMOVED:
            yield f"{key}: DeepSpeed has it no more; remove it"
        elif key not in KNOWN and not key.startswith("_"):  # _comment and the like
            yield _unknown(key, key, KNOWN)


def _zero_problems(zero: object) -> Iterator[str]:
    if not isinstance(zero, dict) and zero != "auto":
        yield f"zero_optimization={_show(zero)}: expected an object; write {{...}}, or remove it"
    yield from (
        _unknown(f"zero_optimization.{key}", key, ZERO_KEYS) for key in _block(zero) if key not in ZERO_KEYS
    )
    for key, value in _block(zero).items():
        if _is_number(key) and value != "auto" and type(value) not in (int, float):
            yield f"zero_optimization.{key}={_show(value)}: expected a number; write it without quotes"


def _is_number(key: str) -> bool:
    return key.endswith(_NUMBERS) and key not in ("zero_hpz_partition_size", "ignore_unused_parameters")


def _otherwise(theirs: Settings) -> Iterator[str]:
    for key, instead in OTHERWISE.items():
        value = _at(theirs, key)
        if _is_on(value):
            yield f"{key}={_show(value)}: {instead}; remove {key}"


def _contradictions(theirs: Settings, fixed: dict[str, Fixed]) -> Iterator[str]:
    for key, (value, why) in fixed.items():
        their_value = _at(theirs, key)
        if their_value in (None, "auto"):
            continue
        if their_value != value or isinstance(their_value, bool) != isinstance(value, bool):
            yield (
                f"{key}={_show(their_value)}, but {why}: expected {_show(value)}; change one of them, or"
                f" remove {key}"
            )


def _unknown(dotted: str, key: str, known: tuple[str, ...]) -> str:
    hint = did_you_mean(key, known, "remove it, or see deepspeed.ai/docs/config-json")
    return f"{dotted}: DeepSpeed has no such key; {hint}"


def _is_on(value: object) -> bool:
    """Return whether a block does something. {"enabled": false} and {"enabled": "auto"} do not."""
    if isinstance(value, dict):
        return bool(value) and value.get("enabled", True) not in (False, "auto")
    return value not in (None, False, "auto")


def _merged(made: Settings, theirs: Settings) -> Settings:
    """Return made, with the values of a file in place of its own, unless they are "auto"."""
    merged = dict(made)
    for key, value in theirs.items():
        if value == "auto" or value is None or key.startswith("_"):
            continue
        if isinstance(value, dict):
            if block := _merged(_block(merged.get(key)), value):
                merged[key] = block
        else:
            merged[key] = value
    return merged


def _at(values: Settings, key: str) -> object:
    """Return the value of a dotted key; None where it is missing."""
    value: object = values
    for part in key.split("."):
        value = _block(value).get(part)
    return value


def _block(value: object) -> Settings:
    return value if isinstance(value, dict) else {}


def _object(pairs: list[tuple[str, object]]) -> Settings:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice} stands twice in one object; keep one")
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number; write a number")


def _show(value: object) -> str:
    return show(json.dumps(value, ensure_ascii=False))
