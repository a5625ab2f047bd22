"""The commands that start ranks are lists, and bring the nodes together."""

import base64
import json
import sys
from dataclasses import replace

import pytest

from qwenlora.launch import commands
from qwenlora.launch.allocation import Allocation

ALLOCATION = Allocation(0, ("127.0.0.1", "127.0.0.2"), None, 0, False, name="n", secret="s")


def world(argv: list[str]) -> dict:
    (text,) = (word.removeprefix("--world_info=") for word in argv if word.startswith("--world_info="))
    return json.loads(base64.urlsafe_b64decode(text))


def test_the_torchrun_command_is_a_list_and_asks_for_a_free_port(tmp_path):
    argv = commands.torchrun_argv([f"{tmp_path}/a b; rm -rf x/config.yaml", "lora.r=3"], 2)
    assert argv == [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--signals-to-handle=SIGQUIT",
        "-m",
        "qwenlora.trainer.main",
        f"{tmp_path}/a b; rm -rf x/config.yaml",
        "lora.r=3",
    ]


def test_the_command_on_one_node():
    alone = Allocation(0, ("node1",), None, 0, False)
    argv = commands.deepspeed_argv(["a b; rm -rf x/config.yaml", "lora.r=3"], 2, alone, 12345)
    assert world(argv) == {"node-0": [0, 1]}
    assert argv == [
        sys.executable,
        "-m",
        "deepspeed.launcher.launch",
        argv[3],
        "--node_rank=0",
        "--master_addr=127.0.0.1",
        "--master_port=12345",
        "--no_local_rank",
        "--module",
        "qwenlora.trainer.main",
        "a b; rm -rf x/config.yaml",
        "lora.r=3",
    ]


def test_the_command_on_the_second_of_three_nodes(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    argv = commands.deepspeed_argv(
        ["config.yaml"], 2, replace(ALLOCATION, node=1, hosts=("node1", "node2", "node3")), 12345
    )
    assert list(world(argv).items()) == [("node-0", [0, 1]), ("node-1", [4, 5]), ("node-2", [0, 1])]
    assert argv[4:7] == ["--node_rank=1", "--master_addr=node1", "--master_port=12345"]


def test_torchrun_on_the_hosts_of_a_hostfile():
    second = replace(ALLOCATION, node=1, hosts=("node1", "node2"))
    rendezvous = commands.rendezvous_options(second, "n.1", 12345, 60)
    argv = commands.torchrun_argv(["config.yaml"], 4, rendezvous)
    assert argv[3:9] == [
        "--rdzv-backend=static",
        "--nnodes=2",
        "--node-rank=1",
        "--master-addr=node1",
        "--master-port=12345",
        "--nproc-per-node=4",
    ]


@pytest.mark.parametrize("node", [0, 1])
def test_torchrun_on_the_nodes_of_a_job(node):
    allocation = Allocation(node, ("node1", "node2"), "12", 0, True)
    assert commands.rendezvous_options(allocation, "12.0.1", 12345, 90) == [
        "--nnodes=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node1:12345",
        "--rdzv-id=12.0.1",
        f"--rdzv-conf=is_host={1 - node},join_timeout=90,last_call_timeout=1",
    ]
