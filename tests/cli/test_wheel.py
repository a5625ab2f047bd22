"""The wheel alone is enough: it holds all files that commands read."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qwenlora.run.package import files, package

ROOT = Path(__file__).parents[2]
MAKE = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return the folder of an unpacked wheel, made of a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for file in files(package()):
        copy = folder / "sources" / file.relative_to(package())
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copyfile(ROOT / name, folder / "sources" / name)
    command = [sys.executable, "-c", MAKE, str(folder)]
    made = subprocess.run(command, cwd=folder / "sources", capture_output=True, text=True, check=True)
    with zipfile.ZipFile(folder / made.stdout.split()[-1]) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def run(wheel, tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "qwenlora", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_has_the_files_of_the_package(wheel):
    names = {file.relative_to(package()) for file in files(package()) if not file.name.startswith(".")}
    assert {name for name in names if not (wheel / "qwenlora" / name).exists()} == set()


def test_it_runs_from_an_empty_folder(wheel, tmp_path):
    assert run(wheel, tmp_path, "init", "demo").returncode == 0
    assert "qwen3-8b-tools" in run(wheel, tmp_path, "recipes").stdout
    planned = run(wheel, tmp_path, "plan", "demo.yaml", "--gpu", "h100")
    assert (planned.returncode, planned.stderr) == (0, "")
    assert "recommended" in planned.stdout
    listed = run(wheel, tmp_path, "train", "demo.yaml", "--dry-run")
    assert "# run folder" in listed.stdout


def test_slurm_s_scripts_come_out_of_it_and_none_is_lost(wheel, tmp_path):
    copied = run(wheel, tmp_path, "slurm", "scripts", "my scripts")
    assert (copied.returncode, copied.stderr) == (0, "")
    assert "sbatch --gpus-per-node 8 --time 8:00:00 'my scripts/train.sh' my.yaml" in copied.stdout
    assert {file.name for file in (tmp_path / "my scripts").iterdir()} == {"env.sh", "job.sh", "train.sh"}
    script = tmp_path / "my scripts" / "train.sh"
    said = subprocess.run([script, "my.yaml"], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr.startswith("error: not in a Slurm job; ")
    script.write_text("mine")
    again = run(wheel, tmp_path, "slurm", "scripts", "my scripts")
    assert (again.returncode, script.read_text()) == (2, "mine")
    assert again.stderr == (
        "error: my scripts/env.sh exists already; name another folder: qwenlora slurm scripts FOLDER\n"
    )
