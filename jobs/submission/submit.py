"""A run as a job: `from qwenlora.jobs import submit; job = submit("configs/my.yaml", {"lora.r": 32},
nodes=2)`.

On submitit: `job.result()` is the run's summary (task.py), `job.state` Slurm's word. What is submitted lies
beside the run folder, in .submitted/<run>/<n>/: the resolved config, a copy of the package, submitit's files;
ledger.py keeps account. All that can be refused is refused before anything is written.
"""

import contextlib
import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import submitit
from submitit.core.utils import FailedJobError

from qwenlora.configs import Config, load_config
from qwenlora.configs.load import to_yaml
from qwenlora.jobs import ledger
from qwenlora.jobs.find import Found, newest_job
from qwenlora.jobs.ledger import Cluster, SubmittedJob
from qwenlora.jobs.submission import executors, sweeps
from qwenlora.jobs.submission.executors import Needs
from qwenlora.jobs.submission.site import Site, load_site
from qwenlora.jobs.task import Attempt, InProcess
from qwenlora.run.folder import RunFolder
from qwenlora.run.package import snapshot as copy_package
from qwenlora.run.records import now

Overrides = Mapping[str, Any] | Iterable[str]
Job = submitit.Job[dict[str, Any]]
NO_LIMIT_MIN = 60 * 24 * 365
LONGEST_NAME = 64


@dataclass(frozen=True)
class Asked:
    """What a user asks of a job; submit says what it means. None: as the site has it, or the default."""

    cluster: Cluster = "slurm"
    nodes: int | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    timeout_min: int | None = None
    snapshot: bool = False
    name: str | None = None
    fresh: bool = False
    allowed: tuple[str, ...] = ()

    @property
    def on_slurm(self) -> bool:
        """Whether Slurm runs it."""
        return self.cluster == "slurm"

    def check(self, site: Site) -> None:
        """Refuse what cannot be. Raises: ValueError."""
        if self.cluster not in ("slurm", "local", "debug"):
            raise ValueError(f"cluster={self.cluster}: expected slurm, local or debug")
        for key, least in {"nodes": 1, "gpus_per_node": 0, "cpus_per_task": 1, "timeout_min": 1}.items():
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{key}={value}: expected a whole number, {least} or more")
        if not self.on_slurm and (self.nodes or 1) > 1:
            raise ValueError(
                f"nodes={self.nodes}: cluster={self.cluster} is this machine alone; for several,"
                " cluster=slurm"
            )
        if self.on_slurm and not (self.timeout_min or site.timeout_min):
            raise ValueError(
                "timeout_min is missing: minutes, as --timeout-min 600; or set it in a site file"
            )
        if self.cluster == "debug" and (self.fresh or self.allowed):
            raise ValueError(
                "fresh and allow_config_change do not go with cluster=debug; qwenlora train knows them"
            )
        if self.cluster == "debug" and self.snapshot:
            raise ValueError(
                "snapshot has no effect with cluster=debug, which runs in this process; leave it out"
            )

    def needs(self, site: Site, processes: int, run: RunFolder) -> Needs:
        """Return what one job is given. processes: ranks a node."""
        theirs = site if self.on_slurm else Site()
        gpus = theirs.gpus_per_node if self.gpus_per_node is None else self.gpus_per_node
        return Needs(
            nodes=self.nodes or theirs.nodes or 1,
            gpus_per_node=gpus or 0,
            cpus_per_task=self.cpus_per_task or theirs.cpus_per_task or processes,
            timeout_min=self.timeout_min or theirs.timeout_min or NO_LIMIT_MIN,
            name=_safe(self.name or run.path.name),
            site=site,
            snapshot=self.snapshot,
        )


@dataclass(frozen=True)
class Submission:
    """A job, or an array of jobs, known to be sound. target: the folder of the run, or of the sweep.

    source: the package that a snapshot is taken of, where it is not this one.
    """

    target: RunFolder
    configs: tuple[Config, ...]
    cluster: Cluster
    needs: Needs
    max_parallel: int | None = None
    source: Path | None = None
    fresh: bool = False
    allowed: tuple[str, ...] = ()

    @property
    def gpu_hours(self) -> float:
        """What all jobs ask for together."""
        needs = self.needs
        return len(self.configs) * needs.nodes * needs.gpus_per_node * needs.timeout_min / 60

    def folder(self) -> Path:
        """Return where the next submission of this run or sweep goes."""
        numbers = [int(path.name) for path in self.target.submitted.glob("*") if path.name.isdecimal()]
        return self.target.submitted / str(max(numbers, default=0) + 1)

    def text(self) -> str:
        """Return what sbatch would read, and write nothing."""
        return executors.slurm(self.needs, self.folder(), self.max_parallel).text(len(self.configs))

    def submit(self) -> list[Job]:
        """Submit, and return a Job a config. Raises: ValueError with sbatch's words when it refuses."""
        if self.cluster == "slurm" and not shutil.which("sbatch"):
            raise ValueError(
                "cluster=slurm: there is no sbatch on this machine; submit from a login node, or"
                " cluster=local"
            )
        folder = self._make_folder()
        try:
            files = self._write_configs(folder)
            if self.needs.snapshot:
                copy_package(folder / "code", self.source)
            apart = executors.detached() if self.cluster == "local" else contextlib.nullcontext()
            # submitit prints sbatch's words
            with _as_if_outside_of_jobs(), apart, contextlib.redirect_stderr(io.StringIO()):
                jobs = cast(
                    list[Job], self._executor(folder).submit_array([self._task(file) for file in files])
                )
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, FailedJobError):
                raise ValueError(f"sbatch refused the job: {' '.join(str(error).split())}") from None
            raise
        if self.cluster == "slurm":  # the result of the first node's task is the run's
            jobs = [submitit.SlurmJob(folder, job.job_id, tasks=(0,)) for job in jobs]
        self._note(folder, jobs, files)
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
        one = len(self.configs) == 1
        files = [
            folder / ("config.yaml" if one else f"config-{number}.yaml")
            for number in range(len(self.configs))
        ]
        for file, config in zip(files, self.configs, strict=True):
            file.write_text(to_yaml(config), encoding="utf-8")
        return files

    def _executor(self, folder: Path) -> submitit.Executor:
        if self.cluster == "debug":
            return submitit.DebugExecutor(folder)
        if self.cluster == "local":
            return executors.local(self.needs, folder)
        return executors.slurm(self.needs, folder, self.max_parallel)

    def _task(self, file: Path) -> Attempt | InProcess:
        if self.cluster == "debug":
            return InProcess(str(file))
        return Attempt(str(file), self.cluster == "slurm", self.fresh, self.allowed)

    def _note(self, folder: Path, jobs: Sequence[Job], files: Sequence[Path]) -> None:
        needs = self.needs
        all_of_them = SubmittedJob(
            job_id=jobs[0].job_id.partition("_")[0],
            time=now(),
            cluster=self.cluster,
            nodes=needs.nodes,
            gpus_per_node=needs.gpus_per_node,
            cpus_per_task=needs.cpus_per_task,
            timeout_min=needs.timeout_min,
            site=str(needs.site.file) if needs.site.file else None,
            snapshot=needs.snapshot,
            name=needs.name,
            folder=str(folder),
            work_dir=str(Path.cwd()),
        )
        for job, file, config in zip(jobs, files, self.configs, strict=True):
            run = RunFolder(config.run_dir)
            ledger.note(run, all_of_them.revised(job_id=job.job_id, config=str(file)))
        if len(jobs) > 1:
            ledger.note(self.target, all_of_them.revised(runs=len(jobs)))


def submit(
    config: str | Path,
    overrides: Overrides = (),
    *,
    cluster: Cluster = "slurm",
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    cpus_per_task: int | None = None,
    timeout_min: int | None = None,
    site: str | Path | None = None,
    snapshot: bool = False,
    name: str | None = None,
    fresh: bool = False,
    allow_config_change: Sequence[str] = (),
) -> Job:
    """Submit a run; return submitit's Job, whose result is the run's summary.

    cluster: slurm; local: a process of this machine; debug: this process, once the result is asked for.
    nodes, gpus_per_node, cpus_per_task (CPUs a node), timeout_min (minutes): default to the site's, then to
    one node, no GPU, one CPU a process; Slurm must be told a time. site: a site file or its name (site.py).
    name: the job's.
    snapshot: run a copy of the package, made now. fresh, allow_config_change: as `qwenlora train` has them.
    Raises: ValueError for all that is known to fail.
    """
    allowed = tuple(allow_config_change)
    asked = Asked(cluster, nodes, gpus_per_node, cpus_per_task, timeout_min, snapshot, name, fresh, allowed)
    return prepare(config, overrides, asked, site).submit()[0]


def submit_sweep(
    config: str | Path,
    grid: Mapping[str, Sequence[Any]],
    overrides: Overrides = (),
    *,
    max_parallel: int | None = None,
    cluster: Cluster = "slurm",
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    cpus_per_task: int | None = None,
    timeout_min: int | None = None,
    site: str | Path | None = None,
    snapshot: bool = False,
    name: str | None = None,
) -> list[Job]:
    """Submit a run for every combination of the grid's values, as one job array; return their Jobs.

    grid: {dotted config key: values}; the last key changes fastest. Each run has its folder in run_dir, named
    like lora.r=16,train.learning_rate=0.0001. max_parallel: how many run at once; None: all that Slurm has
    room for. The rest is as in submit. Raises: ValueError, before any of them is submitted.
    """
    asked = Asked(cluster, nodes, gpus_per_node, cpus_per_task, timeout_min, snapshot, name)
    return prepare_sweep(config, grid, overrides, asked, site, max_parallel).submit()


def prepare(
    config: str | Path,
    overrides: Overrides,
    asked: Asked,
    site: str | Path | None = None,
    source: Path | None = None,
) -> Submission:
    """Return the submission of one run. source: the package that a snapshot is taken of. Raises:
    ValueError."""
    place = load_site(site)
    loaded = load_config(config, overrides, place.config, str(place.file))
    return _prepare(RunFolder(loaded.run_dir), (loaded,), asked, place, source=source)


def prepare_sweep(
    config: str | Path,
    grid: Mapping[str, Sequence[Any]],
    overrides: Overrides,
    asked: Asked,
    site: str | Path | None = None,
    max_parallel: int | None = None,
) -> Submission:
    """Return the submission of a sweep. Raises: ValueError."""
    place = load_site(site)
    if max_parallel is not None and max_parallel < 1:
        raise ValueError(f"max_parallel={max_parallel}: expected 1 or more")
    if asked.cluster == "local":
        raise ValueError(
            "cluster=local would start all runs of a sweep at once; submit them one by one, or cluster=slurm"
        )
    folder, configs = sweeps.configs(config, grid, overrides, place)
    return _prepare(folder, configs, asked, place, max_parallel=max_parallel)


def _prepare(
    target: RunFolder, configs: tuple[Config, ...], asked: Asked, site: Site, **more: Any
) -> Submission:
    asked.check(site)
    _check_place(target, snapshot=asked.snapshot)
    nodes, processes = asked.needs(site, 1, target).nodes, 1
    for config in configs:
        processes = max(processes, _check(config, asked, site, nodes))
    more |= {"fresh": asked.fresh, "allowed": asked.allowed}
    return Submission(target, configs, asked.cluster, asked.needs(site, processes, target), **more)


def _check(config: Config, asked: Asked, site: Site, nodes: int) -> int:
    """Refuse what the agent would, and return the processes a node."""
    from qwenlora.launch import hostfile, refusals  # jobs/ is below launch/, which knows what a node will run

    if asked.on_slurm:
        refusals.check_launcher_in_slurm(config)
    if config.launch.hostfile is not None:
        raise ValueError(
            f"launch.hostfile={config.launch.hostfile} is for qwenlora train on the first of these machines;"
            " leave it out"
        )
    gpus = asked.needs(site, 1, RunFolder(config.run_dir)).gpus_per_node
    processes = (
        config.launch.nproc_per_node or gpus or (1 if asked.on_slurm else hostfile.processes_per_node(config))
    )
    processes = 1 if asked.cluster == "debug" else processes
    refusals.check_start(config, nodes, processes)
    run = RunFolder(config.run_dir)
    refusals.check_allowed_keys(asked.allowed)
    run.check(config, fresh=asked.fresh, allowed=asked.allowed)
    if under_way := Found(run, newest_job(run)).alive():
        raise ValueError(
            f"run_dir={run.path} is under way as {under_way}; cancel that first, or choose another run_dir"
        )
    return processes


def _check_place(target: RunFolder, *, snapshot: bool) -> None:
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


def _safe(name: str) -> str:
    """Return a name that means nothing to a shell or to Slurm."""
    return re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("_")[:LONGEST_NAME] or "qwenlora"


@contextlib.contextmanager
def _as_if_outside_of_jobs() -> Iterator[None]:
    """Hide the variables of a job that this is called in, which would be taken for the new one's."""
    meant = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or name.startswith("SBATCH_")
    }
    with submitit.helpers.clean_env():
        os.environ.update(meant)
        yield
