"""GPUs are counted, and free memory is found, without torch."""

import os

import pytest

from qwenlora.run import hardware


@pytest.mark.parametrize(
    ("visible", "count"),
    [("", 0), ("-1", 0), ("NoDevFiles", 0), ("-1,-1", 0), ("0", 1), ("0,3", 2), ("GPU-5f,GPU-6a,", 2)],
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
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.visible_devices(2) == devices


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without nvidia-smi; return the folders that stand for /dev and the driver's /proc."""
    for name in [name for name in os.environ if name.startswith("SLURM") or name == "CUDA_VISIBLE_DEVICES"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    folders = tmp_path / "dev", tmp_path / "proc"
    for folder in (tmp_path / "bin", *folders):
        folder.mkdir()
    monkeypatch.setattr(hardware, "_DEVICES", folders[0])
    monkeypatch.setattr(hardware, "_DRIVER", folders[1])
    return folders


def test_without_nvidia_smi_device_files_are_counted(machine):
    devices, driver = machine
    assert hardware.gpu_count() == 0
    for name in ("nvidia0", "nvidia10", "nvidiactl", "nvidia-uvm", "null"):
        (devices / name).touch()
    for number in range(4):
        (driver / f"0000:0{number}:00.0").mkdir()
    (devices / "nvidia3").mkdir()  # not even root can open it
    assert hardware.gpu_count() == 2, "not those that the container was not given, or that cannot be opened"


def test_where_nvidia_smi_fails_device_files_are_counted(machine, tmp_path):
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho Driver/library version mismatch\nexit 18\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    (machine[0] / "nvidia0").touch()
    assert hardware.gpu_count() == 1


def test_the_driver_shows_the_gpus_that_a_container_was_not_given(machine, monkeypatch):
    (machine[1] / "0000:01:00.0").mkdir()
    assert hardware.gpu_count() == 1
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert hardware.gpu_count() == 0, "a job may have asked for none"


@pytest.mark.parametrize(
    ("cgroup", "files", "free"),
    [
        ("0::/", {}, 4 * 2**20),
        (
            "0::/job/step",
            {"job/memory.max": "max", "job/memory.current": "1", "job/memory.stat": ""},
            4 * 2**20,
        ),
        (
            "0::/job/step",
            {
                "job/memory.max": "1000000",
                "job/memory.current": "700000",
                "job/memory.stat": "anon 9\ninactive_file 50000\n",
            },
            350_000,
        ),
        (
            "5:cpu:/x\n4:memory:/job",
            {
                "memory/memory.limit_in_bytes": "500000",
                "memory/memory.usage_in_bytes": "600000",
                "memory/memory.stat": "total_inactive_file 5",
            },
            0,
        ),
    ],
)
def test_free_memory_is_the_machine_s_or_that_of_a_group_around_the_process(
    monkeypatch, tmp_path, cgroup, files, free
):
    written = {"proc/meminfo": "MemTotal: 9999 kB\nMemAvailable:    4096 kB\n", "proc/self/cgroup": cgroup}
    for name, text in (written | {f"cgroups/{name}": text for name, text in files.items()}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(hardware, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path / "cgroups")
    assert hardware.free_memory() == free
