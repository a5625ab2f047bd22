"""What the driver says of a GPU, from the kernel's log or from nvidia-smi."""

import os
import subprocess
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


def test_the_first_line_from_then_on_that_means_a_faulty_gpu_is_named(log):
    faults, start = driver.GpuFaults(), time.monotonic()
    log(f"NVRM: {OFF}", start - 60)  # another job's
    log("eth0: link is up", start + 1)
    log("NVRM: Xid (PCI:0000:3b:00): 31, pid=1, name=python, MMU Fault", start + 1)  # a program's error
    assert faults.first() == ""
    log(f"NVRM: {OFF.replace('3b', '5e')}", start + 2)
    log("NVRM: Xid (PCI:0000:5e:00): 154, GPU recovery action changed", start + 2)
    assert faults.first() == OFF.replace("3b", "5e")


@pytest.fixture
def smi(monkeypatch, tmp_path):
    """Return a function that has nvidia-smi run a command of the shell; the kernel's log cannot be read."""
    monkeypatch.setattr(driver, "KERNEL_LOG", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def write(command):
        (tmp_path / "new").write_text(f"#!/bin/sh\n{command}\n")
        (tmp_path / "new").chmod(0o755)
        (tmp_path / "new").rename(tmp_path / "nvidia-smi")  # the old one may still run

    return write


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("0, 0\n1, [N/A]\n", "0, 0\n1, [N/A]\n", ""),
        ("0, 3\n1, 2\n", "0, 3\n1, 2\n", ""),  # of weeks ago
        ("0, 3\n1, 2\n", "0, 3\n1, 4\n", "memory errors that ECC could not correct: GPU 1: 2"),
        ("0, 0\n", "0, 0\n1, 4\n", ""),  # nothing to compare with
        ("Unable to determine the device handle", "0, 1\n", ""),
        ("0, 0\n", "Unable to determine the device handle", ""),
    ],
)
def test_where_the_log_is_not_to_be_read_the_errors_that_ecc_counts_since_then_tell(
    smi, before, after, fault
):
    smi(f"printf '{before}'")
    faults = driver.GpuFaults()
    faults._before._process.wait()
    smi(f"printf '{after}'")
    assert faults.first() == fault


def test_an_nvidia_smi_that_not_even_a_kill_ends_is_not_waited_for(smi, monkeypatch):
    monkeypatch.setattr(driver, "TIMEOUT_S", 0.1)
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: None)
    smi("exec sleep 20")
    faults = driver.GpuFaults()
    assert faults.first() == ""
    process = faults._before._process
    assert process.poll() is None, "it still hangs"
    process.terminate()
    process.wait()


def test_without_a_driver_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(driver, "KERNEL_LOG", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver.GpuFaults().first() == ""
