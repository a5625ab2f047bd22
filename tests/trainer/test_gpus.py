"""GPUs that the machine shows and torch cannot use are refused, with the reason and what helps."""

import re

import made
import pytest
import torch

from qwenlora.run.folder import RunFolder
from qwenlora.trainer import prepare
from qwenlora.trainer.ranks import gpus


@pytest.fixture
def machine(monkeypatch):
    """Return a function that sets what the machine shows, what torch can use, and what it says otherwise."""

    def is_(shown: int, usable: int, visible: str | None = None, cuda: str | None = "13.0", error: str = ""):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            monkeypatch.setattr(gpus, "gpu_count", lambda: shown)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: usable)
        monkeypatch.setattr(torch.version, "cuda", cuda)

        def init():
            if error:
                raise RuntimeError(error)

        monkeypatch.setattr(torch.cuda, "init", init)

    return is_


OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by"
    " downloading and installing a new version"
)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"shown": 2, "cuda": None},
            f"this machine has 2 GPUs that torch cannot use: torch {torch.__version__} is built for CPUs;"
            " install one for your GPUs (pytorch.org/get-started has the command); to use the CPU on"
            " purpose, set CUDA_VISIBLE_DEVICES to nothing: CUDA_VISIBLE_DEVICES= qwenlora ...",
        ),
        (
            {"shown": 1, "error": OLD_DRIVER},
            "this machine has 1 GPU that torch cannot use: The NVIDIA driver on your system is too old (found"
            " version 11040); update it, or install a torch for an older CUDA than 13.0",
        ),
        (
            {"shown": 8, "error": "No CUDA GPUs are available"},
            "this machine has 8 GPUs that torch cannot use: No CUDA GPUs are available; see whether"
            " `nvidia-smi` works here, and start a container with its GPUs (docker --gpus all,",
        ),
        (
            {"shown": 1, "visible": "7"},
            "this machine has 1 GPU (CUDA_VISIBLE_DEVICES=7) that torch cannot use: it finds none; see",
        ),
    ],
)
def test_a_machine_whose_gpus_torch_cannot_use_is_refused(machine, given, says):
    machine(usable=0, **given)
    with pytest.raises(ValueError, match="^" + re.escape(says)):
        gpus.check(2)


def test_a_name_that_is_not_there_is_refused(machine):
    machine(4, 1, visible="0,7")
    says = "CUDA_VISIBLE_DEVICES=0,7 names 2 GPUs, and torch finds 1 of them; name those that `nvidia-smi -L`"
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        gpus.check()


def test_each_process_needs_a_gpu_of_its_own(machine):
    machine(4, 4)
    gpus.check(4)
    with pytest.raises(ValueError, match="^5 processes on a machine with 4 usable GPUs: each needs one"):
        gpus.check(5)


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_the_cpu_can_be_chosen_on_purpose(machine, visible):
    machine(2, 0, visible=visible, cuda=None)
    gpus.check(2)


def test_a_machine_without_gpus_trains_on_the_cpu(machine):
    machine(0, 0, cuda=None)
    gpus.check(2)


def test_deepspeeds_launcher_names_gpus_on_any_machine(machine, monkeypatch):
    machine(0, 0, visible="0,1", cuda=None)
    monkeypatch.setattr(gpus, "gpus_shown", lambda: 0)
    with pytest.raises(
        ValueError, match=re.escape("2 GPUs (CUDA_VISIBLE_DEVICES=0,1) that torch cannot use")
    ):
        gpus.check()
    monkeypatch.setenv("LOCAL_SIZE", "2")
    gpus.check(2)


def test_a_gpu_that_only_torch_knows_is_used(machine):
    machine(0, 1)  # as of another maker
    gpus.check()


def test_the_preparation_refuses_before_it_looks_for_the_base(machine, tmp_path):
    machine(2, 0, cuda=None)
    config = made.config_of()
    with pytest.raises(ValueError, match="^this machine has 2 GPUs that torch cannot use"):
        prepare.prepare(config, RunFolder(str(tmp_path / "run")))
