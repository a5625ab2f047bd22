"""A rank that hangs ends the attempt, by name, with the stacks of all ranks in their logs."""

import os
import re
import signal
import subprocess
import time

import forked
import psutil
import pytest
from slurm_runs import attempts, wait_for_step, write_config

pytestmark = pytest.mark.slow
STALL_S = 15


def ranks(run):
    """Return the ranks' processes, by rank."""
    ours = [
        one
        for one in psutil.process_iter(["cmdline"])
        if str(run / "config.yaml") in (one.info["cmdline"] or [])
    ]
    return {int(one.name().removeprefix("rank-")): one for one in ours if one.name().startswith("rank-")}


def start(folder, *arguments):
    command = [*forked.COMMAND, "train", "my.yaml", *arguments]
    process = forked.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_step(folder / "runs/my", 1, 6)
    return process


def test_the_rank_that_hangs_is_named_and_all_write_their_stacks(tmp_path):
    write_config(tmp_path, 400)
    run = tmp_path / "runs/my"
    process = start(tmp_path, "--nproc", "2", f"launch.stall_timeout_s={STALL_S}")
    started = time.monotonic()
    os.kill(ranks(run)[1].pid, signal.SIGSTOP)
    screen = process.communicate(timeout=500)[0]
    assert process.returncode == 1, screen
    assert time.monotonic() - started > STALL_S - 1
    assert re.search(
        r"failed: rank 1 on \S+: no progress for \d+ s \(launch.stall_timeout_s is 15\), in step \d+ \(its"
        r" process is"
        r" stopped: SIGSTOP, or a debugger\), the others wait; the stacks of all ranks are in"
        r" .*/logs/attempt-1/rank-\*\.log",
        screen,
    )
    assert "Traceback" not in screen
    assert "most recent call first" in (run / "logs/attempt-1/rank-0.log").read_text()
    assert attempts(run)[0]["reason"] == "failed"
    assert not ranks(run)


def test_stacks_can_be_asked_for_and_change_nothing(tmp_path):
    write_config(tmp_path, 40)
    run = tmp_path / "runs/my"
    process = start(tmp_path)
    os.kill(ranks(run)[0].pid, 41)
    screen = process.communicate(timeout=500)[0]
    assert process.returncode == 0, screen
    assert "most recent call first" in (run / "logs/attempt-1/rank-0.log").read_text()
