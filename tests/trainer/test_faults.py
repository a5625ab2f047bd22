"""Losses and gradients that are not finite, and a full GPU: the message, and what becomes of the weights."""

import json

import pytest
import torch
from made import config_of, side_of, trainer_of
from parts import drifted, other_base
from ranks import run_ranks
from transformers import Trainer, TrainerCallback

from qwenlora.run.folder import RunFolder
from qwenlora.trainer.loop.state import adapter_of
from qwenlora.trainer.ranks.faults import TrainingFault
from qwenlora.trainer.ranks.stop import Stop


def made_with(tiny, folder, bad_steps, what="loss", **train):
    """Return a trainer whose loss, or gradient, is not finite in the given steps, and the warnings it
    gives."""
    warned = []
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    } | train
    made = trainer_of(
        tiny,
        folder,
        side_of(48),
        config_of(**settings),
        warn=warned.append,
        place=lambda row: f"my.jsonl:{row + 1}",
    )
    made.args.logging_steps = made.state.logging_steps = 3
    real = made.compute_loss

    def compute_loss(*arguments, **named):
        loss = real(*arguments, **named)
        broken = made.state.global_step + 1 in bad_steps and len(made._losses) == 1  # its second micro-batch
        if not broken:
            return loss
        if what == "gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
            return loss
        return loss * float("nan")

    made.compute_loss = compute_loss
    return made, warned


def weights(made):
    return {name: tensor.clone() for name, tensor in adapter_of(made.model).items()}


def same(one, other) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def rows_of(made, step, micro):
    units = made.order.step(*divmod(step - 1, made.order.steps_per_epoch))
    return sorted(row for unit in units[micro * 2 : micro * 2 + 2] for row in unit)


def test_by_default_the_run_stops_with_the_rows_and_no_weight_changed(tiny, tmp_path):
    made, _ = made_with(tiny, tmp_path, {4})
    before = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            before[state.global_step] = weights(made)

    made.add_callback(Keep())
    with pytest.raises(TrainingFault) as fault:
        made.train()
    made.saver.wait()
    first, second = rows_of(made, 4, 1)
    assert str(fault.value).startswith(
        f"step 4: the loss is not finite (NaN or infinite), in rows {first} (my.jsonl:{first + 1}), {second}"
        f" (my.jsonl:{second + 1}); it changed no weight, and the checkpoints are from before it: look at"
    )
    assert same(weights(made), before[3])
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == ["checkpoint-2"]


def test_a_gradient_names_all_rows_of_its_step(tiny, tmp_path):
    made, _ = made_with(tiny, tmp_path, {1}, what="gradient")
    with pytest.raises(TrainingFault, match="step 1: the gradient is not finite") as fault:
        made.train()
    assert str(fault.value).count("my.jsonl:") == 8


def test_skip_leaves_the_step_out_and_the_schedule_goes_on(tiny, tmp_path):
    made, warned = made_with(tiny, tmp_path, {3}, on_nan="skip")
    at, rates = {}, {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            at[state.global_step] = weights(made)
            rates[state.global_step] = made.lr_scheduler.last_epoch

    made.add_callback(Keep())
    made.train()
    made.saver.wait()
    assert same(at[2], at[3])
    assert not same(at[3], at[4])
    assert rates == {step: step for step in range(1, 7)}
    (line,) = warned
    assert line.startswith("step 3: the loss is not finite")
    assert line.endswith("): left out")
    losses = [log["loss"] for log in made.state.log_history if "loss" in log]
    assert all(loss == loss and loss > 1 for loss in losses), "the mean is over the steps that were trained"


def test_rollback_goes_back_to_the_checkpoints_weights_and_on_with_the_next_rows(tiny, tmp_path):
    made, warned = made_with(tiny, tmp_path, {4}, on_nan="rollback")
    at = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            at[state.global_step] = (
                weights(made),
                {id(p): values["exp_avg"].clone() for p, values in made.optimizer.state.items()},
            )

    made.add_callback(Keep())
    made.train()
    made.saver.wait()
    assert same(at[2][0], at[4][0])
    assert not same(at[3][0], at[4][0])
    assert all(torch.equal(moment, at[4][1][key]) for key, moment in at[2][1].items())
    assert warned[0].endswith("left out, and the weights are those of checkpoint-2 again")
    assert made.state.global_step == 6


def test_rollback_without_a_checkpoint_stops(tiny, tmp_path):
    made, _ = made_with(tiny, tmp_path, {1}, on_nan="rollback")
    with pytest.raises(TrainingFault, match="rollback has no checkpoint to go back to yet"):
        made.train()


def test_rollback_passes_over_a_checkpoint_that_is_damaged(tiny, tmp_path):
    made, warned = made_with(tiny, tmp_path, {6}, on_nan="rollback")

    class Damage(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 5:
                made.saver.wait()
                (RunFolder(tmp_path).checkpoint(4) / "state.json").unlink()

    made.add_callback(Damage())
    made.train()
    assert warned[0].endswith("the weights are those of checkpoint-2 again")


def test_bad_steps_that_are_not_in_a_row_may_be_many(tiny, tmp_path):
    made, warned = made_with(tiny, tmp_path, set(range(2, 30, 2)), on_nan="skip", max_steps=30)
    made.train()
    assert len(warned) == 14


def test_a_checkpoint_of_a_run_that_skipped_its_first_real_step_can_be_resumed(tiny, tmp_path):
    """The learning rate of step 1 is 0, and step 2 is left out: every lora_B is still zero, and rightly."""
    made, _ = made_with(tiny, tmp_path, {2}, on_nan="skip", warmup_steps=2.0, max_steps=2)
    made.train()
    made.saver.wait()
    from qwenlora.run import checkpoints

    assert checkpoints.flaw(RunFolder(tmp_path).checkpoint(2)) == ""


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_what_is_never_finite_is_given_up(tiny, tmp_path, policy):
    made, warned = made_with(tiny, tmp_path, set(range(3, 99)), on_nan=policy, max_steps=40)
    with pytest.raises(
        TrainingFault,
        match=f"the 10 steps before were as well: train.on_nan={policy} stops the run",
    ):
        made.train()
    assert len(warned) == 10


def test_a_stop_and_a_fault_are_told_apart():
    stop = Stop()
    assert stop.agree(torch.device("cpu"), also=torch.tensor(True)) is True
    assert not stop.agreed
    stop.request.ask("SIGTERM")
    assert stop.agree(torch.device("cpu"), also=torch.tensor(False)) is False
    assert stop.agreed


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_a_full_gpu_is_reported_with_the_batch_and_what_helps(tiny, tmp_path, monkeypatch, where):
    """Stands for a GPU: torch's own error, raised where the model is run."""
    eval_ = side_of(6, seed=1) if where == "evaluation" else None
    made = trainer_of(tiny, tmp_path, side_of(24), config_of(per_device_train_batch_size=4), eval_)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    if where == "training":
        monkeypatch.setattr(Trainer, "training_step", full)
        with pytest.raises(TrainingFault) as fault:
            made.train()
        assert "GPU out of memory on rank 0 while step 1 was trained: a batch of 4 x " in str(fault.value)
        assert (
            "lower train.per_device_train_batch_size (4), the global batch stays as it is or data.max_length"
            " (2,048), or set train.gradient_checkpointing: true (a third to half slower), or set"
            " strategy.quantization: nf4"
        ) in str(fault.value)
    else:
        made.model.forward = full
        with pytest.raises(
            TrainingFault, match="step 0 was evaluated: a batch of 4 x .*lower train.per_device_eval"
        ):
            made.evaluate()


def test_metrics_of_a_skipped_step_are_plain_json(tiny, tmp_path):
    made, _ = made_with(tiny, tmp_path, {3}, on_nan="skip")
    made.train()
    made.saver.wait()
    state = json.loads((RunFolder(tmp_path).checkpoint(6) / "state.json").read_text())
    assert all(loss == loss for loss in state["loss_so_far"])


def test_ranks_whose_adapters_drifted_apart_by_a_bit_are_named():
    assert run_ranks(drifted, 2, -1) == ["", ""]
    for said in run_ranks(drifted, 2, 1):
        assert said.startswith("rank 1 and rank 0 have different adapters")
        assert said.endswith("no checkpoint was written")


def test_ranks_that_read_other_bases_are_named():
    assert run_ranks(other_base, 2, -1) == ["", ""]
    for said in run_ranks(other_base, 2, 1):
        assert said.startswith("model.name_or_path: rank 1 read a base with other weights than rank 0 did")
