"""How fast each rank is by itself, and who is named as slow."""

from types import SimpleNamespace

import paced
import pytest
import torch
from ranks import run_ranks
from torch import nn

from qwenlora.run import hardware
from qwenlora.run.bad_nodes import BadNodes
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.record import pace
from qwenlora.trainer.record.pace import FOR_STEPS, Pace, PaceCallback, SlowRanks, Stopwatch, alone


class Model(nn.Module):
    """Takes ids by name, as a base does; its layers take hidden states."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"base_layer": nn.Linear(8, 8), "lora_A": nn.Linear(8, 8)}) for _ in range(19)
        )

    def forward(self, input_ids):
        hidden = torch.zeros(*input_ids.shape, 8)
        for layer in self.layers:
            hidden = layer["base_layer"](hidden) + layer["lora_A"](hidden)
        return hidden


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a second each time it is looked at."""
    seconds = iter(range(10**6))
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(seconds))


def test_only_forward_passes_in_training_are_timed_and_their_tokens_counted(clock):
    model = Model()
    watch = Stopwatch([model], torch.device("cpu"))
    watch.start()
    for rows in (2, 3):
        model(input_ids=torch.zeros(rows, 10, dtype=torch.long))
    model.eval()
    model(input_ids=torch.zeros(50, 10, dtype=torch.long))
    assert watch.take(4) == Pace(2 / 4, 1e9 * 2 / 50)
    assert watch.take(4) == Pace(0, 0), "since the last time"


SOME = [f"layers.{number}.base_layer" for number in range(0, 19, 2)]


@pytest.mark.parametrize(
    ("strategy", "cut", "divided", "modules"),
    [
        ("ddp", False, False, [""]),
        ("zero2", False, False, [""]),
        ("ddp", True, False, SOME),
        ("ddp", False, True, SOME),
        ("fsdp", False, False, SOME),
        ("zero3", False, False, SOME),
    ],
)
def test_what_is_timed_waits_for_no_other_rank(clock, strategy, cut, divided, modules):
    model = Model()
    found = alone(model, strategy, cut=cut, divided=divided)
    names = {id(module): name for name, module in model.named_modules()}
    assert [names[id(module)] for module in found] == modules
    watch = Stopwatch(found, torch.device("cpu"))
    watch.start()
    model(input_ids=torch.zeros(2, 10, dtype=torch.long))
    assert watch.take(1) == Pace(len(found), 1e9 / 20)


def test_what_other_hooks_wait_for_is_not_timed(clock):
    """DeepSpeed's hooks gather a layer's weights before it, and let go of them after it."""
    layer = nn.Linear(8, 8)
    watch = Stopwatch([layer], torch.device("cpu"))

    def wait(*_):
        pace.time.perf_counter()

    layer.register_forward_pre_hook(wait)
    layer.register_forward_hook(wait)
    watch.start()
    layer(torch.zeros(2, 10, 8))
    assert watch.take(1).seconds == 1


FAST = Pace(1.0, 1.0)


@pytest.mark.parametrize(
    ("last", "named"),
    [
        (Pace(1.31, 1.31), True),
        (Pace(1.29, 1.29), False),
        (Pace(2.0, 1.0), False),  # it has longer rows
        (Pace(0.1, 9.0), False),  # it has hardly a row
    ],
)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_rank_is_slow_at_1_3_times_the_median_by_its_time_and_for_its_tokens(last, named, ranks):
    paces = [FAST] * (ranks - 1) + [last]
    assert SlowRanks(ranks).add(paces, FOR_STEPS) == [ranks - 1] * named


def test_it_is_named_once_after_fifty_steps_in_a_row():
    slow, judge = [Pace(2.0, 2.0), FAST, FAST], SlowRanks(3)
    assert judge.add(slow, 49) == []
    assert judge.add([FAST] * 3, 1) == []
    assert [judge.add(slow, 10) for _ in range(8)] == [[], [], [], [], [0], [], [], []]


def test_where_all_are_slow_none_is():
    assert SlowRanks(3).add([Pace(9.0, 9.0)] * 3, FOR_STEPS) == []


def test_ranks_compare_their_paces_name_the_slow_one_and_record_all(tmp_path):
    one, other = run_ranks(paced.compare, 2, tmp_path, [[0.1, 0.5]] * 2 + [[0.4, 0.2]], 30)
    host = one["host"]
    expected = [(0.1, 0.5, 1)] * 2 + [(0.2, 0.4, 0)]
    names = ("rank_forward_s", "slowest_rank_forward_s", "slowest_rank")
    assert one["logged"] == other["logged"]
    assert one["logged"] == [{"loss": 1.0} | dict(zip(names, each, strict=True)) for each in expected]
    (line,) = one["warned"]
    assert line.startswith(f"rank 1 on {host} is slow: 5 times the median for 50 steps (")
    assert ", load " in line
    assert other["warned"] == one["warned"], "its own log says so, too"
    assert one["sent"][-1] == (90, {"ranks/0": 0.4, "ranks/1": 0.2})
    assert other["sent"] == []
    paces = RunFolder(tmp_path).read_paces()
    assert (paces.step, paces.hosts, paces.seconds, paces.slow) == (90, [host] * 2, [0.4, 0.2], [line])
    assert not (tmp_path.parent / ".bad_nodes").exists(), "processes that share cores differ anyway"


@pytest.mark.parametrize(
    ("said", "state"),
    [
        (
            "NVIDIA H100, 705, 1980, 87, 0x0000000000000060",
            "NVIDIA H100, 705 of 1980 MHz, 87 °C, too hot (software), too hot (hardware)",
        ),
        ("NVIDIA H100, 1980, 1980, 40, 0x0000000000000000", "NVIDIA H100, 1980 of 1980 MHz, 40 °C"),
        ("Unable to determine the device handle", "nvidia-smi does not say why"),
    ],
)
def test_a_gpu_says_what_slows_it_down(monkeypatch, tmp_path, said, state):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{said}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert hardware.gpu_now("GPU-1") == state


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_times_itself_and_tells_its_clock():
    device = torch.device("cuda", 0)
    model = nn.Linear(4096, 4096).to(device)
    watch = Stopwatch([model], device)
    watch.start()
    model(torch.zeros(8, 512, 4096, device=device))
    torch.cuda.synchronize()
    pace = watch.take(1)
    assert pace.seconds > 0
    assert pace.per_token == pytest.approx(1e9 * pace.seconds / 4096)
    assert " MHz, " in hardware.gpu_now(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


@pytest.mark.parametrize(("job", "slow"), [("7", {"n2"}), (None, set())])
def test_a_job_remembers_a_slow_gpu_s_node_which_is_bad_the_second_time(tmp_path, monkeypatch, job, slow):
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    else:
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    run = RunFolder(tmp_path / "run")
    for attempt in (1, 2):
        rank = SimpleNamespace(rank=0, world_size=2)
        process = SimpleNamespace(rank=rank, run=run, warn=lambda line: None, attempt=attempt)
        entries = BadNodes.beside(run)
        assert entries.bad() == {}
        PaceCallback(process, None, None)._remember("n2", "rank 1 on n2 is slow")
    assert entries.bad().keys() == slow
