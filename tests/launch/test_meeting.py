"""Agents of several nodes meet on loopback addresses, as on a network."""

import json
import os
import socket
import threading
import time

import pytest

from qwenlora.launch.allocation import (
    FIRST_PORT,
    PORTS,
    Allocation,
    candidate_ports,
    current_allocation,
    free_port,
)
from qwenlora.launch.meeting import Meeting, NotMet
from qwenlora.launch.messages import AgentLost, FileInRunFolder, RanksEnded, RunOver, StartRanks
from qwenlora.run.handover import Handover

HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


def node(number, hosts=HOSTS, job_id="12"):
    return Allocation(number, hosts, job_id, 0, False)


def never():
    return False


@pytest.fixture
def met():
    """Three nodes that have met."""
    with Meeting(node(0)) as first, Meeting(node(1)) as second, Meeting(node(2)) as third:
        for other in (second, third):
            other.join(5.0, never)
        yield first, second, third


def test_what_is_said_arrives_on_the_other_side(met):
    first, *others = met
    for number, other in enumerate(others, 1):
        other.send(FileInRunFolder(text=f"中 {number}"))
    answers = first.gather(FileInRunFolder, 5.0)
    assert {number: answer.text for number, answer in answers.items()} == {1: "中 1", 2: "中 2"}
    assert all(abs(answer.received_at - time.time()) < 5 for answer in answers.values())
    start = StartRanks(handover=Handover(3, "checkpoint-4", ("lora.r",), 1.5), port=7, hosts=("a", "b"))
    first.send(start)
    for other in others:
        message = other.receive(5.0)
        assert message == start.model_copy(update={"received_at": message.received_at})


def test_who_does_not_come_is_named():
    with Meeting(node(0)) as first, Meeting(node(2)) as third:
        third.join(5.0, never)
        third.send(RanksEnded(code=0))
        with pytest.raises(
            NotMet, match=r"^127\.0\.0\.2: no answer within 0 s, of 3 nodes; is port \d+ of 127"
        ):
            first.gather(RanksEnded, 0.4)


def test_who_leaves_is_named(met):
    first, second, third = met
    third.send(RanksEnded(code=0))
    second.__exit__()
    with pytest.raises(NotMet, match=r"^127\.0\.0\.2: its agent ended"):
        first.gather(RanksEnded, 5.0)


def test_a_stop_request_ends_the_waiting():
    with Meeting(node(0)) as first:
        assert first.gather(RanksEnded, 60.0, lambda: True) == {}
    with Meeting(node(1)) as second, pytest.raises(NotMet, match="cannot reach 127"):
        second.join(60.0, lambda: True)


def test_a_port_that_is_taken_is_passed_over():
    taken = candidate_ports("12.0")[:2]
    listeners = [socket.create_server((HOSTS[0], port)) for port in taken]
    try:
        with Meeting(node(0)) as first, Meeting(node(1)) as second:
            assert first.port == candidate_ports("12.0")[2]
            accepting = [
                threading.Thread(target=lambda server: server.accept()[0].close(), args=(listener,))
                for listener in listeners
            ]
            for thread in accepting:
                thread.start()
            second.join(10.0, never)
    finally:
        for listener in listeners:
            listener.close()


def test_another_jobs_agent_and_a_stranger_are_sent_away(monkeypatch):
    monkeypatch.setenv("QWENLORA_SECRET", "s")
    with Meeting(node(0)) as first:
        for hello in (
            {"token": "13.0 s", "node": 1},
            {"token": "12.0 ", "node": 1},  # the job's id is no secret
            {"token": "12.0 s", "node": 9},
            {"token": "12.0 s", "node": [1]},
            {"token": 7, "node": 1},
            {"node": 1},
            [],
            "x",
        ):
            with socket.create_connection((HOSTS[0], first.port), timeout=5) as stranger:
                stranger.sendall(json.dumps(hello).encode() + b"\n")
                assert stranger.recv(100) == b""
        with socket.create_connection((HOSTS[0], first.port), timeout=5) as stranger:
            stranger.sendall(b"\xff\xfe GET / HTTP/1.1\r\n\r\n")
            assert stranger.recv(100) == b""
        with socket.create_connection((HOSTS[0], first.port), timeout=5) as stranger:
            stranger.sendall(b"[" * 5000 + b"\n")
            assert stranger.recv(100) == b""
        with Meeting(node(1)) as second:
            second.join(5.0, never)
            second.send(RanksEnded(code=1))
            assert first.receive(5.0).code == 1


def test_a_node_is_taken_in_once(met):
    first, second, _ = met
    with socket.create_connection((HOSTS[0], first.port), timeout=5) as stranger:
        stranger.sendall(b'{"token": "12.0 ", "node": 1}\n')
        assert stranger.recv(100) == b""
    second.send(RanksEnded(code=1))
    assert first.receive(5.0).code == 1


def test_who_comes_when_all_is_over_hears_that():
    with Meeting(node(0)) as first, Meeting(node(1)) as second, Meeting(node(2)) as third:
        parting = threading.Thread(target=lambda: first.part(20.0, of_all=True))
        parting.start()
        for other in (second, third):
            other.join(5.0, never)
            assert isinstance(other.receive(5.0), RunOver)
            other.__exit__()
        parting.join(5.0)
        assert not parting.is_alive()


def test_one_node_needs_no_port():
    with Meeting(node(0, ("127.0.0.1",))) as alone:
        assert alone.port == 0
        assert alone.gather(RanksEnded, 0.1) == {}


def test_the_first_node_waits_for_the_others_to_leave(met):
    first, second, third = met
    threading.Timer(0.5, lambda: (second.__exit__(), third.__exit__())).start()
    start = time.monotonic()
    first.part(10.0, of_all=True)
    assert 0.4 < time.monotonic() - start < 5


def test_a_node_that_is_let_go_hears_it_and_is_no_longer_there(met):
    first, second, third = met
    third.send(RanksEnded(code=0))
    assert first.receive(5.0).node == 2
    assert first.connected == {1, 2}
    assert second.connected == {0}
    first.drop(2)
    assert isinstance(third.receive(5.0), RunOver), "so it does not look for another one to lead"
    assert third.receive(5.0) == AgentLost(node=0)
    assert first.receive(5.0) == AgentLost(node=2)
    assert first.connected == {1}
    second.__exit__()
    assert not first.part(5.0, of_all=False), "it may still run"


def test_a_node_that_is_not_needed_any_more_leaves_in_its_own_time(met):
    first, second, third = met
    first.release(2)
    assert isinstance(third.receive(5.0), RunOver)
    assert first.connected == {1}
    threading.Timer(0.5, lambda: (second.__exit__(), third.__exit__())).start()
    assert first.part(10.0, of_all=True), "nobody has to be killed"


def test_nodes_that_are_left_keep_their_order_and_have_new_numbers():
    left = (HOSTS[0], HOSTS[2])
    assert [node(number).among(left).node for number in (0, 2)] == [0, 1]
    assert node(2).among(left).hosts == left
    assert not node(2).among(left).first


def test_nobody_is_left_when_all_have_gone_by_themselves(met):
    first, second, third = met
    second.__exit__()
    third.__exit__()
    assert first.part(5.0, of_all=True)


def test_a_machine_that_says_nothing_more_is_noticed_within_a_quarter_of_a_minute(met):
    for meeting in met:
        for peer in meeting._peers.values():
            option = lambda name, peer=peer: peer.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))  # noqa: E731
            assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            probes = option("TCP_KEEPCNT") * option("TCP_KEEPINTVL")
            assert option("TCP_KEEPIDLE") + probes <= 15
            assert option("TCP_USER_TIMEOUT") <= 15_000


def test_ports_follow_from_the_job_and_stay_below_those_of_outgoing_connections():
    assert candidate_ports("12.0") == candidate_ports("12.0") != candidate_ports("13.0")
    ports = candidate_ports("12.0")
    assert len(set(ports)) == len(ports)
    assert all(FIRST_PORT <= port < FIRST_PORT + PORTS < 32768 for port in ports)
    with socket.create_server(("", free_port("12.0"))) as taken:
        assert free_port("12.0") != taken.getsockname()[1]


SLURM = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "a[1-2],b3", "SLURM_NODEID": "1"}


def test_an_allocation_is_read_from_slurms_environment(monkeypatch):
    for name, value in (SLURM | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_RESTART_COUNT": "2"}).items():
        monkeypatch.setenv(name, value)
    assert current_allocation() == Allocation(1, ("a1", "a2", "b3"), "12", 2, False)
    monkeypatch.setenv("QWENLORA_REQUEUES", "1")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert current_allocation() == Allocation(1, ("a1", "a2", "b3"), "9_3", 2, True)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "24")
    with pytest.raises(ValueError, match="srun started 24 tasks on 3 nodes, qwenlora needs one a node"):
        current_allocation()


def test_without_a_step_there_is_one_node(monkeypatch):
    assert current_allocation() == Allocation(0, (socket.gethostname(),), None, 0, False)
    monkeypatch.setenv("SLURM_JOB_ID", "12")  # salloc, without srun
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    assert current_allocation() == Allocation(0, (socket.gethostname(),), "12", 0, False)


@pytest.mark.parametrize(
    ("step", "nodes", "typed"),
    [
        ({}, 2, False),  # a shell of salloc on the login node, or a batch script
        ({"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NODELIST": "a1"}, 2, False),  # salloc's shell on a node
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "a[1-2]"}, 2, True),  # in `srun --pty bash`
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "a[1-3]"}, 3, True),
    ],
)
def test_the_shell_of_one_of_several_nodes_is_told_what_starts_all(monkeypatch, step, nodes, typed):
    for name, value in {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": str(nodes), **step}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "isatty", lambda number: typed)
    monkeypatch.setattr(os, "getsid", lambda _: os.getpgrp() - typed)
    with pytest.raises(ValueError, match=f"is on one of {nodes} nodes, .* `srun --nodes={nodes} --ntasks-p"):
        current_allocation()


@pytest.mark.parametrize("terminal", [True, False])
def test_what_srun_starts_itself_is_not_refused(monkeypatch, terminal):
    steps = {"SLURM_JOB_NUM_NODES": "4", "SLURM_STEP_NUM_TASKS": "3", **SLURM}
    for name, value in steps.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "isatty", lambda number: terminal)  # with --pty
    monkeypatch.setattr(os, "getsid", lambda _: os.getpgrp())
    assert current_allocation().nodes == 3
    monkeypatch.setenv("SLURM_STEP_NODELIST", "a1")  # srun --nodes=1 in a job of more
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("SLURM_NODEID", "0")
    assert current_allocation().hosts == ("a1",)
