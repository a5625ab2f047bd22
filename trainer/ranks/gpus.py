"""GPUs that the machine shows and torch cannot use: all would go to the CPU, and be a thousand times slower.
Checked before the preparation, by each rank, and before a model answers."""

import os

import torch

from qwenlora.run.hardware import gpu_count, gpus_shown

ON_CPU = "to use the CPU on purpose, set CUDA_VISIBLE_DEVICES to nothing: CUDA_VISIBLE_DEVICES= qwenlora ..."


def check(processes: int = 1) -> None:
    """Refuse GPUs that torch cannot use. processes: of a run, on this machine. Raises: ValueError."""
    shown = gpu_count()
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown and not usable:
        if "LOCAL_SIZE" in os.environ and not gpus_shown():
            return  # without GPUs, too, DeepSpeed's launcher names some
        named = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
        gpus = "1 GPU" if shown == 1 else f"{shown} GPUs"
        raise ValueError(f"this machine has {gpus}{named} that torch cannot use: {_reason()}; {ON_CPU}")
    if visible is not None and usable < shown:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={visible} names {shown} GPUs, and torch finds {usable} of them; name those"
            " that `nvidia-smi -L` lists, or unset it"
        )
    if usable and processes > usable:
        raise ValueError(
            f"{processes} processes on a machine with {usable} usable GPU{'s' * (usable > 1)}: each needs one"
            " of its own; lower launch.nproc_per_node (--nproc)"
        )


def _reason() -> str:
    """Return why torch cannot use a GPU, and what helps."""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"torch {torch.__version__} is built for CPUs; install one for your GPUs (pytorch.org/get-started"
            " has the command)"
        )
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
    else:
        said = "it finds none"
    if "too old" in said:
        return (
            f"{said}; update it, or install a torch for an older CUDA than {torch.version.cuda}"
            " (pytorch.org/get-started has the command)"
        )
    return (
        f"{said}; see whether `nvidia-smi` works here, and start a container with its GPUs (docker --gpus"
        " all, apptainer --nv)"
    )
