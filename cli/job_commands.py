"""The commands about jobs: submit, sweep, status, logs, cancel, resume, site."""

import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from qwenlora.cli.guarded import ConfigFile, Overrides, guarded

if TYPE_CHECKING:
    from qwenlora.jobs.submission.submit import Submission

Named = Annotated[
    str, typer.Argument(metavar="RUN|JOB", help="A run folder, such as runs/tiny, or a Slurm job's id.")
]
Cluster = Annotated[
    str, typer.Option(help="slurm, local (a process of this machine), or debug (this process).")
]
Nodes = Annotated[int | None, typer.Option(help="Nodes. Default: the site's, or 1.")]
Gpus = Annotated[int | None, typer.Option(help="GPUs a node. Default: the site's, or none.")]
Cpus = Annotated[int | None, typer.Option(help="CPUs a node. Default: the site's, or one a process.")]
Timeout = Annotated[int | None, typer.Option(help="Time limit in minutes. Default: the site's.")]
SiteFile = Annotated[
    str | None, typer.Option(help="A site file, or its name in configs/clusters/. Default: QWENLORA_SITE.")
]
Snapshot = Annotated[bool, typer.Option("--snapshot", help="Run a copy of the package as it is now.")]
Name = Annotated[str | None, typer.Option(help="The job's name. Default: the run folder's.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be submitted; write nothing.")]


def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    cluster: Cluster = "slurm",
    nodes: Nodes = None,
    gpus_per_node: Gpus = None,
    cpus_per_task: Cpus = None,
    timeout_min: Timeout = None,
    site: SiteFile = None,
    snapshot: Snapshot = False,
    name: Name = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Set an earlier run in run_dir aside; start anew.")
    ] = False,
    allow_config_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="A key, such as train.learning_rate, that may differ from the run's so far."
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Submit the run of CONFIG as a job."""

    def command() -> int:
        from qwenlora.jobs.submission.submit import Asked, prepare

        asked = Asked(
            cluster=cluster,  # type: ignore[arg-type]  # Asked.check refuses any other
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            cpus_per_task=cpus_per_task,
            timeout_min=timeout_min,
            snapshot=snapshot,
            name=name,
            fresh=fresh,
            allowed=tuple(allow_config_change or ()),
        )
        return _submit(prepare(config, overrides or [], asked, site), dry_run=dry_run)

    guarded(command)


def sweep(
    config: ConfigFile,
    overrides: Overrides = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE,VALUE", help="A key and its values; may be given again."),
    ] = None,
    max_parallel: Annotated[
        int | None, typer.Option(help="How many runs at once. Default: all there is room for.")
    ] = None,
    cluster: Cluster = "slurm",
    nodes: Nodes = None,
    gpus_per_node: Gpus = None,
    cpus_per_task: Cpus = None,
    timeout_min: Timeout = None,
    site: SiteFile = None,
    snapshot: Snapshot = False,
    name: Name = None,
    dry_run: DryRun = False,
) -> None:
    """Submit a run for every combination of the values, as one job array."""

    def command() -> int:
        from qwenlora.jobs.submission.submit import Asked, prepare_sweep
        from qwenlora.jobs.submission.sweeps import parse_grid

        asked = Asked(
            cluster=cluster,  # type: ignore[arg-type]  # Asked.check refuses any other
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            cpus_per_task=cpus_per_task,
            timeout_min=timeout_min,
            snapshot=snapshot,
            name=name,
        )
        values = parse_grid(grid or [])
        return _submit(
            prepare_sweep(config, values, overrides or [], asked, site, max_parallel), dry_run=dry_run
        )

    guarded(command)


def status(
    run: Annotated[
        str, typer.Argument(metavar="RUN|JOB|SWEEP", help="A run folder, a sweep's, or a job's id.")
    ],
) -> None:
    """Show a run's attempts, how far it is, its job and its checkpoints; of a sweep, a line a run."""

    def command() -> int:
        from rich.console import Console

        from qwenlora.jobs.find import find
        from qwenlora.jobs.views.status import show

        show(find(run), Console(markup=False, highlight=False))
        return 0

    guarded(command)


def logs(
    run: Named,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run is over.")] = False,
    rank: Annotated[
        int | None, typer.Option(min=0, help="The log of one process, of the last attempt.")
    ] = None,
) -> None:
    """Show what a run's job has said, or what one of its processes wrote down."""

    def command() -> int:
        from qwenlora.jobs.find import find
        from qwenlora.jobs.views.logs import show

        try:
            show(find(run), rank=rank, follow=follow)
        except KeyboardInterrupt:
            return 130
        return 0

    guarded(command)


def cancel(
    run: Named, now: Annotated[bool, typer.Option("--now", help="Stop at once, without saving.")] = False
) -> None:
    """Stop a run for good: it saves, and does not come back by itself."""

    def command() -> int:
        from qwenlora.jobs.find import find
        from qwenlora.jobs.views.control import cancel as stop

        print("\n".join(stop(find(run), now=now)))
        return 0

    guarded(command)


def resume(run: Named) -> None:
    """Have a run go on from its newest checkpoint: submitted again, as its last job was."""

    def command() -> int:
        from qwenlora.jobs.find import find
        from qwenlora.jobs.views.control import resume as go_on

        print(go_on(find(run)))
        return 0

    guarded(command)


def site(site: Annotated[str, typer.Argument(help="A site file, or its name in configs/clusters/.")]) -> None:
    """Print a site's options for sbatch: sbatch $(qwenlora site mycluster) slurm/train.sh my.yaml."""

    def command() -> int:
        from qwenlora.jobs.submission.site import load_site

        loaded = load_site(site)
        if unsaid := loaded.unsaid():
            print(
                f"note: options of sbatch cannot say {', '.join(unsaid)}; qwenlora submit does",
                file=sys.stderr,
            )
        print(" ".join(loaded.command_line()))
        return 0

    guarded(command)


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (submit, sweep, status, logs, cancel, resume, site):
        app.command()(command)


def _submit(submission: "Submission", *, dry_run: bool) -> int:
    from qwenlora.configs.load import to_yaml

    configs, needs = submission.configs, submission.needs
    if dry_run:
        if submission.cluster == "slurm":
            print(f"# ---- sbatch\n{submission.text()}\n")
        for config in configs:
            print(f"# ---- config of {config.run_dir}\n{to_yaml(config)}")
        times = f"{len(configs)} jobs x " * (len(configs) > 1)
        size = f"{times}{needs.nodes} x {needs.gpus_per_node} GPUs x {needs.timeout_min} min"
        print(
            f"# GPU-hours           {submission.gpu_hours:g} = {size}\n# run folder         "
            f" {submission.target.path}"
        )
        return 0
    jobs = submission.submit()
    if submission.cluster == "debug":
        for job in jobs:
            print(job.result())
        return 0
    named = jobs[0].job_id if len(jobs) == 1 else f"{jobs[0].job_id.partition('_')[0]}, {len(jobs)} runs"
    print(f"job {named}; how far it is:\n  qwenlora status {shlex.quote(str(submission.target.path))}")
    return 0
