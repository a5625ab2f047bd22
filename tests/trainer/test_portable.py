"""A checkpoint of any strategy and number of ranks resumes under any other."""

import itertools
from pathlib import Path

import pytest
from ranks import run_ranks
from safetensors.torch import load_file
from spread import SAVED, STEPS, Cell, make_base, run_cells

CLOSE = 1e-5
SAVERS = (("ddp", 1), ("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("fsdp", 2), ("zero3", 4))
RESUMERS = tuple(itertools.product(("ddp", "zero1", "zero2", "zero3", "fsdp"), (1, 2, 4)))
ALL = tuple(itertools.product(SAVERS, RESUMERS))


def covering() -> list[tuple]:
    """Return pairs in which each resumer meets a saver, and each saver itself and two others: a
    checkpoint's form does not depend on who reads it."""
    pairs = {(SAVERS[(number + 3) % len(SAVERS)], resumer) for number, resumer in enumerate(RESUMERS)}
    return sorted(pairs | {(saver, saver) for saver in SAVERS})


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny):
    """Return what each saver did over all steps, and where its checkpoint in mid-epoch is."""
    folder = tmp_path_factory.mktemp("portable")
    base = make_base(folder / "base", "qwen3", tied=True)
    start = Cell(str(base), "", dropout=0.0)
    done = {}
    for count in (1, 2, 4):
        mine = [saver for saver in SAVERS if saver[1] == count]
        cells = [start.under(name, folder / f"{name}-{count}") for name, _ in mine]
        results = run_ranks(run_cells, count, cells, str(tiny))
        done |= {saver: (results[0][number], cells[number]) for number, saver in enumerate(mine)}
    return folder, done, str(tiny)


def resume_all(made, pairs: list[tuple], folder: Path) -> dict[tuple, dict]:
    """Return what was trained after the checkpoint, by pair; ranks are started once for all of a number of
    them."""
    _, done, tokenizer = made
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


def optimizers_apart(first: Path, second: Path) -> float:
    """Return the largest difference of the optimizer states that two runs saved last."""
    files = [load_file(run / f"checkpoint-{STEPS}" / "optimizer.safetensors") for run in (first, second)]
    assert files[0].keys() == files[1].keys()
    return max((files[0][key] - files[1][key]).abs().max().item() for key in files[0])


def check(made, pairs: list[tuple], folder: Path) -> None:
    _, done, _ = made
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


@pytest.mark.slow
def test_a_checkpoint_of_each_strategy_goes_on_under_each_other(made, tmp_path):
    pairs = covering()
    assert all(sum(by == saver != to for by, to in pairs) >= 2 for saver in SAVERS)
    assert {resumer for _, resumer in pairs} == set(RESUMERS)
    check(made, pairs, tmp_path)


@pytest.mark.long
def test_every_pair(made, tmp_path):
    check(made, [pair for pair in ALL if pair not in covering()], tmp_path)


@pytest.mark.slow
def test_with_dropout_the_same_strategy_goes_on_to_the_bit(made, tmp_path):
    _, done, tokenizer = made
    names, cells = ("zero2", "zero3", "fsdp"), []
    for name in names:
        whole = tmp_path / name / "whole"
        cell = done["ddp", 2][1].under(name, whole, dropout=0.1)
        cells += [
            cell,
            cell.under(name, tmp_path / name / "again", resume=str(whole / f"checkpoint-{SAVED}")),
        ]
    adapters = [result["adapter"] for result in run_ranks(run_cells, 2, cells, tokenizer)[0]]
    assert dict(zip(names, adapters[::2], strict=True)) == dict(zip(names, adapters[1::2], strict=True))
