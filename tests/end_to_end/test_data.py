"""Rows on their way into a whole run: left out with a report, packed, split off for evaluation, stopped
half-way."""

import json
import signal
import subprocess
import time

import forked
import psutil
import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def test_rows_that_are_left_out_are_reported_on_the_screen_in_the_folder_and_to_wandb(
    qwenlora, tmp_path, read_wandb
):
    (tmp_path / "peft.py").write_text("raise SystemExit('a file of the user, and no library')")
    rows = [{"instruction": f"问题{n}？", "output": f"答案{n}。"} for n in range(40)]
    write(
        tmp_path / "my.jsonl",
        [*rows[:7], {"instruction": "问"}, *rows[7:], {"instruction": "问", "output": " "}],
    )
    (tmp_path / "my.yaml").write_text(
        "model: {name_or_path: tiny}\ndata: {train: my.jsonl, eval_fraction: 0.2}\n"
        "train: {global_batch_size: 4, max_steps: 3, save_strategy: 'no', eval_strategy: steps, eval_steps:"
        " 3}\n"
    )
    answer = qwenlora("train", "my.yaml", WANDB_MODE="offline")
    assert answer.returncode == 2
    assert "2 of 42 rows cannot be trained:\n  my.jsonl:8: " in answer.stdout
    assert not list((tmp_path / "runs" / "my").glob("wandb/offline*")), "nothing expensive was started"

    answer = qwenlora("train", "my.yaml", "data.on_bad_row=skip", WANDB_MODE="offline")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    folder = tmp_path / "runs" / "my"
    listed = f"left out, all of them listed in {folder}/bad_rows.txt: 2 of 42 rows cannot be trained:"
    assert f"{listed}\n  my.jsonl:8: " in answer.stdout
    lines = (folder / "bad_rows.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in lines] == ["my.jsonl:8", "my.jsonl:42"]
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["bad_rows"] == 2
    assert facts["data"]["train"]["rows"] + facts["data"]["eval"]["rows"] == 40
    assert any("eval_loss" in line for line in metrics(folder))
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    sent = {}
    for record in read_wandb(file):
        if record.WhichOneof("record_type") == "summary":
            sent |= {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.summary.update
            }
    assert sent["data/bad_rows"] == 2


PACKED = (
    "model: {name_or_path: tiny}\ndata: {train: example, packing: 'on', max_length: 256}\n"
    "train: {global_batch_size: 4, per_device_train_batch_size: 2, max_steps: 14, learning_rate: 3e-3,\n"
    "        save_strategy: steps, save_steps: 8}\nlog: {logging_steps: 1}\n"
)


@pytest.mark.long
def test_packed_runs_are_the_same_on_any_number_of_ranks_and_go_on_bit_for_bit(qwenlora, tmp_path):
    """24 packs in steps of 4; steps 7 and 13 begin an epoch."""
    (tmp_path / "my.yaml").write_text(PACKED)
    for folder, processes in (("one", 1), ("two", 2)):
        answer = qwenlora("train", "my.yaml", f"run_dir={folder}", "--nproc", processes)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert "24 packs of at most 256 tokens, 94.71% full" in answer.stdout
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-5
        assert abs(a["grad_norm"] - b["grad_norm"]) <= 1e-4

    cut = forked.Popen(
        [*forked.COMMAND, "train", "my.yaml", "run_dir=cut", "--nproc", "2"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "cut" / "metrics.jsonl").exists() or len(metrics(tmp_path / "cut")) < 3:
        assert cut.poll() is None, cut.stdout.read()
        time.sleep(0.02)
    cut.send_signal(signal.SIGTERM)
    cut.communicate(timeout=500)
    if cut.returncode == 75:  # else it was done before the signal came
        answer = qwenlora("train", "my.yaml", "run_dir=cut", "--nproc", 2)
        assert answer.returncode == 0, answer.stdout + answer.stderr
    names = ("loss", "grad_norm", "step")
    whole, resumed = ([{n: line[n] for n in names} for line in metrics(tmp_path / f)] for f in ("two", "cut"))
    assert whole == resumed
    adapters = [
        load_file(tmp_path / folder / "adapter" / "adapter_model.safetensors") for folder in ("two", "cut")
    ]
    assert all(bool((adapters[0][name] == adapters[1][name]).all()) for name in adapters[0])


def test_a_stop_during_preparation_ends_all_of_it_and_the_next_start_is_right(qwenlora, tmp_path):
    write(
        tmp_path / "my.jsonl",
        [{"instruction": f"问{n}" * 60, "output": f"答{n}。" * 60} for n in range(10_000)],
    )
    (tmp_path / "my.yaml").write_text(
        "model: {name_or_path: tiny}\ndata: {train: my.jsonl, num_proc: 2}\n"
        "train: {global_batch_size: 2, max_steps: 1, save_strategy: 'no'}\n"
    )
    process = forked.Popen(
        [*forked.COMMAND, "train", "my.yaml"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    cache = tmp_path / "runs" / ".prepared"
    while not any(path.stat().st_size for path in cache.glob("*.staging-*/train/ids.bin")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 3, "one that prepares, and two of its own"
    process.send_signal(signal.SIGINT)
    screen = process.communicate(timeout=500)[0]
    assert process.returncode == 75, screen
    assert "stopped before anything of this attempt was saved; the same command starts again" in screen
    _, alive = psutil.wait_procs(started, timeout=500)
    assert alive == []
    answer = qwenlora("train", "my.yaml")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert (
        json.loads((tmp_path / "runs" / "my" / "facts.json").read_text())["data"]["train"]["rows"] == 10_000
    )
    assert [path.name for path in cache.iterdir() if "staging" in path.name or "claim" in path.name] == []


def test_runs_share_what_was_prepared(qwenlora, tmp_path):
    arguments = ["train", "my.yaml", "train.max_steps=1"]
    (tmp_path / "my.yaml").write_text(
        "model: {name_or_path: tiny}\ndata: {train: example}\ntrain: {global_batch_size: 2, save_strategy:"
        " 'no'}\n"
    )
    for name in ("one", "two"):
        assert qwenlora(*arguments, f"run_dir=runs/{name}").returncode == 0
    folders = [path for path in (tmp_path / "runs" / ".prepared").iterdir() if (path / "index.json").exists()]
    assert len(folders) == 1
    facts = json.loads((tmp_path / "runs" / "two" / "facts.json").read_text())
    assert folders[0].samefile(facts["data_folder"])
