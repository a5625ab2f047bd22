"""The batch scripts of this room, copied to where a user can change them: `qwenlora slurm scripts FOLDER`."""

import shutil
from pathlib import Path

HERE = Path(__file__).parent


def copy_scripts(folder: Path) -> list[Path]:
    """Copy train.sh, and what it sources, into a folder, and return the copies. Raises: ValueError when one
    is there already: a site's own env.sh must not be lost."""
    copies = [folder / file.name for file in sorted(HERE.glob("*.sh"))]
    if there := [copy for copy in copies if copy.exists()]:
        raise ValueError(f"{there[0]} exists already; name another folder: qwenlora slurm scripts FOLDER")
    folder.mkdir(parents=True, exist_ok=True)
    for copy in copies:
        shutil.copyfile(HERE / copy.name, copy)
        copy.chmod(0o755 if copy.name == "train.sh" else 0o644)  # installers may drop the bit
    return copies
