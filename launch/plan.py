"""What can be said of a run before it starts: how many processes, the command that starts them, what is refused."""

import difflib
import json
import shlex
import sys
from collections.abc import Sequence

from qwenlora.configs import Config
from qwenlora.configs.load import FIELDS, SECTIONS, to_yaml
from qwenlora.data import sources
from qwenlora.data.order import accumulation_steps, total_steps
from qwenlora.data.prepared import files_key
from qwenlora.data.survey import survey
from qwenlora.jobs import checkpoints
from qwenlora.jobs.run import PREPARE_ONLY, RunFolder
from qwenlora.launch.children import RANK_MODULE
from qwenlora.launch.hardware import gpu_count


def processes_of(config: Config) -> int:
    """Return how many ranks this node runs."""
    return config.launch.nproc_per_node or gpu_count() or 1


def torchrun_argv(arguments: list[str], processes: int, rendezvous: Sequence[str] = ("--standalone",)) -> list[str]:
    """Return the command that starts a node's ranks.

    arguments: a config file and overrides. rendezvous: how nodes meet; --standalone: a free port on this machine.
    """
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *rendezvous,
        f"--nproc-per-node={processes}",
        "--signals-to-handle=SIGQUIT",  # children.py brings the others to the ranks
        "-m",
        RANK_MODULE,
        *arguments,
    ]


def preparing_argv(folder: RunFolder) -> list[str]:
    """Return the command that makes model and data ready, once for all ranks."""
    return [sys.executable, "-m", RANK_MODULE, str(folder.config), PREPARE_ONLY]


def rendezvous_options(run_id: str, nodes: int, first: bool, host: str, port: int, timeout_s: int) -> list[str]:
    """Return torchrun's options for several nodes. first: whether this node holds the store, at host and port."""
    return [
        f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={host}:{port}",
        f"--rdzv-id={run_id}",
        # said, not guessed from names: a node may be known by several
        f"--rdzv-conf=is_host={int(first)},join_timeout={timeout_s},last_call_timeout=1",
    ]


def check(config: Config, nodes: int = 1, processes: int | None = None) -> int:
    """Return the accumulation steps. processes: on each of the nodes; default: what this machine would run.

    Raises: ValueError for what can be refused before anything is started.
    """
    sources.find(config.data)
    world_size = nodes * (processes or processes_of(config))
    return accumulation_steps(config.train.global_batch_size, config.train.per_device_train_batch_size, world_size)


def check_keys(allowed: Sequence[str]) -> None:
    """Refuse what --allow-config-change has no key for. Raises: ValueError."""
    for key in allowed:
        if key not in FIELDS and key not in SECTIONS:
            near = difflib.get_close_matches(key, [*FIELDS, *SECTIONS], n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; the sections are: {', '.join(SECTIONS)}"
            raise ValueError(f"--allow-config-change {key}: no such key{hint}")


def dry_run(config: Config, arguments: list[str]) -> str:
    """Return the resolved config, what follows from it, and the command that does it by hand. Reads the data files.

    arguments: the config file and overrides that config was loaded from.
    """
    accumulation = check(config)
    train, data, processes = config.train, config.data, processes_of(config)
    rows = survey(data)
    packs = data.packing == "on" or (data.packing == "auto" and gpu_count() > 0)
    if packs or data.overlength == "split":
        steps = f"known when the rows are {'packed' if packs else 'split'}: qwenlora data check {shlex.join(arguments)}"
    else:
        total = total_steps(rows.train, train.global_batch_size, train.num_train_epochs, train.max_steps)
        steps = f"{total}, {-(-rows.train // train.global_batch_size)} an epoch"
    command = shlex.join(torchrun_argv(arguments, processes))
    dropped = " (before long ones are dropped)" * (data.overlength == "drop")
    bad = f", {rows.bad:,} more cannot be trained and are left out" * (rows.bad > 0)
    return (
        f"{to_yaml(config)}\n"
        f"# rows                {rows.train:,}{dropped}{bad}\n"
        f"# processes           {processes}\n"
        f"# global batch        {train.global_batch_size} {'packs' if packs else 'rows'} = {say_processes(processes)} x"
        f" {train.per_device_train_batch_size} x {accumulation} accumulated\n"
        f"# steps               {steps}\n"
        f"# run folder          {RunFolder(config.run_dir).path}\n"
        f"# command             {command}\n" + "".join(f"# warning             {note}\n" for note in rows.notes)
    )


def check_resume(config: Config, folder: RunFolder, resume: str, allowed: Sequence[str]) -> None:
    """Refuse what names, manifests and the config show to be impossible, before anything is started."""
    newest = next(iter(folder.checkpoints()), None)
    if resume not in ("auto", "none"):
        newest = checkpoints.named(folder, resume, config.model_dump(mode="json", by_alias=True), allowed)
    elif newest is None or checkpoints.flaw(newest, thorough=False):
        return
    trained, steps = checkpoints.read(newest)["step"], config.train.max_steps
    if steps and trained > steps:
        raise ValueError(
            f"train.max_steps={steps} is less than the {trained} steps that {newest.name} has trained; raise it, or"
            " name an earlier checkpoint: --resume"
        )


def say_processes(count: int) -> str:
    """Return how many, in words."""
    return "1 process" if count == 1 else f"{count} processes"


def refuse_other_data(config: Config, folder: RunFolder) -> None:
    """Refuse to call a run done whose data changed since. Raises: ValueError."""
    now = files_key(sources.find(config.data), folder.cache(config))
    if json.loads(folder.facts.read_text(encoding="utf-8"))["files_key"] != now:
        raise ValueError(
            f"run_dir={config.run_dir} is done, but was trained on other data: the files changed since;"
            " choose another run_dir, or --fresh to set the old run aside"
        )
