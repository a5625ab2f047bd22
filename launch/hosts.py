"""Several machines without Slurm: the hostfile, what is refused of it, and what of this machine the others
are told.

`qwenlora train my.yaml --hostfile hosts`, with a line `HOST slots=PROCESSES` a machine, as DeepSpeed and MPI
read it. How agents start on the others is elsewhere.py's.
"""

import re
import secrets
import shutil
import socket
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

from qwenlora.configs import Config
from qwenlora.launch.allocation import Allocation

# no @ and no leading dash: the name is both an address and an argument of ssh
_LINE = re.compile(r"(?P<host>\w[\w.:-]*)\s+slots=(?P<slots>\d+)\s*(#.*)?")
# of the environment, what the other machines are told; paths of this machine's own (HOME, TMPDIR) stay out
_CARRIED = (
    "CUDA_DEVICE_",
    "CUDA_LAUNCH_",
    "DS_",
    "GLOO_",
    "HF_",
    "HUGGING_FACE_",
    "LD_LIBRARY_PATH",
    "MKL_",
    "MV2_",
    "NCCL_",
    "OMP_",
    "PYTHON",
    "QWENLORA_",
    "TOKENIZERS_",
    "TORCH_",
    "TRANSFORMERS_",
    "TRITON_",
    "UCX_",
    "WANDB_",
)


class Hosts(NamedTuple):
    """The machines of a hostfile, in its order, and how many processes each runs."""

    names: tuple[str, ...]
    slots: int


def read(path: str) -> Hosts:
    """Return what a hostfile says. Raises: ValueError naming the line."""
    what, expected = f"launch.hostfile={path}", "expected a line `HOST slots=PROCESSES` for each machine"
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{what}: {error.strerror}; {expected}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{what} is no text; {expected}") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if not found or not int(found["slots"]):
            user = "; a user's name goes into ~/.ssh/config" * ("@" in line)
            raise ValueError(f"{what}:{number}: {line.strip()!r}; {expected}, as `node1 slots=8`{user}")
        if found["host"] in slots:
            raise ValueError(
                f"{what}:{number}: {found['host']} is there twice; give it one line with all its slots"
            )
        slots[found["host"]] = int(found["slots"])
    if not slots:
        raise ValueError(f"{what} names no machine; {expected}")
    if len(set(slots.values())) > 1:
        differ = ", ".join(f"{host} {count}" for host, count in slots.items())
        raise ValueError(f"{what}: slots differ ({differ}); give all machines the same number, the smallest")
    return Hosts(tuple(slots), next(iter(slots.values())))


def of(config: Config) -> Hosts | None:
    """Return the hosts that a config names, if it does. Raises: ValueError."""
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


def allocation_of(hosts: Hosts) -> Allocation:
    """Return this machine's place among hosts: the first. Raises: ValueError when it cannot lead them."""
    first, *others = hosts.names
    if not _is_here(first):
        raise ValueError(
            f"{first}, the first machine of the hostfile, is not this one ({socket.gethostname()}); start on"
            f" {first}, or give this machine the first line"
        )
    if first.startswith(("localhost", "127.")) and not all(
        name.startswith(("localhost", "127.")) for name in others
    ):
        raise ValueError(
            f"{first} means another machine to each of {', '.join(others)}; write this machine's name:"
            f" {socket.gethostname()}"
        )
    if others and not shutil.which("ssh"):
        raise ValueError(
            f"there is no ssh here, by which {', '.join(others)} would be reached; install OpenSSH"
        )
    return Allocation(0, hosts.names, None, 0, False, name=secrets.token_hex(8), secret=secrets.token_hex(32))


def _is_here(host: str) -> bool:
    """Whether a name means this machine: only its own addresses can be bound."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
    except OSError:
        return False
    return True


def add_deepspeed_env(environment: MutableMapping[str, str]) -> set[str]:
    """Set what the user's .deepspeed_env says, as DeepSpeed's launcher would on all hosts; return the names.

    It is looked for at home and here; DS_ENV_FILE gives it another name. Raises: ValueError.
    """
    name, names = environment.get("DS_ENV_FILE", ".deepspeed_env"), set()
    for file in (Path.home() / name, Path(name)):
        if not file.is_file():
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            key, equals, value = line.partition("=")
            if not line.strip() or line.startswith("#"):
                continue
            if not equals or not key.strip():
                raise ValueError(f"{file}:{number} is not NAME=VALUE; mend or remove the line")
            environment[key.strip()] = value.strip()
            names.add(key.strip())
    return names


def carried(environment: Mapping[str, str], besides: set[str]) -> dict[str, str]:
    """Return what of this machine's environment the others get, keys for W&B and the hub included."""
    return {key: value for key, value in environment.items() if key.startswith(_CARRIED) or key in besides}


def refuse_in_slurm(config: Config) -> None:
    """Refuse what makes no sense in a Slurm job. Raises: ValueError."""
    launch = config.launch
    if launch.launcher != "torchrun":
        raise ValueError(
            f"launch.launcher={launch.launcher} is for machines without Slurm: in a job srun starts an agent"
            " on each node, which starts torchrun; leave --launcher out"
        )
    if launch.hostfile is not None:
        raise ValueError(
            f"launch.hostfile={launch.hostfile} is for machines without Slurm: a job runs on the nodes that"
            " Slurm chose; leave --hostfile out"
        )


def with_slots(config: Config, hosts: Hosts) -> Config:
    """Return the config with the number of processes that the hostfile says, for machines that cannot read
    it."""
    return config.model_copy(
        update={"launch": config.launch.model_copy(update={"nproc_per_node": hosts.slots})}
    )
