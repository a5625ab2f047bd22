"""The jobs of a run: .submitted/<run>/jobs.jsonl beside the run folder, a line for each submission."""

from typing import Literal, get_args

from qwenlora.run.folder import RunFolder
from qwenlora.run.records import Moment, Record

Cluster = Literal["slurm", "local", "debug"]
CLUSTERS: tuple[Cluster, ...] = get_args(Cluster)


class SubmittedJob(Record):
    """One submission. nodes: the most; min_nodes: the fewest, 0 for as many; site: the site file; config: the
    file with the resolved config, None for a sweep; runs: how many a sweep has; folder: of submitit's files,
    and the snapshot of the package (code/), if any; work_dir: where it was submitted: data paths are relative
    to it."""

    job_id: str
    time: Moment
    cluster: Cluster
    nodes: int = 1
    min_nodes: int = 0
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    timeout_min: int | None = None
    site: str | None = None
    snapshot: bool = False
    name: str | None = None
    folder: str = ""
    work_dir: str = ""
    config: str | None = None
    runs: int | None = None


def submissions(run: RunFolder) -> list[SubmittedJob]:
    """Return the jobs of a run, oldest first. Raises: ValueError when a line is damaged."""
    file = run.submitted / "jobs.jsonl"
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    return [SubmittedJob.parse(line) for line in lines if line.strip()]


def note(run: RunFolder, job: SubmittedJob) -> None:
    """Add a job to the ledger of its run."""
    run.submitted.mkdir(parents=True, exist_ok=True)
    with (run.submitted / "jobs.jsonl").open("a", encoding="utf-8") as file:
        file.write(job.text(indent=None) + "\n")


def sweep_runs(folder: RunFolder) -> list[RunFolder]:
    """Return the runs of a sweep that were submitted, started or not, by name."""
    return [
        RunFolder(folder.path / file.parent.name)
        for file in sorted(folder.path.glob(".submitted/*/jobs.jsonl"))
    ]
