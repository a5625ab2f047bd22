"""Two agents compare their nodes before anything is started, as the first one asks and the other answers."""

import io
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from rich.console import Console

from qwenlora.configs import load_config
from qwenlora.launch import preflight
from qwenlora.launch.allocation import Allocation
from qwenlora.launch.children import Children
from qwenlora.launch.follower import Follower
from qwenlora.launch.leader import Leader
from qwenlora.launch.meeting import Meeting, NotMet
from qwenlora.launch.node import Node

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
