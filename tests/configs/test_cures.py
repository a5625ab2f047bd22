"""Changes that may make a run fit are those that the config and the machine allow, the nearest first."""

import pytest

from qwenlora.configs.combinations import Machine
from qwenlora.configs.cures import LEANER, Setting, cures
from qwenlora.configs.schema import Config


def setting_of(machine, max_length=512, **sections):
    values = {
        "run_dir": "r",
        "model": {"name_or_path": "m"},
        "data": {"train": "example", "max_length": max_length},
    }
    return Setting(Config.model_validate(values | sections), machine)


LARGE = {"gradient_checkpointing": 1, "per_device_train_batch_size": 4, "global_batch_size": 8}


def test_each_key_is_changed_to_what_costs_least():
    setting = setting_of(Machine(1, 2, 2), train=LARGE, strategy={"name": "ddp"})
    assert list(cures(setting, lambda _: "", experts=True)) == [
        "train.gradient_checkpointing: auto",
        "train.per_device_train_batch_size: 1",
        "strategy.name: fsdp",
        "strategy.quantization: nf4",
        "lora.experts: shared",
        "4 such GPUs and train.per_device_train_batch_size: 1",
        "data.max_length: 256",
    ]
    assert (
        list(cures(setting, lambda _: "!", experts=False, keys=LEANER))[-1] == "strategy.quantization: nf4!"
    )


@pytest.mark.parametrize(
    "sections",
    [
        {"strategy": {"quantization": "nf4", "name": "ddp"}},
        {"lora": {"init_lora_weights": "orthogonal", "experts": "shared"}},
        {"lora": {"init_lora_weights": "orthogonal", "target_modules": ["q_proj"]}},
        {"train": {"gradient_checkpointing": True}, "strategy": {"quantization": "int8"}},
    ],
)
def test_what_is_there_or_would_be_refused_is_not_named(sections):
    setting = setting_of(Machine(1, 1, 1), max_length=256, **sections)
    assert list(cures(setting, lambda _: "", experts="lora" in sections)) == ["2 such GPUs"]


def test_auto_is_not_told_a_strategy():
    setting = setting_of(Machine(1, 2, 2))
    assert not any("strategy.name" in cure for cure in cures(setting, lambda _: "", experts=False))


def test_two_changes_are_named_where_none_is_enough_alone():
    def fits(changed):
        enough = changed.config.strategy.quantization == "nf4" and changed.config.data.max_length <= 512
        return "" if enough else None

    setting = setting_of(Machine(1, 1, 1), max_length=2048)
    assert list(cures(setting, fits, experts=False)) == [
        "strategy.quantization: nf4 with data.max_length: 512"
    ]


@pytest.mark.parametrize(
    ("train", "sequence_parallel", "said", "batch", "per_device"),
    [
        (
            LARGE,
            1,
            "16 such GPUs and train.global_batch_size: 16 and train.per_device_train_batch_size: 1",
            16,
            1,
        ),
        (LARGE, 2, "16 such GPUs and train.per_device_train_batch_size: 1", 8, 1),
        ({"per_device_train_batch_size": 1, "global_batch_size": 20}, 1, "16 such GPUs", 20, 1),
        ({"per_device_train_batch_size": 2, "global_batch_size": 96}, 1, "16 such GPUs", 96, 2),
    ],
)
def test_more_gpus_share_a_batch(train, sequence_parallel, said, batch, per_device):
    tried = []

    def fits(changed):
        tried.append(changed)
        return "" if changed.machine.world_size == 16 else None

    strategy = {"name": "ddp", "sequence_parallel": sequence_parallel}
    setting = setting_of(Machine(1, 8, 8), train=train, strategy=strategy)
    assert said in list(cures(setting, fits, experts=False))
    larger = next(each for each in tried if each.machine.world_size == 16)
    assert larger.config.train.global_batch_size == batch
    assert larger.config.train.per_device_train_batch_size == per_device
