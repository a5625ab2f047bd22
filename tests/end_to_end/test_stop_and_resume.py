"""Asked to stop, a run saves and leaves with 75; the same command goes on as if nothing had happened."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import forked
import psutil
import pytest
import tracked

from qwenlora.run.folder import RunFolder

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
    for _ in range(3600):
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
    answer = forked.run(
        [
            *forked.COMMAND,
            "train",
            "my.yaml",
            "--nproc",
            "2",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout
    return folder / "runs" / "my"


@pytest.mark.parametrize(
    ("number", "everyone"),
    [
        pytest.param(signal.SIGINT, False, id="Ctrl-C"),
        pytest.param(signal.SIGHUP, False, id="the terminal closes"),
        # tests/slurm has Slurm itself send these two
        pytest.param(signal.SIGTERM, True, id="scancel", marks=pytest.mark.long),
        pytest.param(signal.SIGUSR1, True, id="sbatch --signal", marks=pytest.mark.long),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(qwenlora, tmp_path, config, whole, number, everyone):
    """A terminal and `kill` signal the agent alone; Slurm signals every process of the job at once. What is
    written to a closed terminal fails, and the run saves all the same."""
    arguments = ["train", str(config), "run_dir=cut", "--nproc", "2"]
    closes = number == signal.SIGHUP
    terminal, screen_file = os.openpty() if closes else (None, subprocess.PIPE)
    with forked.Popen(
        [*forked.COMMAND, *arguments],
        cwd=tmp_path,
        stdout=screen_file,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        if closes:
            os.close(screen_file)
        wait_for_step(tmp_path / "cut", 5, process)
        others = psutil.Process(process.pid).children(recursive=True) if everyone else []
        if closes:
            os.close(terminal)
        for one in [process, *others]:
            one.send_signal(number)
        screen = process.communicate(timeout=500)[0]
    assert process.returncode == 75, screen
    assert closes or "which is saved; the same command resumes" in screen
    assert closes or ("Ctrl-C again" in screen) == (number == signal.SIGINT)
    again = qwenlora(*arguments)
    assert again.returncode == 0, again.stdout
    assert "resuming from checkpoint-" in again.stdout
    assert losses(tmp_path / "cut") == losses(whole)
    assert adapter(tmp_path / "cut") == adapter(whole)
    first, second = (
        json.loads(line) for line in (tmp_path / "cut" / "attempts.jsonl").read_text().splitlines()
    )
    assert (first["reason"], first["message"], second["reason"]) == ("stopped", number.name, "done")
    assert second["first_step"] == first["last_step"] + 1


def test_one_signalled_rank_is_enough_and_a_second_command_is_kept_out(qwenlora, tmp_path, config):
    arguments = ["train", str(config), "run_dir=cut", "train.max_steps=40", "--nproc", "2"]
    with forked.Popen(
        [*forked.COMMAND, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as process:
        wait_for_step(tmp_path / "cut", 1, process)
        for intruder in ([*arguments, "train.learning_rate=0.5"], [*arguments, "lora.r=8", "--fresh"]):
            refused = qwenlora(*intruder)
            assert refused.returncode == 2
            assert f"is in use by process {process.pid} on " in refused.stderr
        (rank,) = (
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if child.name() == "rank-1"
        )
        rank.send_signal(signal.SIGUSR1)
        screen = process.communicate(timeout=500)[0]
    assert process.returncode == 75, screen
    assert qwenlora(*arguments).returncode == 0
    assert [step for step, _ in losses(tmp_path / "cut")] == [1, *range(3, 40, 3), 40]
    first, second = (
        json.loads(line) for line in (tmp_path / "cut" / "attempts.jsonl").read_text().splitlines()
    )
    assert (first["reason"], second["first_step"]) == ("stopped", first["last_step"] + 1)


def test_a_broken_checkpoint_is_passed_over_and_named(qwenlora, tmp_path, config, whole):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoint-14")
    (tmp_path / "run" / "checkpoint-12" / "manifest.json").unlink()
    (tmp_path / "run" / "checkpoint-8" / "optimizer.safetensors").unlink()
    answer = qwenlora("train", config, "run_dir=run", "--nproc", 2)
    assert answer.returncode == 0, answer.stdout
    assert "passed over: checkpoint-12 has no manifest.json" in answer.stdout
    assert "passed over: checkpoint-8 lacks optimizer.safetensors" in answer.stdout
    assert "resuming from checkpoint-4" in answer.stdout
    assert (losses(tmp_path / "run"), adapter(tmp_path / "run")) == (losses(whole), adapter(whole))


def test_a_checkpoint_of_another_run_is_refused_by_name(qwenlora, tmp_path, config, whole):
    checkpoint = whole / "checkpoint-4"
    for change, words in (
        (
            ["train.learning_rate=1e-5"],
            "is of another config: train.learning_rate was 0.003, now 1e-05; to go on all the same:"
            " --allow-config-change train.learning_rate",
        ),
        (["data.eval=example"], "is of another config: data.eval was null, now example"),
    ):
        answer = qwenlora("train", config, "run_dir=other", *change, "--resume", checkpoint)
        assert answer.returncode == 2, answer.stdout
        assert f"{checkpoint} {words}" in answer.stderr
        assert not (tmp_path / "other" / "attempts.jsonl").exists(), "nothing was started"


def test_a_resume_from_an_older_checkpoint_abandons_the_newer_ones(qwenlora, tmp_path, config, whole):
    shutil.copytree(whole, tmp_path / "run")
    answer = qwenlora("train", config, "run_dir=run", "--nproc", 2, "--resume", "checkpoint-4")
    assert answer.returncode == 0, answer.stdout
    assert (losses(tmp_path / "run"), adapter(tmp_path / "run")) == (losses(whole), adapter(whole))
    names = {path.name for path in (tmp_path / "run").glob("*checkpoint-*")}
    assert names == {f"checkpoint-{n}" for n in (4, 8, 12, 14)} | {
        f"abandoned-checkpoint-{n}" for n in (8, 12, 14)
    }


def test_a_checkpoint_is_an_adapter_folder(whole):
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    base = whole / "base_model"
    tuned = AutoPeftModelForCausalLM.from_pretrained(whole / "checkpoint-14")
    final = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), whole / "adapter")
    weights = dict(final.named_parameters())
    assert all(p.equal(weights[name]) for name, p in tuned.named_parameters() if "lora_" in name)
    configs = [(whole / name / "adapter_config.json").read_text() for name in ("checkpoint-14", "adapter")]
    assert configs[0] == configs[1]


def test_other_weights_of_the_base_are_noticed(qwenlora, tmp_path, config):
    arguments = ["train", config, "run_dir=run", "train.max_steps=2"]
    assert qwenlora(*arguments).returncode == 0
    shutil.rmtree(tmp_path / "run" / "adapter")
    weights = tmp_path / "run" / "base_model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    answer = qwenlora(*arguments)
    assert answer.returncode == 2, answer.stdout
    assert re.search(r"on a base model with other weights \(then \w+, now \w+\); restore them", answer.stdout)


def test_a_base_on_the_hub_that_moved_is_noticed(qwenlora, tmp_path, config, tiny):
    repo, then, now = tmp_path / "hub" / "models--me--TinyQ", "1" * 40, "2" * 40
    for commit in (then, now):
        shutil.copytree(tiny, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(then)
    begin = tmp_path / "begin.py"  # as HF_HUB_CACHE would, which a forked process is too late to read
    begin.write_text(
        f"from huggingface_hub import constants\nconstants.HF_HUB_CACHE = {str(repo.parent)!r}\n"
    )
    hub = {forked.SABOTAGE: str(begin)}
    arguments = ["train", config, "run_dir=run", "model.name_or_path=me/TinyQ"]
    answer = qwenlora(*arguments, "train.max_steps=4", **hub)
    assert answer.returncode == 0, answer.stdout
    assert json.loads((tmp_path / "run" / "facts.json").read_text())["base_fingerprint"] == then
    assert "and has the weights" in qwenlora("verify", "run", **hub).stdout
    (repo / "refs" / "main").write_text(now)
    refused = qwenlora("verify", "run", **hub)
    assert (refused.returncode, "was trained on a base with other weights" in refused.stderr) == (2, True)
    answer = qwenlora(*arguments, **hub)
    assert answer.returncode == 2, answer.stdout
    assert f"a base model with other weights (then {then}, now {now}); restore them" in answer.stdout
    pinned = [f"model.revision={then}", "--allow-config-change", "model.revision", "train.max_steps=6"]
    answer = qwenlora(*arguments, *pinned, **hub)
    assert answer.returncode == 0, answer.stdout
    assert "resuming from checkpoint-4" in answer.stdout


def test_a_run_never_starts_over_in_silence(qwenlora, tmp_path, config, whole):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        (folder / "manifest.json").unlink()
    for arguments, words in (
        ([], "can be resumed from: checkpoint-14 has no manifest.json; "),
        (["--resume", "checkpoint-8"], "checkpoint-8 has no manifest.json"),
        (["--resume", "checkpoint-9"], "checkpoint-9; this run has checkpoint-14, checkpoint-12, "),
        (["--resume", "run"], "is a run, not one of its checkpoints: checkpoint-14, "),
        (["--resume", "checkpoint-8", "--fresh"], "--fresh starts anew, --resume checkpoint-8 goes on"),
    ):
        answer = qwenlora("train", config, "run_dir=run", *arguments)
        assert answer.returncode == 2, answer.stdout
        assert words in answer.stdout + answer.stderr
    assert not (tmp_path / "run.old-1").exists()
    for number, arguments in enumerate((["--fresh"], ["--resume", "none"]), 1):
        assert qwenlora("train", config, "run_dir=run", "train.max_steps=2", *arguments).returncode == 0
        assert (tmp_path / f"run.old-{number}" / "metrics.jsonl").exists()


def test_a_killed_agent_leaves_no_rank_behind(tmp_path, config):
    with forked.Popen(
        [*forked.COMMAND, "train", str(config), "run_dir=run", "--nproc", "2", "train.max_steps=1000"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    ) as process:
        wait_for_step(tmp_path / "run", 2, process)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(children) >= 3
    _, alive = psutil.wait_procs(children, timeout=500)
    assert not alive


def test_a_rank_that_crashes_ends_the_run_with_its_reason(qwenlora, tmp_path, config):
    (tmp_path / "sabotage.py").write_text(
        "import os, sys\n"
        "if 'qwenlora.trainer.forkserver' in sys.orig_argv:\n"
        "    import qwenlora.trainer.attempt as attempt\n"
        "    whole = attempt.train\n"
        "    def broken(*given):\n"
        "        if os.environ['RANK'] == '1': raise RuntimeError('the card fell off the bus')\n"
        "        return whole(*given)\n"
        "    attempt.train = broken\n"
    )
    sabotage = {forked.SABOTAGE: str(tmp_path / "sabotage.py")}
    answer = qwenlora("train", config, "run_dir=run", "--nproc", "2", **sabotage)
    assert answer.returncode == 1, answer.stdout
    assert "failed: RuntimeError: the card fell off the bus" in answer.stdout
    assert "rank-1.log:" in answer.stdout
    (attempt,) = (json.loads(line) for line in (tmp_path / "run" / "attempts.jsonl").read_text().splitlines())
    assert (attempt["reason"], attempt["message"]) == ("failed", "RuntimeError: the card fell off the bus")


def test_a_rank_that_is_killed_is_named_with_its_signal(tmp_path, config):
    with forked.Popen(
        [*forked.COMMAND, "train", str(config), "run_dir=run", "--nproc", "2", "train.max_steps=1000"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for_step(tmp_path / "run", 2, process)
        children = psutil.Process(process.pid).children(recursive=True)
        next(child for child in children if child.name() == "rank-1").kill()
        screen = process.communicate(timeout=500)[0]
    assert process.returncode == 1
    assert (
        "failed: rank 1 was killed by SIGKILL, not by qwenlora: by hand, by the scheduler, or for lack of"
        in screen
    )
    assert "Traceback" not in screen


def test_a_done_run_goes_on_for_longer_and_is_seen_by_status(qwenlora, tmp_path, config, whole):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "comparison.json").write_text("of the adapter of step 14")
    code = (tmp_path / "run" / "code.json").read_text()
    again = qwenlora("train", config, "run_dir=run", "--nproc", 2)
    assert "run is done (14 steps): the adapter is in run/adapter" in again.stdout
    assert (tmp_path / "run" / "code.json").read_text() == code, (
        "of what trained it, not of what was asked later"
    )
    assert (tmp_path / "run" / "comparison.json").exists()
    longer = qwenlora("train", config, "run_dir=run", "--nproc", 2, "train.max_steps=18", "--resume", "auto")
    assert longer.returncode == 0, longer.stdout
    assert "resuming from checkpoint-14" in longer.stdout
    assert "changed since: train.max_steps was 14, now 18" in longer.stdout
    assert not (tmp_path / "run" / "comparison.json").exists()
    assert (tmp_path / "run" / "comparison.old.json").read_text() == "of the adapter of step 14"
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 3, 6, 9, 12, 14, 15, 18]
    fewer = qwenlora("train", config, "run_dir=run", "train.max_steps=16")
    assert fewer.returncode == 2
    assert (
        "train.max_steps=16 is less than the 18 steps that checkpoint-18 has trained; raise it, or"
        in fewer.stderr
    )
    fewer = qwenlora("train", config, "run_dir=run", "train.max_steps=null", "train.num_train_epochs=1.0")
    assert fewer.returncode == 2
    assert "train.num_train_epochs=1 makes 8 steps, and 18 are trained already; raise it" in fewer.stdout
    again = qwenlora("train", config, "run_dir=run", "--nproc", 2, "train.max_steps=18")
    assert "run is done (18 steps)" in again.stdout, "what was refused has left no trace"
    status = qwenlora("status", "run")
    assert status.returncode == 0, status.stderr
    assert "run: done · step 18 · loss " in status.stdout
    assert "14  15-18" in status.stdout
    assert "attempt 3 refused: train.num_train_epochs=1 makes 8 steps" in status.stdout
    nothing = qwenlora("status", tmp_path / "elsewhere")
    assert (nothing.returncode, "holds no run" in nothing.stderr) == (2, True)


def test_a_change_that_is_meant_passes(qwenlora, tmp_path, config, whole):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    change = ["train.learning_rate=1e-4", "data.train=other.jsonl"]
    (tmp_path / "other.jsonl").write_text('{"instruction": "1+1?", "output": "2"}\n' * 40)
    arguments = ["train", config, "run_dir=run", "--nproc", 2, "--resume", "checkpoint-8", *change]
    refused = qwenlora(*arguments)
    assert refused.returncode == 2
    assert "--allow-config-change data.train --allow-config-change train.learning_rate" in refused.stderr
    typo = qwenlora(*arguments, "--allow-config-change", "train.learnin_rate")
    assert "train.learnin_rate: no such key; did you mean train.learning_rate?" in typo.stderr
    allowed = ["--allow-config-change", "train.learning_rate", "--allow-config-change", "data"]
    answer = qwenlora(*arguments, *allowed)
    assert answer.returncode == 0, answer.stdout
    assert (
        "changed since: data.train was example, now other.jsonl, train.learning_rate was 0.003"
        in answer.stdout
    )


def test_a_run_keeps_the_dtype_of_its_base_and_its_micro_batch(qwenlora, tmp_path, config):
    arguments = ["train", config, "run_dir=run", "train.global_batch_size=4", "train.save_steps=1"]
    size = "train.per_device_train_batch_size"
    begun = qwenlora(*arguments, "train.max_steps=1", "model.dtype=bfloat16", f"{size}=2")
    assert begun.returncode == 0, begun.stdout
    more = ["train.max_steps=2", "--allow-config-change", "model.dtype"]
    auto = qwenlora(*arguments, *more, f"{size}=auto")
    assert auto.returncode == 0, auto.stdout
    told = "model.dtype=auto stays bfloat16, as the run began; a run that begins here takes float32"
    assert f"warning: {told}" in auto.stdout
    assert re.search(r"micro-batch +2 rows, as the run began", auto.stdout)
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "state.json").read_text())
    assert (state["dtype"], state["micro_batch"]) == ("bfloat16", 2)


def test_a_time_budget_ends_an_attempt_like_a_signal(qwenlora, tmp_path, config):
    answer = qwenlora("train", config, "run_dir=run", "train.max_steps=100000", "train.max_time_min=0.05")
    assert answer.returncode == 75, answer.stdout
    assert "which is saved; the same command resumes: train.max_time_min is over" in answer.stdout
    again = qwenlora("train", config, "run_dir=run", "train.max_steps=100000", "train.max_time_min=0.02")
    assert again.returncode == 75
    first, second = (
        json.loads(line) for line in (tmp_path / "run" / "attempts.jsonl").read_text().splitlines()
    )
    assert (first["message"], second["reason"]) == ("train.max_time_min is over", "stopped")
    assert second["first_step"] == first["last_step"] + 1
    assert second["last_step"] >= second["first_step"], "it goes on, however short the time"


def test_all_attempts_are_one_run_in_each_tracker(tmp_path, config, read_wandb, qwenlora):
    """Killed after step 6, with checkpoint-4 saved; stopped; ended: offline, W&B and SwanLab have a file for
    each start."""
    arguments = ["train", str(config), "run_dir=run", "train.max_steps=26", "log.logging_steps=1"]
    arguments.append("log.to=[wandb,tensorboard,mlflow,swanlab,trackio]")
    for number, end in ((1, "kill"), (2, "terminate")):
        environment = os.environ | {"WANDB_MODE": "offline"}
        with forked.Popen(
            [*forked.COMMAND, *arguments], cwd=tmp_path, env=environment, stdout=subprocess.PIPE
        ) as process:
            wait_for_step(tmp_path / "run", 6 * number, process)
            getattr(process, end)()
            process.communicate(timeout=500)
        time.sleep(1)  # the kernel ends the ranks
    assert qwenlora(*arguments, WANDB_MODE="offline").returncode == 0
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 3
    (name,) = {file.name for file in files}
    assert (tmp_path / "run" / "wandb" / "run_id").read_text() in name
    sent, summary = {}, {}
    for file in files:
        for record in read_wandb(file):
            items = record.history.item
            values = {item.key or "/".join(item.nested_key): item.value_json for item in items}
            if "train/loss" in values:
                sent.setdefault(int(values["trainer/step"]), set()).add(float(values["train/loss"]))
            updates = record.summary.update
            summary |= {item.key or ".".join(item.nested_key): item.value_json for item in updates}
    assert {step: {loss} for step, loss in losses(tmp_path / "run")} == sent, (
        "a repeated step has the same loss"
    )
    run = RunFolder(tmp_path / "run")
    as_float32 = [(step, pytest.approx(loss, rel=1e-7)) for step, loss in losses(run.path)]
    assert tracked.tensorboard(run) == as_float32
    for read in (tracked.mlflow, tracked.swanlab, tracked.trackio):
        assert sorted(read(run)) == losses(run.path), read.__name__
    attempts = [json.loads(line) for line in (tmp_path / "run" / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["reason"] for attempt in attempts] == ["killed", "stopped", "done"]
    assert attempts[1]["steps_repeated"] == attempts[0]["last_step"] - attempts[1]["first_step"] + 1 > 0
    assert attempts[2]["steps_repeated"] == 0
    assert set(attempts[2]["seconds"]) == {"start_up", "data", "model", "first_step"}
    assert 0 < attempts[0]["goodput"] < 1  # which of the two is larger, the machine decides
    assert 0 < attempts[2]["goodput"] < 1
    last = json.loads(summary["attempt/3"])
    assert (last["reason"], last["last_step"], json.loads(summary["attempts"])) == ("done", 26, 3)
    assert json.loads(summary["attempt/1"])["reason"] == "killed"
    checkpoint = json.loads((tmp_path / "run" / "checkpoint-26" / "state.json").read_text())
    assert checkpoint["wandb_id"] == (tmp_path / "run" / "wandb" / "run_id").read_text()


def test_a_requeued_job_goes_on_however_it_began(qwenlora, tmp_path, config, whole):
    shutil.copytree(whole, tmp_path / "run")
    arguments = ["train", config, "run_dir=run", "--nproc", 2, "train.max_steps=16"]
    for how in (["--fresh"], ["--resume", "checkpoint-4"]):
        answer = qwenlora(*arguments, *how, SLURM_RESTART_COUNT="1")
        assert answer.returncode == 0, answer.stdout
        assert "requeued by Slurm: going on from the newest checkpoint" in answer.stdout
    assert "run is done (16 steps)" in answer.stdout
    assert not (tmp_path / "run.old-1").exists()
