"""The GPUs and the free memory of this machine, without torch."""

import os
import platform
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

# nvmlClocksEventReasons: https://docs.nvidia.com/deploy/nvml-api/group__nvmlClocksEventReasons.html
THROTTLED = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "too hot (software)",
    0x40: "too hot (hardware)",
    0x80: "power brake",
}
WAKING_S = 120.0  # for drivers that sleep while no program uses a GPU
_DEVICES, _DRIVER = Path("/dev"), Path("/proc/driver/nvidia/gpus")
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def visible_devices(processes: int) -> list[int | str]:
    """Return a GPU for each process, as CUDA_VISIBLE_DEVICES names it; -1 where there is none."""
    names = _named()
    if names is None:
        return list(range(processes))
    names = names[:processes]
    return [int(name) if name.isdecimal() else name for name in [*names, *["-1"] * (processes - len(names))]]


def gpu_count() -> int:
    """Return how many NVIDIA GPUs a process started here may use, under CUDA_VISIBLE_DEVICES; torch may be
    unable to use them (trainer/ranks/gpus.py)."""
    names = _named()
    return gpus_shown() if names is None else len([name for name in names if name != "-1"])


def gpus_shown() -> int:
    """Return how many NVIDIA GPUs this machine shows, whatever CUDA_VISIBLE_DEVICES says."""
    if shutil.which("nvidia-smi"):
        answer = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return sum(line.startswith("GPU ") for line in answer.stdout.splitlines())
    devices = [file for file in _DEVICES.glob("nvidia*") if re.fullmatch(r"nvidia\d+", file.name)]
    if devices or "SLURM_JOB_ID" in os.environ:  # a job may not be given the GPUs of its node
        return sum(map(_can_be_opened, devices))
    return len(list(_DRIVER.glob("*")))  # in a container without GPUs only the driver shows them


class SeenGpu(NamedTuple):
    """An NVIDIA GPU. name: the driver's; mib: of its memory, 0 where the driver does not say."""

    name: str
    mib: int


def gpus_seen() -> list[SeenGpu]:
    """Return the NVIDIA GPUs that this machine shows; [] without nvidia-smi."""
    pairs = (values for values in GpuQuery("name,memory.total").answer(WAKING_S) if len(values) == 2)
    return [SeenGpu(name, int(mib) if mib.isdecimal() else 0) for name, mib in pairs]


class GpuQuery:
    """A question to nvidia-smi, which runs from now on. query: the names of what to say of each GPU."""

    def __init__(self, query: str, *options: str) -> None:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", *options]
        self._process: subprocess.Popen[str] | None = None
        with suppress(OSError):  # there is none
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace"
            )

    def answer(self, timeout_s: float) -> list[list[str]]:
        """Return the values of each GPU; [] without an answer in time. Once nvidia-smi hangs in the driver,
        not even a kill ends it: it is not waited for."""
        if self._process is None:
            return []
        try:
            said, _ = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return []
        return [line.split(", ") for line in said.splitlines()]


def gpu_now(uuid: str) -> str:
    """Return the state of a GPU, as nvidia-smi says it: its clock, temperature, and what slows it down."""
    query = "name,clocks.sm,clocks.max.sm,temperature.gpu,clocks_throttle_reasons.active"
    try:
        ((name, clock, highest, celsius, reasons),) = GpuQuery(query, f"--id={uuid}").answer(10.0)
        bits = int(reasons, 16)
    except ValueError:
        return "nvidia-smi does not say why"
    why = [text for bit, text in THROTTLED.items() if bits & bit]
    return f"{name}, {clock} of {highest} MHz, {celsius} °C{''.join(f', {text}' for text in why)}"


def cpu_now() -> str:
    """Return the state of this machine's CPU: its name, and how many processes want to run on it."""
    return f"{cpu_name()}, load {os.getloadavg()[0]:.1f}"


def cpu_name() -> str:
    """Return this machine's CPU by its model, with the cores that this process may use."""
    lines = (_PROC / "cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def memory_mib() -> int:
    """Return this machine's memory."""
    return int((_PROC / "meminfo").read_text().partition("MemTotal:")[2].split()[0]) // 1024


def free_memory() -> int:
    """Return the bytes of host memory that can still be taken: the machine's, or those of a cgroup that this
    process is in (a Slurm job's, a container's) if they are fewer."""
    meminfo = (_PROC / "meminfo").read_text()
    free = [int(meminfo.partition("MemAvailable:")[2].split()[0]) * 1024]
    for line in (_PROC / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, limit, used, cache = _CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used = _CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        inner = root / path.strip("/")
        folders = [folder for folder in (inner, *inner.parents) if folder.is_relative_to(root)]
        free += [left for folder in folders if (left := _left(folder, limit, used, cache)) is not None]
    return max(0, min(free))


def _left(folder: Path, limit: str, used: str, cache: str) -> int | None:
    """Return the bytes that a cgroup has left, None if it has no limit. cache: of files, which gives way."""
    try:
        most, taken = (folder / limit).read_text().strip(), int((folder / used).read_text())
        stat = (folder / "memory.stat").read_text().split()
    except OSError:
        return None
    gives_way = int(stat[stat.index(cache) + 1]) if cache in stat else 0
    return int(most) - taken + gives_way if most.isdecimal() else None


def _named() -> list[str] | None:
    """Return the names in CUDA_VISIBLE_DEVICES; None where it is not set. Slurm's NoDevFiles means none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    return [name.strip() for name in visible.split(",") if name.strip() not in ("", "NoDevFiles")]


def _can_be_opened(device: Path) -> bool:
    try:
        os.close(os.open(device, os.O_RDWR))
    except OSError:
        return False
    return True
