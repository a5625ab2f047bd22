"""A real Slurm cluster for the tests of this folder, see cluster.sh. It needs root and a few packages."""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPT = HERE / "cluster.sh"
OVER = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
PROGRAMS = (
    "slurmctld",
    "slurmd",
    "slurmdbd",
    "sbatch",
    "munged",
    "mariadbd",
    "mariadb",
    "ip",
    "nsenter",
    "unshare",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("slurm")


class Cluster:
    """A cluster under way, and Slurm's commands on it. Each command must end within a minute."""

    def __init__(self, folder: Path, net: str = "loopback", nodes: int = 2) -> None:
        self.folder, self.net = folder, net
        # no SLURM_* of a job that runs the tests, and down with it should pytest be killed
        ours = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
        }
        self.environment = ours | {
            "CLUSTER_DIR": str(folder),
            "NET": net,
            "NODES": str(nodes),
            "OWNER": str(os.getpid()),
            "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
        }

    def run(self, *command: object, check: bool = True, **options) -> subprocess.CompletedProcess:
        """Run a command where Slurm's commands work. Options: of subprocess.run."""
        words = [str(word) for word in command]
        if self.net == "netns":
            words = [str(SCRIPT), "exec", *words]
        settings = {"env": self.environment, "capture_output": True, "text": True, "timeout": 60}
        answer = subprocess.run(words, **settings | options, check=False)
        assert not check or answer.returncode == 0, f"{words}: {answer.stdout}{answer.stderr}"
        return answer

    def script(self, *arguments: str) -> str:
        """Run cluster.sh. Not through a pipe, which its daemons would keep open."""
        with tempfile.TemporaryFile("w+") as said:
            command = [str(SCRIPT), *arguments]
            answer = subprocess.run(
                command,
                env=self.environment,
                stdout=said,
                stderr=said,
                stdin=subprocess.DEVNULL,
                timeout=900,
                check=False,
            )
            said.seek(0)
            text = said.read()
        assert answer.returncode == 0, f"cluster.sh {arguments}: {text}"
        return text

    def sbatch(self, *arguments: object, cwd: Path, env: dict[str, str] | None = None) -> str:
        """Return the new job's id."""
        command = ("sbatch", "--parsable", *arguments)
        return self.run(*command, cwd=cwd, env=self.environment | (env or {})).stdout.strip()

    def scontrol(self, *arguments: object) -> str:
        return self.run("scontrol", *arguments).stdout

    def scancel(self, *arguments: object) -> None:
        self.run("scancel", *arguments)

    def sacct(self, *arguments: object) -> list[str]:
        """Return the lines of `sacct -XnP`."""
        return self.run("sacct", "-X", "-n", "-P", *arguments).stdout.splitlines()

    def state(self, job_id: str) -> str:
        """Return a job's state in Slurm's words: COMPLETING while it is being stopped, "" when it is not
        known."""
        answer = self.run("squeue", "-h", "-t", "all", "-o", "%T", "-j", job_id, check=False).stdout.split()
        return answer[0] if answer else ""

    def wait(self, job_id: str, *states: str, timeout: float = 900) -> str:
        """Return the state, one of those named, as soon as the job has it."""
        deadline = time.monotonic() + timeout
        while (state := self.state(job_id)) not in states:
            over = time.monotonic() > deadline or state in OVER
            assert not over, f"{job_id} is {state}, not {states}; {self._about(job_id)}"
            time.sleep(0.1)
        return state

    def _about(self, job_id: str) -> str:
        """Return what Slurm knows of a job, and the end of what it said."""
        about = self.scontrol("show", "job", job_id)
        output = Path(about.partition("StdOut=")[2].partition("\n")[0])
        return about + (output.read_text(errors="replace")[-5000:] if output.is_file() else "")

    def wait_idle(self, timeout: float = 900) -> None:
        """Cancel all jobs, and wait until every node is free."""
        deadline = time.monotonic() + timeout
        while self.run("squeue", "-h", "-o", "%i").stdout or self._node_states() != "idle":
            self.scancel("--user", "root")
            assert time.monotonic() < deadline, self.run("sinfo", "-N", "-l").stdout
            time.sleep(0.2)

    def wait_down(self, node: str, timeout: float = 900) -> None:
        """Wait until Slurm has noticed that a node is gone."""
        deadline = time.monotonic() + timeout
        while "down" not in (states := self.run("sinfo", "-h", "-N", "-n", node, "-o", "%T").stdout):
            assert time.monotonic() < deadline, states
            time.sleep(0.2)

    def _node_states(self) -> str:
        return " ".join(sorted(set(self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").stdout.split())))

    def kill_node(self, name: str) -> None:
        self.script("node-kill", name)

    def start_node(self, name: str) -> None:
        self.script("node-up", name)


def _booted(factory, net, nodes):
    missing = [
        name for name in PROGRAMS if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    ]
    why = f"{', '.join(missing)} not installed" if missing else "not root" if os.getuid() else ""
    if why:
        text = f"no Slurm cluster: {why}; as root on Debian: {SCRIPT} install"
        if os.environ.get("QWENLORA_REQUIRE_SLURM") == "1":
            pytest.fail(text)
        pytest.skip(text)
    cluster = Cluster(factory.mktemp(f"slurm-{net}"), net, nodes)
    try:
        cluster.script("up")
        yield cluster
    finally:
        cluster.script("down")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Two nodes on the machine's own network."""
    yield from _booted(tmp_path_factory, "loopback", 2)


@pytest.fixture(scope="session")
def netns_cluster(tmp_path_factory):
    """Four nodes with a network each: an address that only the other nodes can reach, ports of their own."""
    yield from _booted(tmp_path_factory, "netns", 4)
