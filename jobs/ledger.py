"""What was submitted of a run: .submitted/<run>/jobs.jsonl beside the run folder, one line a submission.

{"job_id", "time", "cluster", "nodes", "gpus_per_node", "cpus_per_task", "timeout_min", "site", "snapshot",
"name", "folder", "work_dir", "config"}. folder: of submitit's files and the snapshot (code/); work_dir: where
it was submitted, which data paths are relative to; config: the resolved config that the job runs. The line of
a sweep as a whole has "runs", their number, instead of "config".
"""

import json
from typing import Any

from qwenlora.run.folder import RunFolder


def submissions(run: RunFolder) -> list[dict[str, Any]]:
    """Return the lines, oldest first."""
    file = run.submitted / "jobs.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def note(run: RunFolder, line: dict[str, Any]) -> None:
    """Add a line."""
    run.submitted.mkdir(parents=True, exist_ok=True)
    with (run.submitted / "jobs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def sweep_runs(folder: RunFolder) -> list[RunFolder]:
    """Return the runs below a sweep's folder that were submitted, started or not, by name."""
    return [
        RunFolder(folder.path / file.parent.name)
        for file in sorted(folder.path.glob(".submitted/*/jobs.jsonl"))
    ]
