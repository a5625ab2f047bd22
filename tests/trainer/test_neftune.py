"""NEFTune's noise belongs to rows, however they are put together, and to training alone."""

import math

import pytest
import torch
from made import config_of, side_of, trainer_of

from qwenlora.data.packing import pack
from qwenlora.trainer.loop.neftune import Noise
from qwenlora.trainer.spread.sequence import Team

ALPHA, WIDTH = 5.0, 8
LENGTHS = [5, 3, 4, 7]


def noise(step, lines, tokens, team=Team(), seed=42):  # noqa: B008 (frozen)
    """Return what is added to embeddings of zeros, [lines, tokens, width]."""
    embeddings = torch.nn.Embedding.from_pretrained(torch.zeros(2, WIDTH))
    added = Noise(embeddings, ALPHA, seed, LENGTHS, team)
    with added.over(step, lines):
        made = embeddings(torch.zeros(len(lines), tokens, dtype=torch.int64))
    assert not embeddings(torch.zeros(1, 1, dtype=torch.int64)).any(), "none outside of a step"
    return made


def test_a_row_has_its_noise_wherever_it_lies():
    padded = noise(3, [[0], [1], [3]], 9)
    packed = noise(3, [[1, 0], [3]], 8)
    flat = noise(3, [[3, 1, 0]], 15)
    for row, others in {0: (packed[0, 3:8], flat[0, 10:]), 1: (packed[0, :3], flat[0, 7:10])}.items():
        assert all(torch.equal(padded[row, : LENGTHS[row]], other) for other in others)
    assert not padded[0, 5:].any(), "no noise on padding"
    assert torch.equal(padded[2, :7], flat[0, :7])


def test_ranks_that_share_a_line_have_slices_of_its_noise():
    whole = noise(3, [[3, 1, 0]], 16)
    parts = [noise(3, [[3, 1, 0]], 4, Team(size=4, rank=rank)) for rank in range(4)]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_noise_differs_by_seed_step_and_row_and_has_the_size_of_the_paper():
    row = noise(3, [[0]], 5)[0]
    assert torch.equal(row, noise(3, [[0]], 5)[0])
    for other in (noise(4, [[0]], 5), noise(3, [[0]], 5, seed=1), noise(3, [[2]], 5)):
        assert not torch.equal(other[0, :4], row[:4])
    most = ALPHA / math.sqrt(5 * WIDTH)
    many = torch.cat([noise(step, [[0]], 5)[0] for step in range(200)])
    assert 0.99 * most < many.abs().max() <= most
    assert abs(many.std().item() / (most / math.sqrt(3)) - 1) < 0.02
    assert abs(many.mean().item()) < 0.02 * most


def losses_of(trainer):
    trainer.args.logging_steps = trainer.state.logging_steps = 1
    trainer.train()
    history = trainer.state.log_history
    evaluation = [line["eval_loss"] for line in history if "eval_loss" in line]
    return [line["loss"] for line in history if "loss" in line], evaluation


@pytest.mark.parametrize("packed", [False, True])
def test_losses_do_not_depend_on_micro_batches(tiny, tmp_path, packed):
    side, eval_ = side_of(24), side_of(6, 1)
    packs = pack(side.lengths, 64) if packed else None
    made = {}
    for name, size, alpha in (("whole", 4, 9.0), ("cut", 1, 9.0), ("without", 4, None)):
        config = config_of(
            per_device_train_batch_size=size,
            global_batch_size=4,
            max_steps=2,
            neftune_noise_alpha=alpha,
            eval_strategy="steps",
            eval_steps=1,
            learning_rate=1e-12,  # evaluations then show whether noise is added to them
        )
        config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": 64})})
        made[name] = losses_of(trainer_of(tiny, tmp_path / name, side, config, eval_, packs))
    (whole, eval_loss), (cut, _), (without, plain) = made["whole"], made["cut"], made["without"]
    assert whole == pytest.approx(cut, abs=1e-5)
    assert min(abs(one - other) for one, other in zip(whole, without, strict=True)) > 1e-3
    assert eval_loss == pytest.approx(plain, abs=1e-6)
