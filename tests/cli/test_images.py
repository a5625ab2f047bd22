"""The images: the Dockerfile is sound, and apptainer.def makes the same of the same base."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DEFINITION = (ROOT / "apptainer.def").read_text()
SETUP = (ROOT / "setup.cfg").read_text()
_STEP = re.compile(r"^ *(?:RUN |&& )?((?:apt-get|rm|python\S* -m venv|\S+/pip) .*?)(?: \\)?$", re.MULTILINE)


def test_hadolint_finds_nothing_in_the_dockerfile():
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    hadolint = shutil.which("hadolint", path=path)
    if hadolint is None:
        pytest.skip("the test extra of setup.cfg is not installed as a whole")
    command = [hadolint, ROOT / "Dockerfile"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (0, "")


def test_both_images_are_made_in_the_same_way():
    steps = _STEP.findall(DOCKERFILE)
    assert len(steps) == 6
    assert steps == _STEP.findall(DEFINITION)
    assert re.search("^FROM (.*)", DOCKERFILE, re.MULTILINE)[1] == re.search("From: (.*)", DEFINITION)[1]


def test_what_is_installed_has_the_versions_that_are_tested():
    installs = [step for step in _STEP.findall(DOCKERFILE) if "/pip " in step]
    assert len(installs) == 2
    assert all("--constraint /opt/constraints.txt" in step for step in installs)
    allowed = re.search(r"python_requires = >=3\.(\d+),<3\.(\d+)", SETUP)
    minor = re.search(r"python3\.(\d+) -m venv", DOCKERFILE)[1]
    assert int(minor) in range(int(allowed[1]), int(allowed[2]))


def test_pins_are_those_that_setup_cfg_allows():
    pinned = re.findall(r"^([\w.-]+)==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    versions = {_plain(name): _numbers(version) for name, version in pinned}
    needed = re.search(r"install_requires =\n((?:    .*\n)+)", SETUP)[1]
    for name, lowest in re.findall(r"^    ([\w-]+) >= ([\d.]+)$", needed, re.MULTILINE):
        assert versions[_plain(name)] >= _numbers(lowest), name


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
