"""Which nodes the end of an attempt in a job names, what makes them bad, and what the job then does."""

import io
from contextlib import ExitStack

import pytest
from rich.console import Console

from qwenlora.configs import load_config
from qwenlora.launch import blame
from qwenlora.launch.allocation import Allocation
from qwenlora.launch.children import Children
from qwenlora.launch.leader import Leader
from qwenlora.launch.meeting import Meeting, NotMet
from qwenlora.launch.messages import NodeFacts
from qwenlora.launch.node import Node
from qwenlora.launch.watch import Watch
from qwenlora.run import bad_nodes
from qwenlora.run.bad_nodes import BadNodes
from qwenlora.run.rank_deaths import killed_line
from qwenlora.run.records import RankError
from qwenlora.slurm.query import ClusterNode, JobInfo

HOSTS = ("n1", "n2", "n3")
CONFIG = "model: {name_or_path: tiny}\ndata: {train: example}\ntrain: {per_device_train_batch_size: 1}\n"


@pytest.fixture
def node(tmp_path):
    """The first of three nodes of two ranks, in a job."""
    (tmp_path / "my.yaml").write_text(CONFIG + "launch: {nproc_per_node: 2}\n")
    config = load_config(tmp_path / "my.yaml", {"run_dir": str(tmp_path / "runs" / "run")})
    allocation = Allocation(0, HOSTS, "7", 0, True)
    console = Console(file=io.StringIO(), width=300)
    node = Node(config, allocation, Children(), Meeting(allocation), console, ExitStack())
    node.folder.path.mkdir(parents=True)
    node.folder.begin_attempt(6, job_id="7")
    return node


@pytest.fixture
def watch(node):
    return Watch(node, 1)


def named(node):
    return {
        (host, entry.kind)
        for host, found in BadNodes.beside(node.folder).entries().items()
        for entry in found
    }


def rank_failed(node, rank, message, *, ours, bad_ranks):
    error = RankError(
        process=f"rank-{rank}", time=1.0, message=message, code=1, ours=ours, bad_ranks=bad_ranks
    )
    node.folder.error(1, f"rank-{rank}").write_text(error.text())


def test_what_agents_see_names_nodes(node, watch):
    watch.gpu_faults, watch.behind, watch.absent, watch.fault = {"n1": "Xid"}, {"n2": False}, ["n3"], "why"
    blame.note_blamed(node, watch)
    assert named(node) == {("n1", "driver"), ("n2", "stalled"), ("n3", "failed")}
    assert node.folder.history.last().bad == ["n1", "n2"], "one failure may be chance"
    assert "n1 is a bad node: Xid" in node.console.file.getvalue()


def test_where_all_nodes_hang_none_is_bad_at_once(node, watch):
    watch.behind, watch.fault = dict.fromkeys(HOSTS, False), "why"
    blame.note_blamed(node, watch)
    assert named(node) == {(host, "failed") for host in HOSTS}
    assert node.folder.history.last().bad == []


def test_a_node_that_waits_for_a_disk_is_not_bad_at_once(node, watch):
    watch.behind, watch.fault = {"n1": True, "n2": False}, "why"
    blame.note_blamed(node, watch)
    assert named(node) == {("n1", "failed"), ("n2", "stalled")}


def test_wrong_sums_name_the_rank_s_node(node, watch):
    rank_failed(node, 0, "rank 5 on other.name: wrong", ours=True, bad_ranks=[5])
    blame.note_blamed(node, watch)
    assert named(node) == {("n3", "preflight")}
    assert node.folder.history.last().bad == ["n3"]


def test_a_killed_rank_names_its_node_and_an_exception_none(node, watch):
    rank_failed(node, 4, "RuntimeError: no", ours=False, bad_ranks=[])
    blame.note_blamed(node, watch)
    assert named(node) == set()
    node.folder.log(1, "launch-1").write_text(killed_line("rank-2", 9))
    watch.fault, watch.absent = "the agent of n3 is gone", ["n3"]  # which ends the ranks of others, too
    blame.note_blamed(node, watch)
    assert named(node) == {("n3", "failed")}
    watch.fault, watch.absent = "", []
    blame.note_blamed(node, watch)
    assert named(node) == {("n3", "failed"), ("n2", "failed")}


@pytest.mark.parametrize(("job_id", "cause"), [(None, ""), ("7", "PREEMPTED")])
def test_what_slurm_ends_and_what_is_no_job_names_nobody(node, watch, job_id, cause):
    node.allocation = Allocation(0, HOSTS, job_id, 0, True)
    watch.behind, watch.cause = {"n2": False}, cause
    blame.note_blamed(node, watch)
    assert named(node) == set()


def test_nodes_that_do_not_come_are_named_where_most_did(node):
    meeting = node.meeting
    for answered, absent in (({1}, ["n3"]), (set(), ())):
        missing = meeting._no_answer(answered, 1.0)
        assert isinstance(missing, NotMet)
        assert missing.absent == absent
    with pytest.raises(NotMet) as missing:
        meeting.gather(NodeFacts, 0.0)
    assert missing.value.absent == ()


def test_what_a_job_is_to_leave_out_is_asked_where_a_node_is_bad(node, monkeypatch):
    asked = []
    job = JobInfo("7", "RUNNING", excluded=("n9",), partition="main")
    monkeypatch.setattr(blame.query, "ask", lambda job_id: asked.append(job_id) or job)
    names = (*HOSTS, "n4", "n9")
    monkeypatch.setattr(bad_nodes, "cluster_nodes", lambda _: [ClusterNode(n, "", True) for n in names])
    assert blame.left_out_next(node) == ()
    assert not asked
    entries = BadNodes.beside(node.folder)
    for host in ("n1", "n2"):
        entries.add("driver", host, "Xid")
    assert blame.left_out_next(node) == ("n9", "n2"), "three must be left for a job of three"


@pytest.mark.parametrize(
    ("code", "exclude", "left"), [(75, ("n9", "n2"), "75 n9,n2"), (75, (), ""), (1, ("n2",), "")]
)
def test_the_batch_shell_learns_what_to_leave_out_when_it_requeues(leader, monkeypatch, code, exclude, left):
    monkeypatch.setattr("qwenlora.launch.leader.left_out_next", lambda node: exclude)
    monkeypatch.setattr(leader.node.meeting, "part", lambda *_, **__: True)
    leader.node.folder.exit_code.touch()
    leader._part(code)
    assert leader.node.folder.exit_code.read_text() == left


@pytest.fixture
def leader(node, monkeypatch):
    leader = Leader(node)
    leader._met = True
    node.meeting._peers = dict.fromkeys((1, 2))
    monkeypatch.setattr(node.meeting, "release", node.meeting._released.add)
    return leader


@pytest.mark.parametrize(
    ("bad", "excluded", "goes_on", "left"),
    [
        ([], [], True, ("n1", "n2", "n3")),
        (["n2"], [], True, ("n1", "n3")),
        (["elsewhere"], [], True, ("n1", "n2", "n3")),
        (["n2", "n3"], ["n2"], False, None),  # too few would be left
        (["n2", "n3"], [], True, ("n1", "n2", "n3")),  # nowhere else to go
        (["n1"], ["n1"], False, None),  # the first leads
        (["n1"], ["elsewhere"], True, ("n1", "n2", "n3")),
    ],
)
def test_a_job_goes_on_without_bad_nodes_or_is_requeued_without_them(
    leader, monkeypatch, bad, excluded, goes_on, left
):
    for host in bad:
        BadNodes.beside(leader.node.folder).add("driver", host, "Xid")
    monkeypatch.setattr("qwenlora.launch.leader.left_out_next", lambda node: excluded)
    assert leader._can_go_on() is goes_on
    said = leader.node.console.file.getvalue()
    assert ("requeueing without " in said) is not goes_on
    if goes_on:
        leader._regroup()
        assert leader.node.allocation.hosts == left


def test_a_spare_node_takes_the_place_of_a_bad_one(leader):
    node = leader.node
    node.config = node.config.model_copy(
        update={"launch": node.config.launch.model_copy(update={"spare_nodes": 1, "min_nodes": 2})}
    )
    node.allocation = node.job.among(HOSTS[:2])
    BadNodes.beside(node.folder).add("driver", "n2", "Xid")
    assert leader._can_go_on()
    leader._regroup()
    assert node.allocation.hosts == ("n1", "n3")
    assert "with n3 in place of n2" in node.console.file.getvalue()


def test_a_start_on_a_bad_node_is_warned_of(node):
    BadNodes.beside(node.folder).add("stalled", "n3", "rank 5 hung")
    blame.warn_of_bad(node)
    said = node.console.file.getvalue()
    assert said.startswith("warning: n3 was found bad: rank 5 hung (0 s ago); if it fails, ")
    assert len(said.splitlines()) == 1
