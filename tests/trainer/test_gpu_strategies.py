"""On a GPU: each strategy that one GPU can show, in bfloat16, with a table of what it took."""

import pytest
import torch
from rich.console import Console
from rich.table import Table
from spread import Cell, make_base, measure_alone

CELLS = (
    ("ddp", "none", "none"),
    ("ddp", "nf4", "none"),
    ("ddp", "int8", "none"),
    ("zero1", "none", "none"),
    ("zero2", "none", "optimizer"),
    ("zero2", "nf4", "none"),
    ("zero3", "none", "none"),
    ("zero3", "none", "params"),
    ("zero3", "nf4", "none"),
    ("fsdp", "none", "none"),
    ("fsdp", "none", "params"),
)
CLOSE = 0.02  # of a loss near 8: the order of sums differs, in bfloat16

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


# so that each takes a few minutes: `make gpu PART=zero3`
GROUPS = (("ddp", "fsdp"), ("zero1", "zero2"), ("zero3",))


@pytest.mark.parametrize("names", GROUPS, ids="-".join)
def test_each_strategy_trains_alike_and_resumes_to_the_bit(tiny, tmp_path, names):
    base = str(make_base(tmp_path / "base", "qwen3", tied=False))
    start = Cell(base, "", dtype="bfloat16")
    table = Table(
        "strategy", "quantization", "offload", "last loss", "seconds", "peak GPU MB", "base MB held"
    )
    alone = {}
    for name, quantization, offload in CELLS:
        folder = tmp_path / f"{name}-{quantization}-{offload}"
        if name not in ("ddp", *names):
            continue
        cell = start.under(name, folder, quantization=quantization, offload=offload)
        done = measure_alone(cell, str(tiny))
        assert min(done["norms"].values()) > 0
        if name == "ddp":
            alone[quantization] = done["losses"]
        if name not in names:
            continue
        again = cell.under(name, f"{folder}-again", resume=str(folder / "checkpoint-10"))
        resumed = measure_alone(again, str(tiny))
        assert resumed["adapter"] == done["adapter"], (
            f"{cell.name} {quantization} {offload} does not go on to the bit"
        )
        expected = alone[quantization]
        apart = max(abs(done["losses"][step] - expected[step]) for step in expected)
        assert apart < CLOSE, (name, quantization)
        figures = (
            f"{done['seconds']:.1f}",
            f"{done['gpu_bytes'] / 1e6:.1f}",
            f"{done['held']['base_bytes'] / 1e6:.2f}",
        )
        table.add_row(name, quantization, offload, f"{done['losses'][20]:.4f}", *figures)
    Console(width=120).print(table)
