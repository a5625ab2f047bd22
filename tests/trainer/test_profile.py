"""log.profile_steps watches the steps that it names, says what it saw on one page, and changes nothing."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from made import config_of, side_of, trainer_of
from transformers import TrainerCallback

from qwenlora.run.folder import RunFolder
from qwenlora.trainer.loop.state import adapter_of
from qwenlora.trainer.record.profile import Profiler
from qwenlora.trainer.record.profile_events import Event, operations
from qwenlora.trainer.record.profile_page import Operation, Profiled, Span, gaps, merged, page


class Watch(TrainerCallback):
    """Notes the logged losses, and in which steps torch's profiler is on."""

    def __init__(self):
        self.losses, self.on = [], []

    def on_pre_optimizer_step(self, args, state, control, **_):
        if torch.autograd._profiler_enabled():
            self.on.append(state.global_step + 1)

    def on_log(self, args, state, control, logs, **_):
        if "loss" in logs:
            self.losses.append((logs["loss"], logs["grad_norm"]))


def trained(tiny, folder, steps, *callbacks, **train):
    """Return a trainer, what was said and what was seen, after training. steps: to profile, or None."""
    config = config_of(**{"max_steps": 5} | train)
    made = trainer_of(tiny, folder, side_of(21), config)
    made.args.logging_steps = made.state.logging_steps = 1
    said, watch = [], Watch()
    process = SimpleNamespace(run=RunFolder(folder), say=said.append, warn=said.append)
    if steps:
        made.add_callback(Profiler(list(steps), process, made))
    for callback in (watch, *callbacks):
        callback.trainer = made
        made.add_callback(callback)
    made.train()
    return made, said, watch


@pytest.fixture(scope="module")
def profiled(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiled")
    return folder, *trained(tiny, folder, (2, 3))


def test_losses_and_adapter_have_the_same_bits_with_it(profiled, tiny, tmp_path):
    _, made, _, watch = profiled
    plain, _, unwatched = trained(tiny, tmp_path, None)
    assert watch.losses == unwatched.losses
    assert len(watch.losses) == 5
    ours, theirs = adapter_of(made.peft_model), adapter_of(plain.peft_model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_only_its_steps_are_watched_and_nothing_stays_behind(profiled):
    _, made, _, watch = profiled
    assert watch.on == [2, 3]
    for owner, method in ((made, "compute_loss"), (made.accelerator, "backward"), (made.optimizer, "step")):
        function = vars(owner).get(method)  # the schedule has replaced the optimizer's
        assert function is None or not function.__code__.co_filename.endswith("profile.py")


def test_the_trace_has_the_steps_and_their_phases(profiled):
    folder, *_ = profiled
    with gzip.open(folder / "profile" / "steps-2-3.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert [name for name in names if str(name).startswith("step ")] == ["step 2", "step 3"]
    assert names.count("forward") == names.count("backward") == 4  # two micro-batches a step
    assert "aten::mm" in names


def test_the_page_is_said_and_read_in_one_sitting(profiled):
    folder, made, said, _ = profiled
    assert len(said) == 1
    assert said[0].startswith("profile of steps 2 to 3: ")
    assert said[0].endswith("profile/steps-2-3.md")
    text = (folder / "profile" / "steps-2-3.md").read_text()
    assert len(text.splitlines()) < 60
    for word in ("forward", "backward", "norm and optimizer", "aten::mm", "base", "adapter", "activations"):
        assert f"| {word}" in text
    trainable = sum(4 * p.numel() for p in made.model.parameters() if p.requires_grad)
    for name, size in (("adapter", trainable), ("gradients", trainable), ("optimizer", 2 * trainable)):
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
        assert float(row.split("|")[2].split()[0]) == pytest.approx(size / 1e6, rel=0.05)


@pytest.mark.parametrize(
    ("step", "profiled", "said"),
    [
        (0, (10, 13), ""),
        (0, (10, 12), "only steps 10 to 12 will be profiled, since this attempt trains steps 1 to 12"),
        (10, (11, 13), "only steps 11 to 13 will be profiled, since this attempt trains steps 11 to 30"),
        (20, None, "no step will be profiled, since this attempt trains steps 21 to 30"),
        (0, None, "no step will be profiled, since this attempt trains steps 1 to 6"),
    ],
)
def test_steps_that_an_attempt_does_not_have_are_said_before_its_first(step, profiled, said):
    lines = []
    profiler = Profiler([10, 13], SimpleNamespace(warn=lines.append), None)
    last = int(said.split()[-1]) if said else 100
    profiler.on_train_begin(None, SimpleNamespace(global_step=step, max_steps=last), None)
    assert lines == ([f"log.profile_steps=[10, 13]: {said}"] if said else [])
    assert (profiler.first, profiler.last) == profiled or profiler.first > profiler.last


class StopAt(TrainerCallback):
    """Has the ranks agree to stop in a step."""

    def __init__(self, step):
        self.step, self.trainer = step, None

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.trainer.stop.agreed = state.global_step + 1 == self.step


def test_an_attempt_that_is_to_stop_saves_and_writes_no_profile(tiny, tmp_path):
    made, said, _ = trained(tiny, tmp_path, (1, 2), StopAt(2), max_steps=4)
    made.saver.wait()
    assert [folder.name for folder in RunFolder(tmp_path).checkpoints()] == ["checkpoint-2"]
    assert said == ["stopped after step 2 of steps 1 to 2: no profile"]
    assert not torch.autograd._profiler_enabled()
    assert not (tmp_path / "profile").exists()


def test_a_profile_that_cannot_be_written_ends_no_run(tiny, tmp_path):
    (tmp_path / "profile").write_text("in the way")
    made, said, _ = trained(tiny, tmp_path, (1, 1), max_steps=2)
    assert said == ["the profile of step 1 cannot be written: File exists"]
    assert made.state.global_step == 2


GPU = Profiled(
    device="NVIDIA H100",
    steps=[Span("step 1", 1000, 2000), Span("step 2", 2000, 3000)],
    phases=[Span("forward", 1000, 1200), Span("backward", 1200, 1900), Span("forward", 2000, 2500)],
    operations=[Operation("aten::mm", 8, 900.0, 40.0), Operation("aten::add", 2, 100.0, 20.0)],
    memory={"base": 15_200_000_000},
    on_gpu=[Span("forward", 1010, 1510), Span("backward", 1510, 2010)],
    kernels=[
        Span("gemm", 1010, 1500),
        Span("nccl", 1100, 2010),  # on another stream
        Span("add", 1503, 1600),
        Span("gemm", 2410, 3100),  # after the CPU is done
    ],
)


def test_the_times_in_which_the_gpu_was_idle_are_found():
    found = [(gap.us, gap.after, gap.before, gap.phase) for gap in gaps(GPU)]
    assert found == [(400, "nccl", "gemm", "forward"), (10, "the start", "gemm", "forward")]
    assert merged(GPU.kernels) == [Span("gemm", 1010, 2010), Span("gemm", 2410, 3100)]


def test_a_kernel_s_time_is_that_of_the_operation_that_started_it():
    def event(name, start, end, *, on_gpu=False, named=False, thread=1, id=0, of=0):
        return Event(name, start, end, on_gpu, named, thread, id, of)

    found = operations(
        [
            event("forward", 0, 100, named=True),
            event("aten::linear", 10, 60, id=1),
            event("aten::mm", 20, 50, id=2),
            event("cudaLaunchKernel", 30, 45, of=2),
            event("aten::mm", 50, 55, id=3),
            event("aten::mm", 52, 90, thread=2, id=4),  # at the same time, in the backward pass's thread
            event("gemm", 70, 170, on_gpu=True, of=2),
            event("gemm", 170, 180, on_gpu=True, of=3),
            event("Memcpy", 180, 181, on_gpu=True),
            event("forward", 70, 180, on_gpu=True, named=True),
        ]
    )
    assert sorted(found) == [
        Operation("Memcpy", 0, 1, 0),
        Operation("aten::linear", 1, 0, 50 - 30 - 5),
        Operation("aten::mm", 3, 110, 30 + 5 + 38),
    ]


def test_the_page_of_a_gpu_has_its_times_and_its_gaps():
    lines = [" ".join(line.split()) for line in page(GPU, "my-run, steps 1 to 2", "x.json.gz").splitlines()]
    assert "| forward | 0.35 | 33.3% | 0.25 |" in lines  # a step; 700 of 2,100 us on the CPU
    assert "| aten::mm | 4 | 0.45 | 42.9% | 0.02 |" in lines
    assert "19.5% of the time, 0.205 ms a step, in 2 gaps over 5 us. The longest:" in lines
    assert "| 0.4 | forward | nccl | gemm |" in lines
    assert "| base | 15.2 GB |" in lines
