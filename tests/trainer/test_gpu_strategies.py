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


def test_each_strategy_trains_alike_and_resumes_to_the_bit(tiny, tmp_path):
    base = str(make_base(tmp_path / "base", "qwen3", tied=False))
    start = Cell(base, "", dtype="bfloat16")
    table = Table(
        "strategy", "quantization", "offload", "last loss", "seconds", "peak GPU MB", "base MB held"
    )
    losses = {}
    for name, quantization, offload in CELLS:
        folder = tmp_path / f"{name}-{quantization}-{offload}"
        cell = start.under(name, folder, quantization=quantization, offload=offload)
        done = measure_alone(cell, str(tiny))
        again = cell.under(name, f"{folder}-again", resume=str(folder / "checkpoint-10"))
        resumed = measure_alone(again, str(tiny))
        assert min(done["norms"].values()) > 0
        assert resumed["adapter"] == done["adapter"], (
            f"{cell.name} {quantization} {offload} does not go on to the bit"
        )
        losses[name, quantization, offload] = done["losses"]
        figures = (
            f"{done['seconds']:.1f}",
            f"{done['gpu_bytes'] / 1e6:.1f}",
            f"{done['held']['base_bytes'] / 1e6:.2f}",
        )
        table.add_row(name, quantization, offload, f"{done['losses'][20]:.4f}", *figures)
    Console(width=120).print(table)
    for (name, quantization, _), found in losses.items():
        alone = losses["ddp", quantization, "none"]
        assert max(abs(found[step] - alone[step]) for step in found) < CLOSE, (name, quantization)
