"""What a run keeps in memory becomes a checkpoint, or is not used."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from qwenlora.run import checkpoints, snapshots
from qwenlora.run.checkpoints import ADAPTER, OPTIMIZER, STATE
from qwenlora.run.folder import RunFolder
from qwenlora.run.records import Cursor, FileEntry, Identity, Schedule, State
from qwenlora.run.snapshots import Snapshots

IDENTITY = Identity(config={}, data="d", base="b")


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


@pytest.fixture
def memory():
    memory = Snapshots()
    yield memory
    memory.close()


def contents(step):
    state = State(
        step=step,
        cursor=Cursor(epoch=0, step_in_epoch=step, steps_per_epoch=100),
        scheduler=Schedule(last_epoch=step),
        optimizer_groups=[],
        loss_so_far=[],
        logged_step=step,
        evaluation_due=False,
        eval_losses={},
        moved=True,
    )
    adapter = save({"lora_B": np.full(5000, step, np.float32)})
    return {STATE: state.text().encode(), ADAPTER: adapter, OPTIMIZER: save({"m": np.ones(3)})}


def manifest(step, files):
    entries = {
        name: FileEntry(bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
        for name, text in files.items()
    }
    return checkpoints.manifest_text(step, 2, IDENTITY, entries)


def keep(memory, slot, step):
    files = contents(step)
    snapshots.write(Path(memory.paths[slot]), files, manifest(step, files))


def flip(memory, slot, part=0.5):
    with Path(memory.paths[slot]).open("r+b") as file:
        file.seek(int(file.seek(0, os.SEEK_END) * part))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_the_newest_snapshot_becomes_a_whole_checkpoint(memory, run):
    keep(memory, 0, 7)
    keep(memory, 1, 5)
    assert memory.save_newest(run) == ("checkpoint-7", [])
    (folder,) = run.checkpoints()
    assert checkpoints.flaw(folder) == ""
    assert {
        file.name: file.read_bytes() for file in folder.iterdir() if "manifest" not in file.name
    } == contents(7)
    assert [path.name for path in run.path.iterdir()] == ["checkpoint-7"]


def test_a_place_is_used_again_also_for_less(memory, run):
    keep(memory, 0, 7)
    os.truncate(Path(memory.paths[0]), 10**6)
    keep(memory, 0, 8)
    assert memory.save_newest(run)[0] == "checkpoint-8"


def test_without_a_snapshot_newer_than_the_disk_nothing_is_written(memory, run):
    assert memory.save_newest(run) == ("", [])
    keep(memory, 0, 7)
    memory.save_newest(run)
    before = run.checkpoint(7).stat().st_mtime_ns
    keep(memory, 1, 6)
    assert memory.save_newest(run) == ("", [])
    assert run.checkpoint(7).stat().st_mtime_ns == before


def test_a_damaged_checkpoint_on_disk_counts_for_nothing(memory, run):
    keep(memory, 0, 9)
    memory.save_newest(run)
    (run.checkpoint(9) / ADAPTER).write_bytes(b"x")
    keep(memory, 1, 7)
    flip(memory, 0)
    name, problems = memory.save_newest(run)
    assert name == "checkpoint-7"
    assert len(problems) == 1


@pytest.mark.parametrize("part", [0.001, 0.3, 0.5, 0.7])
def test_a_flipped_bit_is_noticed_and_the_older_one_is_used(memory, run, part):
    keep(memory, 0, 7)
    keep(memory, 1, 5)
    flip(memory, 0, part)
    name, problems = memory.save_newest(run)
    assert name == "checkpoint-5"
    assert len(problems) == 1
    assert "in memory" in problems[0]
    assert [path.name for path in run.path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize("share", [0.001, 0.3, 0.6])
def test_a_snapshot_that_was_cut_off_is_not_used(memory, run, share):
    keep(memory, 0, 7)
    file = Path(memory.paths[0])
    os.truncate(file, int(file.stat().st_size * share))
    keep(memory, 1, 5)
    assert memory.save_newest(run)[0] == "checkpoint-5"


def test_a_full_disk_is_said_and_leaves_nothing(memory, run, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshots, "settle", full)
    keep(memory, 0, 7)
    name, (problem,) = memory.save_newest(run)
    assert name == ""
    assert problem.endswith(": No space left on device")
    assert list(run.path.iterdir()) == []


def test_the_files_have_no_names_so_nothing_stays_when_their_processes_are_gone(memory):
    assert all(" (deleted)" in str(Path(path).readlink()) for path in memory.paths)
