"""Asks Slurm about a job. `scontrol show job` knows most, but shows a job that is being stopped as COMPLETING
(after the loss of a node, as PENDING already). Then only the accounting (sacct) knows why it is stopped;
without accounting that is guessed."""

import os
import re
import subprocess
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 10.0  # seconds, for one command
PATIENCE = 2.0  # seconds that the accounting may lag behind
CLOCKS_S = 30.0  # by which the clocks of machines may differ
UNDER_WAY = {"PENDING", "RUNNING", "SUSPENDED", "RESIZING"}  # states of a job that has not ended
COLUMNS = "JobIDRaw,JobID,State,Reason,NodeList,WorkDir,JobName,Submit,Start,End"
SEPARATOR = "\x1f"
# states of a node; signs after them say more, * that it does not answer
WORKS = r"(idle|allocated|mixed|completing|planned)[^*\w]*"
_BEGAN = time.time()  # of this process; its job is stopped later


class JobInfo(NamedTuple):
    """A job, or one incarnation of it. Times are seconds since 1970; None: not known, or not yet.

    job_id: 12, or 12_3 for task 3 of an array
    state: in Slurm's words; of a job that is COMPLETING, how it ends: PENDING, RUNNING, CANCELLED, TIMEOUT,
        PREEMPTED, NODE_FAIL, REQUEUED, COMPLETED, FAILED ...
    completing: its processes are being stopped
    restarts: how often Slurm has put it back into the queue, including now
    requeue: Slurm may do so; False once only the accounting remembers the job
    preempted: by a job with a higher priority; true as soon as that is announced, when there is a grace time
    seconds_left: until Slurm stops it, at its time limit or the end of the grace time; None without a limit
    nodes: in Slurm's order; of a job that is being stopped, those that are still alive
    required, excluded: nodes that it must and must not have
    command: the script and its arguments, joined by spaces, so they cannot be split again
    """

    job_id: str
    state: str
    completing: bool = False
    reason: str = ""
    restarts: int = 0
    requeue: bool = False
    preempted: bool = False
    seconds_left: float | None = None
    nodes: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    partition: str = ""
    reservation: str = ""
    stdout: Path | None = None
    work_dir: Path | None = None
    command: str = ""
    name: str = ""
    submit: float | None = None
    start: float | None = None
    end: float | None = None

    @property
    def is_alive(self) -> bool:
        """Whether it waits, runs, or is being stopped, perhaps to run again."""
        return self.completing or self.state in UNDER_WAY


class ClusterNode(NamedTuple):
    """A node of the cluster. kind: its features, generic resources such as GPUs, CPUs and memory; works: it
    takes jobs, now or when others have ended."""

    name: str
    kind: str
    works: bool


def ask(job_id: str, restarts: int | None = None) -> JobInfo | None:
    """Return what Slurm says of a job, or None when there is no Slurm or it does not know the job. restarts:
    SLURM_RESTART_COUNT of the asking process, 0 when unset; the answer is then about the incarnation of this
    process, even when the job already waits to run again."""
    job = show(job_id)
    if job is None:
        past = history(job_id)
        return past[-1 if restarts is None else min(restarts, len(past) - 1)] if past else None
    if not job.completing and restarts in (None, job.restarts):
        return job
    ended = _ended(job, restarts)
    if ended is None:
        return job._replace(state=_guess(job))
    return job._replace(
        state=ended.state,
        preempted=job.preempted or ended.preempted,
        nodes=job.nodes or ended.nodes,
        start=ended.start,
        end=ended.end,
        seconds_left=None,
    )


def history(job_id: str) -> list[JobInfo]:
    """Return a job's incarnations, by SLURM_RESTART_COUNT from 0; [] when the accounting does not know it.
    Once a job has lost a node, Slurm 22.05 writes how each later incarnation ends into the record of the one
    that lost it, and leaves their own PENDING for ever: that record is then the last here."""
    answer = _run("sacct", "-D", "-X", "-n", "-P", f"--delimiter={SEPARATOR}", "-o", COLUMNS, "-j", job_id)
    jobs: list[JobInfo] = []
    has_lost_nodes = False
    for record in answer.stdout.split("\n") if answer else ():
        fields = record.split(SEPARATOR)
        # an array's number names all its tasks, and is also the number of one of them
        if len(fields) != len(COLUMNS.split(",")) or job_id not in fields[:2]:
            continue
        _, name_of_task, state, reason, nodes, work_dir, name, submit, start, end = fields
        state = state.split()[0]  # CANCELLED by 1000
        if state == "RESIZING":  # the same incarnation goes on in the next line, with fewer nodes
            has_lost_nodes = True
            continue
        if has_lost_nodes and state == "PENDING":
            continue
        jobs.append(
            JobInfo(
                job_id=name_of_task,
                state=state,
                reason=_known(reason),
                restarts=len(jobs),
                preempted=state == "PREEMPTED",
                nodes=hosts(_known(nodes)),
                work_dir=Path(work_dir) if work_dir else None,
                name=name,
                submit=_seconds(submit),
                start=_seconds(start),
                end=_seconds(end),
            )
        )
    return jobs


def ended(job_id: str, restarts: int, since: float) -> JobInfo | None:
    """Return how an incarnation of a job ended, or is being stopped; None when the accounting does not know.
    since: it ended after that."""
    past = history(job_id)
    # the last record may be about later incarnations, too
    mine = past[restarts : restarts + 1] or [each for each in past[-1:] if (each.end or 0) >= since - 1]
    return mine[0] if mine and mine[0].state not in UNDER_WAY else None


def requeue(job_id: str) -> str:
    """Put a job back into the queue; return why that failed, or an empty text. A waiting job stays as it is.
    A job that is being stopped, at its time limit or by scancel, runs again: ask first."""
    job = show(job_id)  # for its id in an array: `scontrol requeue NUMBER` may mean the whole array
    if job is None:
        return "Slurm does not know the job"
    answer = _run("scontrol", "requeue", job.job_id)
    if answer is None:
        return "scontrol does not answer"
    return "" if answer.returncode == 0 or "pending execution" in answer.stderr else answer.stderr.strip()


def cancel(job_id: str) -> None:
    """End a job; it is not run again."""
    _run("scancel", job_id)


def cluster_nodes(partition: str) -> list[ClusterNode]:
    """Return the nodes of a partition, or of several (a,b); empty: of the default one. [] without Slurm."""
    chosen = ("-p", partition) if partition else ()
    answer = _run("sinfo", "-h", "-N", *chosen, "-o", SEPARATOR.join(("%N", "%P", "%T", "%f %G %c %m")))
    found: dict[str, ClusterNode] = {}
    for record in answer.stdout.splitlines() if answer else ():
        name, of, state, kind = record.split(SEPARATOR)
        if partition or of.endswith("*"):
            found[name] = ClusterNode(name, kind, re.fullmatch(WORKS, state) is not None)
    return list(found.values())


def kill_step() -> None:
    """Kill all processes of the step that this one is in, on all nodes."""
    _run("scancel", "--signal=KILL", f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}")


def hosts(nodelist: str) -> tuple[str, ...]:
    """Return the names in Slurm's short form: a1,b[2-3,08-09] is a1 b2 b3 b08 b09. Raises: ValueError."""
    names: list[str] = []
    for word in re.findall(r"(?:[^,\[]|\[[^\]]*\]|\[)+", nodelist):
        parts = re.findall(r"\[.*?\]|[^\[]+", word)
        if "".join(parts) != word:
            raise ValueError(f"no names of nodes: {word}")
        choices = [_numbers(part[1:-1]) if part[0] == "[" else [part] for part in parts]
        names += map("".join, product(*choices))
    return tuple(names)


def _numbers(ranges: str) -> list[str]:
    """Return the numbers of 1-3,08, each with at least as many digits as the first of its range."""
    numbers: list[str] = []
    for part in ranges.split(","):
        low, _, high = part.partition("-")
        if not re.fullmatch(r"\d+(-\d+)?", part) or int(high or low) < int(low):
            raise ValueError(f"no numbers of nodes: [{ranges}]")
        numbers += [str(number).zfill(len(low)) for number in range(int(low), int(high or low) + 1)]
    return numbers


def show(job_id: str) -> JobInfo | None:
    """Return what scontrol says. A second try: it may be busy when many jobs end together."""
    for wait in (0.3, 0.0):
        answer = _run("scontrol", "show", "job", job_id)
        if answer is None:
            return None
        jobs = map(_read, re.split(r"\n\s*\n", answer.stdout))  # an array's number names all its tasks
        named = [job for number, job in jobs if job_id in (number, job.job_id)]
        if named or "Invalid job id" in answer.stderr:
            return named[0] if named else None
        time.sleep(wait)
    return None


def _read(record: str) -> tuple[str, JobInfo]:
    """Return the number and the job of a record of `scontrol show job` (not with -o: values have spaces)."""

    def line(pattern: str) -> str:
        match = re.search(rf"^ *{pattern}", record, re.MULTILINE)
        return _known(match[1]) if match else ""

    number, state = line(r"JobId=(\d+)"), line(r"JobState=(\w+)")
    array, task = line(r"JobId=\d+ ArrayJobId=(\d+)"), line(r"JobId=\d+ ArrayJobId=\d+ ArrayTaskId=(\d+) ")
    stdout, work_dir = line("StdOut=(.*)"), line("WorkDir=(.*)")
    end = _seconds(line(r"StartTime=\S+ EndTime=(\S+)"))
    return number, JobInfo(
        job_id=f"{array}_{task}" if task else number,
        state=state,
        completing=state == "COMPLETING",
        reason=line("JobState=.* Reason=(.*) Dependency="),
        restarts=int(line(r"Requeue=\d Restarts=(\d+)") or 0),
        requeue=line(r"Requeue=(\d)") == "1",
        preempted=line(r"PreemptEligibleTime=\S+ PreemptTime=(\S+)") != "",
        seconds_left=max(0.0, end - time.time()) if state == "RUNNING" and end is not None else None,
        nodes=hosts(line(r"NodeList=(\S*)")),
        required=hosts(line(r"ReqNodeList=(\S*)")),
        excluded=hosts(line(r"ReqNodeList=\S* ExcNodeList=(\S*)")),
        partition=line(r"Partition=(\S*)"),
        reservation=line(r"Reservation=(\S*)"),
        stdout=Path(stdout) if stdout else None,
        work_dir=Path(work_dir) if work_dir else None,
        command=line("Command=(.*)"),
        name=line("JobId=.* JobName=(.*)"),
        submit=_seconds(line(r"SubmitTime=(\S+)")),
        start=_seconds(line(r"StartTime=(\S+)")),
        end=end if state != "PENDING" else None,  # of a waiting job it is only an estimate
    )


def _ended(job: JobInfo, restarts: int | None) -> JobInfo | None:
    """Return the incarnation that has ended or is being stopped; None when the accounting is too late."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = _last_ended(job) if restarts is None else ended(job.job_id, restarts, _BEGAN)
        if found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def _last_ended(job: JobInfo) -> JobInfo | None:
    """Return the last incarnation that ended, but not before this one started (or was put back: a second
    later)."""
    past = [each for each in history(job.job_id) if each.end and each.end >= (job.start or 0) - 2]
    return past[-1] if past and past[-1].state not in UNDER_WAY else None


def _guess(job: JobInfo) -> str:
    """Return how a job ends, without accounting. REQUEUED may also be a preemption or a lost node."""
    if job.reason == "TimeLimit":
        return "TIMEOUT"
    # a job that was put back has no end yet, or that of its time limit
    cancelled = job.completing and job.end is not None and job.end < time.time() + CLOCKS_S
    return "CANCELLED" if cancelled else "REQUEUED"


def _known(value: str) -> str:
    return "" if value in ("(null)", "None", "N/A", "Unknown", "None assigned") else value


def _seconds(value: str) -> float | None:
    return float(value) if value.isdecimal() else None


def _run(*command: str) -> subprocess.CompletedProcess[str] | None:
    """Run a command of Slurm's, which shows times in seconds since 1970; None when it is missing or hangs."""
    env = os.environ | {"SLURM_TIME_FORMAT": "%s"}
    try:
        return subprocess.run(
            command, env=env, capture_output=True, text=True, errors="replace", timeout=TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
