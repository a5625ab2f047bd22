"""What the driver says of a GPU, from the kernel's log or from nvidia-smi."""

import os
import time

import pytest

from qwenlora.launch import driver


@pytest.fixture
def log(monkeypatch):
    """Return a function that logs a line at a time (time.monotonic()): a pipe that keeps records apart."""
    reader, writer = os.pipe2(os.O_DIRECT)
    monkeypatch.setattr(driver, "KERNEL_LOG", f"/proc/self/fd/{reader}")
    yield lambda line, at: os.write(writer, f"6,1,{int(at * 1e6)},-;{line}\n SUBSYSTEM=pci\n".encode())
    os.close(reader)
    os.close(writer)


OFF = "Xid (PCI:0000:3b:00): 79, pid=1, name=python, GPU has fallen off the bus."


def test_the_first_line_since_then_that_means_a_faulty_gpu_is_named(log):
    start = time.monotonic()
    log(f"NVRM: {OFF}", start - 60)  # another job's
    log("eth0: link is up", start + 1)
    log("NVRM: Xid (PCI:0000:3b:00): 31, pid=1, name=python, MMU Fault", start + 1)  # a program's error
    assert driver.gpu_fault(start) == ""
    log(f"NVRM: {OFF.replace('3b', '5e')}", start + 2)
    log("NVRM: Xid (PCI:0000:5e:00): 154, GPU recovery action changed", start + 2)
    assert driver.gpu_fault(start) == OFF.replace("3b", "5e")


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ("0, 0\n1, [N/A]\n", ""),
        ("0, 0\n1, 2\n", "memory errors that ECC could not correct: GPU 1: 2"),
        ("Unable to determine the device handle", ""),
    ],
)
def test_where_the_log_is_not_to_be_read_the_counts_of_ecc_tell(monkeypatch, tmp_path, said, fault):
    monkeypatch.setattr(driver, "KERNEL_LOG", tmp_path / "none")
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{said}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert driver.gpu_fault(0.0) == fault


def test_without_a_driver_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(driver, "KERNEL_LOG", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver.gpu_fault(0.0) == ""
