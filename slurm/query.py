"""Asks Slurm about a job, and reads what it answers.

`scontrol show job` knows most, but calls a job whose processes are being stopped COMPLETING (or, after a lost
node, PENDING already). Why they are stopped is in the accounting (sacct) at that moment. Without accounting
it is guessed.
"""

import os
import re
import subprocess
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 10.0  # seconds, for one command
PATIENCE = 2.0  # seconds that the accounting may lag behind
UNDER_WAY = {"PENDING", "RUNNING", "SUSPENDED", "RESIZING"}  # states of a job that has not ended
COLUMNS = "JobIDRaw,JobID,State,Reason,NodeList,WorkDir,JobName,Submit,Start,End"
SEPARATOR = "\x1f"


class Job(NamedTuple):
    """A job, or one incarnation of it. Times are seconds since 1970, None: not known or not yet.

    job_id: 12, or 12_3 for task 3 of an array
    state: in Slurm's words, what is behind COMPLETING included: PENDING, RUNNING, CANCELLED, TIMEOUT,
    PREEMPTED,
        NODE_FAIL, REQUEUED, COMPLETED, FAILED ...
    completing: its processes are being stopped
    restarts: how often Slurm has put it back into the queue, the time under way included
    requeue: Slurm may do so; not known, so False, once only the accounting remembers the job
    preempted: by a job that matters more; true from the announcement on, when there is a time of grace
    seconds_left: until Slurm stops it, at its time limit or when the time of grace is over; None without a
    time limit
    nodes: in Slurm's order; of a job that is being stopped, those that still live
    command: the script and its arguments with a space between: nobody can take that apart again
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
    stdout: Path | None = None
    work_dir: Path | None = None
    command: str = ""
    name: str = ""
    submit: float | None = None
    start: float | None = None
    end: float | None = None


def ask(job_id: str, restarts: int | None = None) -> Job | None:
    """Return what Slurm says of a job, or None when there is no Slurm or it does not know the job.

    restarts: what SLURM_RESTART_COUNT says in the asking process, 0 when unset. The answer is then about the
    incarnation that it belongs to, even when the job is already waiting to run again.
    """
    job = _show(job_id)
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


def history(job_id: str) -> list[Job]:
    """Return the incarnations of a job, the first one first: number n is the one with SLURM_RESTART_COUNT n.

    An empty list: there is no accounting, or it does not know the job.
    """
    answer = _run("sacct", "-D", "-X", "-n", "-P", f"--delimiter={SEPARATOR}", "-o", COLUMNS, "-j", job_id)
    jobs: list[Job] = []
    for record in answer.stdout.split("\n") if answer else ():
        fields = record.split(SEPARATOR)
        # an array's number names all its tasks, and one of them by itself
        if len(fields) != len(COLUMNS.split(",")) or job_id not in fields[:2]:
            continue
        _, name_of_task, state, reason, nodes, work_dir, name, submit, start, end = fields
        state = state.split()[0]  # CANCELLED by 1000
        jobs.append(
            Job(
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


def requeue(job_id: str) -> str:
    """Put a job back into the queue; return why that failed, or an empty text. One that waits already is left
    as it is.

    It works while the job is being stopped, at its time limit too. After scancel it undoes that: ask first.
    """
    job = _show(job_id)  # its name in an array is needed: `scontrol requeue NUMBER` may be the whole array
    if job is None:
        return "Slurm does not know the job"
    answer = _run("scontrol", "requeue", job.job_id)
    if answer is None:
        return "scontrol does not answer"
    return "" if answer.returncode == 0 or "pending execution" in answer.stderr else answer.stderr.strip()


def hosts(nodelist: str) -> tuple[str, ...]:
    """Return the names in Slurm's short form: a1,b[2-3,08-09] is a1 b2 b3 b08 b09. Raises: ValueError."""
    names: list[str] = []
    for word in re.findall(r"(?:[^,\[]|\[[^\]]*\]|\[)+", nodelist):
        parts = re.findall(r"\[.*?\]|[^\[]+", word)
        if "".join(parts) != word:
            raise ValueError(f"no names of nodes: {word}")
        names += map(
            "".join, product(*(_numbers(part[1:-1]) if part[0] == "[" else [part] for part in parts))
        )
    return tuple(names)


def _numbers(ranges: str) -> list[str]:
    """Return the numbers of 1-3,08: as they are written, with as many digits at least as the first of its
    range."""
    numbers: list[str] = []
    for part in ranges.split(","):
        low, _, high = part.partition("-")
        if not re.fullmatch(r"\d+(-\d+)?", part) or int(high or low) < int(low):
            raise ValueError(f"no numbers of nodes: [{ranges}]")
        numbers += [str(number).zfill(len(low)) for number in range(int(low), int(high or low) + 1)]
    return numbers


def _show(job_id: str) -> Job | None:
    """Return what scontrol says. It is asked twice: it may be busy when many jobs end together."""
    for wait in (0.3, 0.0):
        answer = _run("scontrol", "show", "job", job_id)
        if answer is None:
            return None
        jobs = map(_read, re.split(r"\n\s*\n", answer.stdout))  # an array's number names all its tasks
        found = [job for number, job in jobs if job_id in (number, job.job_id)]
        if found or "Invalid job id" in answer.stderr:
            return found[0] if found else None
        time.sleep(wait)
    return None


def _read(record: str) -> tuple[str, Job]:
    """Return a job of `scontrol show job`, after its number. Not of -o: values have spaces, and end with the
    line."""

    def line(pattern: str) -> str:
        match = re.search(rf"^ *{pattern}", record, re.MULTILINE)
        return _known(match[1]) if match else ""

    number, state = line(r"JobId=(\d+)"), line(r"JobState=(\w+)")
    array, task = line(r"JobId=\d+ ArrayJobId=(\d+)"), line(r"JobId=\d+ ArrayJobId=\d+ ArrayTaskId=(\d+) ")
    stdout, work_dir = line("StdOut=(.*)"), line("WorkDir=(.*)")
    end = _seconds(line(r"StartTime=\S+ EndTime=(\S+)"))
    return number, Job(
        job_id=f"{array}_{task}" if task else number,
        state=state,
        completing=state == "COMPLETING",
        reason=line("JobState=.* Reason=(.*) Dependency="),
        restarts=int(line(r"Requeue=\d Restarts=(\d+)") or 0),
        requeue=line(r"Requeue=(\d)") == "1",
        preempted=line(r"PreemptEligibleTime=\S+ PreemptTime=(\S+)") != "",
        seconds_left=max(0.0, end - time.time()) if state == "RUNNING" and end is not None else None,
        nodes=hosts(line(r"NodeList=(\S*)")),
        stdout=Path(stdout) if stdout else None,
        work_dir=Path(work_dir) if work_dir else None,
        command=line("Command=(.*)"),
        name=line("JobId=.* JobName=(.*)"),
        submit=_seconds(line(r"SubmitTime=(\S+)")),
        start=_seconds(line(r"StartTime=(\S+)")),
        end=end if state != "PENDING" else None,  # what a waiting job shows is made up
    )


def _ended(job: Job, restarts: int | None) -> Job | None:
    """Return the incarnation that is over or being stopped, or None when the accounting has no end of it in
    time."""
    deadline = time.monotonic() + PATIENCE
    while True:
        past = history(job.job_id)
        if (
            restarts is None
        ):  # the last that ended, unless that was before this one started (or was put back: a second)
            found = [each for each in past if each.end and each.end >= (job.start or 0) - 2][-1:]
        else:
            found = past[restarts : restarts + 1]
        if found and found[0].state not in UNDER_WAY:
            return found[0]
        if time.monotonic() > deadline:
            return None
        time.sleep(0.1)


def _guess(job: Job) -> str:
    """Return how a job ends without accounting. REQUEUED: that, or it was preempted, or a node was lost."""
    if job.reason == "TimeLimit":
        return "TIMEOUT"
    return "CANCELLED" if job.completing and job.end else "REQUEUED"


def _known(value: str) -> str:
    return "" if value in ("(null)", "None", "N/A", "Unknown", "None assigned") else value


def _seconds(value: str) -> float | None:
    return float(value) if value.isdecimal() else None


def _run(*command: str) -> subprocess.CompletedProcess[str] | None:
    """Return how a command of Slurm's ended, with times in seconds since 1970; None when it is not there or
    hangs."""
    env = os.environ | {"SLURM_TIME_FORMAT": "%s"}
    try:
        return subprocess.run(
            command, env=env, capture_output=True, text=True, errors="replace", timeout=TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
