"""Two agents compare their nodes before anything is started, as the first one asks and the other answers."""

import io
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from rich.console import Console

from qwenlora.configs import load_config
from qwenlora.launch import follower, preflight
from qwenlora.launch.allocation import Allocation
from qwenlora.launch.children import Children
from qwenlora.launch.follower import follow
from qwenlora.launch.leader import Leader
from qwenlora.launch.meeting import Meeting, NotMet
from qwenlora.launch.node import Node
from qwenlora.slurm.query import JobInfo

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def job(*nodes, state="RUNNING", restarts=0, requeue=True):
    return JobInfo("41", state, restarts=restarts, requeue=requeue, nodes=nodes)


@pytest.fixture
def check(tmp_path):
    """Check two nodes; return what the first one printed. overrides: of the second one's config."""

    def check(*overrides):
        run = tmp_path / "run"
        run.mkdir()
        ends = []
        with ExitStack() as stack:
            nodes = []
            for number, more in enumerate(([], overrides)):
                allocation = Allocation(number, ("127.0.0.1", "127.0.0.2"), "41", 0, False)
                config = load_config(TINY, [f"run_dir={run}", "launch.join_timeout_s=20", *more])
                meeting, console = stack.enter_context(Meeting(allocation)), Console(file=io.StringIO())
                nodes.append(Node(config, allocation, Children(), meeting, console, stack))
            second = threading.Thread(target=lambda: ends.append(follow(nodes[1])))
            second.start()
            try:
                Leader(nodes[0])._check_nodes(1)
            finally:
                nodes[0].meeting.part(0.5, of_all=True)
                second.join(20)
        assert ends == [0], "the first node tells the others that the run is over"
        assert list(run.iterdir()) == [], "the files that nodes wrote are removed"
        return nodes[0].console.file.getvalue()

    return check


@pytest.mark.parametrize(
    ("answers", "requeued"),
    [
        ([job("127.0.0.1", "127.0.0.2", "127.0.0.3"), job("127.0.0.2", "127.0.0.3")], True),
        ([job("127.0.0.1", "127.0.0.2"), None], False),  # scontrol is not there
        ([job("127.0.0.2", state="COMPLETING")], False),  # Slurm stops it, or has requeued it
        ([job("127.0.0.2", restarts=1)], False),
        ([job("127.0.0.2", requeue=False), None], False),
        ([job("127.0.0.3", "127.0.0.2"), None], False),  # another one does it
    ],
)
@pytest.mark.parametrize("answers_still", [True, False])
def test_a_job_without_its_first_node_is_requeued_once_slurm_knows(
    tmp_path, monkeypatch, answers, requeued, answers_still
):
    asked, done = iter(answers), []
    monkeypatch.setattr(follower, "_answers", lambda _: answers_still)
    monkeypatch.setattr(follower.query, "ask", lambda _: next(asked))
    monkeypatch.setattr(follower.query, "requeue", done.append)
    monkeypatch.setattr(follower.time, "sleep", lambda _: None)
    hosts = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
    allocation = Allocation(1, hosts, "41", 0, True)
    config = load_config(TINY, [f"run_dir={tmp_path}"])
    console, meeting = Console(file=io.StringIO()), Meeting(allocation)
    node = Node(config, allocation, Children(), meeting, console, ExitStack())
    assert follower._without_the_first(node) == 1
    # a machine that answers has its batch shell, which requeues the job
    assert done == (["41"] if requeued and not answers_still else [])


def test_a_machine_answers_if_only_to_refuse():
    assert follower._answers("127.0.0.1")
    assert not follower._answers("no-such-host.invalid")


def test_nodes_that_are_alike_pass(check):
    assert check() == ""


def test_a_node_with_another_config_is_named(check):
    with pytest.raises(NotMet, match=r"^127\.0\.0\.2 reads another config"):
        check("lora.r=4")


@pytest.mark.parametrize(("unseen", "message"), [(0, "is not the folder that 127"), (1, "does not see")])
def test_a_folder_that_is_not_shared_is_named(check, monkeypatch, unseen, message):
    monkeypatch.setattr(preflight, "sees_file", lambda run, node, text: node != unseen)
    with pytest.raises(NotMet, match=rf"^127\.0\.0\.2.* run_dir=.*{message}"):
        check()


def test_a_clock_that_is_off_is_a_warning(check, monkeypatch):
    monkeypatch.setattr(preflight, "MAX_CLOCK_SKEW_S", -1.0)
    assert check().startswith("warning: the clock of 127.0.0.2 is ")
