"""The commands that start ranks are lists, and bring the nodes together."""

import base64
import json
import sys
from dataclasses import replace

import pytest

from qwenlora.configs.schema import Config, Data, Launch, Model
from qwenlora.launch import commands
from qwenlora.launch.allocation import Allocation
from qwenlora.launch.launcher import rank_variables
from qwenlora.launch.node import Node

ALLOCATION = Allocation(0, ("127.0.0.1", "127.0.0.2"), None, 0, False, name="n", secret="s")


@pytest.fixture
def node_of():
    def node_of(allocation, processes):
        config = Config(run_dir="runs/x", model=Model(name_or_path="tiny"), data=Data(train="example"))
        config = config.model_copy(update={"launch": Launch(nproc_per_node=processes)})
        return Node(config, allocation, None, None, None, None)

    return node_of


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


def test_the_ranks_of_the_second_node_follow_those_of_the_first(node_of):
    second = node_of(replace(ALLOCATION, node=1, hosts=("node1", "node2")), processes=2)
    assert rank_variables(second, 12345) == [
        {
            "MASTER_ADDR": "node1",
            "MASTER_PORT": "12345",
            "LOCAL_WORLD_SIZE": "2",
            "WORLD_SIZE": "4",
            "GROUP_RANK": "1",
            "LOCAL_RANK": str(local),
            "RANK": str(2 + local),
        }
        for local in range(2)
    ]


def test_the_ranks_of_one_machine_meet_on_it_whatever_its_name_is(node_of):
    (rank,) = rank_variables(node_of(Allocation(0, ("no.such.name",), None, 0, False), processes=1), 12345)
    assert (rank["MASTER_ADDR"], rank["RANK"], rank["WORLD_SIZE"]) == ("127.0.0.1", "0", "1")
