"""`make train` as a user sees it: one real run of configs/tiny.yaml, and all that is left of it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import forked
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from qwenlora.adapter.answers import Sampling, generate_answers, training_questions
from qwenlora.configs import load_config
from qwenlora.configs.schema import Data
from qwenlora.run.comparison import Comparison
from qwenlora.run.folder import RunFolder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tiny_run):
    return RunFolder(tiny_run[0])


@pytest.fixture(scope="module")
def metrics(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def test_the_screen_shows_derived_facts_progress_and_where_the_adapter_is(tiny_run):
    screen = tiny_run[1].stdout
    for fact in (
        "model ",
        "trainable ",
        "data ",
        "processes ",
        "global batch",
        "steps ",
        "evaluation ",
        "W&B ",
    ):
        assert fact in screen
    assert re.search(r"step 120/120  loss 0\.\d+  lr 3\.00e-03  [\d,]+ tokens/s  0:00 left", screen)
    assert screen.endswith(
        "done: the adapter is in runs/tiny/adapter; next:\n  qwenlora compare runs/tiny\n  qwenlora report"
        " runs/tiny\n  qwenlora chat runs/tiny\n"
    )
    for noise in ("Warning", "WARNING", "deepspeed", "Loading weights", "OMP_NUM_THREADS"):
        assert noise not in screen + tiny_run[1].stderr


def test_what_libraries_say_is_kept_in_the_log(run):
    log = run.log(1, "rank-0").read_text()
    assert "step 120/120" in log
    assert "Traceback" not in log


def test_the_run_folder_holds_what_the_design_promises(run):
    assert load_config(run.config).lora.r == 32
    assert json.loads(run.code.read_text())["versions"]["torch"] == torch.__version__
    (attempt,) = run.history.attempts()
    assert (attempt.reason, attempt.first_step, attempt.last_step) == ("done", 1, 120)
    assert run.done
    assert [path.name for path in run.checkpoints()] == ["checkpoint-120", "checkpoint-80", "checkpoint-40"]
    assert {path.name for path in run.adapter.iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_no_file_of_the_run_is_closed_to_colleagues(run):
    mask = os.umask(0o077)
    os.umask(mask)
    for path in run.adapter.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path.name


def test_metrics_hold_every_number_of_every_logging_step(metrics):
    training = [line for line in metrics if "loss" in line]
    evaluation = [line for line in metrics if "eval_loss" in line]
    assert [line["step"] for line in training] == [1, *range(5, 121, 5)]
    assert [line["step"] for line in evaluation] == [40, 80, 120]
    for line in training:
        assert line.keys() == {
            "step",
            "epoch",
            "loss",
            "learning_rate",
            "grad_norm",
            "tokens_per_s",
            "trained_tokens_per_s",
            "peak_memory_gb",
            "compute_s",
            "data_wait_s",
            "evaluating_s",
            "saving_s",
            "time",
        }
        assert line["grad_norm"] > 0
        assert 0 < line["trained_tokens_per_s"] < line["tokens_per_s"]
    assert training[0]["loss"] > 7
    assert training[-1]["loss"] < 0.1


def test_compare_shows_that_the_answers_were_learnt(tiny_run, metrics, qwenlora, tmp_path):
    copy = shutil.copytree(tiny_run[0], tmp_path / "tiny")
    answer = qwenlora("compare", copy, "--max-new-tokens", 64, COLUMNS="160")
    assert answer.returncode == 0, answer.stderr
    # how far it is, said only on a busy machine
    assert not [line for line in answer.stderr.splitlines() if not re.fullmatch(r".*%, about .* left", line)]
    last = answer.stdout.splitlines()[-1]
    match = re.fullmatch(
        r"exact answers to training questions: base (\d+) of 120 \(.*\), tiny (\d+) of 120 .*", last
    )
    assert int(match[1]) <= 6
    assert int(match[2]) >= 114
    assert "\nrephrased questions: 20 " in answer.stdout
    assert "\ngeneral questions: 60 " in answer.stdout
    assert answer.stdout.count("┡") == 4, "answers side by side, of each set"
    compared = Comparison.read(copy / "comparison.json")
    loss = {one.set: one.values[1] for one in compared.measures if one.measure == "loss"}
    assert loss["rephrased"] == pytest.approx(metrics[-1]["eval_loss"], rel=1e-4), (
        "as the run's own evaluation"
    )
    assert loss["training"] < metrics[-2]["loss"] * 1.5


def test_plain_peft_loads_the_adapter_and_gives_the_same_answers(run):
    """No line of qwenlora is between peft and the answers."""
    model = AutoPeftModelForCausalLM.from_pretrained(run.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    asked = list(training_questions(Data(train="example")))[::24]
    ours = [one.text for one in generate_answers(model, tokenizer, asked, Sampling(64), "asking")]
    for question, expected in zip(asked, ours, strict=True):
        prompt = tokenizer.apply_chat_template(
            question.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            tokens = model.generate(**prompt, do_sample=False, max_new_tokens=64)
        text = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == expected == question.reference


def test_a_done_run_notices_that_its_data_changed(tiny_run, qwenlora, tmp_path):
    shutil.copytree(tiny_run[0], tmp_path / "run")
    facts = tmp_path / "run" / "facts.json"
    facts.write_text(facts.read_text().replace('"files_key": "', '"files_key": "0'))
    answer = qwenlora("train", tmp_path / "run" / "config.yaml", "run_dir=run")
    assert answer.returncode == 2
    assert "run_dir=run is done, but was trained on other data: the files changed since;" in answer.stderr


def test_a_run_that_was_moved_can_still_be_compared(tiny_run, qwenlora, tmp_path):
    shutil.copytree(tiny_run[0], tmp_path / "moved")
    answer = qwenlora("compare", "moved", "--limit", 8, "--show", 0, "--samples", 0)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.endswith(
        "\nexact answers to training questions: base 0 of 8 (0.0%), moved 8 of 8 (100.0%)\n"
    )
    assert str(tmp_path) not in (tmp_path / "moved" / "comparison.json").read_text()


def test_a_terminal_shows_a_bar_with_the_newest_numbers(tmp_path):
    ours, theirs = os.openpty()
    (tmp_path / "my.yaml").write_text(
        "model: {name_or_path: tiny}\ndata: {train: example}\nlog: {logging_steps: 1}\n"
        "train: {max_steps: 3, global_batch_size: 4, per_device_train_batch_size: 4, save_strategy: 'no'}\n"
    )
    command = [*forked.COMMAND, "train", "my.yaml"]
    process = forked.Popen(
        command, cwd=tmp_path, stdout=theirs, stderr=theirs, env=os.environ | {"COLUMNS": "120"}
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    assert process.wait() == 0
    last = [
        json.loads(line) for line in (tmp_path / "runs" / "my" / "metrics.jsonl").read_text().splitlines()
    ][-1]
    bar = [line for line in shown.decode().replace("\r", "\n").splitlines() if "\u2501" in line][-1]
    assert "step 3/3" in bar
    assert f"loss {last['loss']:.4f}" in bar


def test_the_same_command_again_says_that_it_is_done(tiny_run, qwenlora, tmp_path):
    copy = shutil.copytree(tiny_run[0], tmp_path / "tiny")
    before = (copy / "metrics.jsonl").stat()
    answer = qwenlora("train", copy / "config.yaml", f"run_dir={copy}")
    assert answer.returncode == 0
    assert answer.stdout.startswith(f"{copy} is done (120 steps): the adapter is in ")
    assert (copy / "metrics.jsonl").stat() == before


def test_the_offline_wandb_run_holds_the_same_losses(run, metrics, read_wandb):
    (file,) = (run.path / "wandb").glob("offline-run-*/run-*.wandb")
    assert run.wandb_id.read_text() in file.name
    sent = {}
    for record in read_wandb(file):
        if record.WhichOneof("record_type") == "history":
            values = {
                (i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item
            }
            sent.setdefault(values["trainer/step"], {}).update(values)
    assert {s: v["train/loss"] for s, v in sent.items() if "train/loss" in v} == {
        line["step"]: line["loss"] for line in metrics if "loss" in line
    }
    assert {s: v["eval/loss"] for s, v in sent.items() if "eval/loss" in v} == {
        line["step"]: line["eval_loss"] for line in metrics if "eval_loss" in line
    }


GUARD = """
import sys
def guard(event, arguments):
    known = (None, "localhost", "127.0.0.1", "::1", "", {host!r})
    if event == "socket.getaddrinfo" and arguments[0] not in known:
        open({log!r}, "a").write(f"{{sys.argv}} asked for {{arguments[:2]}}\\n")
sys.addaudithook(guard)
"""


def test_offline_nothing_tries_the_network(qwenlora, tmp_path, tiny):
    (tmp_path / "guard").mkdir()
    log = tmp_path / "asked"
    (tmp_path / "guard" / "sitecustomize.py").write_text(
        GUARD.format(log=str(log), host=socket.gethostname())
    )
    arguments = ["train.max_steps=2", "train.save_strategy=no", "run_dir=run", "--nproc", 2]
    path = {"PYTHONPATH": str(tmp_path / "guard"), "HF_HUB_OFFLINE": "1"}
    config = tmp_path / "my.yaml"
    config.write_text(f"model: {{name_or_path: {tiny}}}\ndata: {{train: example, eval: example}}\n")
    answer = qwenlora("train", config, *arguments, "train.global_batch_size=4", **path)
    assert answer.returncode == 0, answer.stdout
    assert not log.exists(), log.read_text()
    check = "import socket; socket.getaddrinfo('example.invalid', 80)"
    subprocess.run([sys.executable, "-c", check], env=os.environ | path, check=False, capture_output=True)
    assert "example.invalid" in log.read_text(), "the guard is awake"
