"""benchmarks/gpu.py but for its sizes: each part on a CPU, its ways in this process instead of their own."""

import json
import math
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import gpu


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Return a function that measures a part, and returns the figures that it wrote."""

    @contextmanager
    def started(way, folder):
        yield gpu.worker(way, folder)

    monkeypatch.setattr(gpu, "started", started)
    monkeypatch.setattr("qwenlora.trainer.calibrate.LONG_S", 0.0)

    def measure(part, *more):
        small = ("--device", "cpu", "--tiny", "--turns", "1", "--steps", "3", "--out", str(tmp_path))
        gpu.main([part, *small, *more])
        return json.loads(gpu.file_of(gpu.read_options([part, *small, *more]), part).read_text())

    return measure


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu.PARTS)
def test_the_ways_of_a_part_learn_alike(measure, part, capsys):
    found = measure(part)
    ways = gpu.PARTS[part].here
    assert list(found["ways"]) == ways
    for figures in found["ways"].values():
        assert figures["tokens_per_s"] > 0
        assert figures["peak_gb"] > 0
    table = capsys.readouterr().out
    assert all(f"| {way} | " in table for way in ways)


def test_the_share_of_bare_products_is_shown_once_they_are_measured(measure, tmp_path):
    found = measure(gpu.CEILINGS)
    assert found["rates"]["products"]["float32"] > 0
    options = gpu.read_options([gpu.WHOLE, "--device", "cpu", "--out", str(tmp_path)])
    assert 0 < gpu.bare_products(options, "float32", found["card"]) < 1e15
    assert math.isnan(gpu.bare_products(options, "float32", "another card"))


@pytest.mark.parametrize(
    ("where", "what", "said"),
    [("q_proj.base_layer.weight", 1.5, "a loss differs"), ("o_proj.lora_A", 1.001, "a norm differs")],
)
def test_a_way_that_computes_wrongly_gets_no_number(measure, monkeypatch, where, what, said):
    real = gpu.ours_of

    def ours_of(*arguments, **options):
        trainer = real(*arguments, **options)
        for name, parameter in trainer.model.named_parameters():
            if where in name:
                parameter.data *= what
        return trainer

    monkeypatch.setattr(gpu, "ours_of", ours_of)
    with pytest.raises(AssertionError, match=f"qwenlora: {said}"):
        measure(gpu.WHOLE)


def test_a_way_that_the_gpu_is_too_small_for_is_said_and_the_others_are_measured(
    measure, monkeypatch, capsys
):
    monkeypatch.setattr(gpu, "padded", lambda rows: torch.cuda.OutOfMemoryError("out of memory"))

    def step(trainer, batch):
        if isinstance(batch, Exception):
            raise batch
        return 1.0, 1.0

    monkeypatch.setattr(gpu, "train_step", step)
    assert list(measure(gpu.NF4)["ways"]) == [gpu.OURS]
    assert f"| {gpu.PLAIN} | out of memory |" in capsys.readouterr().out
    monkeypatch.setattr(
        gpu, "train_step", lambda trainer, batch: step(trainer, RuntimeError("out of memory"))
    )
    with pytest.raises(SystemExit, match="the GPU is too small for every way"):
        measure(gpu.NF4)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("whole --device cuda", "gpu-whole"),
        ("whole --device cuda --turns 2 --tokens 4096", "gpu-whole"),
        (
            "whole --device cuda --shape Qwen3-8B --layers 4 --tokens 512",
            "gpu-whole-Qwen3-8B-4-layers-512-tokens",
        ),
        ("nf4 --device cpu --tiny", "gpu-nf4-tiny-cpu"),
        ("ceilings --device cpu", "gpu-ceilings-cpu"),
        ("ceilings --device cuda", "gpu-ceilings"),
    ],
)
def test_a_try_replaces_no_other_figures(given, name):
    options = gpu.read_options(given.split())
    assert gpu.file_of(options, options.part).stem == name


@pytest.mark.parametrize(
    ("part", "gigabytes", "layers"),
    [("whole", 141, 28), ("whole", 85, 28), ("whole", 40, 10), ("experts", 141, 12)],
)
def test_the_layers_fit_the_gpu(monkeypatch, part, gigabytes, layers):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gigabytes * 10**9, 0))
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)  # without TRL
    options = gpu.read_options([part, "--device", "cuda"])
    assert gpu.job_of(gpu.PARTS[part], options).values["num_hidden_layers"] == layers
