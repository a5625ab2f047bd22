"""The signals that ask a run to stop.

A scheduler sends SIGTERM (scancel, a time limit, preemption) or what `sbatch --signal` names, mostly SIGUSR1
or SIGUSR2; a terminal sends SIGINT (Ctrl-C), and SIGHUP when it closes. Nobody can tell from them how much
time is left, so all mean the same: finish the step, save, leave with exit code 75. Only `nohup` differs: it
has its command ignore SIGHUP, which then stays so.
"""

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def under_nohup() -> bool:
    """Whether this process ignores SIGHUP, as `nohup` has it."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def to_handle(*, nohup: bool) -> list[signal.Signals]:
    """Return the stop signals that a process is to handle. nohup: SIGHUP stays ignored."""
    return [number for number in STOP_SIGNALS if not (nohup and number == signal.SIGHUP)]
