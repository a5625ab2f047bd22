"""A plan says what fits, how long it takes and what to take, without torch and within a second."""

import json
import subprocess
import sys

import pytest
from planned import ROWS, case_of
from rich.console import Console

from qwenlora.cli.main import main
from qwenlora.configs.schema import Model
from qwenlora.plan import table
from qwenlora.plan.bases import known, shape_of_base
from qwenlora.plan.hardware import gpus, named, of_driver
from qwenlora.plan.plan import make_plan
from qwenlora.plan.scale import plot, scales


def ways(plan):
    return {way.name: way for way in plan.ways}


def test_the_recommended_strategy_fits_and_none_that_fits_is_much_faster():
    for base in ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-32B", "Qwen/Qwen2.5-72B", "Qwen/Qwen3-30B-A3B"):
        plan = make_plan(case_of(base, "h100", nodes=2, gpus_per_node=8))
        assert plan.recommended.fit == "fits"
        assert plan.recommended.memory.total <= named("h100").bytes
        fitting = [way.tokens_s for way in plan.ways if way.fit == "fits"]
        assert plan.recommended.tokens_s * 1.04 > max(fitting)


def test_a_72b_on_24_gb_does_not_fit_and_the_plan_says_what_would():
    plan = make_plan(case_of("Qwen/Qwen2.5-72B", "4090", gpus_per_node=8))
    assert plan.recommended is None
    assert {way.name for way in plan.ways if way.fit != "does not fit"} == {"zero3"}  # tight
    assert "what would fit: strategy.quantization: nf4 (zero3) or 32 such GPUs (fsdp)" in plan.instead


def test_what_would_fit_fits():
    plan = make_plan(case_of("Qwen/Qwen2.5-72B", "4090", nodes=4, gpus_per_node=8))
    assert plan.recommended is not None


def test_a_base_in_parts_over_a_slow_network_is_slow_and_in_nodes_is_not():
    plan = make_plan(case_of("Qwen/Qwen2.5-72B", "h100", nodes=2, gpus_per_node=8, network=12.5e9))
    both = ways(plan)
    assert both["fsdp"].efficiency < 0.5 < 0.95 < both["fsdp in nodes"].efficiency
    assert plan.recommended.name == "fsdp in nodes"


def test_nodes_that_cost_more_than_they_give_are_told():
    """One GPU a node, so that a base in parts has to cross a slow network."""
    fast, slow = (
        make_plan(case_of("Qwen/Qwen2.5-32B", "h100", nodes=8, network=network)) for network in (50e9, 1e9)
    )
    assert slow.scaling is None or slow.scaling < fast.scaling


def test_scaling_is_the_speed_of_a_gpu_beside_that_on_one_node():
    alone, both = (
        make_plan(case_of("Qwen/Qwen2.5-7B", "h100", nodes=nodes, gpus_per_node=8)) for nodes in (1, 2)
    )
    assert alone.scaling is None
    assert both.scaling == pytest.approx(both.recommended.tokens_s / alone.recommended.tokens_s / 2)


@pytest.mark.parametrize(
    ("train", "kept"),
    [
        ({}, 3),  # of three epochs
        ({"save_strategy": "steps", "save_steps": 100}, 4),
        ({"save_strategy": "steps", "save_steps": 100, "save_total_limit": None}, 12),
        ({"save_strategy": "steps", "save_steps": 600}, 2),
        ({"save_strategy": "no"}, 1),
        ({"save_total_limit": 1, "metric_for_best_model": "eval_loss"}, 3),
    ],
)
def test_checkpoints_are_counted_with_the_best_and_the_one_that_is_written(train, kept):
    data = {"train": "example", "eval": "example"}
    plan = make_plan(case_of("Qwen/Qwen2.5-7B", "h100", train={"global_batch_size": 64} | train, data=data))
    assert plan.length.steps == 1146
    assert plan.kept == kept
    assert plan.checkpoint == 12 * 40_370_176
    begun = make_plan(case_of("Qwen/Qwen2.5-7B", "h100", lora={"init_lora_weights": "pissa"}, data=data))
    assert begun.checkpoint == 16 * 40_370_176, "with the beginning of the adapter"
    also = {"init_lora_weights": "pissa", "modules_to_save": ["embed_tokens"]}
    more = make_plan(case_of("Qwen/Qwen2.5-7B", "h100", lora=also, data=data)).checkpoint - begun.checkpoint
    assert more == 12 * 152_064 * 3584, "embeddings have no beginning"


@pytest.mark.parametrize(
    ("free", "files", "said"), [(10**9, 0, "GB"), (10**12, 50, "50 more files"), (10**12, 64, "")]
)
def test_a_disk_with_too_little_room_for_checkpoints_is_told(monkeypatch, capsys, free, files, said):
    monkeypatch.setattr(table, "free_bytes", lambda folder: free)
    monkeypatch.setattr(table, "free_files", lambda folder: files)
    case = case_of("Qwen/Qwen2.5-7B", "h100", train={"save_strategy": "steps", "save_steps": 9})
    table.show(make_plan(case), case, "a test", Console(width=200))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("checkpoints"))
    assert line.startswith("checkpoints   484.4 MB each, at most 4 at a time, 1.9 GB; ")
    assert said in line
    assert ("; set train.save_total_limit lower" in line) == bool(said)


def test_layers_are_computed_again_only_where_memory_is_short():
    again = {
        length: make_plan(
            case_of("Qwen/Qwen2.5-7B", "a100-40", data={"train": "example", "max_length": length})
        ).ways[0]
        for length in (2048, 12288, 16384)
    }
    assert [way.recomputed > 0 for way in again.values()] == [False, True, True]
    assert all(way.memory.total <= named("a100-40").bytes for way in again.values())


def test_a_batch_that_the_gpus_cannot_share_is_refused_with_a_plan_for_one_that_they_can():
    train = {"global_batch_size": 64, "per_device_train_batch_size": 10}
    plan = make_plan(case_of("Qwen/Qwen2.5-7B", "h100", gpus_per_node=8, train=train))
    assert "fewer than 8 processes" in plan.refusal
    assert plan.recommended.per_device in (1, 2, 4, 8)
    assert {way.per_device for way in plan.ways} == {plan.recommended.per_device}


def test_gpus_that_do_not_divide_a_batch_fit_and_some_are_idle_at_its_end():
    seven, eight = (
        make_plan(case_of("Qwen/Qwen2.5-7B", "h100", gpus_per_node=gpus)).recommended for gpus in (7, 8)
    )
    assert seven.step_s / eight.step_s == pytest.approx(10 / 8, rel=0.05), "10 of 64 packs on some of them"


def test_settings_that_no_strategy_allows_are_named():
    plan = make_plan(case_of("Qwen/Qwen2.5-7B", "h100", gpus_per_node=8, strategy={"sequence_parallel": 3}))
    assert plan.recommended is None
    assert "strategy.sequence_parallel=3 on 8 processes" in plan.instead


def test_each_strategy_has_the_largest_micro_batch_that_fits():
    train = {"global_batch_size": 64, "per_device_train_batch_size": "auto"}
    plan = make_plan(case_of("Qwen/Qwen2.5-32B", "h100", gpus_per_node=2, train=train))
    sizes = {way.name: way.per_device for way in plan.ways}
    assert sizes["ddp"] < sizes["fsdp"] <= 32
    assert all(way.memory.total <= named("h100").bytes for way in plan.ways)


def test_a_run_is_as_many_steps_and_jobs_as_its_rows_and_its_time_limit_make():
    case = case_of("Qwen/Qwen2.5-7B", "h100", train={"global_batch_size": 64, "num_train_epochs": 2})
    plan = make_plan(case, limit_min=60)
    packs = ROWS.tokens / 2048
    assert plan.length.steps == 2 * -(-packs // 64)
    assert plan.length.hours == pytest.approx(2 * packs / 64 * plan.recommended.step_s / 3600)
    with_gaps = make_plan(case._replace(rows=ROWS._replace(packs=int(1.2 * packs))))
    assert with_gaps.length.steps > plan.length.steps
    assert with_gaps.length.hours == pytest.approx(plan.length.hours), "a pack takes what its tokens take"
    assert plan.length.attempts == -(-plan.length.hours * 3600 // (3600 - 60))


def test_a_batch_larger_than_an_epoch_takes_the_time_of_its_rows():
    rows = ROWS._replace(rows=4, tokens=4 * 2048)
    few, many = (
        make_plan(case_of("Qwen/Qwen2.5-7B", "h100", rows=rows, train={"global_batch_size": batch}))
        for batch in (4, 64)
    )
    assert few.length.steps == many.length.steps == 3
    assert many.length.hours == pytest.approx(few.length.hours, rel=0.1)


def test_data_that_are_not_here_leave_out_the_run_alone(qwenlora, tmp_path):
    (tmp_path / "my.yaml").write_text(
        "model: {name_or_path: Qwen/Qwen2.5-7B}\ndata: {train: not_here.jsonl}\n"
    )
    answer = qwenlora("plan", str(tmp_path / "my.yaml"), "--gpu", "h100")
    assert answer.returncode == 0
    assert "rows          not here, so each counts data.max_length=2,048 tokens" in answer.stdout
    assert "recommended   strategy.name=ddp" in answer.stdout
    assert "\nrun " not in answer.stdout
    answer = qwenlora("plan", str(tmp_path / "my.yaml"), "--gpu", "h100", "--scale", "1,2")
    assert (answer.returncode, "--scale needs the rows" in answer.stderr) == (2, True)


def test_a_better_gpu_never_takes_longer():
    cases = (case_of("Qwen/Qwen2.5-7B", gpu) for gpu in ("a100", "h100", "h200", "b200"))
    steps = [make_plan(case).ways[0].step_s for case in cases]
    assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize(
    "name", [name for name in known() if "MoE" not in name and not name.endswith("Next")]
)
def test_a_known_base_has_the_size_of_its_name(name):
    billions = next(float(word[:-1]) for word in name.split("-") if word[0].isdigit() and word[-1] == "B")
    case = case_of(f"Qwen/{name}", "h100")
    assert case.parameters.total == pytest.approx(billions * 1e9, rel=0.15)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B"),
        ("Qwen/Qwen2.5-Coder-32B-Instruct", "Qwen2.5-32B"),
        ("unsloth/Qwen3-4B-Instruct-2507", "Qwen3-4B"),
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", "Qwen3-Coder-30B-A3B"),
        ("Qwen/Qwen3-30B-A3B-Thinking-2507", "Qwen3-30B-A3B"),
        ("Qwen/Qwen3-VL-8B-Thinking", "Qwen3-VL-8B"),
    ],
)
def test_variants_of_a_known_qwen_have_its_shape(name, entry):
    assert shape_of_base(Model(name_or_path=name))[1] == f"the table of known Qwens ({entry})"


def test_an_unknown_base_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no such folder, not in the hub's cache.*Qwen2.5-7B"):
        shape_of_base(Model(name_or_path="someone/Other-9B"))


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("h100", "H100"),
        ("A100", "A100-80"),
        ("a100-40", "A100-40"),
        ("4090", "GeForce RTX 4090"),
        ("rtx3090", "GeForce RTX 3090"),
        ("NVIDIA A100-PCIE-40GB", "A100-40"),
    ],
)
def test_gpus_are_named_as_people_do(name, gpu):
    assert named(name).name == gpu


def test_an_unknown_gpu_is_refused():
    with pytest.raises(ValueError, match="gpu h101 is unknown; did you mean H100"):
        named("h101")


@pytest.mark.parametrize(
    ("driver_s", "gpu"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100 80GB PCIe", "A100-80"),
        ("Tesla V100-SXM2-16GB", "V100-16"),
        ("Tesla T4", "T4"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("AMD Instinct MI300X OAM", "MI300X"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H20-3e", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_gpus_are_known_by_their_drivers_names(driver_s, gpu):
    found = of_driver(driver_s)
    assert (found and found.name) == gpu


def test_every_gpu_has_memory_and_a_link():
    assert all(gpu.bytes > 10e9 and gpu.link > 1e9 for gpu in gpus().values())


def test_the_command_imports_no_torch_and_prints_numbers_that_are_valid_json(tmp_path):
    (tmp_path / "my.yaml").write_text("model: {name_or_path: Qwen/Qwen2.5-7B}\ndata: {train: example}\n")
    code = (
        "import sys; from qwenlora.cli.main import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)"
    )
    options = ["--gpu", "h100", "--gpus-per-node", "8", "--json"]
    command = [sys.executable, "-c", code, "plan", "my.yaml", *options]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (answer.returncode, answer.stderr) == (0, "False False\n")
    plan = json.loads(answer.stdout)
    assert plan["recommended"]["fit"] == "fits"
    assert plan["parameters"]["total"] == 7_615_616_512
    assert plan["how"]["step_s"] == "calibrated formula"


def test_scaling_keeps_the_global_batch_and_ends_where_gpus_have_no_pack_of_it():
    case = case_of("Qwen/Qwen2.5-7B", "h100", gpus_per_node=8, train={"global_batch_size": 64})
    runs = scales(case, [1, 8, 64, 128])
    assert [run.gpus for run in runs if run.way] == [1, 8, 64]
    speeds = [run.tokens_s for run in runs]
    assert speeds[0] < speeds[1] < speeds[2]
    assert all(0 < run.goodput <= 1 - run.start for run in runs if run.way)


def test_goodput_falls_with_failures_and_with_rare_saves():
    def goodput(failures, gpus=64, memory=None, **train):
        train, kept = {"global_batch_size": 64} | train, {"memory_steps": memory}
        case = case_of("Qwen/Qwen2.5-7B", "h100", gpus_per_node=8, train=train, checkpoint=kept)
        return scales(case, [gpus], failures)[0].goodput

    often = {"save_strategy": "steps", "save_steps": 10}
    assert goodput(0.0, **often) > goodput(0.01, **often) > goodput(0.1, **often)
    assert goodput(0.01, **often) > goodput(0.01, save_strategy="no")
    rarely = {"save_strategy": "steps", "save_steps": 500}
    assert goodput(0.01, **rarely) > goodput(0.01, memory=200, **rarely) > goodput(0.01, memory=0, **rarely)
    assert goodput(0.01, 8, **rarely) == goodput(0.01, 8, 0, **rarely), "with its only node all is lost"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scale", "12"), "multiple of a node's 8"),
        (("--scale", "8,x"), "expected numbers of GPUs"),
        (("--scale", ""), "expected numbers of GPUs"),
        (("--scale", "8", "--trace"), "one of them at a time"),
        (("--plot", "x.png"), "draws what --scale computes"),
        (("--scale", "8", "--plot", "no/x.png"), "no/x.png cannot be written: No such file"),
        (("strategy.expert_parallel=2",), "it has no experts"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(tmp_path, capsys, monkeypatch, options, message):
    (tmp_path / "my.yaml").write_text("model: {name_or_path: Qwen/Qwen2.5-7B}\ndata: {train: example}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["qwenlora", "plan", "my.yaml", "--gpu", "h100", "--gpus-per-node", "8", *options]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert (ended.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert message in said.err


def test_scaling_is_drawn(tmp_path):
    case = case_of("Qwen/Qwen2.5-7B", "h100", gpus_per_node=8)
    plot(scales(case, [8, 16]), tmp_path / "scale.png")
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
