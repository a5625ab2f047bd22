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
