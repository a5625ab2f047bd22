"""Experts that ranks divide among them are trained as on one rank: losses, evaluations, norms, adapter."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from spread import Cell, make_base, run_cells
from transformers import AutoConfig, AutoModelForCausalLM

from qwenlora.configs.schema import Config, Data, Model, Strategy
from qwenlora.trainer.model.fused_experts import check
from qwenlora.trainer.model.lora import count_parameters

pytestmark = pytest.mark.slow
CLOSE = 1e-5
TRAIN = {"router_aux_loss": 0.1, "max_grad_norm": 0.05}  # which clips each step


def assert_alike(one: dict, other: dict) -> None:
    for field in ("losses", "eval", "router"):
        steps = one[field].keys() & other[field].keys()
        assert steps, field
        assert max(abs(one[field][step] - other[field][step]) for step in steps) <= CLOSE, field
    assert max(abs(norm / other["norms"][step] - 1) for step, norm in one["norms"].items()) < 1e-4


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def apart(one: dict, other: dict) -> float:
    assert {name: t.shape for name, t in one.items()} == {name: t.shape for name, t in other.items()}
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen3_5_moe_text"])
def runs(request, tmp_path_factory, tiny):
    """Return ({name: what rank 0 did}, {name: what rank 1 did}, the folder of the runs)."""
    folder = tmp_path_factory.mktemp(request.param)
    base = str(make_base(folder / "base", request.param, tied=True))
    router = {"target_parameters": ["gate.weight"]}
    start = Cell(base, "", steps=4, save_steps=2, train=TRAIN, lora=router, end_to_end=True)
    divided = replace(start, expert_parallel=2)

    def again(cell: Cell, name: str, of: str) -> Cell:
        return cell.under("ddp", folder / name, resume=str(folder / of / "checkpoint-2"))

    alone = run_ranks(run_cells, 1, [start.under("ddp", folder / "one")], str(tiny))[0]
    names = ["divided", "to the bit", "from one"]
    cells = [
        divided.under("ddp", folder / "divided"),
        again(divided, "to the bit", "divided"),
        again(divided, "from one", "one"),
    ]
    two = run_ranks(run_cells, 2, cells, str(tiny))
    to_one = run_ranks(run_cells, 1, [again(start, "to one", "divided")], str(tiny))[0]
    first = dict(zip(["one", *names, "to one"], [*alone, *two[0], *to_one], strict=True))
    return first, dict(zip(names, two[1], strict=True)), folder


def test_two_ranks_train_what_one_does(runs):
    first, _, folder = runs
    assert first["one"]["moved"] > 0.1
    assert_alike(first["divided"], first["one"])
    assert apart(adapter_of(folder / "divided"), adapter_of(folder / "one")) <= CLOSE


def test_each_rank_holds_its_experts_alone(runs):
    first, second, folder = runs
    one, ranks = first["one"]["held"], [first["divided"]["held"], second["divided"]["held"]]
    config = Cell(str(folder / "base"), str(folder)).config
    parameters = count_parameters(config, str(folder / "base"))
    for held in ranks:
        assert one["base_bytes"] - held["base_bytes"] == 4 * parameters.experts // 2
        moments = one["optimizer_numbers"] - held["optimizer_numbers"]
        assert moments == 2 * parameters.experts_trained // 2


def test_a_run_goes_on_to_the_bit(runs):
    first, _, _ = runs
    assert first["to the bit"]["adapter"] == first["divided"]["adapter"]


@pytest.mark.parametrize("resumed", ["from one", "to one"])
def test_a_run_goes_on_with_its_experts_on_more_or_fewer_ranks(runs, resumed):
    first, _, folder = runs
    assert_alike(first[resumed], first["one"])
    assert apart(adapter_of(folder / resumed), adapter_of(folder / "one")) <= CLOSE


def test_experts_in_nf4_are_divided_with_the_numbers_that_they_have_together(tmp_path, tiny):
    base = str(make_base(tmp_path / "base", "qwen3_moe", tied=True))
    start = Cell(base, "", steps=2, save_steps=2, train=TRAIN | {"eval_steps": 2}, quantization="nf4")
    one = run_ranks(run_cells, 1, [start.under("ddp", tmp_path / "one")], str(tiny))[0][0]
    divided = replace(start, expert_parallel=2).under("ddp", tmp_path / "two")
    first, second = (cells[0] for cells in run_ranks(run_cells, 2, [divided], str(tiny)))
    assert_alike(first, one)
    assert apart(adapter_of(tmp_path / "two"), adapter_of(tmp_path / "one")) <= CLOSE
    experts = count_parameters(divided.config, base).experts
    for rank in (first, second):
        assert "Params4bit" in rank["held"]["kinds"]
        assert one["held"]["base_bytes"] - rank["held"]["base_bytes"] == experts / 2 / 2


def test_two_teams_train_what_one_rank_does(tmp_path, tiny):
    """Micro-batches of one row: some ranks have none in the last round. Only experts have LoRA."""
    base = str(make_base(tmp_path / "base", "qwen3_moe", tied=True))
    lora = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    train = TRAIN | {"global_batch_size": 6, "per_device_train_batch_size": 1, "gradient_checkpointing": True}
    start = Cell(base, "", steps=3, save_steps=3, train=train, lora=lora)
    one = run_ranks(run_cells, 1, [start.under("ddp", tmp_path / "one")], str(tiny))[0][0]
    cell = replace(start, expert_parallel=2).under("ddp", tmp_path / "four")
    ranks = run_ranks(run_cells, 4, [cell], str(tiny))
    assert_alike(ranks[0][0], one)
    assert apart(adapter_of(tmp_path / "four"), adapter_of(tmp_path / "one")) <= CLOSE


# ---- refusals


def config_of(size: int) -> Config:
    return Config(
        run_dir="unused",
        model=Model(name_or_path="my-qwen"),
        data=Data(train="unused"),
        strategy=Strategy(expert_parallel=size),
    )


def base_of(kind: str, **sizes: int):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, num_hidden_layers=2, **sizes))


def test_experts_that_ranks_cannot_share_equally_are_refused():
    base = base_of("qwen3_moe", num_experts=12)
    check(config_of(4), base)
    with pytest.raises(ValueError, match="no multiple of 8") as refusal:
        check(config_of(8), base)
    assert str(refusal.value) == (
        "strategy.expert_parallel=8 with model.name_or_path=my-qwen: its 12 experts are no multiple of 8; set"
        " it to one of 1, 2, 3, 4, 6, 12"
    )


@pytest.mark.parametrize(
    ("base", "why"),
    [
        (("qwen3", {}), "it has no experts"),
        (
            ("qwen3_moe", {"moe_intermediate_size": 12}),
            r"its experts \(model\.layers\.0\.mlp\.experts\.gate_up",
        ),
    ],
)
def test_a_base_without_experts_that_are_known_is_refused(base, why):
    kind, sizes = base
    with pytest.raises(ValueError, match=why):
        check(config_of(2), base_of(kind, **sizes))
