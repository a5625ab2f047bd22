"""Several machines without Slurm: the hostfile of `qwenlora train --hostfile`, with a line
`HOST slots=PROCESSES` for each machine, as for DeepSpeed; and the variables that the other machines get."""

import re
import secrets
import shutil
import socket
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

from qwenlora.configs import Config
from qwenlora.launch.allocation import Allocation
from qwenlora.run.hardware import gpu_count

# no @ and no leading dash: the name is both an address and an argument of ssh
_LINE = re.compile(r"(?P<host>\w[\w.:-]*)\s+slots=(?P<slots>\d+)\s*(#.*)?")
_EXPECTED = "expected a line `HOST slots=PROCESSES` for each machine"
# variables that the other machines get; paths of this machine (HOME, TMPDIR) stay out
_FORWARDED = re.compile(
    "CUDA_DEVICE_|CUDA_LAUNCH_|DS_|GLOO_|HF_|HUGGING_FACE_|LD_LIBRARY_PATH|MKL_|MV2_|NCCL_|OMP_|PYTHON|QWENLORA_|"
    "TOKENIZERS_|TORCH_|TRANSFORMERS_|TRITON_|UCX_|WANDB_"
)


class Hostfile(NamedTuple):
    """The machines of a hostfile, in its order. slots: processes on each."""

    names: tuple[str, ...]
    slots: int


def read(path: str) -> Hostfile:
    """Return the contents of a hostfile. Raises: ValueError naming the line."""
    setting = f"launch.hostfile={path}"
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{setting}: {error.strerror}; {_EXPECTED}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{setting} is not a text file; {_EXPECTED}") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        host, count = _read_line(line, f"{setting}:{number}")
        if host in slots:
            raise ValueError(
                f"{setting}:{number}: {host} is there twice; give it one line with all its slots"
            )
        slots[host] = count
    if not slots:
        raise ValueError(f"{setting} names no machine; {_EXPECTED}")
    if len(set(slots.values())) > 1:
        differ = ", ".join(f"{host} {count}" for host, count in slots.items())
        raise ValueError(
            f"{setting}: slots differ ({differ}); give all machines the same number, the smallest"
        )
    return Hostfile(tuple(slots), next(iter(slots.values())))


def _read_line(line: str, place: str) -> tuple[str, int]:
    match = _LINE.fullmatch(line.strip())
    if not match or not int(match["slots"]):
        user = "; a user's name goes into ~/.ssh/config" * ("@" in line)
        raise ValueError(f"{place}: {line.strip()!r}; {_EXPECTED}, as `node1 slots=8`{user}")
    return match["host"], int(match["slots"])


def of(config: Config) -> Hostfile | None:
    """Return the hostfile that a config names; None without one. Raises: ValueError."""
    launch = config.launch
    if launch.hostfile is None:
        return None
    hosts = read(launch.hostfile)
    if launch.nproc_per_node not in (None, hosts.slots):
        raise ValueError(
            f"launch.nproc_per_node={launch.nproc_per_node}, but {launch.hostfile} has slots={hosts.slots};"
            " make them the same, or leave nproc_per_node (--nproc) out"
        )
    return hosts


def processes_per_node(config: Config) -> int:
    """Return how many ranks this node runs. Raises: ValueError when the hostfile contradicts the config."""
    hosts = of(config)
    return hosts.slots if hosts else config.launch.nproc_per_node or gpu_count() or 1


def allocation_of(hosts: Hostfile) -> Allocation:
    """Return the allocation of this machine, the hostfile's first. Raises: ValueError if it is not that."""
    first, *others = hosts.names
    if not _is_this_machine(first):
        raise ValueError(
            f"{first}, the first machine of the hostfile, is not this one ({socket.gethostname()}); start on"
            f" {first}, or give this machine the first line"
        )
    if _is_loopback(first) and not all(map(_is_loopback, others)):
        raise ValueError(
            f"{first} means another machine to each of {', '.join(others)}; write this machine's name:"
            f" {socket.gethostname()}"
        )
    if others and not shutil.which("ssh"):
        raise ValueError(f"no ssh on this machine to reach {', '.join(others)} with; install OpenSSH")
    return Allocation(0, hosts.names, None, 0, False, name=secrets.token_hex(8), secret=secrets.token_hex(32))


def _is_loopback(host: str) -> bool:
    return host.startswith(("localhost", "127."))


def _is_this_machine(host: str) -> bool:
    """Whether a name means this machine: only its own addresses can be bound."""
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in addresses:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
    except OSError:
        return False
    return True


def add_deepspeed_env(environment: MutableMapping[str, str]) -> set[str]:
    """Set the variables in .deepspeed_env (DS_ENV_FILE gives it another name), at home and here, as
    DeepSpeed's launcher does on all hosts; return their names. Raises: ValueError at a bad line."""
    name, names = environment.get("DS_ENV_FILE", ".deepspeed_env"), set()
    for file in (Path.home() / name, Path(name)):
        if not file.is_file():
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            key, equals, value = line.partition("=")
            if not line.strip() or line.startswith("#"):
                continue
            if not equals or not key.strip():
                raise ValueError(f"{file}:{number} is not NAME=VALUE; correct or remove the line")
            environment[key.strip()] = value.strip()
            names.add(key.strip())
    return names


def forwarded(environment: Mapping[str, str], more: set[str]) -> dict[str, str]:
    """Return the variables that other machines get: keys for W&B and the hub, too, and the names in more."""
    return {key: value for key, value in environment.items() if _FORWARDED.match(key) or key in more}


def with_slots(config: Config, hosts: Hostfile) -> Config:
    """Return the config with the hostfile's number of processes, for machines that cannot read the file."""
    launch = config.launch.model_copy(update={"nproc_per_node": hosts.slots})
    return config.model_copy(update={"launch": launch})
