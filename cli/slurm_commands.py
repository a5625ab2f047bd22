"""`qwenlora slurm scripts`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from qwenlora.cli.arguments import screen
from qwenlora.slurm.scripts import copy_scripts


def scripts(
    folder: Annotated[Path, typer.Argument(help="Where they go, on a file system that all nodes see.")],
) -> int:
    """Copy the batch scripts out of the package, for plain sbatch.

    Example: qwenlora slurm scripts slurm
    """
    for copy in copy_scripts(folder):
        screen().print(f"{copy} is written", soft_wrap=True)
    train = shlex.quote(str(folder / "train.sh"))
    screen().print("next: your site's set-up goes into env.sh; then")
    screen().print(f"  sbatch --gpus-per-node 8 --time 8:00:00 {train} my.yaml", soft_wrap=True)
    return 0
