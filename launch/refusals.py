"""The checks that refuse a start with ValueError: of `qwenlora train`, its dry run, and `qwenlora submit`."""

import difflib
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from qwenlora.configs import Config
from qwenlora.configs.combinations import ZERO, Machine, refuse
from qwenlora.configs.deepspeed import deepspeed_config
from qwenlora.configs.keys import FIELDS, SECTIONS
from qwenlora.data import sources
from qwenlora.data.order import accumulation_steps
from qwenlora.data.prepared import other_files
from qwenlora.launch.hostfile import processes_per_node
from qwenlora.plan import fit
from qwenlora.plan.adapter import check_divided, check_names
from qwenlora.plan.bases import shape_of_base
from qwenlora.plan.hardware import Gpu, of_this_machine
from qwenlora.plan.shape import tensors
from qwenlora.run import checkpoints
from qwenlora.run.folder import RunFolder
from qwenlora.run.format import count
from qwenlora.run.hardware import gpu_count


def check_start(config: Config, nodes: int = 1, processes: int | None = None, gpu: Gpu | None = None) -> int:
    """Return a config's accumulation steps. Raises: ValueError if it cannot start. processes: of a node; gpu:
    the kind that each has, by which a run that cannot fit is refused. Default: this machine's."""
    sources.find(config.data)
    _check_adapter(config)
    if config.launch.launcher == "deepspeed" and not find_spec("deepspeed"):
        raise ValueError(
            "launch.launcher=deepspeed needs the deepspeed package, which is not here: pip install deepspeed,"
            " or leave --launcher out"
        )
    for tracker in config.log.to:
        if tracker != "wandb" and not find_spec(tracker):
            raise ValueError(
                f"log.to={tracker} needs the {tracker} package, which is not here: pip install"
                f" 'qwenlora[{tracker}]', or leave it out of log.to"
            )
    strategy, train = config.strategy, config.train
    # None: on this machine. A job's nodes are expected to have a GPU a process; its agent checks that there
    gpus = gpu_count() if processes is None else processes
    if processes is None:
        gpu = of_this_machine() if gpus and config.launch.plan != "off" else None
    processes = processes or processes_per_node(config)
    machine = Machine(nodes, processes, gpus)
    refuse(config, machine)
    accumulation = accumulation_steps(
        train.global_batch_size,
        train.micro_batch,
        machine.world_size,
        strategy.sequence_parallel,
    )
    if strategy.name in ZERO:
        if not find_spec("deepspeed"):
            raise ValueError(
                f"strategy.name={strategy.name} needs the deepspeed package, which is not here: pip install"
                " deepspeed, or set strategy.name: ddp or fsdp"
            )
        deepspeed_config(config, strategy.name, processes, accumulation)
    if gpu and (warning := fit.check(config, machine, gpu)):
        print(f"warning: {warning}", file=sys.stderr)
    return accumulation


def _check_adapter(config: Config) -> None:
    """Refuse modules and experts that the base lacks, where its config.json or name tells. Raises:
    ValueError."""
    try:
        shape, _ = shape_of_base(config.model)
    except ValueError:
        return  # the preparation says it, or it is a model that a plan does not know
    check_names(config.lora, shape, list(tensors(shape)))
    check_divided(config, shape.num_experts)


def check_launcher_in_slurm(config: Config) -> None:
    """Refuse settings that make no sense in a Slurm job. Raises: ValueError."""
    launch = config.launch
    if launch.launcher != "torchrun":
        raise ValueError(
            f"launch.launcher={launch.launcher} is for machines without Slurm: in a job srun starts an agent"
            " on each node, which starts the ranks; leave --launcher out"
        )
    if launch.hostfile is not None:
        raise ValueError(
            f"launch.hostfile={launch.hostfile} is for machines without Slurm: a job runs on the nodes that"
            " Slurm chose; leave --hostfile out"
        )


def nodes_that_train(config: Config, nodes: int) -> int:
    """Return how many of a Slurm job's nodes train at a time; the others are spare. Raises: ValueError when
    none would."""
    spare = config.launch.spare_nodes
    if spare >= nodes:
        raise ValueError(
            f"launch.spare_nodes={spare} leaves none of the job's {count(nodes, 'node')} to train on; ask for"
            f" more (--nodes), or set it to at most {nodes - 1}"
        )
    return nodes - spare


def check_allowed_keys(allowed: Sequence[str]) -> None:
    """Refuse keys of --allow-config-change that no config has. Raises: ValueError."""
    for key in allowed:
        if key not in FIELDS and key not in SECTIONS:
            near = difflib.get_close_matches(key, [*FIELDS, *SECTIONS], n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; the sections are: {', '.join(SECTIONS)}"
            raise ValueError(f"--allow-config-change {key}: no such key{hint}")


def check_resume(config: Config, folder: RunFolder, resume: str, allowed: Sequence[str]) -> None:
    """Refuse a resume that cannot work, as far as names, manifests and config tell. Raises: ValueError."""
    newest = next(iter(folder.checkpoints()), None)
    if resume not in ("auto", "none"):
        newest = checkpoints.named(folder, resume, config.model_dump(mode="json", by_alias=True), allowed)
    elif newest is None or checkpoints.flaw(newest, thorough=False):
        return
    trained, steps = checkpoints.read(newest).step, config.train.max_steps
    if steps and trained > steps:
        raise ValueError(
            f"train.max_steps={steps} is less than the {trained} steps that {newest.name} has trained; raise"
            " it, or name an earlier checkpoint: --resume"
        )


def check_same_data(config: Config, folder: RunFolder) -> None:
    """Refuse a run that is done if its data files have changed since. Raises: ValueError."""
    if other_files(config, folder):
        raise ValueError(
            f"run_dir={config.run_dir} is done, but was trained on other data: the files changed since;"
            " choose another run_dir, or --fresh to set the old run aside"
        )
