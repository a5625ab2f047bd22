"""Agents on the other machines of a hostfile: started by ssh from the first one's, told what they need, ended
with it.

What an agent there needs (its place, the config, variables with keys) goes through ssh's standard input: a
command line is seen by everybody on a machine, and a file may stay.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from qwenlora.configs import Config
from qwenlora.launch.allocation import Allocation
from qwenlora.launch.children import prepare_child

_NAME = "QWENLORA_ELSEWHERE"
_LEAVE_S = 5.0
# runs there before anything of ours can be imported: PYTHONPATH is among what it is told
_BOOT = (
    'import json, os, sys; told = json.loads(sys.stdin.readline()); os.chdir(told["folder"]); python ='
    " sys.executable; "
    'os.execve(python, [python, "-P", "-m", "qwenlora.launch.elsewhere"], os.environ | told["variables"])'
)


@dataclass
class Started:
    """The agent of another machine, as this one sees it: an ssh client and what came out of it."""

    host: str
    ssh: "subprocess.Popen[bytes]"
    log: Path

    @property
    def failed(self) -> str:
        """What went wrong, when it has ended; else nothing."""
        if self.ssh.poll() is None:
            return ""
        said = self.log.read_text(encoding="utf-8", errors="replace").strip()
        last = said.splitlines()[-1].strip() if said else "without a word"
        if self.ssh.returncode == 255:  # ssh's own
            return f"{self.host}: ssh failed: {last}; `ssh {self.host} true` must work without a password"
        return f"{self.host}: its agent did not start: {last} (exit code {self.ssh.returncode}, {self.log})"


def ssh_argv(host: str) -> list[str]:
    """Return the command that starts an agent on a host; it waits there for a line of JSON on its standard
    input."""
    command = shlex.join([sys.executable, "-I", "-c", _BOOT])
    return ["ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", host, f"exec {command}"]


def told(config: Config, where: Allocation, variables: dict[str, str]) -> str:
    """Return the line that an agent elsewhere is told. where: its place."""
    place = json.dumps({"config": config.model_dump(mode="json", by_alias=True), "where": asdict(where)})
    line = {"folder": str(Path.cwd()), "variables": variables | {_NAME: place}}
    return json.dumps(line) + "\n"


@contextmanager
def started(
    config: Config, where: Allocation, variables: dict[str, str], logs: Path
) -> Iterator[list[Started]]:
    """Start an agent on each of the other machines; leave none behind. logs: where what they say goes."""
    agents: list[Started] = []
    try:
        for node, host in enumerate(where.hosts[1:], 1):
            log = logs / f"agent-{node}.log"
            with log.open("wb") as said:
                ssh = subprocess.Popen(
                    ssh_argv(host),
                    stdin=subprocess.PIPE,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=prepare_child,
                )
            agents.append(Started(host, ssh, log))
            assert ssh.stdin is not None
            try:
                with ssh.stdin:
                    ssh.stdin.write(told(config, replace(where, node=node), variables).encode())
            except BrokenPipeError:
                continue  # it has ended; failed says why
        yield agents
    finally:
        end = time.monotonic() + _LEAVE_S
        while any(agent.ssh.poll() is None for agent in agents) and time.monotonic() < end:
            time.sleep(0.05)
        for agent in agents:
            agent.ssh.kill()  # the agent there ends when it hears no more of this one
            agent.ssh.wait()


def main() -> int:
    """Be the agent of one of the other machines; return its exit code."""
    from qwenlora.launch import agent

    place = json.loads(os.environ.pop(_NAME))
    config = Config.model_validate_json(json.dumps(place["config"]))
    where = Allocation(**place["where"] | {"hosts": tuple(place["where"]["hosts"])})
    return agent.follow(config, where)


if __name__ == "__main__":
    sys.exit(main())
