"""Why Slurm ended an attempt, as a state of Slurm: CANCELLED, NODE_FAIL, PREEMPTED, REQUEUED or TIMEOUT."""

import os

from qwenlora.run.records import Attempt
from qwenlora.slurm import query

LONGEST_LEAD_S = 840
LEAD_SIGNALS = ("SIGUSR1", "SIGUSR2")
_SLURM_ENDS = ("CANCELLED", "NODE_FAIL", "PREEMPTED", "REQUEUED", "TIMEOUT")


def cause_of_kill(attempt: Attempt) -> str:
    """Return the state in which Slurm ended an attempt that was killed; empty where Slurm does not know."""
    if not attempt.job_id:
        return ""
    ended = query.ended(attempt.job_id, attempt.restarts, attempt.start.timestamp())
    return ended.state if ended else ""


def cause_of_stop(job: query.JobInfo | None, stop_signal: str) -> str:
    """Return why Slurm stops a job that got stop_signal; empty when it does not: Slurm sends the signal ahead
    of the time limit, but anybody else may send it, too."""
    if job is None:
        return ""
    if job.state in _SLURM_ENDS:
        return job.state
    if job.preempted:
        return "PREEMPTED"
    if not job.requeue:  # `qwenlora cancel` forbids requeueing, and then has the job save
        return "CANCELLED"
    # the lead is unknown if sbatch's command line set it; Slurm sends the signal up to a minute early
    lead = os.environ.get("QWENLORA_LEAD_S", "")
    lead_s = max(int(lead) if lead.isdecimal() else 0, LONGEST_LEAD_S) + 60
    if stop_signal in LEAD_SIGNALS and job.seconds_left is not None and job.seconds_left <= lead_s:
        return "TIMEOUT"
    return ""
