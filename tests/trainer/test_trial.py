"""The micro-batch that fits is found before the first step, and changes no number of the run."""

import pytest
import torch
from made import config_of, parameters_of, side_of, trainer_of

from qwenlora.configs.estimate import cut_into
from qwenlora.trainer.loop.state import adapter_of
from qwenlora.trainer.loop.trial import halved, search, step_fits, try_out
from qwenlora.trainer.ranks.faults import TrainingFault
from qwenlora.trainer.spread import strategy
from qwenlora.trainer.spread.strategy import KEPT, Spread

LAYERS = 4


@pytest.mark.parametrize(
    ("most", "layers", "keep", "found"),
    [
        ({0: 12, 4: 12}, [0, 1, 2, 3, 4], False, (12, 0)),
        ({0: 5, 4: 12}, [0, 1, 2, 3, 4], False, (3, 0)),  # rather than 6 with layers computed again
        ({0: 0, 2: 0, 3: 1, 4: 6}, [0, 1, 2, 3, 4], False, (1, 3)),
        ({0: 0, 4: 0}, [0, 1, 2, 3, 4], False, (1, 4)),
        ({0: 0, 1: 3, 2: 6, 3: 12, 4: 12}, [0, 1, 2, 3, 4], True, (12, 3)),
        ({0: 3, 4: 6}, [0, 1, 2, 3, 4], True, (3, 0)),
        ({2: 6}, [2], True, (6, 2)),
        ({2: 0}, [2], False, (1, 2)),
    ],
)
def test_a_smaller_micro_batch_is_taken_before_layers_are_computed_again(most, layers, keep, found):
    """most: the largest micro-batch that fits, by the layers that are computed again."""

    def fits(size, again):
        return size <= most[max(layer for layer in most if layer <= again)]

    assert search(fits, [12, 6, 3, 1], layers, keep=keep) == found


def test_sizes_are_halved():
    assert halved([12, 8, 6, 4, 3, 2, 1]) == [12, 6, 3, 1]
    assert halved([5]) == [5]


def layers_of(trainer):
    return trainer.peft_model.get_base_model().model.layers


def limit(trainer, tokens, count=LAYERS):
    """Have the model run out of memory over so many tokens in one of its first layers that keeps its
    activations."""

    def refuse(layer, inputs, *_):
        if inputs[0].shape[:-1].numel() > tokens and not layer.gradient_checkpointing:
            raise torch.OutOfMemoryError

    for layer in layers_of(trainer)[:count]:
        layer.register_forward_pre_hook(refuse)


def auto(**train):
    return config_of(per_device_train_batch_size="auto", max_steps=3, **train)


@pytest.mark.parametrize(
    ("tokens", "why", "found"),
    [
        (8 * 39, "", (8, 0)),
        (4 * 39, "", (4, 0)),
        (10, "", (1, 4)),
        (4 * 39, KEPT, (8, 4)),
    ],
)
def test_numbers_are_those_of_a_run_with_that_size(tiny, tmp_path, tokens, why, found):
    side, config = side_of(24), auto()
    config = config.model_copy(update={"lora": config.lora.model_copy(update={"lora_dropout": 0.1})})
    trainer = trainer_of(tiny, tmp_path, side, cut_into(config, 8))
    limit(trainer, tokens)
    spread = try_out(trainer, config, Spread(micro_batch=8, why_so_many=why), LAYERS)
    assert (spread.micro_batch, spread.recomputed) == found
    assert ("a trial step with 8 did not fit" in spread.why_so_many) == (found[0] < 8)
    trainer.train()
    fixed = trainer_of(tiny, tmp_path, side, cut_into(config, found[0]))
    fixed.train()
    assert trainer.args.gradient_accumulation_steps == fixed.args.gradient_accumulation_steps
    expected = adapter_of(fixed.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_of(trainer.model).items())


@pytest.mark.parametrize(
    ("train", "size", "tokens", "found"),
    [
        ({"gradient_checkpointing": False}, 8, 4 * 39, (4, 0)),  # the size alone is auto
        ({"per_device_train_batch_size": 4}, 4, 10, (4, 2)),  # the layers alone are
        ({}, 8, 10, (1, 2)),
    ],
)
def test_what_is_auto_is_found_and_set(tiny, tmp_path, train, size, tokens, found):
    config = config_of(**{"per_device_train_batch_size": "auto"} | train)
    trainer = trainer_of(tiny, tmp_path, side_of(24), cut_into(config, size))
    limit(trainer, tokens, count=2)
    spread = try_out(trainer, config, Spread(micro_batch=size), LAYERS)
    assert (spread.micro_batch, spread.recomputed) == found
    assert trainer.args.per_device_train_batch_size == trainer.order.per_device_batch_size == found[0]
    assert [layer.gradient_checkpointing for layer in layers_of(trainer)] == [
        number < found[1] for number in range(LAYERS)
    ]


def test_what_the_config_decides_is_not_tried(tiny, tmp_path):
    config = config_of(gradient_checkpointing=False)
    trainer = trainer_of(tiny, tmp_path, side_of(24), config)
    limit(trainer, 0)
    for spread, plan in (
        (Spread(micro_batch=4), config),
        (Spread("fsdp", micro_batch=4), auto()),
        (Spread("zero3", micro_batch=4), auto()),
    ):
        assert try_out(trainer, plan, spread, LAYERS) == spread


@pytest.mark.parametrize(
    ("free", "before", "found"),
    [
        (10**12, 0, (8, "the most that fit half of the free memory, 500.0 GB")),
        (0, 0, (1, "the most that fit half of the free memory, 0.0 GB")),
        (0, 4, (4, KEPT)),
        (10**12, 3, (8, "the most that fit half of the free memory, 500.0 GB")),  # it cuts no batch of 8
    ],
)
def test_a_run_keeps_its_micro_batch_where_it_can(monkeypatch, free, before, found):
    monkeypatch.setattr(strategy, "free_memory", lambda: free)
    sizes = parameters_of(990, 10, 900, 90, 2, 8, 16, 4, 16, 0, 0)
    spread = strategy.choose(auto(), sizes, 40, before)
    assert (spread.micro_batch, spread.why_so_many) == found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_gpu_holds_the_micro_batch_that_was_found(tiny, tmp_path):
    """The memory that torch may take is set between what the smallest and the largest need."""
    side, config = side_of(512), auto(global_batch_size=512, gradient_checkpointing=False)
    trainer = trainer_of(tiny, tmp_path, side, cut_into(config, 512))
    trainer.rehearse(1)
    torch.cuda.reset_peak_memory_stats()
    trainer.rehearse(64)
    most = 2**28 + torch.cuda.max_memory_allocated()
    trainer.peft_model.zero_grad()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(most / torch.cuda.get_device_properties(0).total_memory)
    try:
        spread = try_out(trainer, config, Spread(micro_batch=512), LAYERS)
        assert 1 < spread.micro_batch < 512
        trainer.train()
        with pytest.raises(TrainingFault, match="GPU out of memory"):
            trainer_of(tiny, tmp_path, side, cut_into(config, 512)).train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_trial_leaves_no_gradient(tiny, tmp_path):
    trainer = trainer_of(tiny, tmp_path, side_of(24), config_of())
    assert step_fits(trainer, 4)
    assert all(p.grad is None for p in trainer.peft_model.parameters())
