"""What can be said of a run before it starts: how many processes, the command that starts them, what is
refused."""

import base64
import difflib
import json
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from qwenlora.configs import Config
from qwenlora.configs.combinations import ZERO, Machine, packs_rows, refuse
from qwenlora.configs.deepspeed import as_comment, deepspeed_config
from qwenlora.configs.estimate import decide
from qwenlora.configs.keys import FIELDS, SECTIONS
from qwenlora.configs.load import to_yaml
from qwenlora.data import sources
from qwenlora.data.order import accumulation_steps, total_steps
from qwenlora.data.prepared import other_files
from qwenlora.data.survey import survey
from qwenlora.launch import hosts
from qwenlora.launch.allocation import free_port
from qwenlora.launch.children import RANK_MODULE
from qwenlora.launch.hardware import gpu_count, visible_devices
from qwenlora.run import checkpoints
from qwenlora.run.folder import PREPARE_ONLY, RunFolder


def processes_of(config: Config) -> int:
    """Return how many ranks this node runs. Raises: ValueError for a hostfile that says something else, or
    nothing."""
    named = hosts.of(config)
    return named.slots if named else config.launch.nproc_per_node or gpu_count() or 1


def torchrun_argv(
    arguments: list[str], processes: int, rendezvous: Sequence[str] = ("--standalone",)
) -> list[str]:
    """Return the command that starts a node's ranks.

    arguments: a config file and overrides. rendezvous: how nodes meet; --standalone: a free port on this
    machine.
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


def deepspeed_argv(
    arguments: list[str],
    processes: int,
    node: int = 0,
    nodes: int = 1,
    host: str = "127.0.0.1",
    port: int = 0,
) -> list[str]:
    """Return the command that starts a node's ranks by DeepSpeed's launcher; host, port: where rank 0
    listens.

    It is what `deepspeed` runs on each host. `deepspeed` itself stays out: its processes would outlive a
    killed agent, it needs pdsh, puts variables on command lines, and has its own idea of
    CUDA_VISIBLE_DEVICES.
    Source: deepspeed/launcher/runner.py and launch.py.
    """
    devices = {f"node-{one}": list[int | str](range(processes)) for one in range(nodes)}
    devices[f"node-{node}"] = visible_devices(processes)
    world = base64.urlsafe_b64encode(json.dumps(devices).encode()).decode()
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={world}",
        f"--node_rank={node}",
        f"--master_addr={host}",
        f"--master_port={port}",
        "--no_local_rank",
        "--module",
        RANK_MODULE,
        *arguments,
    ]


def argv_by_hand(config: Config, arguments: list[str], processes: int, names: Sequence[str]) -> list[str]:
    """Return the command that does without agents what they would do. names: of the hosts."""
    if config.launch.launcher == "torchrun" and len(names) == 1:
        return torchrun_argv(arguments, processes)
    port = free_port(str(RunFolder(config.run_dir).path))
    if config.launch.launcher == "torchrun":
        meeting = [f"--nnodes={len(names)}", "--rdzv-backend=c10d", f"--rdzv-endpoint={names[0]}:{port}"]
        return torchrun_argv(arguments, processes, meeting)
    where = f"--hostfile={config.launch.hostfile}" if config.launch.hostfile else f"--num_gpus={processes}"
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", where, f"--master_port={port}"]
    return [*runner, "--no_local_rank", "--module", RANK_MODULE, *arguments]


def preparing_argv(folder: RunFolder) -> list[str]:
    """Return the command that makes model and data ready, once for all ranks."""
    return [sys.executable, "-m", RANK_MODULE, str(folder.config), PREPARE_ONLY]


def rendezvous_options(
    run_id: str, nodes: int, first: bool, host: str, port: int, timeout_s: int
) -> list[str]:
    """Return torchrun's options for several nodes. first: whether this node holds the store, at host and
    port."""
    return [
        f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={host}:{port}",
        f"--rdzv-id={run_id}",
        # said, not guessed from names: a node may be known by several
        f"--rdzv-conf=is_host={int(first)},join_timeout={timeout_s},last_call_timeout=1",
    ]


def static_options(node: int, nodes: int, host: str, port: int) -> list[str]:
    """Return torchrun's options for nodes whose order is given, so that rank 0 is on the first, which has the
    screen.

    In a job c10d orders them by name, and srun brings what rank 0 says to the job's output from anywhere.
    """
    return [
        "--rdzv-backend=static",
        f"--nnodes={nodes}",
        f"--node-rank={node}",
        f"--master-addr={host}",
        f"--master-port={port}",
    ]


def check(config: Config, nodes: int = 1, processes: int | None = None) -> int:
    """Return the accumulation steps. processes: on each of the nodes; default: what this machine would run.

    Raises: ValueError for what can be refused before anything is started.
    """
    sources.find(config.data)
    if config.launch.launcher == "deepspeed" and not find_spec("deepspeed"):
        raise ValueError(
            "launch.launcher=deepspeed needs the deepspeed package, which is not here: pip install deepspeed,"
            " or leave --launcher out"
        )
    here, strategy, train = processes is None, config.strategy, config.train
    processes = processes or processes_of(config)
    # a job's nodes are expected to have a GPU a process; there, its agent asks again
    machine = Machine(nodes, processes, gpu_count() if here else processes)
    refuse(config, machine)
    accumulation = accumulation_steps(
        train.global_batch_size,
        train.per_device_train_batch_size,
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
    return accumulation


def check_keys(allowed: Sequence[str]) -> None:
    """Refuse what --allow-config-change has no key for. Raises: ValueError."""
    for key in allowed:
        if key not in FIELDS and key not in SECTIONS:
            near = difflib.get_close_matches(key, [*FIELDS, *SECTIONS], n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; the sections are: {', '.join(SECTIONS)}"
            raise ValueError(f"--allow-config-change {key}: no such key{hint}")


def dry_run(
    config: Config,
    arguments: list[str],
    *,
    fresh: bool = False,
    resume: str = "auto",
    allowed: Sequence[str] = (),
) -> str:
    """Return the resolved config, what follows from it, and the command that does it by hand. Reads the data
    files.

    arguments: the config file and overrides that config was loaded from. Raises: ValueError for what a start
    would
    refuse: here a run folder that holds another run.
    """
    folder = RunFolder(config.run_dir)
    fresh = fresh or resume == "none"
    check_keys(allowed)
    folder.check(config, fresh=fresh, allowed=allowed)
    if not fresh:
        check_resume(config, folder, resume, allowed)
    done = f" (done: {folder.history.last_step()} steps)" if folder.done and not fresh else ""
    named = hosts.of(config)
    names = named.names if named else ("localhost",)
    accumulation = check(config, len(names))
    train, data, processes = config.train, config.data, processes_of(config)
    count = processes * len(names)
    rows = survey(data)
    packs = packs_rows(config, on_gpu=gpu_count() > 0)
    shared = f" / {config.strategy.sequence_parallel} a sequence" * (config.strategy.sequence_parallel > 1)
    if packs or data.overlength == "split":
        steps = (
            f"known when the rows are {'packed' if packs else 'split'}: qwenlora data check"
            f" {shlex.join(arguments)}"
        )
    else:
        total = total_steps(rows.train, train.global_batch_size, train.num_train_epochs, train.max_steps)
        steps = f"{total}, {-(-rows.train // train.global_batch_size)} an epoch"
    command = shlex.join(argv_by_hand(config, arguments, processes, names))
    if len(names) > 1:
        command += f"\n# hosts               {' '.join(names)}; by hand, " + (
            "DeepSpeed needs pdsh to reach them"
            if config.launch.launcher == "deepspeed"
            else "on each of them"
        )
    dropped = " (before long ones are dropped)" * (data.overlength == "drop")
    bad = f", {rows.bad:,} more cannot be trained and are left out" * (rows.bad > 0)
    return (
        f"{to_yaml(config)}\n"
        f"# rows                {rows.train:,}{dropped}{bad}\n"
        f"# processes           {count}{f' on {len(names)} hosts' * (len(names) > 1)}\n"
        f"# global batch        {train.global_batch_size} {'packs' if packs else 'rows'} ="
        f" {say_processes(count)}"
        f"{shared} x {train.per_device_train_batch_size} x {accumulation} accumulated\n"
        f"# steps               {steps}\n"
        f"# strategy            {_strategy(config, processes)}\n"
        f"# run folder          {folder.path}{done}\n"
        f"# command             {command}\n"
        + "".join(f"# warning             {note}\n" for note in rows.notes)
    ) + (_deepspeed(config, processes, accumulation) if config.strategy.name in ZERO else "")


def _strategy(config: Config, processes: int) -> str:
    if config.strategy.name != "auto":
        return config.strategy.name
    if gpu_count():
        return "auto: decided at the start, from the base's size and the GPUs' memory"
    here = decide(config, None, Machine(1, processes, 0)).sentence.removeprefix("strategy.name=")
    return f"{here} (where there are GPUs: decided at the start)"


def _deepspeed(config: Config, processes: int, accumulation: int) -> str:
    made = deepspeed_config(config, config.strategy.name, processes, accumulation)
    return f"# DeepSpeed's config\n{as_comment(made)}"


def check_resume(config: Config, folder: RunFolder, resume: str, allowed: Sequence[str]) -> None:
    """Refuse what names, manifests and the config show to be impossible, before anything is started."""
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


def say_processes(count: int) -> str:
    """Return how many, in words."""
    return "1 process" if count == 1 else f"{count} processes"


def refuse_other_data(config: Config, folder: RunFolder) -> None:
    """Refuse to call a run done whose data changed since. Raises: ValueError."""
    if other_files(config, folder):
        raise ValueError(
            f"run_dir={config.run_dir} is done, but was trained on other data: the files changed since;"
            " choose another run_dir, or --fresh to set the old run aside"
        )
