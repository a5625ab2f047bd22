"""A run as a job, by submitit: `job = submit("configs/my.yaml", {"lora.r": 32}, nodes=2)`.

`job.result()` is the run's summary (task.py), `job.state` Slurm's. Beside the run folder, the folder
.submitted/<run>/<n>/ has the resolved config, a copy of the package and submitit's files; ledger.py lists the
jobs. All that can be refused is refused before anything is written.
"""

import contextlib
import io
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack, cast

import submitit
from submitit.core.utils import FailedJobError

from qwenlora.configs import Config, load_config
from qwenlora.configs.load import to_yaml
from qwenlora.jobs import ledger
from qwenlora.jobs.find import RunOrJob, newest_job
from qwenlora.jobs.ledger import Cluster, SubmittedJob
from qwenlora.jobs.submission import executors, sweeps
from qwenlora.jobs.submission.options import (
    JobOptions,
    JobSpec,
    check_options,
    cluster_of,
    gpu_of,
    job_spec,
)
from qwenlora.jobs.submission.site import Site, load_site
from qwenlora.jobs.task import InProcess, RunTask, Summary
from qwenlora.launch import hostfile, refusals
from qwenlora.run.bad_nodes import BadNodes, to_leave_out
from qwenlora.run.folder import RunFolder
from qwenlora.run.package import snapshot as copy_package
from qwenlora.run.records import now
from qwenlora.slurm.query import JobInfo, hosts

Overrides = Mapping[str, Any] | Iterable[str]
Job = submitit.Job[Summary]


@dataclass(frozen=True)
class Submission:
    """A job, or an array of jobs, that was checked. target: the folder of the run, or of the sweep; source:
    the package to snapshot, if not this one; max_parallel: jobs at once; fresh, allowed: as in RunTask."""

    target: RunFolder
    configs: tuple[Config, ...]
    cluster: Cluster
    spec: JobSpec
    max_parallel: int | None = None
    source: Path | None = None
    fresh: bool = False
    allowed: tuple[str, ...] = ()

    @property
    def gpu_hours(self) -> float:
        """The GPU-hours that all jobs together may use."""
        spec = self.spec
        return len(self.configs) * spec.nodes[1] * spec.gpus_per_node * spec.timeout_min / 60

    def folder(self) -> Path:
        """Return where the next submission of this run or sweep goes."""
        numbers = [int(path.name) for path in self.target.submitted.glob("*") if path.name.isdecimal()]
        return self.target.submitted / str(max(numbers, default=0) + 1)

    def text(self) -> str:
        """Return what sbatch would read, and write nothing."""
        return executors.slurm(self.spec, self.folder(), self.max_parallel).text(len(self.configs))

    def submit(self) -> list[Job]:
        """Submit; return a Job for each config. Raises: ValueError with sbatch's message when it refuses."""
        if self.cluster == "slurm" and not shutil.which("sbatch"):
            raise ValueError(
                "cluster=slurm: there is no sbatch on this machine; submit from a login node, or"
                " cluster=local"
            )
        folder = self._make_folder()
        try:
            files = self._write_configs(folder)
            jobs = self._start(folder, files)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, FailedJobError):
                raise ValueError(f"sbatch refused the job: {' '.join(str(error).split())}") from None
            raise
        self._note(folder, jobs, files)
        return jobs

    def _start(self, folder: Path, files: Sequence[Path]) -> list[Job]:
        """Hand the jobs to submitit."""
        if self.spec.snapshot:
            copy_package(folder / "code", self.source)
        detached = executors.detached() if self.cluster == "local" else contextlib.nullcontext()
        # submitit prints sbatch's message to stderr; submit raises it instead
        with _as_if_outside_of_jobs(), detached, contextlib.redirect_stderr(io.StringIO()):
            tasks = [self._task(file) for file in files]
            jobs = cast(list[Job], self._executor(folder).submit_array(tasks))
        if self.cluster == "slurm":  # only the first node's task returns the run's summary
            jobs = [submitit.SlurmJob(folder, job.job_id, tasks=(0,)) for job in jobs]
        return jobs

    def _make_folder(self) -> Path:
        while True:
            folder = self.folder()
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:  # someone else submits at the same time
                continue
            except OSError as error:
                raise ValueError(
                    f"cannot write to {folder}: {error.strerror}; choose another run_dir"
                ) from None

    def _write_configs(self, folder: Path) -> list[Path]:
        """Return the file of each job's resolved config: later edits of the user's YAML change nothing."""
        is_array = len(self.configs) > 1
        files = [
            folder / (f"config-{number}.yaml" if is_array else "config.yaml")
            for number in range(len(self.configs))
        ]
        for file, config in zip(files, self.configs, strict=True):
            file.write_text(to_yaml(config), encoding="utf-8")
        return files

    def _executor(self, folder: Path) -> submitit.Executor:
        if self.cluster == "debug":
            return submitit.DebugExecutor(folder)
        if self.cluster == "local":
            return executors.local(self.spec, folder)
        return executors.slurm(self.spec, folder, self.max_parallel)

    def _task(self, file: Path) -> RunTask | InProcess:
        if self.cluster == "debug":
            return InProcess(str(file))
        return RunTask(str(file), self.cluster == "slurm", self.fresh, self.allowed)

    def _note(self, folder: Path, jobs: Sequence[Job], files: Sequence[Path]) -> None:
        """Add the jobs to the ledgers of their runs, and a sweep's array to the sweep's."""
        spec = self.spec
        array = SubmittedJob(
            job_id=jobs[0].job_id.partition("_")[0],
            time=now(),
            cluster=self.cluster,
            nodes=spec.nodes[1],
            min_nodes=spec.nodes[0],
            gpus_per_node=spec.gpus_per_node,
            cpus_per_task=spec.cpus_per_task,
            timeout_min=spec.timeout_min,
            site=str(spec.site.file) if spec.site.file else None,
            snapshot=spec.snapshot,
            name=spec.name,
            folder=str(folder),
            work_dir=str(Path.cwd()),
        )
        for job, file, config in zip(jobs, files, self.configs, strict=True):
            ledger.note(RunFolder(config.run_dir), array.revised(job_id=job.job_id, config=str(file)))
        if len(jobs) > 1:
            ledger.note(self.target, array.revised(runs=len(jobs)))


def submit(
    config: str | Path,
    overrides: Overrides = (),
    *,
    fresh: bool = False,
    allow_config_change: Sequence[str] = (),
    **options: Unpack[JobOptions],
) -> Job:
    """Submit a run; return submitit's Job, whose result is the run's summary.

    options: see JobOptions; cluster="debug" runs in this process, when the result is asked for. They default
    to the site's, then to one node, no GPU, one CPU a process; Slurm needs a time limit. fresh,
    allow_config_change: as `qwenlora train` has them. Raises: ValueError for all that is known to fail.
    """
    return prepare(config, overrides, options, fresh=fresh, allowed=allow_config_change).submit()[0]


def submit_sweep(
    config: str | Path,
    grid: Mapping[str, Sequence[Any]],
    overrides: Overrides = (),
    *,
    max_parallel: int | None = None,
    **options: Unpack[JobOptions],
) -> list[Job]:
    """Submit a run for every combination of the grid's values, as one job array; return their Jobs.

    grid: {dotted config key: values}; the last key changes fastest. Each run has its folder in run_dir, named
    like lora.r=16,train.learning_rate=0.0001. max_parallel: how many run at once; None: as many as Slurm has
    room for, up to 256. options: as in submit. Raises: ValueError, before any of them is submitted.
    """
    return prepare_sweep(config, grid, overrides, options, max_parallel).submit()


def prepare(
    config: str | Path,
    overrides: Overrides,
    options: JobOptions,
    *,
    fresh: bool = False,
    allowed: Sequence[str] = (),
    source: Path | None = None,
) -> Submission:
    """Return the submission of one run. source: the package to snapshot. Raises: ValueError."""
    site = load_site(options.get("site"))
    loaded = load_config(config, overrides, site.config, str(site.file))
    check_options(options, site)
    if cluster_of(options) == "debug" and (fresh or allowed):
        raise ValueError(
            "fresh and allow_config_change do not go with cluster=debug; qwenlora train knows them"
        )
    refusals.check_allowed_keys(allowed)
    target = RunFolder(loaded.run_dir)
    _check_path(target, snapshot=options.get("snapshot", False))
    processes = _check(loaded, options, site)
    target.check(loaded, fresh=fresh, allowed=allowed)
    _refuse_under_way(target)
    spec = _without_bad(job_spec(options, site, processes, target.path.name), options, target)
    return Submission(
        target, (loaded,), cluster_of(options), spec, source=source, fresh=fresh, allowed=tuple(allowed)
    )


def prepare_sweep(
    config: str | Path,
    grid: Mapping[str, Sequence[Any]],
    overrides: Overrides,
    options: JobOptions,
    max_parallel: int | None = None,
) -> Submission:
    """Return the submission of a sweep. Raises: ValueError."""
    site = load_site(options.get("site"))
    if max_parallel is not None and max_parallel < 1:
        raise ValueError(f"max_parallel={max_parallel}: expected 1 or more")
    if options.get("cluster") == "local":
        raise ValueError(
            "cluster=local would start all runs of a sweep at once; submit them one by one, or cluster=slurm"
        )
    target, configs = sweeps.configs(config, grid, overrides, site)
    check_options(options, site)
    _check_path(target, snapshot=options.get("snapshot", False))
    processes = 1
    for each in configs:
        processes = max(processes, _check(each, options, site))
        RunFolder(each.run_dir).check(each)
        _refuse_under_way(RunFolder(each.run_dir))
    spec = _without_bad(
        job_spec(options, site, processes, target.path.name), options, RunFolder(configs[0].run_dir)
    )
    return Submission(target, configs, cluster_of(options), spec, max_parallel)


def _check(config: Config, options: JobOptions, site: Site) -> int:
    """Refuse what the agent would refuse, and return the processes a node. Raises: ValueError."""
    cluster = cluster_of(options)
    if cluster == "slurm":
        refusals.check_launcher_in_slurm(config)
    if config.launch.hostfile is not None:
        raise ValueError(
            f"launch.hostfile={config.launch.hostfile} is for qwenlora train on the first of these machines;"
            " leave it out"
        )
    spec = job_spec(options, site, 1, "")
    default = 1 if cluster == "slurm" else hostfile.processes_per_node(config)
    processes = config.launch.nproc_per_node or spec.gpus_per_node or default
    if cluster == "debug":
        processes = 1
    gpu = gpu_of(options, site) if spec.gpus_per_node or options.get("gpu") else None
    for nodes in sorted(set(spec.nodes)):
        if cluster == "slurm":
            nodes = refusals.nodes_that_train(config, nodes)
        refusals.check_start(config, nodes, processes, gpu)
    return processes


def _without_bad(spec: JobSpec, options: JobOptions, run: RunFolder) -> JobSpec:
    """Return the job with the bad nodes that it leaves out. run: one of those that it runs."""
    bad, site = BadNodes.beside(run).bad(), spec.site
    if cluster_of(options) != "slurm" or not bad:
        return spec
    job = JobInfo(
        "",
        "",
        required=hosts(site.nodelist or ""),
        excluded=hosts(site.exclude or ""),
        partition=site.partition or "",
        reservation=site.reservation or "",
    )
    return replace(spec, exclude=tuple(to_leave_out(bad, job, spec.nodes[1])))


def _refuse_under_way(run: RunFolder) -> None:
    job_id = newest_job(run, run.history.attempts())
    if under_way := RunOrJob(run, job_id).under_way_as():
        raise ValueError(
            f"run_dir={run.path} is under way as {under_way}; cancel that first, or choose another run_dir"
        )


def _check_path(target: RunFolder, *, snapshot: bool) -> None:
    """Refuse a run folder whose path Slurm or PYTHONPATH would take for something else."""
    path = str(target.path)
    if bad := sorted({letter for letter in path if letter in "%\\" or not letter.isprintable()}):
        letters = " ".join(map(ascii, bad))
        raise ValueError(
            f"run_dir={path!r}: {letters} means something else in Slurm's file names; choose another run_dir"
        )
    if snapshot and os.pathsep in path:
        raise ValueError(
            f"run_dir={path}: PYTHONPATH, which leads to a snapshot, ends at a colon; choose another run_dir"
        )


@contextlib.contextmanager
def _as_if_outside_of_jobs() -> Iterator[None]:
    """Hide the variables of the job that calls this: they would be taken for the new job's."""
    for_sbatch = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or name.startswith("SBATCH_")
    }
    with submitit.helpers.clean_env():
        os.environ.update(for_sbatch)
        yield
