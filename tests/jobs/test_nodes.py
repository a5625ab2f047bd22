"""`qwenlora nodes` shows which nodes jobs leave out and why, and changes that."""

import io

import pytest
from rich.console import Console

from qwenlora.cli.run_commands import nodes
from qwenlora.jobs.views import nodes as views
from qwenlora.run.bad_nodes import BadNodes
from qwenlora.run.folder import RunFolder
from qwenlora.slurm.query import ClusterNode


@pytest.fixture
def entries(tmp_path):
    return BadNodes(tmp_path)


def shown(entries) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    views.show_nodes(entries, console)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_each_entry_is_shown_with_the_state_of_its_node(entries, tmp_path):
    assert shown(entries) == [f"no node was found bad in the last 3 days, beside the runs in {tmp_path}"]
    entries.add("failed", "n1", "rank 0 was killed", RunFolder(tmp_path / "my"), 2)
    entries.add("stalled", "n2", "rank 5 hung", RunFolder(tmp_path / "my"), 3)
    assert shown(entries) == [
        "node state named by why",
        "n2 bad 0 s ago stalled rank 5 hung",
        "n1 not bad 0 s ago failed rank 0 was killed",
    ]


def test_nodes_are_added_and_cleared_by_hand(entries, tmp_path, capsys):
    assert nodes(tmp_path, add="n[1-2]", why="loud fans") == 0
    assert nodes(tmp_path, clear="n1") == 0
    assert capsys.readouterr().out == "jobs leave out n1, n2, until --clear\ncleared n1\n"
    (entry,) = entries.bad()["n2"]
    assert (entry.kind, entry.what) == ("by hand", "loud fans")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clear": "n[1-3]"}, r"--clear n1, n3: not among the nodes that were found bad: n2"),
        ({"add": "n[1"}, r"--add n\[1: expected names of nodes, as node7"),
        ({"sbatch": 2, "add": "n3"}, r"--sbatch 2: expected without --add and --clear"),
        ({"sbatch": 2, "clear": "n2"}, r"--sbatch 2: expected without --add and --clear"),
        ({"add": "../x"}, r"--add \.\./x: expected names of nodes"),
    ],
)
def test_mistakes_are_refused_and_change_nothing(entries, tmp_path, options, message):
    entries.add("driver", "n2", "Xid")
    before = entries.bad()
    with pytest.raises(ValueError, match=message):
        nodes(tmp_path, **options)
    assert entries.bad() == before


@pytest.mark.parametrize(("needed", "option"), [(1, "--exclude=n1\n"), (2, "\n")])
def test_sbatch_s_option_leaves_enough_nodes_for_a_job(
    entries, tmp_path, monkeypatch, capsys, needed, option
):
    found = [ClusterNode("n1", "", True), ClusterNode("n2", "", True)]
    monkeypatch.setattr(views, "cluster_nodes", lambda partition: found)
    entries.add("driver", "n1", "Xid")
    assert nodes(tmp_path, sbatch=needed) == 0
    assert capsys.readouterr().out == option
