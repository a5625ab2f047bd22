"""docs/strategies.md: its figures are what the estimate computes, its refusals are the table's."""

from pathlib import Path

import pytest
from traffic import MIXTURE, NVLINK, sizes_of, traffic

from qwenlora.configs import Config
from qwenlora.configs.combinations import RULES, Machine
from qwenlora.configs.estimate import NETWORK, PCIE, break_even, need
from qwenlora.configs.schema import Lora, Strategy

DOCS = Path(__file__).parents[2] / "docs"
DOC = (DOCS / "strategies.md").read_text(encoding="utf-8")
TWO_NODES = Machine(2, 8, 8, 81_559 * 2**20)
QWEN = {name: sizes_of(name) for name in ("Qwen2.5-7B", "Qwen2.5-32B", "Qwen2.5-72B")}
SPEEDS = {"NVLink": NVLINK, "PCIe": PCIE, "network": NETWORK}
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


def test_a_mixture_s_memory_is_as_it_would_be_computed_now():
    machine, rows = TWO_NODES._replace(nodes=1), []
    for experts in ("all", "shared"):
        for name in ("ddp", "zero2", "zero3", "fsdp"):
            here = config("none").model_copy(update={"lora": Lora(experts=experts)})
            nf4 = here.model_copy(update={"strategy": config("nf4").strategy})
            cells = [f"{need(each, MIXTURE, name, machine).total / 1e9:.1f}" for each in (here, nf4)]
            rows.append(f"| {name}, `experts: {experts}` | {cells[0]} | {cells[1] * (name != 'fsdp')} |")
        cells = []
        for quantization in ("none", "nf4"):
            divided = Strategy(expert_parallel=8, quantization=quantization)
            found = need(here.model_copy(update={"strategy": divided}), MIXTURE, "ddp", machine)
            cells.append(f"{found.total / 1e9:.1f}")
        rows.append(f"| ddp, `expert_parallel: 8`, `experts: {experts}` | {cells[0]} | {cells[1]} |")
    assert "\n".join(rows) in (DOCS / "models.md").read_text(encoding="utf-8"), "\n".join(rows)


def refusals() -> list[str]:
    rows = [f"| {rule.what} | {rule.why} | {rule.instead} |" for rule in RULES]
    return ["| refused | because | instead |", "|---|---|---|", *rows]


@pytest.mark.parametrize("made", [figures, refusals])
def test_a_table_is_as_it_would_be_made_now(made):
    assert "\n".join(made()) in DOC


def test_the_break_evens_are_computed():
    sizes = QWEN["Qwen2.5-7B"]
    named = {name: break_even(config("none"), sizes, speed) for name, speed in SPEEDS.items()}
    named |= {
        "nf4": break_even(config("nf4"), sizes, NETWORK),
        "30B": break_even(config("none"), MIXTURE, NETWORK),
    }
    assert all(f"{tokens:,}" in DOC for tokens in named.values()), named


def test_every_strategy_is_described():
    for name in ("auto", "ddp", "zero1", "zero2", "zero3", "fsdp"):
        assert f"`{name}`" in DOC
