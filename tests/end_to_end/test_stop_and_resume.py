"""Asked to stop, a run saves and leaves with 75; the same command goes on as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.slow

CONFIG = """
model: {name_or_path: tiny}
data: {train: example}
lora: {lora_dropout: 0.1}
train: {global_batch_size: 16, per_device_train_batch_size: 4, max_steps: 14, learning_rate: 3e-3,
        save_strategy: steps, save_steps: 4, save_total_limit: null}
log: {logging_steps: 3}  # a stop falls between two lines
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "my.yaml").write_text(CONFIG)
    return tmp_path / "my.yaml"


def losses(folder) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def adapter(folder) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def wait_for_step(folder, step: int, process) -> None:
    for _ in range(1200):
        if (folder / "metrics.jsonl").exists() and any(done >= step for done, _ in losses(folder)):
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    pytest.fail("no progress")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "my.yaml").write_text(CONFIG)
    answer = subprocess.run(
        [sys.executable, "-c", "from qwenlora.launch.cli import main; main()", "train", "my.yaml", "--nproc", "2"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout
    return folder / "runs" / "my"


@pytest.mark.parametrize(
    ("number", "everyone"),
    [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGUSR1, True)],
    ids=["Ctrl-C", "kill", "scancel", "sbatch --signal"],
)
def test_a_stopped_run_goes_on_bit_for_bit(qwenlora, tmp_path, config, whole, number, everyone):
    """A terminal and `kill` signal the agent alone; Slurm signals every process of the job at once."""
    command = [sys.executable, "-c", "from qwenlora.launch.cli import main; main()"]
    arguments = ["train", str(config), "run_dir=cut", "--nproc", "2"]
    with subprocess.Popen(
        [*command, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        wait_for_step(tmp_path / "cut", 5, process)
        others = psutil.Process(process.pid).children(recursive=True) if everyone else []
        for one in [process, *others]:
            one.send_signal(number)
        screen = process.communicate(timeout=60)[0]
    assert process.returncode == 75, screen
    assert "which is saved; the same command resumes" in screen
    again = qwenlora(*arguments)
    assert again.returncode == 0, again.stdout
    assert "resuming from checkpoint-" in again.stdout
    assert losses(tmp_path / "cut") == losses(whole)
    assert adapter(tmp_path / "cut") == adapter(whole)
    first, second = (json.loads(line) for line in (tmp_path / "cut" / "attempts.jsonl").read_text().splitlines())
    assert (first["reason"], second["reason"]) == ("stopped", "done")
    assert second["first_step"] == first["last_step"] + 1


def test_one_signalled_rank_is_enough_and_a_second_command_is_kept_out(qwenlora, tmp_path, config):
    command = [sys.executable, "-c", "from qwenlora.launch.cli import main; main()"]
    arguments = ["train", str(config), "run_dir=cut", "train.max_steps=40", "--nproc", "2"]
    with subprocess.Popen([*command, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        wait_for_step(tmp_path / "cut", 1, process)
        for intruder in ([*arguments, "train.learning_rate=0.5"], [*arguments, "lora.r=8", "--fresh"]):
            refused = qwenlora(*intruder)
            assert refused.returncode == 2
            assert f"is in use by process {process.pid} on " in refused.stderr
        (rank,) = (
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if child.environ().get("RANK") == "1"
        )
        rank.send_signal(signal.SIGUSR1)
        screen = process.communicate(timeout=60)[0]
    assert process.returncode == 75, screen
    assert qwenlora(*arguments).returncode == 0
    assert [step for step, _ in losses(tmp_path / "cut")] == [1, *range(3, 40, 3), 40]
    first, second = (json.loads(line) for line in (tmp_path / "cut" / "attempts.jsonl").read_text().splitlines())
    assert (first["reason"], second["first_step"]) == ("stopped", first["last_step"] + 1)


def test_a_broken_checkpoint_is_passed_over_and_named(qwenlora, tmp_path, config):
    assert qwenlora("train", config, "run_dir=run").returncode == 0
    expected = losses(tmp_path / "run"), adapter(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoint-14")
    (tmp_path / "run" / "checkpoint-12" / "complete").unlink()
    (tmp_path / "run" / "checkpoint-8" / "optimizer.pt").unlink()
    answer = qwenlora("train", config, "run_dir=run")
    assert answer.returncode == 0, answer.stdout
    assert "passed over: checkpoint-12 is not whole: its saving was cut off" in answer.stdout
    assert "passed over: checkpoint-8 lacks optimizer.pt" in answer.stdout
    assert "resuming from checkpoint-4" in answer.stdout
    assert (losses(tmp_path / "run"), adapter(tmp_path / "run")) == expected


def test_a_checkpoint_of_another_run_is_refused_by_name(qwenlora, tmp_path, config, whole):
    checkpoint = whole / "checkpoint-4"
    for change, words in (
        (["train.learning_rate=1e-5"], "is of another config: train.learning_rate was 0.003, now 1e-05"),
        (["data.eval=example"], "is of another config: data.eval was None, now example"),
    ):
        answer = qwenlora("train", config, "run_dir=other", *change, "--resume", checkpoint, "--fresh")
        assert answer.returncode == 2, answer.stdout
        assert f"--resume {checkpoint}: {checkpoint} {words}" in answer.stdout


def test_a_resume_from_an_older_checkpoint_abandons_the_newer_ones(qwenlora, tmp_path, config, whole):
    shutil.copytree(whole, tmp_path / "run")
    answer = qwenlora("train", config, "run_dir=run", "--nproc", 2, "--resume", "checkpoint-4")
    assert answer.returncode == 0, answer.stdout
    assert (losses(tmp_path / "run"), adapter(tmp_path / "run")) == (losses(whole), adapter(whole))
    names = {path.name for path in (tmp_path / "run").glob("*checkpoint-*")}
    assert names == {f"checkpoint-{n}" for n in (4, 8, 12, 14)} | {f"abandoned-checkpoint-{n}" for n in (8, 12, 14)}


def test_a_file_of_a_checkpoint_that_is_cut_short_or_gone_is_noticed(qwenlora, tmp_path, config, whole):
    from qwenlora.trainer import checkpoints

    for file in sorted((whole / "checkpoint-8").iterdir()):
        if file.name == checkpoints.COMPLETE:
            continue
        for harm, words in (
            (lambda path: path.unlink(), f"lacks {file.name}"),
            (lambda path: os.truncate(path, path.stat().st_size - 1), f"has {file.name} of "),
        ):
            copy = tmp_path / "checkpoint-8"
            shutil.copytree(whole / "checkpoint-8", copy)
            assert checkpoints.flaw(copy) == ""
            harm(copy / file.name)
            assert checkpoints.flaw(copy).startswith(words)
            shutil.rmtree(copy)


def test_other_weights_of_the_base_are_noticed(qwenlora, tmp_path, config):
    assert qwenlora("train", config, "run_dir=run").returncode == 0
    shutil.rmtree(tmp_path / "run" / "adapter")
    weights = tmp_path / "run" / "base_model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    answer = qwenlora("train", config, "run_dir=run")
    assert answer.returncode == 2, answer.stdout
    assert "was trained on a base model with other weights; restore them" in answer.stdout


def test_a_run_never_starts_over_in_silence(qwenlora, tmp_path, config):
    assert qwenlora("train", config, "run_dir=run").returncode == 0
    shutil.rmtree(tmp_path / "run" / "adapter")
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        (folder / "complete").unlink()
    for arguments, words in (
        ([], "can be resumed from: checkpoint-14 is not whole: its saving was cut off; checkpoint-12 "),
        (["--resume", "checkpoint-8"], "checkpoint-8 is not whole: its saving was cut off"),
        (
            ["--resume", "checkpoint-9"],
            "checkpoint-9; this run has checkpoint-14, checkpoint-12, ",
        ),
        (["--resume", "none"], "--resume none would train over what run_dir="),
    ):
        answer = qwenlora("train", config, "run_dir=run", *arguments)
        assert answer.returncode == 2, answer.stdout
        assert words in answer.stdout
    assert qwenlora("train", config, "run_dir=run", "--fresh").returncode == 0
    assert (tmp_path / "run.old-1" / "metrics.jsonl").exists()


def test_a_killed_agent_leaves_no_rank_behind(tmp_path, config):
    command = [sys.executable, "-c", "from qwenlora.launch.cli import main; main()"]
    with subprocess.Popen(
        [*command, "train", str(config), "run_dir=run", "--nproc", "2", "train.max_steps=1000"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    ) as process:
        wait_for_step(tmp_path / "run", 2, process)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(children) >= 3
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_a_rank_that_crashes_ends_the_run_with_its_reason(qwenlora, tmp_path, config):
    (tmp_path / "sabotage").mkdir()
    (tmp_path / "sabotage" / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import qwenlora.trainer.attempt as attempt\n"
        "    def broken(*_): raise RuntimeError('the card fell off the bus')\n"
        "    attempt.train = broken\n"
    )
    environment = {"PYTHONPATH": str(tmp_path / "sabotage")}
    code = "import os, sys; sys.path.insert(0, os.environ['PYTHONPATH'])\nfrom qwenlora.launch.cli import main; main()"
    answer = subprocess.run(
        [sys.executable, "-c", code, "train", str(config), "run_dir=run", "--nproc", "2"],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert answer.returncode == 1, answer.stdout
    assert "failed: RuntimeError: the card fell off the bus" in answer.stdout
    assert "rank-1.log:" in answer.stdout
    (attempt,) = (json.loads(line) for line in (tmp_path / "run" / "attempts.jsonl").read_text().splitlines())
    assert (attempt["reason"], attempt["message"]) == ("failed", "RuntimeError: the card fell off the bus")
