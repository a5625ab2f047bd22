"""A run that was stopped and resumed is the run without a stop: the same rows, losses and weights, bit for
bit."""

import inspect
import json
import random
import signal
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from made import config_of, side_of, trainer_of, weighted
from transformers import Trainer, TrainerCallback

from qwenlora.configs.schema import Lora
from qwenlora.data.order import Order, accumulation_steps
from qwenlora.run import checkpoints
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.loop.batches import StepLoader, seed_micro_batch
from qwenlora.trainer.loop.state import adapter_of
from qwenlora.trainer.ranks.stop import Stop
from qwenlora.trainer.ranks.stop_request import StopRequest
from qwenlora.trainer.record.metrics import Metrics, MetricsFile

ROWS, STEPS = 22, 7  # three steps an epoch


class AskAt(TrainerCallback):
    """Requests a stop in the given step."""

    def __init__(self, request, step=0):
        self.request, self.step = request, step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            self.request.ask("SIGUSR1")


def attempt(tiny, folder, config, ask=None, eval_=None, before=None, side=None):
    """Do what attempt.py does, on one process: choose, load, cut metrics.jsonl, evaluate if due, train.

    ask: when to request a stop: {step}, or {evaluation, batch}, both from 1.
    """
    run, request = RunFolder(folder), StopRequest()
    side, eval_ = side or side_of(ROWS), eval_ or side_of(5, seed=1)
    made = trainer_of(tiny, folder, side, config, eval_, stop=Stop(request))
    file = MetricsFile(run.metrics)
    made.add_callback(Metrics(file, made, None))
    if ask and "evaluation" in ask:
        _ask_in_evaluation(made, request, **ask)
    elif ask:
        made.add_callback(AskAt(request, **ask))
    if before:
        before(made)
    newest = next(iter(run.checkpoints()), None)
    if newest:
        assert checkpoints.flaw(newest) == ""
        made.load(newest)
    evaluation_due = bool(made.resumed and made.resumed.evaluation_due)
    file.forget_after(made.state.global_step, evaluation_too=evaluation_due)
    if evaluation_due:
        made.evaluate()
    if made.state.global_step < STEPS and not made.stop.agreed:
        made.train(resume_from_checkpoint=str(newest) if newest else None)
    made.saver.wait()
    return made


def _ask_in_evaluation(made, request, evaluation, batch):
    """Request a stop before the given batch of the given evaluation."""
    agree, counts = made.stop.agree, {"batch": 0}

    def counting(device, also=None):
        if sys._getframe(1).f_code.co_name == "sum_losses":
            counts["batch"] += 1
            if counts["batch"] == (evaluation - 1) * 2 + batch:  # two batches each
                request.ask("SIGTERM")
        return agree(device, also)

    made.stop.agree = counting


def history(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "epoch")
    return [{key: line[key] for key in keys if key in line} for line in lines]


def weights(made) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_of(made.model).items()}


def settings(**train):
    config = config_of(
        **{
            "max_steps": STEPS,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 3,
            "warmup_steps": 2.0,
            "neftune_noise_alpha": 5.0,
            "per_device_eval_batch_size": 3,
        }
        | train
    )
    config = config.model_copy(update={"lora": Lora(lora_dropout=0.2)})
    return config.model_copy(update={"log": config.log.model_copy(update={"logging_steps": 2})})


def evaluated(every):
    return settings(eval_strategy="steps" if every else "epoch", eval_steps=every)


IN_STEPS = [{"step": step} for step in range(1, STEPS + 1)]
IN_EVALUATIONS = [{"evaluation": number, "batch": batch} for number in (1, 2, 3) for batch in (1, 2)]
EVERY = pytest.mark.parametrize("every", [2, None], ids=["evaluated every 2 steps", "evaluated every epoch"])


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([IN_STEPS[-1], IN_EVALUATIONS[1], IN_EVALUATIONS[2], IN_EVALUATIONS[5]], id="some"),
        pytest.param(IN_STEPS + IN_EVALUATIONS, id="all", marks=pytest.mark.long),
    ],
)
def test_a_stop_at_any_step_or_in_any_evaluation_changes_nothing(tiny, tmp_path, every, cases):
    config = evaluated(every)
    whole = attempt(tiny, tmp_path / "whole", config)
    expected, expected_weights = history(tmp_path / "whole"), weights(whole)
    assert [line["step"] for line in expected if "eval_loss" in line] == (
        [2, 4, 6, 7] if every else [3, 6, 7]
    )
    for number, ask in enumerate(cases):
        folder = tmp_path / str(number)
        first = attempt(tiny, folder, config, ask)
        assert first.stop.stopped, ask  # asked in the last step: its evaluation is left
        second = attempt(tiny, folder, config)
        assert not second.stop.stopped, ask
        assert history(folder) == expected, ask
        for name, tensor in weights(second).items():
            assert torch.equal(tensor, expected_weights[name]), (ask, name)


@EVERY
def test_a_run_of_many_stops_is_the_same_run(tiny, tmp_path, every):
    config = evaluated(every)
    whole = attempt(tiny, tmp_path / "whole", config)
    for step in range(1, STEPS):
        assert attempt(tiny, tmp_path / "cut", config, {"step": step}).state.global_step == step
    assert history(tmp_path / "cut") != history(tmp_path / "whole")
    cut = attempt(tiny, tmp_path / "cut", config)
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(cut).items())


def test_a_run_with_weights_goes_on_to_the_bit(tiny, tmp_path):
    rows = {"side": weighted(side_of(ROWS)), "eval_": weighted(side_of(5, seed=1))}
    whole = attempt(tiny, tmp_path / "whole", settings(), **rows)
    attempt(tiny, tmp_path / "cut", settings(), {"step": 4}, **rows)
    cut = attempt(tiny, tmp_path / "cut", settings(), **rows)
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(cut).items())


def test_a_checkpoint_resumes_with_other_intervals(tiny, tmp_path):
    attempt(tiny, tmp_path / "run", settings(), {"step": 4})
    attempt(tiny, tmp_path / "run", settings(eval_steps=1, save_steps=1, save_total_limit=None))
    names = {path.name for path in RunFolder(tmp_path / "run").checkpoints()}
    assert names == {f"checkpoint-{step}" for step in (3, 4, 5, 6, 7)}
    assert [line["step"] for line in history(tmp_path / "run") if "eval_loss" in line] == [2, 4, 5, 6, 7]


def test_an_evaluation_that_was_killed_after_its_step_was_saved_is_made_again(tiny, tmp_path):
    """Saved every 3 steps and evaluated at each epoch's end, which is the same step, the save comes first."""
    config = settings(eval_strategy="epoch", eval_steps=None)
    whole = attempt(tiny, tmp_path / "whole", config)
    for number in (1, 2, 3):
        folder = tmp_path / str(number)

        class Killed(BaseException):
            pass

        def kill(made, number=number):
            sum_losses, count = made._sum_losses, iter(range(1, 99))
            made._sum_losses = lambda: sum_losses() if next(count) < number else (_ for _ in ()).throw(Killed)

        with pytest.raises(Killed):
            attempt(tiny, folder, config, before=kill)
        cut = attempt(tiny, folder, config)
        assert history(folder) == history(tmp_path / "whole"), number
        assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(cut).items())


def test_a_slow_save_writes_the_step_it_was_given(tiny, tmp_path, monkeypatch):
    """The writer waits for two more steps; what it writes is still the step it was given."""
    import threading

    from safetensors.torch import load_file, save_file

    go, at = threading.Event(), {}
    monkeypatch.setattr(
        "qwenlora.trainer.loop.saver.save_file", lambda *a, **k: (go.wait(60), save_file(*a, **k))
    )

    class Keep(TrainerCallback):
        def __init__(self, made):
            self.made = made

        def on_step_end(self, args, state, control, **_):
            names = {parameter: name for name, parameter in self.made.model.named_parameters()}
            moments = {names[p]: values["exp_avg"].clone() for p, values in self.made.optimizer.state.items()}
            at[state.global_step] = weights(self.made), moments
            if state.global_step == 5:
                go.set()

    attempt(tiny, tmp_path, settings(), before=lambda made: made.add_callback(Keep(made)))
    folder = RunFolder(tmp_path).checkpoint(3)
    assert checkpoints.flaw(folder) == ""
    saved, moments = (
        load_file(folder / "adapter_model.safetensors"),
        load_file(folder / "optimizer.safetensors"),
    )
    assert all(torch.equal(tensor, saved[name]) for name, tensor in at[3][0].items())
    assert all(torch.equal(tensor, moments[f"{name}/exp_avg"]) for name, tensor in at[3][1].items())
    assert not all(torch.equal(tensor, at[4][0][name]) for name, tensor in at[3][0].items())


def test_a_file_that_changes_after_it_was_chosen_is_noticed(tiny, tmp_path):
    attempt(tiny, tmp_path, settings(), {"step": 3})
    made, folder = trainer_of(tiny, tmp_path, side_of(ROWS), settings()), RunFolder(tmp_path).checkpoint(3)
    content = bytearray((folder / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors with other bytes than were written"):
        made.load(folder)


def test_the_configs_optimizer_settings_apply_after_a_resume(tiny, tmp_path):
    attempt(tiny, tmp_path, settings(weight_decay=0.1), {"step": 3})
    made = attempt(
        tiny, tmp_path, settings(weight_decay=0.5, learning_rate=7e-4, lr_scheduler_type="constant")
    )
    assert {group["weight_decay"] for group in made.optimizer.param_groups if group["params"]} == {0.5}
    assert {line["learning_rate"] for line in history(tmp_path) if line["step"] > 3 and "loss" in line} == {
        7e-4
    }


OTHERS = [pytest.param(name, marks=pytest.mark.long) for name in ("sgd", "lion_32bit", "rmsprop")]


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "adamw_8bit", *OTHERS])
def test_any_optimizer_goes_on_to_the_bit(tiny, tmp_path, optim):
    config = settings(optim=optim, learning_rate=1e-4)
    whole = attempt(tiny, tmp_path / "whole", config)
    attempt(tiny, tmp_path / "cut", config, {"step": 4})
    cut = attempt(tiny, tmp_path / "cut", config)
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(cut).items())


def test_the_best_checkpoint_is_kept_over_a_stop(tiny, tmp_path):
    config = settings(
        metric_for_best_model="eval_loss", eval_steps=1, save_steps=1, save_total_limit=2, learning_rate=0.05
    )
    attempt(tiny, tmp_path / "run", config, {"step": 3})
    attempt(tiny, tmp_path / "run", config)
    losses = {line["step"]: line["eval_loss"] for line in history(tmp_path / "run") if "eval_loss" in line}
    best = min(losses, key=losses.__getitem__)
    names = {path.name for path in RunFolder(tmp_path / "run").checkpoints()}
    assert names == {f"checkpoint-{best}", "checkpoint-7"} | ({"checkpoint-6"} if best == 7 else set())


# ---- the clock, and signals


def test_a_time_budget_stops_before_it_is_over(tiny, tmp_path, monkeypatch):
    import time

    clock = {"now": 1000.0}
    monkeypatch.setattr(
        "qwenlora.trainer.ranks.stop.time", type("Clock", (), {"monotonic": lambda: clock["now"]})
    )
    stop = Stop(StopRequest(), max_time_s=35.0)
    made = trainer_of(tiny, tmp_path, side_of(ROWS), settings(eval_strategy="no", eval_steps=None), stop=stop)

    class TenSeconds(TrainerCallback):
        def on_substep_end(self, *_, **__):
            clock["now"] += 10

    made.add_callback(TenSeconds())
    made.train()
    made.saver.wait()
    # after two steps 20 s have passed: a third may end at 30 s, a fourth would end after 35 s
    assert (made.state.global_step, stop.stopped, stop.request.why) == (3, True, "train.max_time_min is over")
    assert checkpoints.flaw(RunFolder(tmp_path).checkpoint(3)) == ""
    assert time.monotonic() > 0


def test_a_signal_sets_a_flag_and_a_second_interrupt_leaves_at_once(monkeypatch):
    left = []
    monkeypatch.setattr("os._exit", left.append)
    request = StopRequest()
    for number in (signal.SIGUSR2, signal.SIGTERM):
        request._handle(number, None)
        assert (request.asked, request.why, left) == (True, "SIGUSR2", [])
    request._handle(signal.SIGINT, None)
    assert left == [130]


# ---- rows


class _Rows:
    """A side whose rows are their numbers."""

    def row(self, number):
        return number


def trained_steps(order: Order, world: int, start: int, stop: int):
    """Yield (step, its units) as Trainer trains them on world ranks, from a checkpoint of step start."""
    accumulation = accumulation_steps(order.global_batch_size, order.per_device_batch_size, world)
    epochs_trained, skipped = divmod(start, order.steps_per_epoch)
    assert "self.state.global_step // num_update_steps_per_epoch" in inspect.getsource(
        Trainer._init_training_state
    )
    loaders = []
    for rank in range(world):
        loader = StepLoader(_Rows(), order, world, rank, accumulation, 0, flat=False)
        loader.collate_fn = list
        loaders.append(loader)
    step = start
    for epoch in range(epochs_trained, 10**9):
        ranks = []
        for loader in loaders:
            if epoch == epochs_trained and skipped:
                loader = skip_first_batches(loader, skipped * accumulation)
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(epoch)
            below = getattr(loader.batch_sampler, "batch_sampler", None)
            if hasattr(below, "set_epoch"):
                below.set_epoch(epoch)
            ranks.append(iter(loader.batch_sampler))
        for _ in range(skipped if epoch == epochs_trained else 0, order.steps_per_epoch):
            if step == stop:
                return
            micro = [list(next(rank)) for _ in range(accumulation) for rank in ranks]
            step += 1
            yield step, [unit for batch in micro for unit in batch]


def test_five_thousand_resumes_land_on_the_right_rows():
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance, resumes = random.Random(seed), 0
    while resumes < 5000:
        worlds = chance.sample([1, 2, 3, 4, 6, 8], 3)
        per_device = chance.randint(1, 3)
        batch = int(np.lcm.reduce(worlds)) * per_device * chance.randint(1, 2)
        rows = chance.randint(1, 6 * batch)
        order = Order(
            np.array([chance.randint(1, 9) for _ in range(rows)]), batch, per_device, chance.randrange(99)
        )
        total, every = chance.randint(1, 4 * order.steps_per_epoch), chance.randint(1, 7)
        seen: dict[int, list] = {}
        saved = 0
        while saved < total:
            killed = chance.randint(saved, total)  # the last step that this attempt ends
            for step, units in trained_steps(order, chance.choice(worlds), saved, killed):
                again = seen.setdefault(step, units)
                assert sorted(again) == sorted(units), (seed, step)
            # asked to stop, it saves there; killed, the last save counts
            saved = killed if chance.random() < 0.5 else max(saved, killed // every * every)
            saved = total if killed == total else saved
            resumes += 1
        assert sorted(seen) == list(range(1, total + 1))
        for step, units in seen.items():
            assert units == order.step(*divmod(step - 1, order.steps_per_epoch)), (seed, step)


def test_passing_over_a_million_micro_batches_looks_at_none_of_them():
    order = Order(np.ones(1_000_000, np.int32), 1, 1, 0)
    order._steps  # noqa: B018 (made at first use)
    loader = skip_first_batches(StepLoader(_Rows(), order, 1, 0, 1, 0, flat=False), 999_999)
    looked_at = []
    real = Order._step
    Order._step = lambda self, epoch, step: (looked_at.append(step), real(self, epoch, step))[1]
    try:
        (last,) = (list(batch) for batch in loader.batch_sampler)
    finally:
        Order._step = real
    assert looked_at == [999_999]
    assert last == order.step(0, 999_999)


def test_dropout_depends_on_seed_step_and_micro_batch_alone():
    drawn = []
    for arguments in ((1, 2, 3), (1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 0, 0)):
        seed_micro_batch(*arguments)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1])
    assert len({tuple(values.tolist()) for values in drawn}) == 5
    first = [tuple(torch.rand(2).tolist()) for step in range(200) if seed_micro_batch(7, step, 0) is None]
    assert all(one != other for one, other in pairwise(sorted(first)))
