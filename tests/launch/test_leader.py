"""The exit code with which the first node's agent leaves a Slurm job."""

import io
from contextlib import ExitStack
from pathlib import Path

import pytest
from rich.console import Console

from qwenlora.configs import load_config
from qwenlora.launch import leader as leading
from qwenlora.launch.allocation import Allocation
from qwenlora.launch.children import Children
from qwenlora.launch.leader import Leader
from qwenlora.launch.meeting import Meeting, NotMet
from qwenlora.launch.messages import AgentLost
from qwenlora.launch.node import Node
from qwenlora.launch.restarts import MOST_IN_VAIN
from qwenlora.launch.watch import Watch
from qwenlora.run.handover import Handover

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


FITS = ("launch.nproc_per_node=1", "train.per_device_train_batch_size=1")


@pytest.fixture
def of_four(tmp_path):
    """Return a function that gives the leader of four nodes, of which some are lost."""

    def leader(lost, *overrides):
        allocation = Allocation(0, tuple(f"127.0.0.{number}" for number in range(1, 5)), None, 0, True)
        config = load_config(TINY, [f"run_dir={tmp_path / 'run'}", *FITS, *overrides])
        console, meeting = Console(file=io.StringIO(), width=300), Meeting(allocation)
        meeting._peers = dict.fromkeys((1, 2, 3))
        meeting._left = set(lost)
        leader = Leader(Node(config, allocation, Children(), meeting, console, ExitStack()))
        leader._met = True
        return leader

    return leader


@pytest.mark.parametrize(
    ("lost", "setting", "goes_on"),
    [
        ([], "launch.min_nodes=null", True),
        ([1], "launch.min_nodes=null", True),
        ([1, 2], "launch.min_nodes=null", True),
        ([1, 2, 3], "launch.min_nodes=null", False),  # most were lost
        ([1, 2, 3], "launch.min_nodes=1", False),
        ([1], "launch.min_nodes=4", False),
        ([], "launch.min_nodes=8", True),  # nothing is lost
        ([1], "launch.min_nodes=3", True),
        ([1, 2], "launch.min_nodes=3", False),
        ([1, 2], "train.global_batch_size=3", True),
        ([1], "train.global_batch_size=2", False),  # more ranks than micro-batches
    ],
)
def test_a_job_goes_on_while_enough_of_its_nodes_are_left(of_four, lost, setting, goes_on):
    leader = of_four(lost, setting)
    assert leader._can_go_on() is goes_on
    said = printed(leader)
    assert said.startswith("requeueing: ") is not goes_on
    if goes_on:
        leader._regroup()
        hosts = tuple(f"127.0.0.{number + 1}" for number in range(4) if number not in lost)
        assert leader.node.allocation.hosts == hosts
        assert printed(leader).startswith("going on inside the job with ") is bool(lost)


def test_nodes_are_lost_one_after_the_other_down_to_the_fewest(of_four):
    leader = of_four([1], "launch.min_nodes=1")
    for lost, nodes in (([1], 3), ([1, 3], 2), ([1, 2, 3], 1)):
        leader.node.meeting._left = set(lost)
        assert leader._can_go_on()
        leader._regroup()
        assert leader.node.allocation.nodes == nodes


def test_a_run_that_fits_only_all_its_nodes_is_requeued(of_four):
    leader = of_four([1], "strategy.sequence_parallel=4")
    assert not leader._can_go_on()
    assert printed(leader).startswith("requeueing: on 3 nodes the run cannot go on: ")


@pytest.mark.parametrize(("met", "lost"), [(False, []), (True, ["127.0.0.2"])])
def test_a_node_that_refuses_before_the_start_is_no_loss_but_a_failure(of_four, monkeypatch, met, lost):
    leader = of_four([1])
    leader.node.folder.path.mkdir()
    leader._met = met
    monkeypatch.setattr(leader, "_check_nodes", lambda _: (_ for _ in ()).throw(NotMet("no answer")))
    monkeypatch.setattr(leader, "_prepare_and_train", lambda *_: 1)
    monkeypatch.setattr(type(leader.node), "forkserver", None)
    assert leader._attempt(Handover()) == 1
    assert leader.node.folder.history.last().lost == lost


@pytest.mark.parametrize("hinders", ["stop_requested", "immortal"])
def test_nothing_begins_anew_in_a_job_that_is_to_stop_or_where_a_rank_cannot_be_killed(of_four, hinders):
    leader = of_four([])
    setattr(leader.node.children, hinders, True)
    assert not leader._can_go_on()


@pytest.mark.parametrize(("lost", "left"), [([], ""), ([1], "75")])
def test_the_batch_shell_learns_the_exit_code_when_srun_would_give_another(
    of_four, tmp_path, monkeypatch, lost, left
):
    monkeypatch.setenv("QWENLORA_EXIT_CODE_FILE", str(tmp_path / "code"))
    (tmp_path / "code").touch()
    leader = of_four(lost)
    leader.node.folder.path.mkdir()
    leading._lead_exit_codes_to(leader.node.folder)
    monkeypatch.setattr(leader.node.meeting, "part", lambda *_, **__: True)
    leader._part(75)
    assert (tmp_path / "code").exists() is bool(left)
    assert not left or (tmp_path / "code").read_text() == left


@pytest.mark.parametrize("code", [0, 2])
def test_a_run_that_is_done_or_refused_is_not_requeued(leader, code):
    assert leader._exit_code_in_job(code) == code


@pytest.mark.parametrize(
    ("lost", "trains", "spare"),
    [
        ([], [1, 2, 3], [4]),
        ([3], [1, 2, 3], []),  # the spare one is lost, which ends nothing
        ([1], [1, 3, 4], []),
        ([1, 2], [1, 4], []),
    ],
)
def test_a_spare_node_takes_the_place_of_a_lost_one(of_four, monkeypatch, lost, trains, spare):
    # so few rows that four could not train
    leader = of_four([], "launch.spare_nodes=1", "launch.min_nodes=1", "train.global_batch_size=3")
    node = leader.node
    node.allocation = node.job.among(node.job.hosts[: node.trains_on])
    node.meeting._left = set(lost)
    watch, sent = Watch(node, 1), []
    monkeypatch.setattr(node.meeting, "send", sent.append)
    for number in lost:
        node.meeting.inbox.put(AgentLost(node=number))
    watch.while_training()
    assert watch.lost == [f"127.0.0.{number + 1}" for number in lost if number < 3]
    assert bool(sent) is bool(watch.lost), "ranks end when one that trains is lost"
    assert leader._can_go_on()
    leader._regroup()
    hosts = tuple(f"127.0.0.{number}" for number in trains)
    assert node.allocation.hosts == hosts
    assert [f"127.0.0.{number}" for number in spare] == [one for one in leader._left() if one not in hosts]
    said = {(1,): "with 3 nodes, with 127.0.0.4 in place of 127.0.0.2\n"}
    assert said.get(tuple(lost), "") in printed(leader)
