"""One run on 1, 3, 2 and 1 processes is the same run: the same rows in the same steps, learning rates, and
losses."""

import json
import os
import sys

import forked
import pytest

pytestmark = pytest.mark.slow

STEPS = 13
CONFIG = """
model: {name_or_path: tiny}
data: {train: example, eval: example}
lora: {lora_dropout: DROPOUT}
train: {global_batch_size: 16, per_device_train_batch_size: 4, max_steps: 13, learning_rate: 1e-3,
        warmup_steps: 2, eval_strategy: steps, eval_steps: 6, save_strategy: steps, save_steps: 50}
log: {logging_steps: 1, wandb: off}
"""

# a rank that writes down which rows it trains, and is asked to stop in a given step
RANK = """
import json, os, sys
from qwenlora.trainer import main
from qwenlora.trainer.loop import batches
from qwenlora.trainer.ranks import stop
file = open(f"{os.environ['ROWS']}-{os.environ['RANK']}", "w")
look_up = batches._Units.__getitem__
def look(self, rows):
    file.write(json.dumps(rows) + chr(10))
    return look_up(self, rows)
batches._Units.__getitem__ = look
begin = stop.Stop.on_step_begin
def on_step_begin(self, args, state, control, **_):
    if state.global_step + 1 == int(os.environ["STOP"]) and os.environ["RANK"] == "0":
        self.request.ask("the test")
    begin(self, args, state, control)
stop.Stop.on_step_begin = on_step_begin
code = main.main(sys.argv[1:])
file.close()
sys.exit(code)
"""


def attempt(folder, name: str, world: int, stop: int) -> list[list[list[int]]]:
    """Run an attempt that is asked to stop in a step; return what each rank looked up, in order. A look-up is
    a row."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    rows = folder / f"rows-{name}-{stop}"
    answer = forked.run(
        [*argv, "rank.py", "my.yaml", f"run_dir={name}"],
        cwd=folder,
        env=os.environ | {"ROWS": str(rows), "STOP": str(stop if stop < STEPS else 0)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "Traceback" not in answer.stdout, answer.stdout
    assert ("stopped after" if stop < STEPS else "done: ") in answer.stdout, answer.stdout + answer.stderr
    return [
        [json.loads(x) for x in (folder / f"{rows.name}-{n}").read_text().splitlines()] for n in range(world)
    ]


def history(folder, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def rows_of_steps(ranks: list[list[list[int]]], first: int, last: int) -> dict[int, list[int]]:
    """Return the sorted rows of each step: 120 rows are 8 steps an epoch, the last of 8 rows."""
    sizes = [8 if step % 8 == 0 else 16 for step in range(first, last + 1)]
    steps, places = {}, [0] * len(ranks)
    for step, size in zip(range(first, last + 1), sizes, strict=True):
        rows = []
        for rank, looked_up in enumerate(ranks):
            for number in range(-(-4 // len(ranks))):  # three of the 4 micro-batches leave two ranks blank
                start = (number * len(ranks) + rank) * 4
                mine = max(min(size - start, 4), 0)
                for unit in looked_up[places[rank] : places[rank] + mine]:
                    rows += unit
                places[rank] += mine
        steps[step] = sorted(rows)
    assert places == [len(looked_up) for looked_up in ranks], "every look-up belongs to a step"
    return steps


@pytest.mark.parametrize("dropout", [pytest.param("0.0", marks=pytest.mark.long), "0.1"])
def test_1_3_2_1_processes_train_as_one(tmp_path, dropout):
    (tmp_path / "my.yaml").write_text(CONFIG.replace("DROPOUT", dropout))
    (tmp_path / "rank.py").write_text(RANK)
    ranks = attempt(tmp_path, "whole", 1, STEPS)
    expected = rows_of_steps(ranks, 1, STEPS)
    assert list(expected) == list(range(1, STEPS + 1))
    seen, last = {}, 0
    for world, stop in ((1, 3), (3, 7), (2, 10), (1, STEPS)):
        ranks = attempt(tmp_path, "changed", world, stop)
        steps = rows_of_steps(ranks, last + 1, stop)
        assert list(steps) == list(range(last + 1, stop + 1))
        seen |= steps
        last = stop
    assert seen == expected
    one, other = history(tmp_path, "whole"), history(tmp_path, "changed")
    assert [line["step"] for line in one] == [line["step"] for line in other]
    worst = 0.0
    for mine, theirs in zip(one, other, strict=True):
        assert mine.get("learning_rate") == theirs.get("learning_rate")
        for key in ("loss", "eval_loss"):
            if key in mine:
                worst = max(worst, abs(mine[key] - theirs[key]))
    print(f"dropout {dropout}: losses differ by at most {worst:.1e}")
    assert worst < 1e-5
