"""DeepSpeed's launcher, and hostfiles: the commands, and what is refused before anything starts."""

import base64
import json
import os
import shlex
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qwenlora.configs import load_config
from qwenlora.launch import agent, commands, hardware, hostfile, refusals, ssh
from qwenlora.launch.allocation import Allocation
from qwenlora.launch.dry_run import dry_run
from qwenlora.launch.refusals import check_start
from qwenlora.run.lent_screen import borrow, lend

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
ALLOCATION = Allocation(0, ("127.0.0.1", "127.0.0.2"), None, 0, False, name="n", secret="s")


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def config_of(**launch):
    return load_config(TINY, {f"launch.{key}": value for key, value in launch.items()})


def write_hostfile(text: str) -> str:
    Path("hosts").write_text(text)
    return "hosts"


def world(argv: list[str]) -> dict:
    (text,) = (word.removeprefix("--world_info=") for word in argv if word.startswith("--world_info="))
    return json.loads(base64.urlsafe_b64decode(text))


def test_the_command_on_one_node():
    argv = commands.deepspeed_argv(["a b; rm -rf x/config.yaml", "lora.r=3"], 2, port=12345)
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
    argv = commands.deepspeed_argv(["config.yaml"], 2, 1, 3, "node1", 12345)
    assert list(world(argv).items()) == [("node-0", [0, 1]), ("node-1", [4, 5]), ("node-2", [0, 1])]
    assert argv[4:7] == ["--node_rank=1", "--master_addr=node1", "--master_port=12345"]


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        (None, [0, 1]),
        ("3,2", [3, 2]),
        ("5,6,7", [5, 6]),
        ("GPU-5f,MIG-6a", ["GPU-5f", "MIG-6a"]),
        ("7", [7, "-1"]),
        ("", ["-1", "-1"]),
        ("-1", ["-1", "-1"]),
    ],
)
def test_ranks_see_the_gpus_that_the_user_chose(monkeypatch, visible, devices):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.visible_devices(2) == devices


def test_torchrun_on_the_hosts_of_a_hostfile():
    rendezvous = commands.rendezvous_options(
        Allocation(1, ("node1", "node2"), None, 0, False, name="n", secret="s"), "n.1", 12345, 60
    )
    argv = commands.torchrun_argv(["config.yaml"], 4, rendezvous)
    assert argv[3:9] == [
        "--rdzv-backend=static",
        "--nnodes=2",
        "--node-rank=1",
        "--master-addr=node1",
        "--master-port=12345",
        "--nproc-per-node=4",
    ]


def test_a_dry_run_shows_the_command_to_paste():
    arguments = ["my configs/tiny.yaml", "launch.launcher=deepspeed", "launch.nproc_per_node=2"]
    text = dry_run(load_config(TINY, arguments[1:]), arguments)
    assert "  launcher: deepspeed\n" in text
    (line,) = (line for line in text.splitlines() if line.startswith("# command"))
    command = shlex.split(line.removeprefix("# command"))
    port = command.pop(4)
    assert port.startswith("--master_port=")
    assert 10_000 <= int(port.partition("=")[2]) < 32_000
    assert command == [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus=2",
        "--no_local_rank",
        "--module",
        "qwenlora.trainer.main",
        *arguments,
    ]


def test_a_dry_run_of_several_hosts_counts_them():
    file = write_hostfile("node1 slots=2\nnode2 slots=2\n")
    arguments = [
        str(TINY),
        "launch.launcher=deepspeed",
        f"launch.hostfile={file}",
        "train.global_batch_size=40",
    ]
    text = dry_run(load_config(TINY, arguments[1:]), arguments)
    assert "# processes           4 on 2 hosts\n" in text
    assert "# global batch        40 rows = 4 processes x 10 x 1 accumulated\n" in text
    assert "deepspeed.launcher.runner --hostfile=hosts --master_port=" in text
    assert "# hosts               node1 node2; by hand, DeepSpeed needs pdsh to reach them\n" in text
    by_torchrun = dry_run(load_config(TINY, arguments[2:]), arguments)
    assert "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=node1:" in by_torchrun


def test_a_hostfile_is_read_as_deepspeed_reads_it():
    from deepspeed.launcher.runner import fetch_hostfile

    file = write_hostfile("# ours\n\n  node-1.example  slots=8  # fast\nnode2\tslots=8\n10.0.0.3 slots=8\n")
    found = hostfile.read(file)
    assert found == (("node-1.example", "node2", "10.0.0.3"), 8)
    assert dict.fromkeys(found.names, found.slots) == fetch_hostfile(file)


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
    with pytest.raises(ValueError, match="^launch.hostfile=hosts is no text; expected"):
        hostfile.read("hosts")


def test_a_batch_that_does_not_divide_by_all_slots_is_refused():
    file = write_hostfile("127.0.0.1 slots=3\n127.0.0.2 slots=3\n")
    with pytest.raises(ValueError, match="global_batch_size=20 is not divisible by .* = 60"):
        agent.run(config_of(launcher="deepspeed", hostfile=file))


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


@pytest.mark.parametrize("launch", [{"launcher": "deepspeed"}, {"hostfile": "hosts"}], ids=str)
def test_in_a_slurm_job_both_are_refused(monkeypatch, launch):
    from qwenlora.jobs import submit

    (key,) = launch
    with pytest.raises(
        ValueError, match=f"^launch.{key}=.* is for machines without Slurm: .*; leave --{key} out$"
    ):
        submit(TINY, {f"launch.{key}": launch[key]}, timeout_min=1)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(
        ValueError, match=f"^launch.{key}=.* is for machines without Slurm: .*; leave --{key} out$"
    ):
        agent.run(config_of(**launch))


def test_without_deepspeed_its_launcher_is_refused(monkeypatch):
    monkeypatch.setattr(refusals, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="^launch.launcher=deepspeed needs the deepspeed package, .*: pip install"
    ):
        check_start(config_of(launcher="deepspeed"))


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


def test_a_lent_screen_is_the_same_open_file(tmp_path, capfd):
    with lend(str(tmp_path)) as path:
        for _ in range(2):
            with os.fdopen(borrow(path), "w") as screen:
                screen.write("said\n")
    assert capfd.readouterr().out == "said\nsaid\n"
