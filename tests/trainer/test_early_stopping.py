"""Training ends when evaluations bring nothing any more, and with the best adapter, over any stops."""

from types import SimpleNamespace

import pytest
import torch
from made import config_of, side_of, trainer_of
from safetensors.torch import load_file

from qwenlora.configs.schema import Train
from qwenlora.run import checkpoints
from qwenlora.run.folder import RunFolder
from qwenlora.trainer import attempt
from qwenlora.trainer.loop.evaluation import evaluations_since_best
from qwenlora.trainer.loop.state import adapter_of
from qwenlora.trainer.ranks.stop import Stop
from qwenlora.trainer.ranks.stop_request import StopRequest

NAN = float("nan")
STEPS = 12
SETTINGS = {
    "max_steps": STEPS,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "metric_for_best_model": "eval_loss",
    "early_stopping_patience": 2,
    "final": "best",
    "learning_rate": 0.05,  # too high: it soon becomes worse
}


@pytest.mark.parametrize(
    ("losses", "count"),
    [
        ({}, 0),
        ({4: 2.0}, 0),
        ({4: 2.0, 8: 1.0}, 0),
        ({4: 1.0, 8: 2.0, 12: 1.5}, 2),
        ({12: 1.5, 8: 2.0, 4: 1.0}, 2),
        ({4: 1.0, 8: 1.0}, 1),  # as good is not better
        ({4: NAN, 8: 3.0, 12: NAN}, 1),
        ({4: NAN, 8: NAN}, 1),
    ],
)
def test_evaluations_since_the_best_are_counted(losses, count):
    assert evaluations_since_best(losses) == count


def run(tiny, folder, stop_at=0, losses=(), saves=True, **more):
    """Train as attempt.py does; return the trainer. stop_at: the step of a stop request; losses: what the
    evaluations find, from step 1 on; saves: whether it is rank 0."""
    request = StopRequest()
    made = trainer_of(
        tiny, folder, side_of(40), config_of(**SETTINGS | more), side_of(5, seed=1), stop=Stop(request)
    )
    made.saver = made.saver if saves else None
    if losses:
        made._sum_losses = lambda: torch.tensor([losses[made.state.global_step - 1], 1.0])
    newest = next(iter(RunFolder(folder).checkpoints()), None)
    if newest:
        made.load(newest)
    if stop_at:
        begun = made.training_step

        def asking(*arguments, **named):
            if made.state.global_step + 1 == stop_at:
                request.ask("SIGTERM")
            return begun(*arguments, **named)

        made.training_step = asking
    context = SimpleNamespace(
        stop=made.stop, chosen=SimpleNamespace(folder=newest), step=made.state.global_step
    )
    attempt._train(context, made)
    made.wait_for_saves()
    return made


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run(tiny, folder), folder


def test_training_ends_when_it_brings_nothing(whole):
    made, folder = whole
    ended, losses = made.state.global_step, made.losses
    best = min(losses, key=losses.__getitem__)
    assert 2 < ended == best + 2 < STEPS
    assert not made.stop.stopped, "it is done"
    assert {path.name for path in RunFolder(folder).checkpoints()} == {
        f"checkpoint-{best}",
        f"checkpoint-{ended}",
    }


def test_a_stop_changes_neither_the_end_nor_the_weights(tiny, tmp_path, whole):
    made, folder = whole
    ended = made.state.global_step
    for stop_at in (2, ended - 1):
        run(tiny, tmp_path, stop_at)
    again = run(tiny, tmp_path)
    assert (again.state.global_step, again.losses) == (ended, made.losses)
    name = f"checkpoint-{ended}/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    once_more = run(tiny, tmp_path)
    assert once_more.gave_up
    assert once_more.state.global_step == ended, "a start after the end trains nothing"


def test_a_best_whose_step_is_not_saved_counts_on_all_ranks_and_after_a_stop(tiny, tmp_path):
    losses = [3.0, 1.0] + [2.0] * (STEPS - 2)
    how = {"losses": losses, "save_steps": 3, "save_total_limit": 1, "early_stopping_patience": 5}
    other = run(tiny, tmp_path / "other", saves=False, **how)
    run(tiny, tmp_path / "first", stop_at=5, **how)
    first = run(tiny, tmp_path / "first", **how)
    assert first.state.global_step == other.state.global_step == 7
    assert first.losses == other.losses == dict(enumerate(losses[:7], 1))


def test_the_adapter_at_the_end_is_the_best_checkpoints(whole):
    made, folder = whole
    best = min(made.losses, key=made.losses.__getitem__)
    said = []
    process = SimpleNamespace(config=made.config, run=RunFolder(folder), say=said.append, warn=said.append)
    attempt._take_the_best(SimpleNamespace(process=process), made)
    saved = load_file(folder / f"checkpoint-{best}" / "adapter_model.safetensors")
    now = adapter_of(made.peft_model)
    assert all(torch.equal(now[name], tensor) for name, tensor in saved.items())
    assert said == [
        f"ended after step {best + 2}: 2 evaluations without a better eval_loss than after step {best}",
        f"the best is checkpoint-{best}: eval_loss {made.losses[best]:.4f}",
    ]


def test_a_best_that_is_damaged_is_not_taken(whole, tmp_path):
    made, folder = whole
    best = min(made.losses, key=made.losses.__getitem__)
    file = folder / f"checkpoint-{best}" / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        assert checkpoints.best(RunFolder(folder), made.losses) == folder / f"checkpoint-{best + 2}"
    finally:
        file.write_bytes(content)
    assert checkpoints.best(RunFolder(folder), {}) is None


@pytest.mark.parametrize("more", [{"early_stopping_patience": 3}, {"final": "best"}])
def test_both_need_to_know_what_is_best(more):
    ((key, value),) = more.items()
    with pytest.raises(
        ValueError, match=f"{key}={value} needs metric_for_best_model; add metric_for_best_mod"
    ):
        Train(**more)
