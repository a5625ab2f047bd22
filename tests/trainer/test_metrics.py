"""Throughput, FLOPs and GPU peaks are computed from facts, and not at all where a fact is missing."""

import pytest
from made import parameters_of

from qwenlora.trainer.record.metrics import flops_per_token, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA Z9000", None),
        ("", None),
    ],
)
def test_an_unknown_gpu_has_no_peak_rather_than_a_wrong_one(name, peak):
    assert peak_flops(name) == peak


def test_the_flops_of_a_7b_are_the_published_formula():
    # 4 (N_b + N_h) + 6 P + 6 s d L; Qwen2.5-7B at r 16 and s 4096, for which 31.0 GFLOP is published
    parameters = parameters_of(
        7_615_616_512, 40_370_176, 6_525_621_760, 544_997_376, 28, 3584, 3584, 18944, 512
    )
    assert flops_per_token(parameters, 4096, recomputed=False) == pytest.approx(31.0e9, rel=0.01)
    extra = flops_per_token(parameters, 4096, recomputed=True) - flops_per_token(
        parameters, 4096, recomputed=False
    )
    assert extra == 2 * parameters.body + 2 * 4096 * 3584 * 28


def test_the_head_costs_flops_at_trained_tokens_only():
    parameters = parameters_of(900, 0, 500, 200, 1, 0, 8, 8, 8)
    of_shares = [flops_per_token(parameters, 0, recomputed=False, trained=share) for share in (1, 0.5, 0)]
    assert of_shares == [4 * 700, 4 * 600, 4 * 500]
