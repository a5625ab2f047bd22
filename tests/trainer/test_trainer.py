"""What we override in transformers' Trainer, and which of its private parts that relies on."""

import functools
import inspect
import json
import sys
import time
import typing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made import config_of, plain_loss_and_gradients, side_of, trainer_of
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType

from qwenlora.configs.schema import Data, SchedulerName, Train
from qwenlora.data.chat import Tokens
from qwenlora.data.packing import pack
from qwenlora.data.prepared import Side
from qwenlora.plan.flops import flops
from qwenlora.run.folder import RunFolder
from qwenlora.run.records import Work
from qwenlora.trainer import prepare
from qwenlora.trainer.loop.arguments import check_optimizer, check_settings, order_of, training_arguments
from qwenlora.trainer.loop.batches import collate
from qwenlora.trainer.loop.evaluation import eval_batches
from qwenlora.trainer.loop.trainer import LoraTrainer
from qwenlora.trainer.record import metrics
from qwenlora.trainer.record.metrics import Metrics, MetricsFile


@pytest.fixture
def trainer(tiny, tmp_path):
    return functools.partial(trainer_of, tiny, tmp_path)


def new_model(tiny):
    torch.manual_seed(0)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(target_modules="all-linear"))


def assert_a_step_is_the_mean_over_all_rows(made: LoraTrainer, tiny, side: Side) -> None:
    gradients = {}
    # before the optimizer's step Trainer has the whole step's gradient
    made.create_optimizer()
    made.optimizer.register_step_pre_hook(
        lambda *_: gradients.update(
            {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}
        )
    )
    made.train()
    loss, expected = plain_loss_and_gradients(new_model(tiny), side, range(len(side)))
    assert made.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-5)
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, atol=1e-6, rtol=1e-4), name


@pytest.mark.parametrize(("per_device", "rows"), [(8, 8), (4, 8), (2, 8), (1, 8), (2, 5), (4, 3)])
def test_a_steps_loss_is_the_mean_over_its_trained_tokens_however_it_is_cut(tiny, trainer, per_device, rows):
    side = side_of(rows)
    made = trainer(side, config_of(per_device_train_batch_size=per_device, max_steps=1, max_grad_norm=0.0))
    assert_a_step_is_the_mean_over_all_rows(made, tiny, side)


@pytest.mark.parametrize(
    ("per_device", "batch", "max_length"), [(1, 4, 64), (2, 4, 64), (4, 4, 100), (1, 16, 60)]
)
def test_packs_give_the_same_loss_and_gradients_as_their_rows_alone(
    tiny, trainer, per_device, batch, max_length
):
    side = side_of(8)
    packs = pack(side.lengths, max_length)
    config = config_of(
        per_device_train_batch_size=per_device, global_batch_size=batch, max_steps=1, max_grad_norm=0.0
    )
    config = config.model_copy(update={"data": Data(train="unused", max_length=max_length, packing="on")})
    assert 1 < len(packs) <= batch
    assert_a_step_is_the_mean_over_all_rows(trainer(side, config, packs=packs), tiny, side)


def test_trainer_walks_our_order(trainer):
    side, config = side_of(21), config_of(max_steps=7)
    made, seen = trainer(side, config), []
    collated = made.get_train_dataloader().collate_fn
    loader = made.get_train_dataloader()
    loader.collate_fn = lambda units: (
        seen.append([len(row.ids) for unit in units for row in unit]),
        collated(units),
    )[1]
    made.get_train_dataloader = lambda: loader
    made.train()
    order = order_of(config, side)
    batches = [list(batch) for epoch in range(3) for batch in order.micro_batches(epoch, 1, 0)]
    expected = [[int(order.lengths[row]) for unit in batch for row in unit] for batch in batches]
    assert seen[: len(expected)] == expected[: len(seen)]
    assert len(seen) >= 7 * 2


def test_evaluation_is_the_same_for_any_batch_size_and_equals_plain_torch(tiny, trainer):
    side, eval_ = side_of(8), side_of(13, seed=1)
    losses = []
    for size in (1, 3, 13, 50):
        made = trainer(side, config_of(per_device_eval_batch_size=size), eval_)
        evaluated = made.evaluate()
        losses.append(evaluated["eval_loss"])
        assert evaluated["eval_perplexity"] == pytest.approx(np.exp(evaluated["eval_loss"]))
    expected, _ = plain_loss_and_gradients(new_model(tiny), eval_, range(13))
    assert losses == pytest.approx([expected] * 4, abs=5e-6)


def test_evaluation_leaves_training_as_it_was(trainer):
    side, eval_ = side_of(24), side_of(5, seed=1)
    with_, without = (
        trainer(
            side,
            config_of(max_steps=3, eval_strategy=strategy, eval_steps=1 if strategy == "steps" else None),
            e,
        )
        for strategy, e in (("steps", eval_), ("no", None))
    )
    with_.train()
    without.train()
    losses = [[log["loss"] for log in made.state.log_history if "loss" in log] for made in (with_, without)]
    assert losses[0] == losses[1]


def test_every_rank_evaluates_as_often_and_every_row_is_evaluated_once():
    side = side_of(13)
    for world_size in (1, 2, 3, 5):
        batches = [list(eval_batches(side, 2, world_size, rank, 0)) for rank in range(world_size)]
        assert len({len(rank) for rank in batches}) == 1
        trained = sum(int((b["labels"][:, 1:] != -100).sum()) for rank in batches for b in rank)
        assert trained == side.trained_lengths.sum()


def test_a_batch_is_padded_on_the_right_and_trains_nothing_there():
    rows = [
        Tokens(np.array([5, 6, 7], np.int32), np.array([False, True, True])),
        Tokens(np.array([8, 9], np.int32), np.array([False, True])),
    ]
    batch = collate(rows, pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_a_blank_batch_gives_a_zero_loss_and_zero_gradients(tiny):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(target_modules="all-linear")
    )
    loss = model(**collate([], pad_id=1), num_items_in_batch=7).loss
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_with_lora_plus_b_learns_as_many_times_as_fast_as_a(trainer):
    made = trainer(side_of(8), config_of(loraplus_lr_ratio=8.0, weight_decay=0.1, max_steps=1))
    made.create_optimizer_and_scheduler(1)
    names = {parameter: name for name, parameter in made.peft_model.named_parameters()}
    rates = {names[p]: group["lr"] for group in made.optimizer.param_groups for p in group["params"]}
    assert len(rates) == sum(p.requires_grad for p in made.peft_model.parameters())
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1e-3}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {8e-3}
    assert made.lr_scheduler.get_last_lr()[0] == 1e-3  # which is shown
    assert all(group["params"] and group["weight_decay"] == 0.1 for group in made.optimizer.param_groups)


def test_with_lora_plus_nothing_but_b_learns_faster_and_norms_do_not_decay(tiny, trainer):
    made = trainer(side_of(8), config_of(loraplus_lr_ratio=8.0, weight_decay=0.1, max_steps=1))
    lora = LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"], use_dora=True)
    made.model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), lora)
    made.create_optimizer()
    names = {parameter: name for name, parameter in made.model.named_parameters() if parameter.requires_grad}
    groups = {names[p]: group for group in made.optimizer.param_groups for p in group["params"]}
    assert set(groups) == set(names.values())
    assert {name for name, group in groups.items() if group["lr"] == 8e-3} == {
        name for name in groups if "lora_B" in name or "lora_embedding_B" in name
    }
    assert {name for name, group in groups.items() if not group["weight_decay"]} == {
        name for name in groups if "norm" in name
    }


def test_schedules_are_transformers_own():
    theirs = {scheduler.value for scheduler in SchedulerType}
    assert set(typing.get_args(SchedulerName)) <= theirs
    # not offered: what needs a metric at each step
    assert theirs - set(typing.get_args(SchedulerName)) <= {"reduce_lr_on_plateau", "greedy"}


@pytest.mark.parametrize("name", typing.get_args(SchedulerName))
def test_every_schedule_runs(trainer, name):
    kwargs = {
        "cosine_with_min_lr": {"min_lr_rate": 0.1},
        "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
        "warmup_stable_decay": {"num_decay_steps": 1},
    }.get(name, {})
    made = trainer(side_of(8), config_of(max_steps=2, lr_scheduler_type=name, lr_scheduler_kwargs=kwargs))
    made.train()
    assert made.state.global_step == 2


OVERRIDDEN = {
    "__init__": None,  # called with names alone
    "_wrap_model": ["self", "model", "training", "dataloader"],
    "get_train_dataloader": ["self"],
    "_get_num_items_in_batch": ["self", "batch_samples", "device"],
    "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "create_optimizer": ["self", "model"],
    "create_scheduler": ["self", "num_training_steps", "optimizer"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "_clip_grad_norm": ["self", "model"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "log": ["self", "logs", "start_time"],
    "floating_point_ops": ["self", "inputs"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_rng_state": ["self", "checkpoint"],
    "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
}


def test_every_method_of_trainer_that_we_override_is_known_here():
    defined = {name for name, value in vars(LoraTrainer).items() if callable(value)}
    assert defined & set(dir(Trainer)) == set(OVERRIDDEN)


@pytest.mark.parametrize("method", [name for name, parameters in OVERRIDDEN.items() if parameters])
def test_trainers_methods_that_we_override_have_the_parameters_we_know(method):
    assert list(inspect.signature(getattr(Trainer, method)).parameters) == OVERRIDDEN[method]


def test_trainer_still_calls_evaluate_and_counts_steps_as_we_rely_on(trainer):
    side = side_of(10)  # two steps an epoch, the second one of two rows
    made = trainer(side, config_of(max_steps=5))
    made.train()
    assert made.state.global_step == 5
    assert made.state.epoch == pytest.approx(2.5)
    assert "self.evaluate(" in inspect.getsource(Trainer._evaluate)


def test_transformers_gets_every_setting(tmp_path):
    """A key that was renamed or forgotten on the way would silently have no effect."""
    chosen = {
        "learning_rate": 3e-5,
        "lr_scheduler_type": "linear",
        "lr_scheduler_kwargs": {},
        "warmup_steps": 7.0,
        "optim": "adamw_torch",
        "weight_decay": 0.03,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-7,
        "max_grad_norm": 0.3,
        "seed": 9,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 5,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "max_steps": 11,
    }
    arguments = training_arguments(config_of(**chosen), RunFolder(tmp_path), 100, 2, evaluates=True)
    for key, value in chosen.items():
        assert getattr(arguments, key) == (value or getattr(arguments, key)), key
    assert arguments.gradient_accumulation_steps == 8 // (2 * 2)
    elsewhere = {"global_batch_size", "num_train_epochs", "gradient_checkpointing", "save_total_limit"}
    elsewhere |= {
        "metric_for_best_model",
        "on_nan",
        "max_time_min",
        "loraplus_lr_ratio",
        "neftune_noise_alpha",
    }
    elsewhere |= {"early_stopping_patience", "final", "router_aux_loss"}
    assert set(Train.model_fields) == set(chosen) | elsewhere


def test_one_process_computes_on_one_gpu_however_many_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    on_gpus = lambda **named: TrainingArguments(**named | {"use_cpu": False})  # noqa: E731
    monkeypatch.setattr("qwenlora.trainer.loop.arguments.TrainingArguments", on_gpus)
    made = training_arguments(config_of(), RunFolder(tmp_path), 100, 1, evaluates=False)
    assert made.n_gpu == 1, "Trainer multiplies the loss by it"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"lr_scheduler_kwargs": {"bad": 1}},
            r"train\.lr_scheduler_kwargs=.* with lr_scheduler_type=cosine: .*bad",
        ),
    ],
)
def test_settings_that_transformers_does_not_know_are_refused_before_the_model_is_loaded(setting, message):
    with pytest.raises(ValueError, match=message):
        check_settings(config_of(**setting), 10)


LACKING = ("torchao", "schedulefree", "torch_optimi")  # packages that a machine may have


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ("adam_w", "train.optim=adam_w: adam_w is not a valid OptimizerNames"),
        ("adamw_torch_4bit", "train.optim=adamw_torch_4bit cannot be used here: .*`pip install torchao`"),
        ("schedule_free_radam", "`pip install schedulefree.`; or set train.optim: adamw_torch_fused"),
        ("stable_adamw", "`pip install torch-optimi`; or set"),
        ("adamw_anyprecision", "torchdistx; or set"),
        ("galore_adamw_8bit_layerwise", "saves memory where all weights are trained; an adapter's are few"),
        ("apollo_adamw", "does not support it: set train.optim: adamw_torch_fused"),
        ("adalomo", "does not support it: set train.optim: adamw_torch_fused"),
    ],
)
def test_an_optimizer_that_cannot_be_made_here_is_refused_with_its_package(monkeypatch, optim, message):
    for package in LACKING:
        monkeypatch.setattr(f"transformers.trainer_optimizer.is_{package}_available", lambda *_: False)
    with pytest.raises(ValueError, match=message):
        check_optimizer(config_of(optim=optim).train)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "sgd", "adamw_bnb_8bit", "lion_32bit"])
def test_an_optimizer_that_can_be_made_passes(optim):
    check_optimizer(config_of(optim=optim).train)


def test_an_optimizer_whose_package_is_broken_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace())  # no AdamW in it
    with pytest.raises(ValueError, match="train.optim=paged_adamw_8bit cannot be used here: cannot import"):
        check_optimizer(config_of(optim="paged_adamw_8bit").train)


@pytest.mark.parametrize(
    ("lora", "train", "message"),
    [
        ({"init_from": "no"}, {}, "lora.init_from=no is no adapter folder"),
        ({}, {"optim": "galore_adamw"}, "train.optim=galore_adamw saves memory where"),
    ],
)
def test_they_are_refused_before_the_base_is_looked_for(monkeypatch, tmp_path, lora, train, message):
    monkeypatch.setattr(prepare.pretrained, "base_of", lambda *_: pytest.fail("it was looked for"))
    config = config_of(**train)
    config = config.model_copy(update={"lora": config.lora.model_copy(update=lora)})
    with pytest.raises(ValueError, match=message):
        prepare.prepare(config, RunFolder(tmp_path))


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_without_its_package_is_refused(monkeypatch, name):
    for number in (2, 3):
        monkeypatch.setattr(prepare, f"is_flash_attn_{number}_available", lambda: False)
    monkeypatch.setattr(prepare, "is_kernels_available", lambda: False)
    package = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}[name]
    with pytest.raises(
        ValueError, match=f"{name} needs the package {package}, .*: pip install {package}, or"
    ):
        prepare._check_attention(name)
    prepare._check_attention("sdpa")
    monkeypatch.setattr(prepare, "is_kernels_available", lambda: True)
    prepare._check_attention(name)


def test_speeds_count_the_tokens_of_the_steps_they_stand_for(trainer, tmp_path, monkeypatch):
    side = side_of(21)
    made = trainer(side, config_of(max_steps=6))
    made.args.logging_steps = 2
    work = Work(frozen=80, trained=10, head_frozen=20, head_trained=0, attention={0: 64})
    seen = Metrics(MetricsFile(tmp_path / "metrics.jsonl"), made, work)
    seen.peak = 1e12
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(clock), time=time.time))
    made.add_callback(seen)
    made.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 6]
    order = order_of(config_of(), side)
    for line, steps in zip(lines, ([0], [1], [2, 3], [4, 5]), strict=True):
        units = [unit for step in steps for unit in order.step(*divmod(step, order.steps_per_epoch))]
        rows = [row for unit in units for row in unit]
        lengths, trained = side.lengths[rows].astype("int64"), side.trained_lengths[rows].sum()
        tokens = lengths.sum()
        assert line["tokens_per_s"] == pytest.approx(tokens / 10)
        assert line["trained_tokens_per_s"] == pytest.approx(trained / 10)
        assert line["mfu"] == pytest.approx(flops(work, lengths, trained) / 10 / 1e12)


def test_a_line_has_the_seconds_since_the_last_one_by_phase(trainer, tmp_path, monkeypatch):
    made = trainer(side_of(21), config_of(max_steps=2))
    made.args.logging_steps = 1
    seen = Metrics(MetricsFile(tmp_path / "metrics.jsonl"), made, None)
    clock = iter([0, 100])
    made.data_wait_s, made.evaluating_s, made.saving_s, made.idle_s = 1.0, 2.0, 3.0, 5.0
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(clock, 0), time=time.time))
    seen._start()
    made.data_wait_s, made.evaluating_s, made.saving_s, made.idle_s = 11.0, 22.0, 33.0, 65.0  # 10 more idle
    logs = {"loss": 1.0}
    seen._tokens = 800
    seen.on_log(made.args, made.state, made.control, logs)
    phases = {"compute_s": 30.0, "data_wait_s": 10.0, "evaluating_s": 20.0, "saving_s": 30.0}
    assert {name: logs[name] for name in phases} == phases
    assert logs["tokens_per_s"] == 800 / 40
    assert "mfu" not in logs  # an unknown number of FLOPs gives none rather than a wrong one
