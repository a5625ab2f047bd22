"""Agents on the other machines of a hostfile: the first machine's agent starts them by ssh, and ends them.
They get allocation, config and variables (secret keys, too) through ssh's standard input: everybody on a
machine sees command lines, and a file may stay behind."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel

from qwenlora.configs import Config
from qwenlora.launch.allocation import Allocation
from qwenlora.launch.children import prepare_child

ASSIGNMENT = "QWENLORA_ASSIGNMENT"  # the variable that holds an agent's Assignment
_LEAVE_S = 5.0
# runs before anything of ours can be imported: PYTHONPATH is among the variables
_BOOT = (
    "import json, os, sys; line = json.loads(sys.stdin.readline()); os.chdir(line['folder']); python ="
    " sys.executable; os.execve(python, [python, '-P', '-m', 'qwenlora.launch.remote_agent'], os.environ |"
    " line['variables'])"
)


class Assignment(BaseModel):
    """What an agent on another machine runs, and as which node."""

    config: Config
    allocation: Allocation


@dataclass
class RemoteAgent:
    """The agent on another machine: the ssh client that started it, and the log of its output."""

    host: str
    ssh: "subprocess.Popen[bytes]"
    log: Path

    @property
    def failure(self) -> str:
        """Why it has ended; empty while it runs."""
        if self.ssh.poll() is None:
            return ""
        output = self.log.read_text(encoding="utf-8", errors="replace").strip()
        last = output.splitlines()[-1].strip() if output else "it printed nothing"
        if self.ssh.returncode == 255:  # the failure is ssh's own
            return f"{self.host}: ssh failed: {last}; `ssh {self.host} true` must work without a password"
        return f"{self.host}: its agent did not start: {last} (exit code {self.ssh.returncode}, {self.log})"


def ssh_argv(host: str) -> list[str]:
    """Return the command that starts an agent on a host; it reads first_line from standard input."""
    command = shlex.join([sys.executable, "-I", "-c", _BOOT])
    return ["ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", host, f"exec {command}"]


def first_line(config: Config, allocation: Allocation, variables: dict[str, str]) -> str:
    """Return the line that an agent on another machine reads. allocation: as that machine sees it."""
    assignment = Assignment(config=config, allocation=allocation).model_dump_json(by_alias=True)
    return json.dumps({"folder": str(Path.cwd()), "variables": variables | {ASSIGNMENT: assignment}}) + "\n"


@contextmanager
def agents_started(
    config: Config, allocation: Allocation, variables: dict[str, str], logs: Path
) -> Iterator[list[RemoteAgent]]:
    """Start an agent on each of the other machines; leave none behind. logs: the folder of their output."""
    agents: list[RemoteAgent] = []
    try:
        for number, host in enumerate(allocation.hosts[1:], 1):
            log = logs / f"agent-{number}.log"
            with log.open("wb") as output:
                client = subprocess.Popen(
                    ssh_argv(host),
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=prepare_child,
                )
            agents.append(RemoteAgent(host, client, log))
            assert client.stdin is not None
            try:
                with client.stdin:
                    line = first_line(config, replace(allocation, node=number), variables)
                    client.stdin.write(line.encode())
            except BrokenPipeError:
                continue  # it has ended; failure says why
        yield agents
    finally:
        end = time.monotonic() + _LEAVE_S
        while any(agent.ssh.poll() is None for agent in agents) and time.monotonic() < end:
            time.sleep(0.05)
        for agent in agents:
            agent.ssh.kill()  # the agent there ends when its connection to this one does
            agent.ssh.wait()
