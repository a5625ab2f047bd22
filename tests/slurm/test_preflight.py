"""A node that is not like the others ends the job within half a minute, by name, before anything is
trained."""

import importlib.metadata
from pathlib import Path

import pytest
from slurm_runs import QWENLORA, attempts, sbatch, write_config

from qwenlora.launch.allocation import FIRST_PORT, PORTS


@pytest.fixture
def mounted(cluster):
    """A function that mounts something on node2 alone, for this test."""
    points = []

    def mount(*words):
        cluster.script("sh", "node2", "mount", *map(str, words))
        points.append(words[-1])

    yield mount
    for point in reversed(points):
        cluster.script("sh", "node2", "umount", str(point))


def failed(cluster, folder, *arguments):
    """Submit a job that fails; return its one line that says why."""
    config = write_config(folder, 4)
    job = sbatch(cluster, folder, config, "run_dir=runs/run", "launch.max_restarts=0", *arguments)
    cluster.wait(job, "FAILED", timeout=900)
    output = (folder / f"slurm-{job}.out").read_text()
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("failed: ")]
    (attempt,) = attempts(folder / "runs/run")
    assert (attempt["reason"], f"failed: {attempt['message']}") == ("failed", line)
    return line


def test_a_run_folder_that_is_not_shared(cluster, tmp_path, mounted):
    (tmp_path / "runs/run").mkdir(parents=True)
    mounted("-t", "tmpfs", "none", tmp_path / "runs/run")
    assert failed(cluster, tmp_path).startswith(
        f"failed: node2: run_dir={tmp_path}/runs/run is not the folder that node1"
    )


def test_a_run_folder_that_one_node_cannot_write_to(cluster, tmp_path, mounted):
    run = tmp_path / "runs/run"
    run.mkdir(parents=True)
    mounted("--bind", run, run)
    cluster.script("sh", "node2", "mount", "-o", "remount,ro,bind", str(run))
    assert failed(cluster, tmp_path) == f"failed: node2: cannot write to run_dir={run}: Read-only file system"


def test_other_package_versions(cluster, tmp_path, mounted):
    (metadata,) = [file for file in importlib.metadata.files("peft") if file.name == "METADATA"]
    other = tmp_path / "METADATA"
    text = Path(metadata.locate()).read_text()
    version = importlib.metadata.version("peft")
    other.write_text(text.replace(f"\nVersion: {version}", "\nVersion: 0.0.1", 1))
    mounted("--bind", other, Path(metadata.locate()))
    line = failed(cluster, tmp_path)
    assert line.startswith(f"failed: node2 has other package versions: peft 0.0.1 (elsewhere {version})")


def test_another_config(cluster, tmp_path, mounted):
    write_config(tmp_path, 4)
    other = tmp_path / "other.yaml"
    other.write_text((tmp_path / "my.yaml").read_text().replace("3e-3", "4e-3"))
    mounted("--bind", other, tmp_path / "my.yaml")
    assert failed(cluster, tmp_path).startswith("failed: node2 reads another config")


def test_a_node_that_refuses_before_it_comes(cluster, tmp_path, mounted):
    write_config(tmp_path, 4)
    other = tmp_path / "other.yaml"
    other.write_text((tmp_path / "my.yaml").read_text() + "nonsense: 1\n")
    mounted("--bind", other, tmp_path / "my.yaml")
    assert failed(cluster, tmp_path).startswith("failed: node2: no answer within 25 s, of 2 nodes")


def test_a_blocked_port(netns_cluster, tmp_path):
    """Node 2 may reach node 1 at Slurm's ports, but not at those at which agents talk."""
    slurmd = netns_cluster.scontrol("show", "node", "node1").partition("Port=")[2].split()[0]
    to_node1 = ["ipproto", "tcp", "to", "10.213.7.11", "dport"]
    rules = [  # Slurm's own ports lie in that range, too
        ["priority", "10", *to_node1, slurmd, "lookup", "main"],
        ["priority", "20", *to_node1, f"{FIRST_PORT}-{FIRST_PORT + PORTS - 1}", "prohibit"],
    ]
    for rule in rules:
        netns_cluster.script("sh", "node2", "ip", "rule", "add", *rule)
    try:
        line = failed(netns_cluster, tmp_path)
    finally:
        for rule in rules:
            netns_cluster.script("sh", "node2", "ip", "rule", "del", *rule)
    assert line.startswith("failed: node2: no answer within 25 s, of 2 nodes; is port ")


def test_preflight_alone_says_what_was_checked_and_leaves_nothing(cluster, tmp_path):
    write_config(tmp_path, 4)
    answer = cluster.run(
        "srun",
        "--nodes=2",
        "--ntasks-per-node=1",
        QWENLORA,
        "preflight",
        "my.yaml",
        "run_dir=runs/run",
        cwd=tmp_path,
    )
    assert "checked 2 ranks on 2 nodes: they reduce at" in answer.stdout
    assert not (tmp_path / "runs/run/attempts.jsonl").exists()
