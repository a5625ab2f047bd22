"""The agents of a job with several nodes, all on this machine and without Slurm: each has the variables that
srun would give it. No batch shell is there to requeue, so a test sees the exit codes that it would get."""

import json
import os
import secrets
import signal
import time
from pathlib import Path

import forked
import psutil
from lives import SABOTEUR


class Agents:
    """The agents, by node. output: what each printed, in folder; sabotage: by node, when it is lost by itself
    (saboteur/sitecustomize.py)."""

    def __init__(
        self, folder: Path, nodes: int, *arguments: str, sabotage: dict[int, dict] | None = None
    ) -> None:
        self.folder = folder
        job = {
            "SLURM_JOB_ID": str(secrets.randbelow(10**8)),
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NODELIST": f"127.0.0.[1-{nodes}]",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_CONF": os.devnull,  # for a file that is not there, Slurm's commands wait a minute
            "QWENLORA_REQUEUES": "1",
            "QWENLORA_SECRET": secrets.token_hex(8),
            "QWENLORA_EXIT_CODE_FILE": str(folder / "exit-code"),
        }
        ours = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.processes = []
        for node in range(nodes):
            own = {"SLURM_NODEID": str(node)}
            if sabotage and node in sabotage:
                plan = {"everyone": True} | sabotage[node]
                own |= {"QWENLORA_CHAOS": json.dumps(plan), forked.SABOTAGE: str(SABOTEUR)}
            with (folder / f"output-{node}").open("wb") as output:
                self.processes.append(
                    forked.Popen(
                        [*forked.COMMAND, "train", *arguments],
                        cwd=folder,
                        env=ours | job | own,
                        stdin=-3,
                        stdout=output,
                        stderr=output,
                    )
                )

    def __enter__(self) -> "Agents":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def rank(self, node: int) -> psutil.Process:
        """Return the one rank of a node."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for process in psutil.Process(self.processes[node].pid).children(recursive=True):
                if process.name().startswith("rank-"):
                    return process
            time.sleep(0.05)
        raise AssertionError(f"no rank on node {node}")

    def kill(self, node: int) -> None:
        """Kill a node's agent; all that it started ends with it."""
        self.processes[node].send_signal(signal.SIGKILL)

    def code(self, node: int = 0, timeout_s: float = 300.0) -> int:
        """Wait for an agent's end; return its exit code."""
        return self.processes[node].wait(timeout_s)

    def said(self, node: int = 0) -> str:
        return (self.folder / f"output-{node}").read_text()
