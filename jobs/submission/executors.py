"""submitit's executors for a job: the text that sbatch reads, or the environment of a local process."""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import submitit
from submitit.slurm.slurm import _make_sbatch_string

from qwenlora.jobs.submission.options import JobSpec
from qwenlora.run.package import package

# as in slurm/train.sh; --open-mode: a requeued job appends to its output
SRUN_ARGS = ("--no-kill", "--kill-on-bad-exit=0", "--wait=0", "--open-mode=append")
SETUP = (
    "export PYTHONSAFEPATH=1",  # else a random.py of the working folder is taken for Python's own
    # since Slurm 22.05 srun ignores the job's --cpus-per-task
    'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_ON_NODE:-1}"',
)
_STANDARD = (0, 1, 2)


class Executor(submitit.SlurmExecutor):
    """submitit's executor for Slurm, which also shows sbatch's text on machines without Slurm."""

    @classmethod
    def affinity(cls) -> int:
        """Return 1: it may be chosen, with or without sbatch."""
        return 1

    def text(self, count: int) -> str:
        """Return what sbatch reads for so many jobs. submitit has no public function for it."""
        array = count if count > 1 else None
        return _make_sbatch_string(
            self._submitit_command_str, self.folder, map_count=array, **self.parameters
        )


def slurm(spec: JobSpec, folder: Path, max_parallel: int | None = None) -> Executor:
    """Return Slurm's executor; its files go to folder. max_parallel: jobs at once; None: submitit's 256."""
    site = spec.site
    executor = Executor(folder, python=shlex.join(site.python or [sys.executable]))
    sizes: dict[str, Any] = {"gpus-per-node": spec.gpus_per_node} if spec.gpus_per_node else {}
    sizes |= {"nodes": spec.nodes_text} if spec.is_moldable else {}  # submitit calculates with a number
    options = site.sbatch_options()
    if spec.exclude:
        options["exclude"] = ",".join([*([site.exclude] if site.exclude else []), *spec.exclude])
    executor.update_parameters(
        job_name=spec.name,
        time=spec.timeout_min,
        nodes=spec.nodes[1],
        cpus_per_task=spec.cpus_per_task,
        signal_delay_s=site.signal_lead_s,
        stderr_to_stdout=True,
        wckey=None,  # submitit's is "submitit", which clusters that track keys refuse
        setup=_setup(spec, folder),
        teardown=["job_end $?"],
        srun_args=[*SRUN_ARGS, *site.srun_args],
        additional_parameters={**sizes, "no-kill": True, **options, "requeue": True},
        # of 2-4 nodes Slurm would take the fewest, if it knew the tasks; srun starts one a node in any case
        **({} if spec.is_moldable else {"ntasks_per_node": 1}),
        **({"array_parallelism": max_parallel} if max_parallel else {}),
    )
    return executor


def local(spec: JobSpec, folder: Path) -> submitit.LocalExecutor:
    """Return the executor of processes of this machine."""
    python = ["env", *_variables(spec, folder), *(spec.site.python or [sys.executable])]
    executor = submitit.LocalExecutor(folder, python=shlex.join(python))
    executor.update_parameters(
        timeout_min=spec.timeout_min, signal_delay_s=spec.site.signal_lead_s, stderr_to_stdout=True
    )
    return executor


@contextlib.contextmanager
def detached() -> Iterator[None]:
    """Start processes without our terminal and pipes: submitit's controller stays, and `| tee` would wait."""
    sys.stdout.flush()
    kept = [os.dup(descriptor) for descriptor in _STANDARD]
    null = os.open(os.devnull, os.O_RDWR)
    try:
        for descriptor in _STANDARD:
            os.dup2(null, descriptor)
        yield
    finally:
        for descriptor, copy in zip(_STANDARD, kept, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(null)


def _setup(spec: JobSpec, folder: Path) -> list[str]:
    """Return what the batch shell does before srun. job.sh decides at the end whether to requeue the job."""
    scripts = (folder / "code" / "qwenlora" if spec.snapshot else package()) / "slurm"
    env_file = spec.site.env_file or os.environ.get("QWENLORA_ENV") or str(scripts / "env.sh")
    lines = [f"export QWENLORA_LEAD_S={spec.site.signal_lead_s}"]  # before the time limit, in seconds
    lines += [f"source {shlex.quote(str(scripts / 'job.sh'))}", f"job_begin {shlex.quote(env_file)}"]
    lines += [f"export {name}={shlex.quote(str(value))}" for name, value in spec.site.environment.items()]
    if spec.snapshot:
        lines.append(f'export PYTHONPATH={shlex.quote(str(folder / "code"))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    return [*lines, *SETUP]


def _variables(spec: JobSpec, folder: Path) -> list[str]:
    """Return the arguments of env(1) for a local job. submitit hides GPUs that the job did not ask for."""
    names = {name: str(value) for name, value in spec.site.environment.items()} | {"PYTHONSAFEPATH": "1"}
    if spec.snapshot:
        names["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(folder / "code"), os.environ.get("PYTHONPATH")])
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if spec.gpus_per_node:
        devices = visible.split(",") if visible else [str(number) for number in range(spec.gpus_per_node)]
        names["CUDA_VISIBLE_DEVICES"] = ",".join(devices[: spec.gpus_per_node])
    elif visible is not None:
        names["CUDA_VISIBLE_DEVICES"] = visible
    hidden = [] if "CUDA_VISIBLE_DEVICES" in names else ["--unset=CUDA_VISIBLE_DEVICES"]
    return [*hidden, *(f"{name}={value}" for name, value in names.items())]
