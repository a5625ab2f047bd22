"""Runs that DeepSpeed's launcher starts: the same adapter, the same stops, the same words when a rank is
killed.

The second machine is another loopback address; ssh, which would reach it, is a script that runs the command
here with nothing of this environment. That script is the only stand-in.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import forked
import psutil
import pytest
from lives import COMMAND, write_config

pytestmark = pytest.mark.slow

# sees to it that nothing but standard input brings keys, and notes the command lines
SSH = """#!/bin/sh
while [ "$1" != 127.0.0.2 ]; do shift; done
echo "$@" >> {log}
shift
cd /
exec env -i HOME="$HOME" PATH=/usr/bin:/bin sh -c "$*"
"""
DEEPSPEED = ("--launcher", "deepspeed")
LONG = ("train.max_steps=100000", "train.eval_strategy=no", "train.save_strategy=no", "log.logging_steps=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    write_config(folder, 4)
    (folder / "one").write_text("localhost slots=2\n")
    (folder / "two").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    (folder / "bin").mkdir()
    ssh = folder / "bin" / "ssh"
    ssh.write_text(SSH.format(log=shlex.quote(str(folder / "ssh.log"))))
    ssh.chmod(0o755)
    return folder


def start(folder, name, *arguments):
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    return forked.Popen(
        [*COMMAND, "my.yaml", f"run_dir={name}", *arguments],
        cwd=folder,
        env=environment | {"PATH": path, "OMP_NUM_THREADS": "1", "WANDB_API_KEY": "the-key"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(folder, name, *arguments) -> str:
    with start(folder, name, *arguments) as process:
        screen = process.communicate(timeout=500)[0]
    assert process.returncode == 0, screen
    return screen


def adapter(folder, name) -> bytes:
    return (folder / name / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def by_torchrun(folder) -> bytes:
    run(folder, "torchrun", "--nproc", "2")
    return adapter(folder, "torchrun")


def descendants(process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def rank(process, number) -> psutil.Process:
    for one in descendants(process):
        if one.environ().get("RANK") == str(number):
            return one
    raise AssertionError(f"no rank {number}")


def wait_for_training(folder, name, process) -> list[psutil.Process]:
    """Wait until a step is trained; return all processes below the agent."""
    for _ in range(1500):
        if (folder / name / "metrics.jsonl").exists() and (folder / name / "metrics.jsonl").read_text():
            return descendants(process)
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    raise AssertionError("no progress")


def assert_nobody_is_left(processes) -> None:
    left = psutil.wait_procs(processes, timeout=500)[1]
    assert not [one for one in left if one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.long
def test_the_adapter_is_that_of_torchrun(folder, by_torchrun):
    screen = run(folder, "one-run", *DEEPSPEED, "--hostfile", "one")
    assert adapter(folder, "one-run") == by_torchrun
    assert "done: the adapter is in one-run/adapter; next:" in screen
    assert "launch.py" not in screen, "what DeepSpeed says is in the log"
    log = (folder / "one-run" / "logs" / "attempt-1" / "launch.log").read_text()
    assert "nnodes=1, num_local_procs=2" in log
    assert "29500" not in log


def test_two_machines_train_the_same_and_no_key_is_on_a_command_line_or_disk(folder, by_torchrun):
    screen = run(folder, "two-run", *DEEPSPEED, "--hostfile", "two", "log.wandb=off")
    assert adapter(folder, "two-run") == by_torchrun
    assert "starting 2 processes on 2 nodes" in screen
    (attempt,) = (
        json.loads(line) for line in (folder / "two-run" / "attempts.jsonl").read_text().splitlines()
    )
    assert (attempt["nodes"], attempt["reason"]) == (["127.0.0.1", "127.0.0.2"], "done")
    assert len((folder / "ssh.log").read_text().splitlines()) == 1
    for file in [folder / "ssh.log", *(folder / "two-run").rglob("*.*")]:
        assert not file.is_file() or b"the-key" not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("number", "to", "hosts"),
    [
        pytest.param(signal.SIGHUP, "all", "one", id="HUP to every process", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, "group", "two", id="Ctrl-C, two machines"),
    ],
)
def test_a_stop_request_ends_with_the_step_saved(folder, number, to, hosts):
    name = f"{number.name}-{hosts}"
    with start(folder, name, *DEEPSPEED, "--hostfile", hosts, *LONG) as process:
        others = wait_for_training(folder, name, process)
        if to == "group":
            os.killpg(process.pid, number)
        else:
            for one in [process, *others] if to == "all" else [process]:
                one.send_signal(number)
        screen = process.communicate(timeout=500)[0]
    assert process.returncode == 75, screen
    assert "which is saved; the same command resumes" in screen
    (attempt,) = (json.loads(line) for line in (folder / name / "attempts.jsonl").read_text().splitlines())
    assert (attempt["reason"], attempt["message"]) == ("stopped", number.name)
    assert (folder / name / f"checkpoint-{attempt['last_step']}" / "manifest.json").exists()
    assert_nobody_is_left(others)


@pytest.mark.long
@pytest.mark.parametrize("hosts", ["one", "two"])
def test_a_killed_rank_is_named_and_nobody_is_left(folder, hosts):
    name = f"killed-{hosts}"
    with start(folder, name, *DEEPSPEED, "--hostfile", hosts, *LONG) as process:
        others = wait_for_training(folder, name, process)
        rank(process, 1).kill()
        screen = process.communicate(timeout=500)[0]
    assert process.returncode == 1, screen
    assert (
        "failed: rank 1 was killed by SIGKILL, not by qwenlora: by hand, by the scheduler, or for lack of"
        in screen
    )
    assert_nobody_is_left(others)


@pytest.mark.long
def test_a_killed_agent_leaves_nobody(folder):
    with start(folder, "orphans", *DEEPSPEED, "--hostfile", "two", *LONG) as process:
        others = wait_for_training(folder, "orphans", process)
        process.kill()
        process.communicate(timeout=500)
    assert_nobody_is_left(others)


def test_a_machine_that_ssh_does_not_reach_is_named(folder, tmp_path):
    (tmp_path / "ssh").write_text(
        "#!/bin/sh\necho 'me@127.0.0.2: Permission denied (publickey).' >&2\nexit 255\n"
    )
    (tmp_path / "ssh").chmod(0o755)
    answer = forked.run(
        [*COMMAND, "my.yaml", "run_dir=unreached", *DEEPSPEED, "--hostfile", "two"],
        cwd=folder,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert answer.returncode == 1
    expected = (
        "failed: 127.0.0.2: ssh failed: me@127.0.0.2: Permission denied (publickey).; `ssh 127.0.0.2 true`"
        " must work without a password\n"
    )
    assert expected in answer.stdout


@pytest.mark.long
def test_deepspeed_by_hand_trains_the_same(folder, by_torchrun):
    answer = subprocess.run(
        [*COMMAND, "my.yaml", "run_dir=hand", *DEEPSPEED, "--nproc", "2", "--dry-run"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        check=True,
    )
    (line,) = (line for line in answer.stdout.splitlines() if line.startswith("# command"))
    argv = shlex.split(line.removeprefix("# command"))
    assert argv[0] == sys.executable
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    by_hand = subprocess.run(
        argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert by_hand.returncode == 0, by_hand.stdout + by_hand.stderr
    assert adapter(folder, "hand") == by_torchrun
