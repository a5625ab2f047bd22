"""Slurm's short form of node names is read as Slurm reads it."""

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenlora.slurm.query import hosts


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("", ""),
        ("node1", "node1"),
        ("node1,node[3-5,08-10]", "node1 node3 node4 node5 node08 node09 node10"),
        ("a[1-2]b[3-4]", "a1b3 a1b4 a2b3 a2b4"),
        ("b3,b1,b1", "b3 b1 b1"),
        ("x[3,1,2]", "x3 x1 x2"),
        ("n[08-8]", "n08"),
        ("n[99-101]", "n99 n100 n101"),
    ],
)
def test_names_come_in_the_order_in_which_they_are_written(nodelist, names):
    assert list(hosts(nodelist)) == names.split()


@pytest.mark.parametrize("nodelist", ["n[2-1]", "n[]", "n[1", "n[a-b]", "n[1-2", "n[1,,2]"])
def test_what_is_no_list_is_refused(nodelist):
    with pytest.raises(ValueError, match="nodes"):
        hosts(nodelist)


@st.composite
def ranges(draw):
    low, width = draw(st.integers(0, 120)), draw(st.integers(1, 4))
    high = low + draw(st.integers(0, 12))
    return f"{low:0{width}}" + (f"-{high:0{width}}" if draw(st.booleans()) else "")


brackets = st.lists(ranges(), min_size=1, max_size=3).map(lambda each: f"[{','.join(each)}]")
prefixes = st.from_regex(r"[a-z]{1,3}-?", fullmatch=True)
words = st.lists(st.tuples(prefixes, brackets).map("".join), min_size=1, max_size=2).map("".join)
plain = st.from_regex(r"[a-z]{1,4}[0-9]{0,3}", fullmatch=True)


def test_any_list_is_read_as_slurm_reads_it(cluster):
    @settings(max_examples=60, deadline=None)
    @given(st.lists(words | plain, min_size=1, max_size=4).map(",".join))
    def compare(nodelist):
        answer = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist],
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert list(hosts(nodelist)) == answer.stdout.split()

    compare()
