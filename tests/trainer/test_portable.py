"""A checkpoint of any strategy and number of ranks resumes under any other."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import run_ranks
from safetensors.torch import load_file
from spread import SAVED, STEPS, Cell, make_base, run_cells

CLOSE = 1e-5
SAVERS = (("ddp", 1), ("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("fsdp", 2), ("zero3", 4))
RESUMERS = tuple(itertools.product(("ddp", "zero1", "zero2", "zero3", "fsdp"), (1, 2, 4)))
# one run, a step under each
SHORT_CYCLE = (("ddp", 1), ("zero3", 2), ("fsdp", 2), ("ddp", 1))
CYCLE = (
    ("ddp", 1),
    ("zero1", 2),
    ("zero2", 2),
    ("zero3", 2),
    ("fsdp", 2),
    ("ddp", 2),
    ("zero3", 4),
    ("fsdp", 1),
)


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny) -> tuple[Cell, str]:
    base = make_base(tmp_path_factory.mktemp("base"), "qwen3", tied=True)
    return Cell(str(base), ""), str(tiny)


def furthest(one: dict, other: dict) -> float:
    return max(abs(one[step] - other[step]) for step in one)


@pytest.mark.slow
@pytest.mark.parametrize("cycle", [SHORT_CYCLE, pytest.param(CYCLE, marks=pytest.mark.long)])
def test_a_run_that_changes_its_strategy_after_each_step_is_the_run_of_one_process(start, tmp_path, cycle):
    cell, tokenizer = start
    cell = replace(cell, save_steps=1, train={"lr_scheduler_type": "constant", "eval_steps": 1})
    alone = cell.under("ddp", tmp_path / "alone", steps=len(cycle))
    results = [run_ranks(run_cells, 1, [alone], tokenizer)[0][0]]
    cells = []
    for step, (name, _) in enumerate(cycle, 1):
        saved = str(Path(cells[-1].folder) / f"checkpoint-{step - 1}") if cells else ""
        cells.append(cell.under(name, tmp_path / f"{step}-{name}", steps=step, resume=saved))
    for count, steps in itertools.groupby(zip(cycle, cells, strict=True), lambda pair: pair[0][1]):
        results += run_ranks(run_cells, count, [one for _, one in steps], tokenizer)[0]
    whole, *parts = results
    for step, part in enumerate(parts, 1):
        assert list(part["losses"]) == [step]
        assert step in part["eval"]
        assert furthest(part["losses"], whole["losses"]) <= CLOSE, cycle[step - 1]
        assert furthest(part["eval"], whole["eval"]) <= CLOSE, cycle[step - 1]
    apart = optimizers_apart(Path(cells[-1].folder), Path(alone.folder), len(cycle))
    assert apart <= CLOSE, f"optimizer states differ by {apart:.2e}"


@pytest.fixture(scope="module")
def made(tmp_path_factory, start):
    """Return what each saver did over all steps, and where its checkpoint in mid-epoch is."""
    folder, (cell, tokenizer) = tmp_path_factory.mktemp("portable"), start
    done = {}
    for count in (1, 2, 4):
        mine = [saver for saver in SAVERS if saver[1] == count]
        cells = [cell.under(name, folder / f"{name}-{count}") for name, _ in mine]
        results = run_ranks(run_cells, count, cells, tokenizer)
        done |= {saver: (results[0][number], cells[number]) for number, saver in enumerate(mine)}
    return done, tokenizer


def resume_all(made, pairs: list[tuple], folder: Path) -> dict[tuple, dict]:
    """Return what was trained after the checkpoint, by pair; ranks are started once for all of a number of
    them."""
    done, tokenizer = made
    results = {}
    for count in (1, 2, 4):
        mine = [pair for pair in pairs if pair[1][1] == count]
        cells = []
        for saver, (name, _) in mine:
            cell = done[saver][1]
            saved = Path(cell.folder) / f"checkpoint-{SAVED}"
            cells.append(cell.under(name, folder_of(folder, saver, (name, count)), resume=str(saved)))
        of_rank = run_ranks(run_cells, count, cells, tokenizer)
        results |= {pair: of_rank[0][number] for number, pair in enumerate(mine)}
    return results


def folder_of(folder: Path, saver: tuple, resumer: tuple) -> Path:
    return folder / f"{saver[0]}-{saver[1]}-to-{resumer[0]}-{resumer[1]}"


def optimizers_apart(first: Path, second: Path, step: int = STEPS) -> float:
    """Return the largest difference of the optimizer states that two runs saved last."""
    files = [load_file(run / f"checkpoint-{step}" / "optimizer.safetensors") for run in (first, second)]
    assert files[0].keys() == files[1].keys()
    return max((files[0][key] - files[1][key]).abs().max().item() for key in files[0])


def test_three_ranks_go_on_with_the_same_bits(start, tmp_path):
    # sums of three numbers depend on their order, which follows from places in DDP's buckets
    cell, tokenizer = start
    whole = cell.under("ddp", tmp_path / "whole")
    resumed = cell.under("ddp", tmp_path / "resumed", resume=str(tmp_path / f"whole/checkpoint-{SAVED}"))
    first, second = run_ranks(run_cells, 3, [whole, resumed], tokenizer)[0]
    assert second["adapter"] == first["adapter"]
    assert second["losses"] == {step: first["losses"][step] for step in second["losses"]}


def check(made, pairs: list[tuple], folder: Path) -> None:
    done, _ = made
    worst = 0.0
    for (saver, resumer), resumed in resume_all(made, pairs, folder).items():
        whole = done[saver][0]
        assert sorted(resumed["losses"]) == list(range(SAVED + 1, STEPS + 1)), (saver, resumer)
        for field in ("losses", "eval"):
            apart = max(abs(resumed[field][step] - whole[field][step]) for step in resumed[field])
            assert apart <= CLOSE, f"{saver} -> {resumer}: {field} differ by {apart:.2e}"
            worst = max(worst, apart)
        apart = optimizers_apart(folder_of(folder, saver, resumer), Path(done[saver][1].folder))
        assert apart <= CLOSE, f"{saver} -> {resumer}: optimizer states differ by {apart:.2e}"
        if saver == resumer:
            assert apart == 0
            assert resumed["adapter"] == whole["adapter"], f"{saver} -> itself is not the same to the bit"
            assert resumed["losses"] == {step: whole["losses"][step] for step in resumed["losses"]}
    print(f"{len(pairs)} pairs, losses at most {worst:.1e} apart")


@pytest.mark.long
def test_every_pair(made, tmp_path):
    check(made, list(itertools.product(SAVERS, RESUMERS)), tmp_path)


@pytest.mark.slow
@pytest.mark.long
def test_with_dropout_the_same_strategy_goes_on_to_the_bit(start, tmp_path):
    cell, tokenizer = start
    names, cells = ("zero2", "zero3", "fsdp"), []
    for name in names:
        whole = cell.under(name, tmp_path / name / "whole", dropout=0.1, steps=3, save_steps=2)
        saved = str(tmp_path / name / "whole" / "checkpoint-2")
        cells += [whole, whole.under(name, tmp_path / name / "again", resume=saved)]
    adapters = [result["adapter"] for result in run_ranks(run_cells, 2, cells, tokenizer)[0]]
    assert dict(zip(names, adapters[::2], strict=True)) == dict(zip(names, adapters[1::2], strict=True))
