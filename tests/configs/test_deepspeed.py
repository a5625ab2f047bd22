"""DeepSpeed's config follows from the run's, and a file of the user's may add to it, never contradict it."""

import json

import pytest

from qwenlora.configs import Config
from qwenlora.configs import deepspeed as ours
from qwenlora.configs.deepspeed import as_comment, deepspeed_config, user_file


def config(strategy=None, **train) -> Config:
    train = {"global_batch_size": 64, "per_device_train_batch_size": 2, "max_grad_norm": 0.5} | train
    model, data = {"name_or_path": "tiny"}, {"train": "example"}
    return Config(run_dir="runs/x", model=model, data=data, train=train, strategy=strategy or {})


@pytest.fixture
def write(tmp_path):
    def write(values) -> str:
        path = tmp_path / "ds.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
        return str(path)

    return write


def made(values, write, name="zero2", **strategy):
    return deepspeed_config(config({"deepspeed_config": write(values), **strategy}), name, 8, 4)


def refusal(values, write, name="zero2", **strategy) -> list[str]:
    with pytest.raises(ValueError, match=".") as caught:
        made(values, write, name, **strategy)
    path = write(values)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"strategy.deepspeed_config={path}: ") for line in lines)
    return [line.removeprefix(f"strategy.deepspeed_config={path}: ") for line in lines]


def test_the_whole_config_is_made():
    assert deepspeed_config(config(), "zero2", 8, 4) == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "zero_optimization": {
            "stage": 2,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def test_offload_and_shard_group_are_passed_on():
    strategy = {"offload": "params", "shard_group": "node"}
    zero = deepspeed_config(config(strategy), "zero3", 8, 4)["zero_optimization"]
    cpu = {"device": "cpu", "pin_memory": True}
    assert (zero["offload_optimizer"], zero["offload_param"], zero["zero_hpz_partition_size"]) == (
        cpu,
        cpu,
        8,
    )
    zero = deepspeed_config(config({"offload": "optimizer"}), "zero1", 8, 4)["zero_optimization"]
    assert zero["offload_optimizer"] == cpu
    assert not {"offload_param", "zero_hpz_partition_size"} & set(zero)


def test_a_file_adds_to_it_and_its_gaps_are_filled_in(write):
    theirs = {
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 1000,
            "offload_optimizer": {"pin_memory": False},
        },
        "flops_profiler": {"enabled": True, "profile_step": 3},
        "wall_clock_breakdown": True,
        "_comment": "from a colleague",
    }
    theirs["zero_optimization"]["offload_optimizer"]["device"] = "cpu"
    expected = deepspeed_config(config({"offload": "optimizer"}), "zero2", 8, 4)
    expected["zero_optimization"] |= {
        "reduce_bucket_size": 1000,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }
    expected |= {"flops_profiler": {"enabled": True, "profile_step": 3}, "wall_clock_breakdown": True}
    assert made(theirs, write, offload="optimizer") == expected


def test_hugging_face_s_auto_is_filled_in(write):
    theirs = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "reduce_bucket_size": "auto",
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    expected = deepspeed_config(config(), "zero3", 8, 4)
    expected["fp16"] |= {"loss_scale": 0, "initial_scale_power": 16}
    assert made(theirs, write, "zero3") == expected


def test_what_agrees_may_be_said_twice(write):
    theirs = {
        "train_batch_size": 64,
        "gradient_clipping": 0.5,
        "zero_optimization": {"zero_hpz_partition_size": 8},
    }
    settings = made(theirs, write, "zero3", shard_group="node")
    assert settings["gradient_clipping"] == 0.5
    assert "train_batch_size" not in settings  # it follows from the rest


CHANGE = "change one of them, or remove"


@pytest.mark.parametrize(
    ("theirs", "line"),
    [
        (
            {"train_micro_batch_size_per_gpu": 4},
            "train_micro_batch_size_per_gpu=4, but train.per_device_train_batch_size=2: expected 2; {change}",
        ),
        (
            {"gradient_accumulation_steps": 1},
            "gradient_accumulation_steps=1, but train.global_batch_size=64 over all processes: expected 4;"
            " {change}",
        ),
        (
            {"train_batch_size": 32},
            "train_batch_size=32, but train.global_batch_size=64: expected 64; {change}",
        ),
        (
            {"gradient_clipping": 1.0},
            "gradient_clipping=1.0, but train.max_grad_norm=0.5: expected 0.5; {change}",
        ),
        (
            {"zero_optimization": {"stage": 3}},
            "zero_optimization.stage=3, but strategy.name=zero2: expected 2; {change}",
        ),
        (
            {"communication_data_type": "fp16"},
            'communication_data_type="fp16", but gradients travel and are summed in float32: expected'
            ' "fp32"; {change}',
        ),
        (
            {"prescale_gradients": True},
            "prescale_gradients=true, but gradients are averaged and clipped by qwenlora's rules: expected"
            " false; {change}",
        ),
        (
            {"zero_optimization": {"compute_grad_norm": False}},
            "zero_optimization.compute_grad_norm=false, but the norm shows whether a step's gradients are"
            " finite: expected true; {change}",
        ),
        (
            {"zero_optimization": {"zero_quantized_nontrainable_weights": True}},
            "zero_optimization.zero_quantized_nontrainable_weights=true, but numbers are the same under"
            " every strategy: expected false; {change}",
        ),
        (
            {"gradient_accumulation_steps": True},
            "gradient_accumulation_steps=true, but train.global_batch_size=64 over all processes: expected"
            " 4; {change}",
        ),
        (
            {"prescale_gradients": 0},  # 0 == False, for Python
            "prescale_gradients=0, but gradients are averaged and clipped by qwenlora's rules: expected"
            " false; {change}",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "big"}},
            'zero_optimization.reduce_bucket_size="big": expected a number; write it without quotes',
        ),
        (
            {"sequence_parallel_size": 2},
            "sequence_parallel_size=2, but strategy.sequence_parallel=1: expected 1; {change}",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            'zero_optimization.offload_optimizer.device="cpu", but strategy.offload=none: expected "none";'
            " {change}",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/x"}}},
            'zero_optimization.offload_param.device="nvme", but strategy.offload=none: expected "none";'
            " {change}",
        ),
        (
            {"zero_optimization": {"zero_hpz_partition_size": 8}},
            "zero_optimization.zero_hpz_partition_size=8, but strategy.shard_group=global: expected 1;"
            " {change}",
        ),
        (
            {"zero_force_ds_cpu_optimizer": True},
            "zero_force_ds_cpu_optimizer=true, but the optimizer is torch's: expected false; {change}",
        ),
        (
            {"gradient_allreduce_op": "sum"},
            'gradient_allreduce_op="sum", but gradients are averaged and clipped by qwenlora\'s rules:'
            ' expected "mean"; {change}',
        ),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            'data_types.grad_accum_dtype="bf16", but gradients are summed in float32: expected "fp32";'
            " {change}",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
            'optimizer={"type": "AdamW", "params": {"lr": "auto"}}: set train.optim, train.learning_rate and'
            " train.weight_decay; remove optimizer",
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            'scheduler={"type": "WarmupLR"}: set train.lr_scheduler_type and train.warmup_steps; remove'
            " scheduler",
        ),
        (
            {"bf16": {"enabled": True}},
            'bf16={"enabled": true}: the base\'s dtype is model.dtype, and all that is trained is float32;'
            " remove bf16",
        ),
        (
            {"torch_autocast": {"enabled": True}},
            'torch_autocast={"enabled": true}: the base\'s dtype is model.dtype, and all that is trained is'
            " float32;"
            " remove torch_autocast",
        ),
        (
            {"zero_optimization": {"cpu_offload": True}},
            "zero_optimization.cpu_offload=true: set strategy.offload: optimizer; remove"
            " zero_optimization.cpu_offload",
        ),
        ({"amp": {"enabled": True}}, "amp: DeepSpeed has it no more; remove it"),
        (
            {"gradient_cliping": 1.0},
            "gradient_cliping: DeepSpeed has no such key; did you mean gradient_clipping?",
        ),
        (
            {"zero_optimization": {"stage3_max_live_params": 1}},
            "zero_optimization.stage3_max_live_params: DeepSpeed has no such key; did you mean"
            " stage3_max_live_parameters?",
        ),
        ({"x": 1}, "x: DeepSpeed has no such key; remove it, or see deepspeed.ai/docs/config-json"),
        (
            {"zero_optimization": True},
            "zero_optimization=true: expected an object; write {...}, or remove it",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_contradiction_is_refused_with_both_values(write, theirs, line):
    keys = line.split("=")[0]
    assert refusal(theirs, write) == [line.replace("{change}", f"{CHANGE} {keys}")]


def test_an_offload_block_without_a_device_gets_the_run_s(write):
    zero = made(
        {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}, write, "zero3", offload="optimizer"
    )
    assert zero["zero_optimization"]["offload_optimizer"] == {
        "device": "cpu",
        "pin_memory": True,
        "ratio": 0.5,
    }


def test_a_yes_or_no_whose_name_ends_as_a_number_s_does_is_one(write):
    zero = made({"zero_optimization": {"ignore_unused_parameters": False}}, write)["zero_optimization"]
    assert zero["ignore_unused_parameters"] is False


def test_blocks_that_are_off_may_stay(write):
    theirs = {
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "autotuning": {"enabled": False},
    }
    assert made(theirs, write)["fp16"] == {"enabled": False}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1,}', "not JSON at line 1, column 9"),
        ('{"a": 1, "a": 2}', "a stands twice in one object; keep one"),
        ('{"a": NaN}', "NaN is no JSON number; write a number"),
        ("[1]", "found [1], expected an object; begin the file with {"),
        ("", "not JSON at line 1, column 1"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(write, text, says):
    path = write(text)
    with pytest.raises(ValueError, match=".") as caught:
        user_file(path)
    assert str(caught.value).startswith(f"strategy.deepspeed_config={path}: {says}")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        user_file(tmp_path / "ds.json")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        user_file(tmp_path)
    (tmp_path / "latin").write_bytes(b"\xff{}")
    with pytest.raises(ValueError, match="not UTF-8 text at byte 0"):
        user_file(tmp_path / "latin")


def test_the_config_is_shown_behind_hashes():
    lines = as_comment({"a": {"b": 1}}).splitlines()
    assert lines == ["# {", '#   "a": {', '#     "b": 1', "#   }", "# }"]


@pytest.mark.slow
def test_deepspeed_takes_every_config_and_knows_the_same_keys(write):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime import config as theirs
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    assert set(ours.ZERO_KEYS) == set(fields) | {field.alias for field in fields.values() if field.alias}
    assert set(ours.REMOVED) == set(theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    for name in ("zero1", "zero2", "zero3"):
        for offload in ("none", "optimizer", *(["params"] * (name == "zero3"))):
            made = deepspeed_config(config({"offload": offload, "shard_group": "node"}), name, 8, 32)
            taken = theirs.DeepSpeedConfig(made)
            assert taken.zero_optimization_stage == int(name[-1])
            assert taken.gradient_clipping == 0.5
            assert (taken.zero_config.offload_optimizer is not None) == (offload != "none")
            assert taken.zero_config.zero_hpz_partition_size == (8 if name == "zero3" else 1)
            assert not taken.bfloat16_config.enabled
            assert taken.train_batch_size == 64


@pytest.mark.slow
def test_every_top_level_key_that_deepspeed_reads_is_known():
    """DeepSpeed passes over keys that it does not know, so its list is what its readers ask for."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime import config as theirs

    seen = set()

    class Asked(dict):
        def note(self, key):
            seen.add(key)

        def get(self, key, default=None):
            self.note(key)
            return super().get(key, default)

        def __contains__(self, key):
            self.note(key)
            return super().__contains__(key)

        def keys(self):
            return self

        def __copy__(self):
            return self

    theirs.DeepSpeedConfig(Asked(deepspeed_config(config(), "zero2", 8, 32)))
    assert seen - set(ours.REMOVED) <= set(ours.KNOWN)
