"""Which nodes jobs leave out, from the times that they were named, and how many they can do without."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from qwenlora.run import bad_nodes
from qwenlora.run.bad_nodes import BadNodes, spared, to_leave_out
from qwenlora.run.folder import RunFolder
from qwenlora.run.records import now
from qwenlora.slurm.query import ClusterNode, JobInfo, cluster_nodes


@pytest.fixture
def entries(tmp_path):
    return BadNodes(tmp_path)


@pytest.mark.parametrize("kind", ["preflight", "stalled", "driver", "by hand"])
def test_what_is_no_chance_makes_a_node_bad_at_once(entries, kind):
    entries.add(kind, "n1", "why")
    assert entries.bad().keys() == {"n1"}


@pytest.mark.parametrize("kind", ["failed", "slow"])
def test_what_may_be_chance_makes_a_node_bad_when_two_attempts_name_it(entries, tmp_path, kind):
    one, other = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "other")
    entries.add(kind, "n1", "first", one, 1)
    entries.add(kind, "n1", "the same attempt says it again", one, 1)
    entries.add(kind, "n2", "once", one, 1)
    assert (entries.entries().keys(), entries.bad()) == ({"n1", "n2"}, {})
    entries.add("failed", "n1", "second", other, 1)
    (named,) = entries.bad().values()
    assert named[0].line == "second (0 s ago, attempt 1 of other)"


def test_entries_are_old_after_three_days_unless_a_person_made_them(entries, monkeypatch):
    for kind, host in (("stalled", "n1"), ("by hand", "n2")):
        entries.add(kind, host, "why")
    time = now() + timedelta(days=3, seconds=1)
    monkeypatch.setattr(bad_nodes, "now", lambda: time)
    assert entries.bad().keys() == {"n2"}
    entries.add("driver", "n3", "why")
    assert sorted(file.name.split("-")[0] for file in entries.folder.iterdir()) == ["n2", "n3"]


def test_what_is_cleared_is_forgotten_and_only_that(entries):
    for host in ("n1", "n1", "n2"):
        entries.add("stalled", host, "why")
    entries.clear(["n1", "n3"])
    assert entries.bad().keys() == {"n2"}


def test_jobs_that_write_at_the_same_time_lose_no_entry_and_damaged_ones_count_for_nothing(entries):
    entries.folder.mkdir()
    (entries.folder / "n99-x.json").write_text('{"host": "n99"')
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: entries.add("driver", f"n{number}", "why"), range(40)))
    assert entries.bad().keys() == {f"n{number}" for number in range(40)}


def test_nodes_with_more_memory_or_cpus_are_of_another_kind(monkeypatch, tmp_path):
    """A job that wants them could not start on the others."""
    nodes = [("a1", "64", "1000"), ("a2", "64", "1000"), ("a3", "64", "2000"), ("a4", "96", "1000")]
    values = "s/%P/main*/; s/%T/idle/; s/%f/(null)/; s/%G/gpu:8/"
    lines = [f"echo \"$6\" | sed '{values}; s/%N/{n}/; s/%c/{c}/; s/%m/{m}/'" for n, c, m in nodes]
    (tmp_path / "sinfo").write_text("\n".join(["#!/bin/sh", *lines]))
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = cluster_nodes("main")
    assert [node.name for node in found] == ["a1", "a2", "a3", "a4"]
    assert found[0].kind == found[1].kind
    assert len({node.kind for node in found}) == 3
    assert spared(["a1", "a3", "a4"], found, 1) == ["a1"]


A, B = ("(null) gpu:a100:8", "(null) gpu:h100:8")


def cluster(*down):
    kinds = {"a1": A, "a2": A, "a3": A, "a4": A, "b1": B, "b2": B}
    return [ClusterNode(name, kind, name not in down) for name, kind in kinds.items()]


@pytest.mark.parametrize(
    ("bad", "down", "needed", "out"),
    [
        (["a1"], (), 3, ["a1"]),
        (["a1"], (), 4, []),  # a job of four of them could not start
        (["a2", "a1"], (), 3, ["a2"]),  # only one: the one that comes first
        (["a1"], ("a4",), 3, []),  # three that work are left, it among them
        (["a4"], ("a4",), 3, ["a4"]),  # it does not work in any case
        (["b1", "a1"], (), 2, ["a1"]),  # one b would be left
        (["b1"], (), 1, ["b1"]),
        (["b1", "b2"], (), 1, ["b1"]),
        (["a1", "a2", "a3", "a4"], (), 1, ["a1", "a2", "a3"]),
        (["elsewhere"], (), 1, []),  # Slurm refuses names that it does not know
    ],
)
def test_of_each_kind_of_node_as_many_stay_as_a_job_takes(bad, down, needed, out):
    assert spared(bad, cluster(*down), needed) == out


@pytest.mark.parametrize(
    ("job", "out"),
    [
        (JobInfo("7", "RUNNING"), ["a1", "a2"]),
        (JobInfo("7", "RUNNING", excluded=("a1",)), ["a2"]),
        (JobInfo("7", "RUNNING", excluded=("a3", "a4")), ["a1"]),  # one stays
        (JobInfo("7", "RUNNING", required=("a3",)), []),
        (JobInfo("7", "RUNNING", reservation="mine"), []),
    ],
)
def test_a_job_with_nodes_of_its_own_choice_leaves_out_none_and_else_as_many_as_it_can(monkeypatch, job, out):
    monkeypatch.setattr(bad_nodes, "cluster_nodes", lambda partition: cluster())
    assert to_leave_out(["a1", "a2"], job, 1) == out
