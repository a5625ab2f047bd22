"""The GPUs of this machine, counted without torch."""

import os
import shutil
import subprocess


def visible_devices(processes: int) -> list[int | str]:
    """Return a GPU for each process, as CUDA_VISIBLE_DEVICES names it; -1 where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(range(processes))
    names = [name.strip() for name in visible.split(",") if name.strip()][:processes]
    return [int(name) if name.isdecimal() else name for name in [*names, *["-1"] * (processes - len(names))]]


def gpu_count() -> int:
    """Return how many NVIDIA GPUs a process started here may use, under CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    if not shutil.which("nvidia-smi"):
        return 0
    answer = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    lines = answer.stdout.splitlines() if answer.returncode == 0 else []
    return sum(line.startswith("GPU ") for line in lines)
