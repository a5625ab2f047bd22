"""Whether GPUs have NVLink is read from nvidia-smi's table."""

import pytest

from qwenlora.trainer.spread import links

# the columns behind the GPUs' are of network cards and processors
NODE = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tNV18\tNV18\tPXB\t0-51,104-155\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tNV18\tNV18\tNODE\t0-51,104-155\t0\t\tN/A\n"
    "GPU2\tNV18\tNV18\t X \tNV18\tSYS\t52-103,156-207\t1\t\tN/A\n"
    "GPU3\tNV18\tNV18\tNV18\t X \tSYS\t52-103,156-207\t1\t\tN/A\n"
    "NIC0\tPXB\tNODE\tSYS\tSYS\t X\n"
    "\nLegend:\n\n  X    = Self\n  NV#  = Connection traversing a bonded set of # NVLinks\n"
)
PAIRS = (
    "\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity\tNUMA Affinity\n"
    "GPU0\t X \tNV4\tSYS\tSYS\t0-31\t0\n"
    "GPU1\tNV4\t X \tSYS\tSYS\t0-31\t0\n"
    "GPU2\tSYS\tSYS\t X \tNV4\t32-63\t1\n"
    "GPU3\tSYS\tSYS\tNV4\t X \t32-63\t1\n"
)
PCI = (
    "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\nGPU0\t X \tPHB\t0-15\tN/A\nGPU1\tPHB\t X \t0-15\tN/A\n"
    "\nLegend:\n  NV#  = Connection traversing a bonded set of # NVLinks\n"
)
ONE = "\t\x1b[4mGPU0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\nGPU0\t X \t0-15\t0\t\tN/A\n"


@pytest.mark.parametrize(
    ("topology", "linked"), [(NODE, True), (PAIRS, False), (PCI, False), (ONE, False), ("", False)]
)
def test_gpus_are_linked_when_every_pair_is(topology, linked):
    assert links.all_linked(topology) is linked


def test_gpus_are_not_linked_when_nvidia_smi_fails(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert not links.nvlink()
