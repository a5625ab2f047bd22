"""`qwenlora train --dry-run`: the resolved config, what follows from it, and the command, as one text."""

import shlex
from collections.abc import Sequence

from qwenlora.configs import Config
from qwenlora.configs.combinations import ZERO, Machine, packs_rows
from qwenlora.configs.deepspeed import as_comment, deepspeed_config
from qwenlora.configs.estimate import decide
from qwenlora.configs.load import to_yaml
from qwenlora.data.order import idle_share, total_steps
from qwenlora.data.survey import Survey, survey
from qwenlora.launch import hostfile
from qwenlora.launch.commands import argv_without_agents, processes_in_words
from qwenlora.launch.refusals import check_allowed_keys, check_resume, check_start
from qwenlora.run.folder import RunFolder
from qwenlora.run.hardware import gpu_count


def dry_run(
    config: Config,
    arguments: list[str],
    *,
    fresh: bool = False,
    resume: str = "auto",
    allowed: Sequence[str] = (),
) -> str:
    """Return the resolved config, what follows from it, and the command without agents. Reads the data files.
    arguments: what config was loaded from, file and overrides. Raises: ValueError if a start would."""
    folder = RunFolder(config.run_dir)
    fresh = fresh or resume == "none"
    check_allowed_keys(allowed)
    folder.check(config, fresh=fresh, allowed=allowed)
    if not fresh:
        check_resume(config, folder, resume, allowed)
    done = f" (done: {folder.history.last_step()} steps)" if folder.done and not fresh else ""
    hosts = hostfile.of(config)
    names = hosts.names if hosts else ("localhost",)
    accumulation = check_start(config, len(names))
    processes, rows = hostfile.processes_per_node(config), survey(config.data)
    packs = packs_rows(config, on_gpu=gpu_count() > 0)
    lines = [
        ("rows", _rows(config, rows)),
        ("processes", f"{processes * len(names)}{f' on {len(names)} hosts' * (len(names) > 1)}"),
        ("global batch", _global_batch(config, processes * len(names), accumulation, packs=packs)),
        ("steps", _steps(config, rows.train, arguments, packs=packs)),
        ("strategy", _strategy(config, processes)),
        ("run folder", f"{folder.path}{done}"),
        ("command", shlex.join(argv_without_agents(config, arguments, processes, names))),
    ]
    if len(names) > 1:
        lines.append(("hosts", _hosts(config, names)))
    lines += [("warning", note) for note in rows.notes]
    text = f"{to_yaml(config)}\n" + "".join(f"# {name:20}{value}\n" for name, value in lines)
    if config.strategy.name in ZERO:
        made = deepspeed_config(config, config.strategy.name, processes, accumulation)
        text += f"# DeepSpeed's config\n{as_comment(made)}"
    return text


def _rows(config: Config, rows: Survey) -> str:
    dropped = " (before long ones are dropped)" * (config.data.overlength == "drop")
    bad = f", {rows.bad:,} more cannot be trained and are left out" * (rows.bad > 0)
    return f"{rows.train:,}{dropped}{bad}"


def _global_batch(config: Config, processes: int, accumulation: int, *, packs: bool) -> str:
    train, shared = config.train, config.strategy.sequence_parallel
    units = f"{train.global_batch_size} {'packs' if packs else 'rows'}"
    ranks = f"{processes_in_words(processes)}{f' / {shared} a sequence' * (shared > 1)}"
    if train.per_device_train_batch_size == "auto":
        return f"{units} = {ranks} x as many as fit x what is accumulated: found at the start"
    idle = idle_share(train.global_batch_size, train.micro_batch, processes, shared)
    unused = f", {idle:.0%} of it blank" if idle else ""
    return f"{units} = {ranks} x {train.micro_batch} x {accumulation} accumulated{unused}"


def _hosts(config: Config, names: Sequence[str]) -> str:
    deepspeed = config.launch.launcher == "deepspeed"
    by_hand = "DeepSpeed needs pdsh to reach them" if deepspeed else "on each of them"
    return f"{' '.join(names)}; by hand, {by_hand}"


def _steps(config: Config, rows: int, arguments: list[str], *, packs: bool) -> str:
    train = config.train
    if packs or config.data.overlength == "split":
        command = f"qwenlora data check {shlex.join(arguments)}"
        return f"known when the rows are {'packed' if packs else 'split'}: {command}"
    total = total_steps(rows, train.global_batch_size, train.num_train_epochs, train.max_steps)
    return f"{total}, {-(-rows // train.global_batch_size)} an epoch"


def _strategy(config: Config, processes: int) -> str:
    if config.strategy.name != "auto":
        return config.strategy.name
    if gpu_count():
        return "auto: decided at the start, from the base's size and the GPUs' memory"
    here = decide(config, None, Machine(1, processes, 0)).sentence.removeprefix("strategy.name=")
    return f"{here} (where there are GPUs: decided at the start)"
