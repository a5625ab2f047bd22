"""DeepSpeed's config for zero1 to zero3: made from the run's, or a file of the user's with the gaps filled
in.

What both the run's config and the file say must agree: the run's config is the one that is printed, kept and
compared.
Source: https://www.deepspeed.ai/docs/config-json/ and the classes in deepspeed.runtime, whose keys a test
compares.
"""

import difflib
import json
from pathlib import Path
from typing import Any, NamedTuple

from qwenlora.configs.schema import Config

BUCKET = 50_000_000  # numbers that travel at once, 200 MB: an adapter's gradients are little more
NEVER = 2**31 - 1

# a block of its own, or a value, that may stand in a file
KNOWN = (
    *(
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ),
    *(
        "managed_gradient_accumulation",
        "steps_per_print",
        "dump_state",
        "disable_python_gc",
        "disable_allgather",
    ),
    *("communication_data_type", "seq_parallel_communication_data_type", "prescale_gradients"),
    *(
        "gradient_predivide_factor",
        "gradient_allreduce_op",
        "zero_optimization",
        "zero_allow_untested_optimizer",
    ),
    *("zero_force_ds_cpu_optimizer", "fp16", "bf16", "bfloat16", "torch_autocast", "optimizer", "scheduler"),
    *(
        "wall_clock_breakdown",
        "memory_breakdown",
        "flops_profiler",
        "comms_logger",
        "autotuning",
        "hybrid_engine",
    ),
    *("pipeline", "data_efficiency", "checkpoint", "data_types", "aio", "dataloader_drop_last", "log_level"),
    *(
        "weight_quantization",
        "compile",
        "timers",
        "tensor_parallel",
        "expert_parallel",
        "tensorboard",
        "wandb",
    ),
    *("csv_monitor", "comet", "activation_checkpointing", "sequence_parallel_size", "vocabulary_size"),
    *("use_data_before_expert_parallelism", "datastates_ckpt"),
)
ZERO_KEYS = (
    *(
        "stage",
        "contiguous_gradients",
        "reduce_scatter",
        "reduce_bucket_size",
        "use_multi_rank_bucket_allreduce",
    ),
    *(
        "allgather_partitions",
        "allgather_bucket_size",
        "overlap_comm",
        "compute_grad_norm",
        "load_from_fp32_weights",
    ),
    *(
        "elastic_checkpoint",
        "offload_param",
        "offload_optimizer",
        "zenflow",
        "sub_group_size",
        "cpu_offload_param",
    ),
    *("cpu_offload_use_pin_memory", "cpu_offload", "stage3_prefetch_bucket_size", "prefetch_bucket_size"),
    *(
        "stage3_param_persistence_threshold",
        "param_persistence_threshold",
        "stage3_model_persistence_threshold",
    ),
    *(
        "model_persistence_threshold",
        "stage3_max_live_parameters",
        "max_live_parameters",
        "stage3_max_reuse_distance",
    ),
    *(
        "max_reuse_distance",
        "stage3_gather_16bit_weights_on_model_save",
        "gather_16bit_weights_on_model_save",
    ),
    *(
        "stage3_module_granularity_threshold",
        "module_granularity_threshold",
        "stage3_use_all_reduce_for_fetch_params",
    ),
    *("use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "allgather_sequential"),
    *("stage3_gather_fp16_weights_on_model_save", "ignore_unused_parameters", "legacy_stage1"),
    *("round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size", "zero_quantized_weights"),
    *("zero_quantized_nontrainable_weights", "zero_quantized_gradients", "memory_efficient_linear"),
    *(
        "pipeline_loading_checkpoint",
        "override_module_apply",
        "log_trace_cache_warnings",
        "enable_sanity_checks",
    ),
    *("save_muon_momentum_buffer_in_memory", "leaf_module"),
)
NUMBERS = ("_size", "_threshold", "_distance", "_parameters")
# what DeepSpeed had once: it refuses them itself, later and at length
REMOVED = (
    *("nebula", "compression_training", "amp", "quantize_training", "sparse_gradients", "eigenvalue"),
    *("sparse_attention", "elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop"),
)
# what qwenlora does in another place: such a block may stand there when it is off
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
    """A value that the run's config decides. key: of the run's config, or why there is no choice."""

    value: Any
    key: str


def deepspeed_config(config: Config, name: str, processes: int, accumulation: int) -> dict[str, Any]:
    """Return DeepSpeed's config. name: zero1, zero2 or zero3; processes: on a node; accumulation:
    micro-batches a step.

    Raises: ValueError when strategy.deepspeed_config cannot be read, or says something else than config.
    """
    made = _made(config, name, processes, accumulation)
    if config.strategy.deepspeed_config is None:
        return made
    path = config.strategy.deepspeed_config
    theirs = user_file(path)
    found = _contradictions(theirs, _fixed(config, name, processes, accumulation))
    if found:
        raise ValueError("\n".join(f"strategy.deepspeed_config={path}: {line}" for line in found))
    merged = _merged(made, theirs)
    merged.pop("train_batch_size", None)  # it counts ranks that share a sequence as many
    return merged


def user_file(path: str | Path) -> dict[str, Any]:
    """Return a DeepSpeed config as it stands in its file, strict JSON. Raises: ValueError."""
    said = f"strategy.deepspeed_config={path}"
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(
            f"{said}: no such file (looked in {Path.cwd()}); name a JSON file, or remove the key"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{said}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise ValueError(
            f"{said}: cannot be read: {error.strerror}; name a JSON file, or remove the key"
        ) from None
    try:
        values = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{said}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}; correct it there"
        ) from None
    except RecursionError:
        raise ValueError(f"{said}: nested too deeply; expected DeepSpeed's config") from None
    except ValueError as error:
        raise ValueError(f"{said}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{said}: found {_show(values)}, expected an object; begin the file with {{")
    return values


def as_comment(settings: dict[str, Any]) -> str:
    """Return the config as lines of JSON behind `# `, to be printed beneath YAML."""
    return "".join(f"# {line}\n" for line in json.dumps(settings, indent=2).splitlines())


def _made(config: Config, name: str, processes: int, accumulation: int) -> dict[str, Any]:
    stage = int(name.removeprefix("zero"))
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        # in stage 3 base weights are fetched while others compute; in 1 and 2 there is but one small
        # reduction a step
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
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # its own CPU Adam is compiled at the start, and is another Adam
        "zero_force_ds_cpu_optimizer": False,
        # what is trained is float32, the base keeps its own dtype
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
    }


def _fixed(config: Config, name: str, processes: int, accumulation: int) -> dict[str, Fixed]:
    """Return what a file may only say as the run's config does, by dotted key."""
    strategy, train = config.strategy, config.train
    on = strategy.shard_group == "node" and name == "zero3"
    optimizer, params = (
        "cpu" if strategy.offload in kinds else "none" for kinds in (("optimizer", "params"), "params")
    )
    grouped = f"strategy.shard_group={strategy.shard_group}" + f" with {processes} processes a node" * on
    full, exact = "gradients travel and are summed in float32", "numbers are the same under every strategy"
    sums = "gradients are averaged and clipped by qwenlora's rules"
    return {
        "train_micro_batch_size_per_gpu": Fixed(
            train.per_device_train_batch_size,
            f"train.per_device_train_batch_size={train.per_device_train_batch_size}",
        ),
        "gradient_accumulation_steps": Fixed(
            accumulation, f"train.global_batch_size={train.global_batch_size} over all processes"
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
        "zero_optimization.zero_hpz_partition_size": Fixed(processes if on else 1, grouped),
        "zero_allow_untested_optimizer": Fixed(True, "the optimizer is torch's"),
        "zero_force_ds_cpu_optimizer": Fixed(False, "the optimizer is torch's"),
        "managed_gradient_accumulation": Fixed(True, sums),
        "gradient_allreduce_op": Fixed("mean", sums),
        "prescale_gradients": Fixed(False, sums),
        "gradient_predivide_factor": Fixed(1.0, sums),
        "zero_optimization.compute_grad_norm": Fixed(True, "the norm tells whether a step is a number"),
        "communication_data_type": Fixed("fp32", full),
        "seq_parallel_communication_data_type": Fixed("fp32", full),
        "data_types.grad_accum_dtype": Fixed("fp32", "gradients are summed in float32"),
        "zero_optimization.zero_quantized_weights": Fixed(False, exact),
        "zero_optimization.zero_quantized_nontrainable_weights": Fixed(False, exact),
        "zero_optimization.zero_quantized_gradients": Fixed(False, exact),
    }


def _contradictions(theirs: dict[str, Any], fixed: dict[str, Fixed]) -> list[str]:
    """Return one line for each key of a file that DeepSpeed does not know, or that is not as fixed says."""
    found = []
    for key in theirs:
        if key in REMOVED:
            found.append(f"{key}: DeepSpeed has it no more; remove it")
        elif key not in KNOWN and not key.startswith("_"):  # _comment and the like
            found.append(_unknown(key, key, KNOWN))
    zero = theirs.get("zero_optimization", {})
    if not isinstance(zero, dict) and zero != "auto":
        found.append(f"zero_optimization={_show(zero)}: expected an object; write {{...}}, or remove it")
    found += [
        _unknown(f"zero_optimization.{key}", key, ZERO_KEYS) for key in _of(zero) if key not in ZERO_KEYS
    ]
    for key, value in _of(zero).items():
        number = key.endswith(NUMBERS) and key not in ("zero_hpz_partition_size", "ignore_unused_parameters")
        if number and value != "auto" and (isinstance(value, bool) or not isinstance(value, int | float)):
            found.append(
                f"zero_optimization.{key}={_show(value)}: expected a number; write it without quotes"
            )
    for key, instead in OTHERWISE.items():
        value = _at(theirs, key)
        if _is_on(value):
            found.append(f"{key}={_show(value)}: {instead}; remove {key}")
    for key, (value, why) in fixed.items():
        said = _at(theirs, key)
        if said not in (None, "auto") and (
            said != value or isinstance(said, bool) != isinstance(value, bool)
        ):
            found.append(
                f"{key}={_show(said)}, but {why}: expected {_show(value)}; change one of them, or remove"
                f" {key}"
            )
    return found


def _unknown(said: str, key: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "remove it, or see deepspeed.ai/docs/config-json"
    return f"{said}: DeepSpeed has no such key; {hint}"


def _is_on(value: Any) -> bool:
    """Return whether a block does something. {"enabled": false} and {"enabled": "auto"} do not."""
    if isinstance(value, dict):
        return bool(value) and value.get("enabled", True) not in (False, "auto")
    return value not in (None, False, "auto")


def _merged(made: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return made with what a file says besides; what is "auto" there is as made has it."""
    merged = dict(made)
    for key, value in theirs.items():
        if value == "auto" or value is None or key.startswith("_"):
            continue
        if isinstance(value, dict):
            below = merged.get(key)
            inner = _merged(below if isinstance(below, dict) else {}, value)
            if inner:
                merged[key] = inner
        else:
            merged[key] = value
    return merged


def _at(values: dict[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split("."):
        found = _of(found).get(part)
    return found


def _of(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice} stands twice in one object; keep one")
    return values


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number; write a number")


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
