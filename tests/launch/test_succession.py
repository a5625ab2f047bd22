"""Who leads when the agent that led is gone, and what becomes of a job without its batch shell."""

import fcntl
import io
import itertools
import os
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from qwenlora.configs import load_config
from qwenlora.launch import leader as leading
from qwenlora.launch import succession
from qwenlora.launch.allocation import Allocation
from qwenlora.launch.children import Children
from qwenlora.launch.leader import Leader
from qwenlora.launch.meeting import Meeting
from qwenlora.launch.node import Node
from qwenlora.run.handover import Handover
from qwenlora.run.history import EXIT_CODES
from qwenlora.slurm.query import JobInfo

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


def job(*nodes, state="RUNNING", restarts=0, requeue=True, stdout=None):
    return JobInfo("41", state, restarts=restarts, requeue=requeue, nodes=nodes, stdout=stdout)


@pytest.fixture
def node(tmp_path):
    """Return a function that makes a node of three."""
    with ExitStack() as stack:

        def node(number, *overrides):
            allocation = Allocation(number, HOSTS, "41", 0, True)
            config = load_config(TINY, [f"run_dir={tmp_path}/run", "launch.join_timeout_s=1", *overrides])
            console, meeting = Console(file=io.StringIO(), width=300), Meeting(allocation)
            return Node(config, allocation, Children(), meeting, console, stack)

        yield node


def met(nodes):
    """Have nodes meet anew; return which of them lead, and how many came to those."""
    threads = [threading.Thread(target=succession.meet_anew, args=(one, HOSTS)) for one in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    leaders = [one for one in nodes if one.meeting.allocation.first]
    for one in leaders:
        one.meeting.wait_for_all(0.5, lambda: False)
    return [(one.job.node, len(one.meeting.connected)) for one in leaders]


def test_the_next_node_leads(node):
    assert met([node(1), node(2)]) == [(1, 1)]


def test_the_one_after_it_leads_when_that_is_gone_too(node):
    assert met([node(2)]) == [(2, 0)]


def test_who_cannot_have_the_run_folders_lock_does_not_lead(node, monkeypatch):
    """As when the first node lives, and only the connection is gone."""
    second = node(1)
    monkeypatch.setattr(leading, "WAIT_FOR_FOLDER_S", 0.0)
    monkeypatch.setattr(succession, "take_screen", lambda _: None)
    folder = second.folder
    folder.path.mkdir()
    folder.config.write_text("a run")
    met([second])
    with (folder.path / ".lock").open("w") as lock:
        lock.write("process 1 on 127.0.0.1")
        lock.flush()
        assert not folder.is_locked
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert folder.is_locked
        assert Leader(second).take_over(Handover(1), HOSTS[0]) is None
    said = second.console.file.getvalue()
    assert "127.0.0.2 cannot lead on: run_dir=" in said
    assert "is in use by process 1 on 127.0.0.1" in said
    assert not folder.history.attempts()


@pytest.mark.parametrize(
    ("answers", "code", "leads", "ended"),
    [
        ([job(*HOSTS), job(*HOSTS[1:])], "stopped", False, "requeue"),
        ([job(*HOSTS[1:])], "done", True, "requeue"),  # it ends at its start
        ([job(*HOSTS[1:])], "failed", True, "cancel"),
        ([job(*HOSTS[1:], requeue=False)], "stopped", True, "cancel"),
        ([job(*HOSTS[:2]), None, job(*HOSTS[1:])], "stopped", True, "requeue"),  # slurmctld was restarting
        ([None], "stopped", True, ""),  # scontrol is not there
        ([job("127.0.0.2", state="COMPLETING")], "stopped", True, ""),  # Slurm stops it, or has requeued it
        ([job("127.0.0.2", restarts=1)], "stopped", True, ""),
        ([job("127.0.0.3", "127.0.0.2")], "stopped", True, "requeue"),
        ([job("127.0.0.3", "127.0.0.2"), job("127.0.0.2", restarts=1)], "stopped", False, ""),  # by another
    ],
)
@pytest.mark.parametrize("answers_still", [True, False])
def test_a_job_without_its_batch_shell_is_ended_once_slurm_knows(
    node, monkeypatch, answers, code, leads, ended, answers_still
):
    asked, done, seconds = iter(answers), [], itertools.count(0, 10)
    monkeypatch.setattr(succession, "_answers", lambda _: answers_still)
    monkeypatch.setattr(succession.query, "show", lambda _: next(asked, None))
    monkeypatch.setattr(succession.query, "requeue", lambda _: done.append("requeue") or "")
    monkeypatch.setattr(succession.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(succession.query, "cancel", lambda _: done.append("cancel"))
    monkeypatch.setattr(succession.time, "sleep", lambda _: None)
    monkeypatch.setattr(Node, "stop_requested", True)  # what most jobs end with
    succession.end_job(node(1), EXIT_CODES[code], leads=leads)
    # a machine that is in the job, and answers, has the batch shell, which ends the job
    lives = answers_still and answers[0] and HOSTS[0] in answers[0].nodes
    assert done == ([ended] if ended and not lives else [])


def test_a_machine_that_is_back_has_no_batch_shell(node, monkeypatch):
    """It did not answer when its place was taken, and is back before Slurm has noticed."""
    one, done, answering = node(1), [], iter([False, True, True])
    shown = iter([job(*HOSTS), job(*HOSTS), job(*HOSTS), job(*HOSTS[1:])])
    monkeypatch.setattr(succession, "_answers", lambda _: next(answering))
    monkeypatch.setattr(succession.query, "show", lambda _: next(shown))
    monkeypatch.setattr(succession.query, "requeue", lambda _: done.append("requeue") or "")
    monkeypatch.setattr(succession.time, "sleep", lambda _: None)
    succession.take_screen(one)
    succession.end_job(one, EXIT_CODES["done"], leads=True)
    assert done == ["requeue"]


def test_a_job_that_another_node_leads_is_left_to_it(node, monkeypatch):
    one, answers = node(1), iter([job(*HOSTS[1:]), job(*HOSTS[1:]), job(*HOSTS[1:], state="COMPLETING")])
    one.folder.path.mkdir()
    monkeypatch.setattr(succession.query, "show", lambda _: next(answers))
    monkeypatch.setattr(succession.query, "requeue", lambda _: pytest.fail("requeued"))
    monkeypatch.setattr(succession.time, "sleep", lambda _: None)
    with (one.folder.path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        succession.end_job(one, EXIT_CODES["stopped"], leads=False)


def test_a_job_is_asked_to_run_again_until_slurm_takes_it(node, monkeypatch):
    refused = iter(["Slurm is busy", ""])
    monkeypatch.setattr(succession.query, "show", lambda _: job(*HOSTS[1:]))
    monkeypatch.setattr(succession.query, "requeue", lambda _: next(refused))
    monkeypatch.setattr(succession.time, "sleep", lambda _: None)
    succession.end_job(node(1), EXIT_CODES["stopped"], leads=True)
    assert not list(refused)


@pytest.fixture
def second(node, monkeypatch):
    """The node that takes the first one's place, in a job of which Slurm is not asked."""
    monkeypatch.setattr(succession, "take_screen", lambda _: None)
    monkeypatch.setattr(succession, "end_job", lambda *_, **__: None)
    return node(1)


def test_who_comes_to_the_lock_after_another_has_led_does_not_lead(second):
    with second.folder.claim(second.config):
        attempt = second.folder.begin_attempt(3)
        second.folder.note_attempt(end=1.0)
    met([second])
    assert Leader(second).take_over(Handover(attempt), HOSTS[0]) is None
    assert "another node has led since" in second.console.file.getvalue()


def test_a_run_that_ranks_have_ended_is_done_without_the_agent_that_led(second):
    folder = second.folder
    with folder.claim(second.config):
        attempt = folder.begin_attempt(3)
        folder.adapter.mkdir()
        folder.end_attempt("done")
    met([second])
    assert Leader(second).take_over(Handover(attempt), HOSTS[0]) == EXIT_CODES["done"]
    assert folder.exit_code.read_text() == "0"


def test_a_job_without_a_batch_shell_of_ours_is_left_alone(node, monkeypatch):
    monkeypatch.setattr(succession.query, "show", lambda _: pytest.fail("asked"))
    one = node(1)
    one.job = replace(one.job, requeues=False)
    succession.end_job(one, EXIT_CODES["failed"], leads=False)


@pytest.mark.parametrize(("nodes", "written"), [(HOSTS, ""), (HOSTS[1:], "a line\n")])
def test_the_output_is_written_here_when_the_batch_shell_is_gone(node, monkeypatch, tmp_path, nodes, written):
    output = tmp_path / "slurm-41.out"
    output.touch()
    monkeypatch.setattr(succession.query, "show", lambda _: job(*nodes, stdout=output))
    child = os.fork()
    if not child:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 1)
        succession.take_screen(node(1))
        os.write(1, b"a line\n")
        os._exit(0)
    os.waitpid(child, 0)
    assert output.read_text() == written


def test_a_machine_answers_if_only_to_refuse(node):
    one = node(1)
    assert succession._answers(one)
    one.job = replace(one.job, hosts=("no-such-host.invalid", *HOSTS[1:]))
    assert not succession._answers(one)


@pytest.mark.parametrize("blocked", [[0], [1], [0, 1]])
def test_a_machine_is_there_if_a_firewall_leaves_one_port_of_two_open(node, monkeypatch, blocked):
    """Both are tried at once: no try ends before the other has begun."""
    one, both = node(1), threading.Barrier(2, timeout=30)
    ports = [1, succession.candidate_ports(one.meeting.run_id)[0]]

    def create_connection(address, timeout):
        both.wait()
        raise TimeoutError if ports.index(address[1]) in blocked else ConnectionRefusedError

    monkeypatch.setattr(succession.socket, "create_connection", create_connection)
    assert succession._answers(one) == (len(blocked) < 2)
