"""What ranks check together before the start."""

import socket

import pytest
import torch

from qwenlora.trainer.ranks import preflight
from qwenlora.trainer.ranks.faults import TrainingFault
from qwenlora.trainer.ranks.preflight import Checked

CPU = torch.device("cpu")


def test_one_process_multiplies_and_says_how_fast():
    (checked,) = preflight.check(CPU)
    assert (checked.host, checked.rank, checked.wrong) == (socket.gethostname(), 0, "")
    assert checked.tflops > 0


def test_a_wrong_product_is_named(monkeypatch):
    right = torch.Tensor.__matmul__

    def wrong(left, other):
        product = right(left, other)
        product[3, 5] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    with pytest.raises(
        TrainingFault, match=r"^rank 0 on \S+: 1 of 262144 entries of a matrix product are wrong"
    ):
        preflight.check(CPU)


def test_the_summary_names_the_slowest_and_warns_of_those_that_are_slow():
    ranks = [
        Checked("a", 0, 50.0, 90.0, ""),
        Checked("a", 1, 52.0, 91.0, ""),
        Checked("b", 2, 30.0, 89.5, ""),
    ]
    line, slow = preflight.summary(ranks)
    assert line == (
        "checked 3 ranks on 2 nodes: they reduce at 89.5 GB/s, and multiply at 50 TFLOP/s (median), the"
        " slowest, rank 2 on b, at 30"
    )
    assert slow.startswith("rank 2 on b (30 TFLOP/s): slower than the others")
    assert preflight.summary(ranks[:2])[1] == ""
    assert "reduce" not in preflight.summary(ranks[:1])[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_multiplies_exactly():
    (checked,) = preflight.check(torch.device("cuda", 0))
    assert checked.wrong == ""
    assert checked.tflops > 1
