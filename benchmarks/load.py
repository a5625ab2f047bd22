"""python benchmarks/load.py: what it costs ranks to load a base: seconds, host memory, bytes read.

It makes a base of 0.9 GB in bfloat16, which four ranks load whole (ddp) and sharded (zero3, fsdp), in new
processes each time, taking turns. A number is shown only if a parameter gathered from all ranks is the
file's, and all ranks together read the base once. README.md beside this file explains the numbers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, Qwen3Config

from qwenlora.configs.schema import Config, Data, Model
from qwenlora.trainer.model import base_files
from qwenlora.trainer.model.loading import load_base
from qwenlora.trainer.spread import sharded_loading
from qwenlora.trainer.spread.zero import start_communication

STRATEGIES = ("ddp", "zero3", "fsdp")
CHECKED = "model.layers.1.mlp.down_proj.weight"
SETTINGS = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def make_base(folder: Path, layers: int) -> None:
    """Write a Qwen3 of random weights in bfloat16, with layers of the smallest Qwen3's shape."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="300MB")


class Counted(base_files.BaseFiles):
    """Files that count the bytes read by this process."""

    total = 0

    def copy(self, name: str, start: int, to: Tensor) -> None:
        """Read as BaseFiles does, and count."""
        before = self.bytes_read
        super().copy(name, start, to)
        type(self).total += self.bytes_read - before


def gathered(parameter: Any, strategy: str) -> Tensor:
    """Return a parameter gathered from all ranks."""
    if strategy == "fsdp":
        return parameter.full_tensor().detach()  # type: ignore[no-any-return]
    if strategy == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def shard_of(parameter: Any, strategy: str) -> Tensor:
    """Return what this rank holds of a parameter."""
    if strategy == "fsdp":
        return parameter.to_local().detach()  # type: ignore[no-any-return]
    return (parameter.ds_tensor if strategy == "zero3" else parameter).detach()  # type: ignore[no-any-return]


def load(strategy: str, base: Path, dtype: str) -> dict[str, float]:
    """Load as one of the ranks; return its seconds, and its bytes: peak, held, read by the process and from
    ranges."""
    dist.init_process_group("gloo")
    start_communication()  # for each strategy, as it imports much
    sharded_loading.BaseFiles = Counted
    model_config = Model.model_validate({"name_or_path": str(base), "dtype": dtype})
    config = Config(run_dir="unused", model=model_config, data=Data(train="unused"))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded_loading.skeleton(config, str(base))  # imports what any strategy does
    dist.barrier()
    process = psutil.Process()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, read, start = process.memory_info().rss, process.io_counters().read_chars, time.perf_counter()
    if strategy == "ddp":
        model = load_base(config, str(base))
    elif strategy == "zero3":
        model = sharded_loading.load_zero3(
            config, str(base), SETTINGS | {"bf16": {"enabled": dtype == "bfloat16"}}
        )
    else:
        model = sharded_loading.load_fsdp(config, str(base), mesh)
    for parameter in model.parameters():
        shard_of(parameter, strategy).sum()  # else pages that transformers mapped would not be loaded yet
    seconds, peak = time.perf_counter() - start, base_files.peak_memory() - before
    read = process.io_counters().read_chars - read
    parameters = dict(model.named_parameters())
    checked = gathered(parameters[CHECKED], strategy)
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(base / index[CHECKED], "pt") as file:
        assert torch.equal(checked, file.get_tensor(CHECKED).to(checked.dtype)), strategy
    return {
        "seconds": seconds,
        "peak": peak,
        "held": sum(shard_of(parameter, strategy).nbytes for parameter in parameters.values()),
        "read": read,
        "counted": Counted.total,
    }


def measure(strategy: str, base: Path, dtype: str, ranks: int, folder: Path) -> list[dict[str, float]]:
    """Return each rank's numbers, from new processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [__file__, "--strategy", strategy, "--base", str(base), "--dtype", dtype]
    command += ["--folder", str(folder)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{strategy} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def print_table(results: dict[str, list[list[dict[str, float]]]], size: int, console: Console) -> None:
    """Print the table: medians over turns of the slowest, or largest, rank."""
    ranks = len(results["ddp"][0])
    table = Table(title=f"{ranks} ranks load a base of {size / 1e9:.2f} GB: GB of the rank with the most")
    for column in ("strategy", "seconds", "peak", "held", "read()", "ranges", "ranges of all"):
        table.add_column(column, justify="right")
    for strategy, turns in results.items():

        def most(key: str, turns: list[list[dict[str, float]]] = turns) -> float:
            return median(max(rank[key] for rank in turn) for turn in turns)

        table.add_row(
            strategy,
            f"{most('seconds'):.2f}",
            *(f"{most(key) / 1e9:.3f}" for key in ("peak", "held", "read", "counted")),
            f"{sum(rank['counted'] for rank in turns[0]) / 1e9:.3f}",
        )
    console.print(table)


def main() -> None:
    """Measure and print the table, or be one of the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=26, help="of the base: 31 MB each")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="that it is loaded in"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where the base is written (default: the temporary folder)"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--strategy", choices=STRATEGIES, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.strategy:
        answer = json.dumps(load(options.strategy, options.base, options.dtype))
        (options.folder / f"{dist.get_rank()}.json").write_text(answer)
        dist.barrier()
        dist.destroy_process_group()
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    results: dict[str, list[list[dict[str, float]]]] = {strategy: [] for strategy in STRATEGIES}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        base = Path(folder) / "base"
        make_base(base, options.layers)
        with base_files.BaseFiles(str(base)) as files:
            size = files.size
        for _ in range(options.repeats):
            for strategy, turns in results.items():
                turns.append(measure(strategy, base, options.dtype, options.ranks, Path(folder)))
    for strategy in ("zero3", "fsdp"):
        for turn in results[strategy]:
            assert sum(rank["counted"] for rank in turn) == size, strategy
            assert sum(rank["read"] for rank in turn) < 1.02 * size, strategy  # headers, config.json, modules
    print_table(results, size, Console())
    if options.json:
        options.json.write_text(json.dumps({"size": size, "results": results}, indent=1))


if __name__ == "__main__":
    main()
