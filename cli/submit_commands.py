"""The commands that submit jobs: submit, sweep, resume, and the options of a site for sbatch."""

import shlex
import sys
from typing import Annotated, Unpack

import typer

from qwenlora.cli.arguments import AllowConfigChange, ConfigFile, Fresh, Overrides, RunOrJobName, with_options
from qwenlora.configs.load import to_yaml
from qwenlora.jobs.find import find
from qwenlora.jobs.submission import resume as resuming
from qwenlora.jobs.submission.options import JobOptions
from qwenlora.jobs.submission.site import load_site
from qwenlora.jobs.submission.submit import Submission, prepare, prepare_sweep
from qwenlora.jobs.submission.sweeps import parse_grid

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be submitted; write nothing.")]


@with_options(JobOptions, cluster="slurm")
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    *,
    fresh: Fresh = False,
    allow_config_change: AllowConfigChange = None,
    dry_run: DryRun = False,
    **options: Unpack[JobOptions],
) -> int:
    """Submit the run of CONFIG as a job.

    Example: qwenlora submit my.yaml --nodes 2 --gpus-per-node 8 --timeout-min 480
    """
    allowed = allow_config_change or []
    submission = prepare(config, overrides or [], options, fresh=fresh, allowed=allowed)
    return _show(submission) if dry_run else _submit(submission)


@with_options(JobOptions, cluster="slurm")
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
    *,
    dry_run: DryRun = False,
    **options: Unpack[JobOptions],
) -> int:
    """Submit a run for every combination of the values, as one job array.

    Example: qwenlora sweep my.yaml --grid lora.r=8,16,32 --gpus-per-node 1
    """
    submission = prepare_sweep(config, parse_grid(grid or []), overrides or [], options, max_parallel)
    return _show(submission) if dry_run else _submit(submission)


def resume(run: RunOrJobName) -> int:
    """Have a run go on from its newest checkpoint: submitted again, as its last job was.

    Example: qwenlora resume runs/my
    """
    print(resuming.resume(find(run)))
    return 0


def site(site: Annotated[str, typer.Argument(help="A site file, or its name in configs/clusters/.")]) -> int:
    """Print a site's options for sbatch.

    Example: sbatch $(qwenlora site mycluster) slurm/train.sh my.yaml
    """
    loaded = load_site(site)
    if unsaid := loaded.unsaid():
        print(
            f"note: options of sbatch cannot say {', '.join(unsaid)}; qwenlora submit does", file=sys.stderr
        )
    print(" ".join(loaded.command_line()))
    return 0


def _show(submission: Submission) -> int:
    """Print what would be submitted."""
    configs, spec = submission.configs, submission.spec
    if submission.cluster == "slurm":
        print(f"# ---- sbatch\n{submission.text()}\n")
    for config in configs:
        print(f"# ---- config of {config.run_dir}\n{to_yaml(config)}")
    jobs = f"{len(configs)} jobs x " * (len(configs) > 1)
    size = f"{jobs}{spec.nodes_text} x {spec.gpus_per_node} GPUs x {spec.timeout_min} min"
    print(f"# GPU-hours           {submission.gpu_hours:g} = {size}")
    print(f"# run folder          {submission.target.path}")
    return 0


def _submit(submission: Submission) -> int:
    """Submit, and print the job's id; with cluster=debug, the result."""
    jobs = submission.submit()
    if submission.cluster == "debug":
        for job in jobs:
            print(job.result())
        return 0
    if without := submission.spec.exclude:
        print(f"without {', '.join(without)}, which were found bad (qwenlora nodes)")
    name = jobs[0].job_id if len(jobs) == 1 else f"{jobs[0].job_id.partition('_')[0]}, {len(jobs)} runs"
    print(f"job {name}; how far it is:\n  qwenlora status {shlex.quote(str(submission.target.path))}")
    return 0
