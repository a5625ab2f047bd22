"""The signals that ask a run to stop.

A scheduler sends SIGTERM (scancel, a time limit, preemption) or what `sbatch --signal` names, mostly SIGUSR1
or SIGUSR2; a terminal sends SIGINT (Ctrl-C). Nobody can tell from them how much time is left, so all mean the
same: finish the step, save, leave with exit code 75.
"""

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
