"""docs/strategies.md: its figures are what the estimate computes, its refusals are the table's."""

from pathlib import Path

import pytest
from traffic import NVLINK, traffic

from qwenlora.configs import Config
from qwenlora.configs.combinations import RULES, Machine
from qwenlora.configs.estimate import NETWORK, PCIE, Sizes, break_even, need

DOC = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text(encoding="utf-8")
TWO_NODES = Machine(2, 8, 8, 81_559 * 2**20)
QWEN = {  # total, trained at r 16, body, head, layers, hidden, intermediate, key and value widths
    "Qwen2.5-7B": Sizes(7_615_616_512, 40_370_176, 6_525_621_760, 544_997_376, 28, 3584, 18_944, 512),
    "Qwen2.5-32B": Sizes(32_763_876_352, 134_217_728, 31_206_740_992, 778_567_680, 64, 5120, 27_648, 1024),
    "Qwen2.5-72B": Sizes(72_706_203_648, 210_534_400, 70_214_787_072, 1_245_708_288, 80, 8192, 29_568, 1024),
}
WAYS = [
    ("ddp", "global", "none"),
    ("zero1", "global", "none"),
    ("zero2", "global", "none"),
    ("zero3", "global", "none"),
    ("fsdp", "global", "none"),
    ("zero3", "node", "none"),
    ("fsdp", "node", "none"),
    ("ddp", "global", "nf4"),
    ("zero3", "global", "nf4"),
]


def config(quantization: str) -> Config:
    return Config(
        run_dir="runs/x",
        model={"name_or_path": "x"},
        data={"train": "example"},
        train={"gradient_checkpointing": True},
        strategy={"quantization": quantization},
    )


def figures() -> list[str]:
    rows = [
        f"| strategy | {' | '.join(f'{name}, GB' for name in QWEN)} |"
        f" {' | '.join(f'{name}, sent' for name in QWEN)} |",
        f"|---|{'---:|' * 6}",
    ]
    for name, group, quantization in WAYS:
        wanted = (
            [name] + [f"shard_group: {group}"] * (group == "node") + [quantization] * (quantization != "none")
        )
        cells = [
            f"{need(config(quantization), sizes, name, TWO_NODES, group).total / 1e9:.1f}"
            for sizes in QWEN.values()
        ]
        moved = [traffic(config(quantization), sizes, name, TWO_NODES, group) for sizes in QWEN.values()]
        cells += [f"{each.micro_batch / 1e9:.0f}" for each in moved]
        rows.append(f"| {', '.join(wanted)} | {' | '.join(cells)} |")
    steps = [f"{traffic(config('none'), sizes, 'ddp', TWO_NODES).step / 1e9:.1f}" for sizes in QWEN.values()]
    return [*rows, f"| each of them, once a step | | | | {' | '.join(steps)} |"]


def refusals() -> list[str]:
    rows = [f"| {rule.what} | {rule.why} | {rule.instead} |" for rule in RULES]
    return ["| refused | because | instead |", "|---|---|---|", *rows]


@pytest.mark.parametrize("made", [figures, refusals])
def test_a_table_is_as_it_would_be_made_now(made):
    assert "\n".join(made()) in DOC


def test_the_break_evens_are_computed():
    named = {"NVLink": break_even(config("none"), NVLINK), "PCIe": break_even(config("none"), PCIE)}
    named |= {"network": break_even(config("none"), NETWORK), "nf4": break_even(config("nf4"), NETWORK)}
    assert all(f"{tokens:,}" in DOC for tokens in named.values()), named


def test_every_strategy_is_described():
    for name in ("auto", "ddp", "zero1", "zero2", "zero3", "fsdp"):
        assert f"`{name}`" in DOC
