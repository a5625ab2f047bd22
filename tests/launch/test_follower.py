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
from qwenlora.launch.follower import Follower
from qwenlora.launch.leader import Leader
from qwenlora.launch.meeting import Meeting, NotMet
from qwenlora.launch.messages import StartRanks
from qwenlora.launch.node import Node
from qwenlora.run.folder import RunFolder
from qwenlora.run.handover import Handover

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


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
            second = threading.Thread(target=lambda: ends.append(Follower(nodes[1]).follow()))
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


@pytest.mark.parametrize(
    ("locked", "requeues", "stops", "leads"),
    [
        (True, True, False, True),
        (False, True, False, False),  # locks do not reach other nodes
        (True, False, False, False),  # somebody sees that the run has failed
        (True, True, True, False),
    ],
)
def test_who_may_lead_on(tmp_path, monkeypatch, locked, requeues, stops, leads):
    allocation, led = Allocation(1, ("127.0.0.1", "127.0.0.2"), "41", 0, requeues), []
    config, children = load_config(TINY, [f"run_dir={tmp_path}"]), Children()
    children.stop_requested = stops
    monkeypatch.setattr(RunFolder, "is_locked", locked)
    monkeypatch.setattr(follower, "run_ranks", lambda _, watch, *__: watch.lost.append("127.0.0.1") or 1)
    monkeypatch.setattr(Leader, "take_over", lambda *_: led.append("leads") or 0)
    monkeypatch.setattr(follower.succession, "end_job", lambda *_, **__: None)
    with ExitStack() as stack:
        console = Console(file=io.StringIO())
        node = Node(config, allocation, children, Meeting(allocation), console, stack)
        start = StartRanks(handover=Handover(1), port=1, hosts=allocation.hosts)
        assert Follower(node)._start(start) == (0 if leads else 1)
    assert bool(led) is leads
