"""The exit code with which the first node's agent leaves a Slurm job."""

import io
from contextlib import ExitStack
from pathlib import Path

import pytest
from rich.console import Console

from qwenlora.configs import load_config
from qwenlora.launch.allocation import Allocation
from qwenlora.launch.children import Children
from qwenlora.launch.leader import MOST_IN_VAIN, Leader
from qwenlora.launch.meeting import Meeting
from qwenlora.launch.node import Node

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.fixture
def leader(tmp_path):
    allocation = Allocation(0, ("127.0.0.1",), "7", 0, True)
    config = load_config(TINY, {"run_dir": str(tmp_path / "run"), "launch.max_restarts": 3})
    console = Console(file=io.StringIO(), width=200)
    leader = Leader(Node(config, allocation, Children(), Meeting(allocation), console, ExitStack()))
    leader.node.folder.path.mkdir()
    return leader


def attempt(leader, reason, count=1, saved_before=0):
    for _ in range(count):
        leader.node.folder.begin_attempt(1, job_id="7", saved_before=saved_before)
        leader.node.folder.end_attempt(reason)


def printed(leader):
    return leader.node.console.file.getvalue()


def test_a_job_that_never_saves_a_step_is_not_requeued_for_ever(leader):
    attempt(leader, "stopped", MOST_IN_VAIN - 1)
    assert leader._exit_code_in_job(75) == 75
    attempt(leader, "stopped")
    assert leader._exit_code_in_job(75) == 1
    assert printed(leader) == f"not requeued: {MOST_IN_VAIN} attempts in a row have saved no step\n"
    leader.node.folder.checkpoint(4).mkdir()
    assert leader._exit_code_in_job(75) == 75


def test_a_failed_job_is_requeued_once_before_it_saved_a_step(leader):
    attempt(leader, "failed")
    assert leader._exit_code_in_job(1) == 75
    attempt(leader, "failed")
    assert leader._exit_code_in_job(1) == 1
    assert printed(leader).splitlines()[-1].startswith("not tried again: 2 attempts failed in a row")


@pytest.mark.parametrize("code", [0, 2])
def test_a_run_that_is_done_or_refused_is_not_requeued(leader, code):
    assert leader._exit_code_in_job(code) == code
