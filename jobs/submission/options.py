"""The options of a job (JobOptions), and the values that they lead to (JobSpec)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

from qwenlora.jobs.ledger import CLUSTERS, Cluster
from qwenlora.jobs.submission.site import Site
from qwenlora.plan.hardware import Gpu, named

NO_LIMIT_MIN = 60 * 24 * 365
LONGEST_NAME = 64
_LEAST = {"gpus_per_node": 0, "cpus_per_task": 1, "timeout_min": 1}


class JobOptions(TypedDict, total=False):
    """Options of `submit` and `submit_sweep`, with help texts. Missing or None: the site's, or a default."""

    cluster: Annotated[Cluster, "slurm, local (a process of this machine), or debug (this process)."]
    nodes: Annotated[
        int | str | tuple[int, int] | None,
        "Nodes, or the fewest and the most, as 2-4: what Slurm has. Default: the site's, or 1.",
    ]
    gpus_per_node: Annotated[int | None, "GPUs a node. Default: the site's, or none."]
    cpus_per_task: Annotated[int | None, "CPUs a node. Default: the site's, or one a process."]
    gpu: Annotated[str | None, "Kind of GPU, as h100: a run that cannot fit is refused. Default: the site's."]
    timeout_min: Annotated[int | None, "Time limit in minutes. Default: the site's."]
    site: Annotated[
        str | Path | None, "A site file, or its name in configs/clusters/. Default: QWENLORA_SITE."
    ]
    snapshot: Annotated[bool, "Run a copy of the package as it is now."]
    name: Annotated[str | None, "The job's name. Default: the run folder's."]


@dataclass(frozen=True)
class JobSpec:
    """What a job gets, defaults filled in. name: safe for a shell; nodes: the fewest and the most;
    cpus_per_task: CPUs a node; exclude: nodes that were found bad."""

    name: str
    nodes: tuple[int, int]
    gpus_per_node: int
    cpus_per_task: int
    timeout_min: int
    site: Site
    snapshot: bool = False
    exclude: tuple[str, ...] = ()

    @property
    def nodes_text(self) -> str:
        """The nodes as sbatch has them."""
        return "-".join(map(str, self.nodes)) if self.is_moldable else str(self.nodes[1])

    @property
    def is_moldable(self) -> bool:
        """Whether the job takes what nodes there are."""
        return self.nodes[0] < self.nodes[1]


def cluster_of(options: JobOptions) -> Cluster:
    """Return the option cluster, slurm by default."""
    return options.get("cluster", "slurm")


def check_options(options: JobOptions, site: Site) -> None:
    """Refuse options that cannot be, or do not go together. Raises: ValueError."""
    cluster, nodes = cluster_of(options), nodes_of(options.get("nodes") or 1)
    if cluster not in CLUSTERS:
        raise ValueError(f"cluster={cluster}: expected slurm, local or debug")
    for key, value in options.items():
        _check_number(key, value)
    if cluster == "slurm" and not (options.get("timeout_min") or site.timeout_min):
        raise ValueError("timeout_min is missing: minutes, as --timeout-min 600; or set it in a site file")
    if cluster != "slurm" and nodes[1] > 1:
        raise ValueError(
            f"nodes={options.get('nodes')}: cluster={cluster} is this machine alone; for several,"
            " cluster=slurm"
        )
    if cluster == "debug" and options.get("snapshot"):
        raise ValueError(
            "snapshot has no effect with cluster=debug, which runs in this process; leave it out"
        )


def nodes_of(value: int | str | Sequence[int]) -> tuple[int, int]:
    """Return the fewest and the most nodes that 3, "2-4" or (2, 4) mean. Raises: ValueError."""
    text = str(value) if isinstance(value, int | str) else "-".join(map(str, value))
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text, re.ASCII)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise ValueError(f"nodes={value}: expected a whole number, 1 or more, or the fewest and most as 2-4")
    return least, most


def _check_number(key: str, value: object) -> None:
    least = _LEAST.get(key)
    if least is None or value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key}={value}: expected a whole number, {least} or more")


def job_spec(options: JobOptions, site: Site, processes: int, default_name: str) -> JobSpec:
    """Return what a job gets. processes: ranks a node."""
    defaults = site if cluster_of(options) == "slurm" else Site()
    gpus = options.get("gpus_per_node")
    return JobSpec(
        name=safe_name(options.get("name") or default_name),
        nodes=nodes_of(options.get("nodes") or defaults.nodes or 1),
        gpus_per_node=(defaults.gpus_per_node if gpus is None else gpus) or 0,
        cpus_per_task=options.get("cpus_per_task") or defaults.cpus_per_task or processes,
        timeout_min=options.get("timeout_min") or defaults.timeout_min or NO_LIMIT_MIN,
        site=site,
        snapshot=options.get("snapshot", False),
    )


def gpu_of(options: JobOptions, site: Site) -> Gpu | None:
    """Return the kind of GPU that a job will have; None where neither options nor site say it. Raises:
    ValueError for an unknown one."""
    name = options.get("gpu") or (site.gpu if cluster_of(options) == "slurm" else None)
    return named(name) if name else None


def safe_name(name: str) -> str:
    """Return a name that means nothing to a shell or to Slurm."""
    return re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("_")[:LONGEST_NAME] or "qwenlora"
