"""With weights the loss of a step is sum(weight * loss) / sum(weight) over its trained tokens, however they
are packed, cut and dealt to ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made import config_of, plain_loss_and_gradients, side_of, trainer_of, weighted, with_weights
from ranks import run_ranks
from sharing import ROWS, Sharing, make_base, model_of, run_all
from transformers import AutoModelForCausalLM

from qwenlora.adapter.compare.losses import mean_loss
from qwenlora.configs.schema import Data, Lora
from qwenlora.data.order import Order
from qwenlora.data.packing import pack
from qwenlora.trainer.loop.batches import collate, collate_packs, weight_of
from qwenlora.trainer.loop.chunked_loss import own_the_loss
from qwenlora.trainer.spread.sequence import Team

CLOSE = 1e-6


def assert_close(gradients: dict, expected: dict) -> None:
    assert gradients.keys() == expected.keys()
    apart = [torch.as_tensor(gradients[name]) - gradient for name, gradient in expected.items()]
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e3 * CLOSE
    assert max(float(difference.abs().max()) for difference in apart) < CLOSE


@pytest.mark.parametrize(("per_device", "max_length"), [(8, 0), (2, 0), (1, 64), (4, 100)])
def test_a_step_is_the_weighted_mean_over_its_tokens(tiny, tmp_path, per_device, max_length):
    side = weighted(side_of(8))
    packs = pack(side.lengths, max_length) if max_length else None
    config = config_of(per_device_train_batch_size=per_device, max_steps=1, max_grad_norm=0.0)
    if max_length:
        data = Data(train="unused", max_length=max_length, packing="on")
        config = config.model_copy(update={"data": data})
    made, gradients = trainer_of(tiny, tmp_path, side, config, packs=packs), {}
    loss, expected = plain_loss_and_gradients(made.model, side, range(8))
    made.create_optimizer()
    made.optimizer.register_step_pre_hook(
        lambda *_: gradients.update(
            {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}
        )
    )
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(loss, abs=CLOSE)
    assert_close(gradients, expected)
    unweighted, _ = plain_loss_and_gradients(made.model, side_of(8), range(8))
    assert abs(unweighted - loss) > 1e3 * CLOSE


def test_evaluation_and_comparison_are_weighted(tiny, tmp_path):
    side, eval_ = side_of(8), weighted(side_of(13, seed=1))
    made = trainer_of(tiny, tmp_path, side, config_of(per_device_eval_batch_size=3), eval_)
    expected, _ = plain_loss_and_gradients(made.model, eval_, range(13))
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, abs=CLOSE)
    rows = [eval_.row(number) for number in range(13)]
    assert mean_loss(made.model, rows, 0, "", batch_size=4) == pytest.approx(expected, abs=CLOSE)


def test_equal_weights_are_the_plain_mean(tiny, tmp_path):
    losses = []
    for scale in (None, 1e-18, 1e18):
        side = side_of(4)
        side = with_weights(side, np.float32(scale)) if scale else side
        made = trainer_of(tiny, tmp_path, side, config_of(max_steps=1))
        made.train()
        losses.append(made.state.log_history[0]["loss"])
    assert losses == pytest.approx(losses[:1] * 3, abs=CLOSE)


def test_without_weights_batches_have_none(tiny, tmp_path):
    made = trainer_of(tiny, tmp_path, side_of(8), config_of(), side_of(5))
    assert "loss_weights" not in next(iter(made.get_train_dataloader()))


# ---- batches


def test_weights_are_shifted_and_padded_as_labels_are():
    side = weighted(side_of(3))
    rows = [side.row(number) for number in range(3)]
    for batch in (collate(rows, 0), collate_packs([rows], 0), collate_packs([rows[:2], rows[2:]], 0)):
        labels, weights = batch["labels"][:, 1:], batch["loss_weights"]
        assert weights.shape == batch["labels"].shape
        assert (weights[:, -1] == 0).all()
        assert ((weights[:, :-1] > 0) == (labels != -100)).all()
        assert weights[weights > 0].tolist() == side.weights[side.trained].tolist()
        assert float(weight_of([batch], "cpu")) == pytest.approx(float(side.weights.sum(dtype=float)))
        slices = [Team(4, place).cut(batch, 0)["loss_weights"] for place in range(4)]
        assert torch.equal(torch.cat(slices, 1)[:, : weights.shape[1]], weights)
    mixed = collate([rows[0], side_of(3).row(1)], 0)["loss_weights"]
    assert set(mixed[1].tolist()) == {0, 1}, "a row without weights has ones"


def test_a_blank_batch_adds_nothing(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    own_the_loss(model, accepts=True, weighted=True)
    blank = collate([], 0)
    assert weight_of([blank], "cpu") == 0
    loss = model(**blank, num_items_in_batch=torch.tensor(2.5)).loss
    assert (loss.item(), loss.dtype) == (0, torch.float32)


def test_a_model_that_computes_its_loss_by_itself_is_refused(tiny):
    model = model_of(AutoModelForCausalLM.from_pretrained(tiny), Lora())
    with pytest.raises(ValueError, match=r"the rows have weights, and Qwen\w+ computes its loss by itself"):
        own_the_loss(model, accepts=False, weighted=True)


# ---- ranks

HOW = {"rows": {}, "packs": {"pack": 100}, "shared": {"size": 2}}
STRATEGIES = ("zero2", "zero3", "fsdp")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tiny):
    """Return the base, and what each of two ranks did in each run."""
    folder = tmp_path_factory.mktemp("weights")
    base = make_base(folder / "base", "qwen3")
    return base, run_ranks(run_all, 2, runs_of(base, folder, HOW), str(tiny))


def runs_of(base: str, folder: Path, how: dict) -> dict[str, Sharing]:
    return {
        name: Sharing(base, str(folder / name), steps=2, weighted=True, **more) for name, more in how.items()
    }


@pytest.mark.parametrize("name", ["rows", "packs", "shared"])
def test_two_ranks_compute_the_weighted_mean(ranks, name):
    base, results = ranks
    side, max_length = weighted(side_of(ROWS)), 100 if name == "packs" else 0
    packs = pack(side.lengths, max_length) if max_length else None
    first = Order(side.lengths, 8, 2, 42, packs, max_length).step(0, 0)
    model = model_of(AutoModelForCausalLM.from_pretrained(base), Lora())
    loss, expected = plain_loss_and_gradients(model, side, [row for unit in first for row in unit])
    results = [rank[name] for rank in results]
    assert [rank["losses"][1] for rank in results] == pytest.approx([loss] * 2, abs=CLOSE)
    assert_close(results[0]["gradients"], expected)


def test_ranks_that_share_sequences_have_the_same_losses(ranks):
    assert_same(ranks[1][0]["rows"], [rank["shared"] for rank in ranks[1]])


def assert_same(one: dict, others: list[dict]) -> None:
    assert (len(one["losses"]), len(one["eval"])) == (2, 1)
    for other in others:
        for what in ("losses", "eval"):
            assert other[what] == pytest.approx(one[what], abs=1e-5), what


@pytest.mark.slow
def test_losses_are_the_same_under_any_strategy(ranks, tiny, tmp_path):
    base, results = ranks
    runs = runs_of(base, tmp_path, {name: {"strategy": name} for name in STRATEGIES})
    for rank in run_ranks(run_all, 2, runs, str(tiny)):
        assert_same(results[0]["rows"], [rank[name] for name in STRATEGIES])
