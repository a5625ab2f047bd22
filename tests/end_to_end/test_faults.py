"""A disk that is full, read-only or gone costs saves, never a saved checkpoint, and shows no traceback."""

import json
import os
import shutil
import signal
import subprocess
import time

import forked
import pytest

from qwenlora.run import checkpoints
from qwenlora.run.folder import RunFolder

pytestmark = pytest.mark.slow

CONFIG = """
model: {name_or_path: MODEL}
data: {train: example, cache_dir: CACHE}
lora: {lora_dropout: 0.1}
train: {global_batch_size: 8, per_device_train_batch_size: 2, max_steps: 30, learning_rate: 3e-3,
        save_strategy: steps, save_steps: 5}
log: {logging_steps: 1, wandb: off}
"""
COMMAND = [*forked.COMMAND, "train", "my.yaml", "--nproc"]


@pytest.fixture
def disk(tmp_path):
    """Return what mounts a small file system, which is where the run will be."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("mounting a small file system needs root: sudo make test")

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)

    yield remount
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    write_config(folder, tiny)
    forked.run([*COMMAND, "1", "run_dir=run"], cwd=folder, check=True, capture_output=True)
    return RunFolder(folder / "run")


def write_config(folder, tiny) -> None:
    (folder / "my.yaml").write_text(
        CONFIG.replace("MODEL", str(tiny)).replace("CACHE", str(folder / "cache"))
    )


def size_of_a_checkpoint(run) -> int:
    return sum(file.stat().st_size for file in run.checkpoints()[0].iterdir())


def start(folder, *arguments, processes=1):
    return forked.Popen(
        [*COMMAND, str(processes), "run_dir=disk/run", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(run, step, process) -> None:
    for _ in range(9000):
        if (progress := run.history.progress.read(1)) and progress.step >= step:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    pytest.fail("no progress")


def losses(run) -> list[tuple]:
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def assert_same(run, undisturbed) -> None:
    assert losses(run) == losses(undisturbed)
    name = "adapter_model.safetensors"
    assert (run.adapter / name).read_bytes() == (undisturbed.adapter / name).read_bytes()


def test_on_a_disk_of_one_and_a_half_checkpoints_the_run_goes_on_and_resumes(
    tmp_path, tiny, undisturbed, disk
):
    write_config(tmp_path, tiny)
    run, size = RunFolder(tmp_path / "disk" / "run"), size_of_a_checkpoint(undisturbed)
    disk(f"size={size * 3 // 2}")
    with start(tmp_path, "train.save_total_limit=1") as process:
        wait_for_step(run, 12, process)
        process.send_signal(signal.SIGTERM)
        screen = process.communicate(timeout=500)[0]
    assert process.returncode == 1, screen
    assert "Traceback" not in screen
    warning = "was not saved: No space left on device; the newest whole one is checkpoint-5"
    assert f"warning: checkpoint-10 {warning}" in screen
    assert "failed: stopped, but checkpoint-" in screen, screen
    assert "No space left on device" in screen
    assert [path.name for path in run.checkpoints()] == ["checkpoint-5"]
    assert checkpoints.flaw(run.checkpoint(5)) == ""
    assert run.history.attempts()[0].reason == "failed"
    disk("size=100m")
    with start(tmp_path, "train.save_total_limit=1") as process:
        screen = process.communicate(timeout=500)[0]
    assert process.returncode == 0, screen
    assert "resuming from checkpoint-5" in screen
    assert_same(run, undisturbed)


@pytest.mark.long
def test_to_the_end_on_such_a_disk_the_adapter_is_written_if_it_fits(tmp_path, tiny, undisturbed, disk):
    write_config(tmp_path, tiny)
    disk(f"size={size_of_a_checkpoint(undisturbed) * 3 // 2}")
    with start(tmp_path) as process:
        screen = process.communicate(timeout=500)[0]
    assert process.returncode == 0, screen
    assert screen.count("was not saved: No space left on device; the newest") == 5, screen
    assert_same(RunFolder(tmp_path / "disk" / "run"), undisturbed)


def test_a_disk_that_becomes_read_only_ends_the_run_with_the_reason(tmp_path, tiny, disk):
    write_config(tmp_path, tiny)
    run = RunFolder(tmp_path / "disk" / "run")
    disk("size=100m")
    with start(tmp_path) as process:
        wait_for_step(run, 11, process)
        while not run.checkpoint(10).exists():
            time.sleep(0.02)
        os.sync()
        # the logs are open for writing, so this file system cannot be remounted; an empty one over it does
        # the same
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", run.path], check=True)
        screen = process.communicate(timeout=500)[0]
    subprocess.run(["umount", "--lazy", run.path], check=True)
    assert process.returncode == 1, screen
    assert "Traceback" not in screen
    assert "was not saved: Read-only file system" in screen
    assert "all steps are trained, but the adapter was not saved: Read-only file system" in screen
    assert checkpoints.flaw(run.checkpoint(10)) == ""


def test_a_run_folder_that_is_removed_is_missed_and_not_made_anew(tmp_path, tiny):
    write_config(tmp_path, tiny)
    (tmp_path / "disk").mkdir()
    run = RunFolder(tmp_path / "disk" / "run")
    with start(tmp_path, processes=2) as process:
        wait_for_step(run, 6, process)
        run.path.rename(
            tmp_path / "removed"
        )  # at once: a folder that is written into cannot be emptied name by name
        shutil.rmtree(tmp_path / "removed", ignore_errors=True)
        screen = process.communicate(timeout=500)[0]
    assert process.returncode == 1, screen
    assert "Traceback" not in screen
    assert "was not saved: No such file or directory" in screen
    assert "all steps are trained, but the adapter was not saved: No such file or directory" in screen
    assert not run.checkpoints()
