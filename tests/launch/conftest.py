"""A folder of its own, no Slurm and no chosen GPUs for every test of launch/."""

import os

import pytest


@pytest.fixture(autouse=True)
def plain_surroundings(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
