"""GPU peaks are known, or not given at all."""

import pytest

from qwenlora.plan.hardware import of_driver


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
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA Z9000", None),
        ("", None),
    ],
)
def test_an_unknown_gpu_has_no_peak_rather_than_a_wrong_one(name, peak):
    gpu = of_driver(name)
    assert (gpu.flops if gpu else None) == peak
