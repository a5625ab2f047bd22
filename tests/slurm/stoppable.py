"""A task that asks Slurm about its job 0.2 s and 1.2 s after the first signal, writes it down and leaves with
75.

Usage: stoppable.py FOLDER. It writes FOLDER/JOB.RESTARTS.RANK.started, and .json: the signals it got, and the
answers.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from qwenlora.slurm.query import ask

folder, job_id = Path(sys.argv[1]), os.environ["SLURM_JOB_ID"]
restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
stem = f"{job_id}.{restarts}.{os.environ['SLURM_PROCID']}"
signals: list[str] = []  # a handler must do no more than this: Slurm sends SIGTERM twice within milliseconds
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: signals.append(signal.Signals(number).name))
(folder / f"{stem}.started").touch()
deadline = time.monotonic() + 120
while not signals and time.monotonic() < deadline:
    time.sleep(0.02)
answers = []
for wait in (0.2, 1.0):
    time.sleep(wait)
    began = time.monotonic()
    answers.append([ask(job_id), ask(job_id, restarts), time.monotonic() - began])
seen = [
    [now._asdict() if now else None, mine._asdict() if mine else None, took] for now, mine, took in answers
]
(folder / f"{stem}.part").write_text(json.dumps({"signals": signals, "answers": seen}, default=str))
(folder / f"{stem}.part").rename(folder / f"{stem}.json")
sys.exit(75)
