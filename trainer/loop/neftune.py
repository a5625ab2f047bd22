"""NEFTune: uniform noise on the embeddings of training rows, none in evaluations.

A number of a row's noise is at most neftune_noise_alpha / sqrt(tokens * width), with the tokens of that row.
transformers takes those of the batch, padding included, and draws from the common generator; both depend on
how rows are put together. Source: https://arxiv.org/abs/2310.05914
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from qwenlora.data.order import Rows
from qwenlora.trainer.spread.sequence import Team

OWN_STREAM = (1,)  # of random numbers: apart from dropout's, which has the same entropy


class Noise:
    """Adds noise to what a model's embeddings return. A row's noise depends on the run's seed, the step and
    the row's number alone: it is the same after a resume, on any number of ranks, in any micro-batch or pack.
    lengths: tokens of each row."""

    def __init__(self, embeddings: nn.Module, alpha: float, seed: int, lengths: Rows, team: Team) -> None:
        self._alpha, self._seed, self._lengths, self._team = alpha, seed, lengths, team
        self._step, self._lines = 0, list[list[int]]()
        embeddings.register_forward_hook(self._add)

    @contextmanager
    def over(self, step: int, lines: list[list[int]]) -> Iterator[None]:
        """Add noise while the context is open. step: from 0; lines: the rows in each line of the batch."""
        self._step, self._lines = step, lines
        try:
            yield
        finally:
            self._lines = []

    def _add(self, _: nn.Module, __: object, output: Tensor) -> Tensor:
        """Return embeddings, [lines, tokens, width], with noise. Ranks share a line in slices."""
        if not self._lines:
            return output
        lines, tokens, width = output.shape
        noise = torch.zeros(lines, tokens * self._team.size, width, device=output.device)
        random = torch.Generator(output.device)
        for line, rows in zip(noise, self._lines, strict=True):
            start = 0
            for row in rows:
                length = int(self._lengths[row])
                entropy = np.random.SeedSequence([self._seed, self._step, row], spawn_key=OWN_STREAM)
                random.manual_seed(int(entropy.generate_state(1, np.uint64)[0]) >> 1)
                most = self._alpha / math.sqrt(length * width)
                line[start : start + length].uniform_(-most, most, generator=random)
                start += length
        mine = slice(self._team.rank * tokens, (self._team.rank + 1) * tokens)
        return output + noise[:, mine].to(output.dtype)
