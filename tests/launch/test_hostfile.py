"""Hostfiles: what is read, what is refused before anything starts, what the other machines get."""

import json
import shlex
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qwenlora.configs import load_config
from qwenlora.launch import agent, hostfile, ssh
from qwenlora.launch.allocation import Allocation

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
ALLOCATION = Allocation(0, ("127.0.0.1", "127.0.0.2"), None, 0, False, name="n", secret="s")


def config_of(**launch):
    return load_config(TINY, {f"launch.{key}": value for key, value in launch.items()})


def write_hostfile(text: str) -> str:
    Path("hosts").write_text(text)
    return "hosts"


def test_a_hostfile_is_read_as_deepspeed_reads_it():
    from deepspeed.launcher.runner import fetch_hostfile

    file = write_hostfile("# ours\n\n  node-1.example  slots=8  # fast\nnode2\tslots=8\n10.0.0.3 slots=8\n")
    hosts = hostfile.read(file)
    assert hosts == (("node-1.example", "node2", "10.0.0.3"), 8)
    assert dict.fromkeys(hosts.names, hosts.slots) == fetch_hostfile(file)


EXPECTED = r"expected a line `HOST slots=PROCESSES`"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", f"^launch.hostfile=hosts names no machine; {EXPECTED}"),
        ("# node1 slots=8\n", f"^launch.hostfile=hosts names no machine; {EXPECTED}"),
        (
            "node1 slots=8\nnode1 slots=8\n",
            "^launch.hostfile=hosts:2: node1 is there twice; give it one line",
        ),
        (
            "node1 slots=eight\n",
            f"^launch.hostfile=hosts:1: 'node1 slots=eight'; {EXPECTED}.* as `node1 slots=8`$",
        ),
        ("node1 slots=0\n", "hosts:1: 'node1 slots=0'; expected"),
        ("node1 slots=-2\n", "hosts:1: 'node1 slots=-2'; expected"),
        ("node1\n", "hosts:1: 'node1'; expected"),
        ("me@node1 slots=8\n", "hosts:1: 'me@node1 slots=8'; .*; a user's name goes into ~/.ssh/config$"),
        ("-oProxyCommand=x slots=8\n", "hosts:1: '-oProxyCommand=x slots=8'; expected"),
        (
            "node1 slots=8\nnode2 slots=4\n",
            r"^launch.hostfile=hosts: slots differ \(node1 8, node2 4\); give all",
        ),
    ],
)
def test_a_bad_hostfile_is_refused_by_line(text, words):
    with pytest.raises(ValueError, match=words) as refused:
        agent.run(config_of(launcher="deepspeed", hostfile=write_hostfile(text)))
    assert "\n" not in str(refused.value)
    assert [path.name for path in Path().iterdir()] == ["hosts"], "nothing was started"


def test_a_hostfile_that_is_not_there_or_no_text_is_refused():
    with pytest.raises(
        ValueError, match="^launch.hostfile=hosts: No such file or directory; expected a line"
    ):
        hostfile.read("hosts")
    Path("hosts").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="^launch.hostfile=hosts is not a text file; expected"):
        hostfile.read("hosts")


def test_processes_that_are_not_the_slots_are_refused():
    config = config_of(hostfile=write_hostfile("127.0.0.1 slots=2\n"), nproc_per_node=4)
    with pytest.raises(
        ValueError, match="^launch.nproc_per_node=4, but hosts has slots=2; make them the same, or"
    ):
        agent.run(config)


def test_the_first_host_must_be_this_one():
    with pytest.raises(
        ValueError, match="^no-such.invalid, the first machine of the hostfile, is not this one"
    ):
        hostfile.allocation_of(hostfile.Hostfile(("no-such.invalid", "127.0.0.2"), 1))
    with pytest.raises(
        ValueError, match=f"^localhost means another machine to each of node2; .*: {socket.gethostname()}"
    ):
        hostfile.allocation_of(hostfile.Hostfile(("localhost", "node2"), 1))


def test_without_ssh_other_machines_are_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="^no ssh on this machine to reach 127.0.0.2 with; install OpenSSH"):
        hostfile.allocation_of(hostfile.Hostfile(("127.0.0.1", "127.0.0.2"), 1))
    assert hostfile.allocation_of(hostfile.Hostfile(("127.0.0.1",), 2)).nodes == 1


def test_keys_reach_other_machines_by_standard_input_only():
    variables = {"WANDB_API_KEY": "k", "HF_TOKEN": "t", "NCCL_DEBUG": "INFO"}
    mine = variables | {
        "HOME": "/home/me",
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "1",
        "X": "1",
        "SLURM_JOB_ID": "1",
    }
    assert hostfile.forwarded(mine, {"X"}) == variables | {"X": "1"}
    allocation = replace(ALLOCATION, node=1)
    line = json.loads(ssh.first_line(config_of(), allocation, variables))
    assert line["variables"].items() > variables.items()
    assignment = ssh.Assignment.model_validate_json(line["variables"][ssh.ASSIGNMENT])
    assert (assignment.config, assignment.allocation) == (config_of(), allocation)
    assert line["folder"] == str(Path.cwd())
    argv = ssh.ssh_argv("node2")
    assert argv[:7] == ["ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "node2"]
    assert shlex.split(argv[7])[:4] == ["exec", sys.executable, "-I", "-c"]


def test_a_deepspeed_env_file_is_heeded():
    Path(".deepspeed_env").write_text("# ours\nNCCL_IB_HCA=mlx5_0\n\nMY_PROXY=http://a=b\n")
    environment = {"HOME": "h"}
    assert hostfile.add_deepspeed_env(environment) == {"NCCL_IB_HCA", "MY_PROXY"}
    assert environment == {"HOME": "h", "NCCL_IB_HCA": "mlx5_0", "MY_PROXY": "http://a=b"}
    Path(".deepspeed_env").write_text("NCCL_IB_HCA\n")
    with pytest.raises(ValueError, match=r"^\.deepspeed_env:1 is not NAME=VALUE; correct or remove the line"):
        hostfile.add_deepspeed_env(environment)
