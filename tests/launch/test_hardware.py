"""GPUs are counted without torch."""

import pytest

from qwenlora.launch import hardware


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,3", 2), ("GPU-5f,GPU-6a,", 2)]
)
def test_visible_gpus_are_counted_as_the_environment_says(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.gpu_count() == count


def test_gpus_are_counted_by_nvidia_smi(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-2)'\n"
    )
    smi.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert hardware.gpu_count() == 2


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        (None, [0, 1]),
        ("3,2", [3, 2]),
        ("5,6,7", [5, 6]),
        ("GPU-5f,MIG-6a", ["GPU-5f", "MIG-6a"]),
        ("7", [7, "-1"]),
        ("", ["-1", "-1"]),
        ("-1", ["-1", "-1"]),
    ],
)
def test_ranks_see_the_gpus_that_the_user_chose(monkeypatch, visible, devices):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.visible_devices(2) == devices
