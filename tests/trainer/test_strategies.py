"""Every strategy gives the numbers of one process, and shards what its name says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made import HYBRIDS
from peft import PeftModel
from ranks import run_ranks
from safetensors.torch import load_file
from spread import STEPS, Cell, make_base, run_cells
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow
CLOSE = 1e-5
NAMES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
BASES = [
    ("qwen3", True),
    pytest.param(("qwen2", False), marks=pytest.mark.long),
    pytest.param(("qwen2", True), marks=pytest.mark.long),
    pytest.param(("qwen3", False), marks=pytest.mark.long),
]
FEWER = ("ddp", "zero2", "zero3", "fsdp")  # without zero1, which is zero2's code in DeepSpeed


def logits_of(base: str, adapter: Path) -> torch.Tensor:
    """Return what plain peft makes of an adapter."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    )
    ids = torch.arange(300, 364).view(2, 32)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def assert_close(one: dict, other: dict, *, at: float = CLOSE) -> None:
    assert one["losses"].keys() == other["losses"].keys()
    assert one["eval"].keys() == other["eval"].keys()
    for field in ("losses", "eval", "router"):
        apart = max([0.0, *(abs(one[field][step] - other[field][step]) for step in one[field])])
        assert apart <= at, f"{field} differ by {apart:.2e}"
    assert max(abs(one["norms"][step] / other["norms"][step] - 1) for step in one["norms"]) < 1e-4


def all_in_parts(folder: Path) -> str:
    """Return DeepSpeed's config without which it keeps small weights whole, and so many that are in use."""
    parts = folder / "parts.json"
    keys = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
    parts.write_text(json.dumps({"zero_optimization": {f"stage3_{key}": 0 for key in keys}}))
    return str(parts)


@pytest.fixture(scope="module")
def tokenizer(tiny) -> str:
    return str(tiny)


@pytest.fixture(scope="module", params=BASES, ids=lambda base: f"{base[0]}-{'tied' if base[1] else 'untied'}")
def matrix(request, tmp_path_factory, tokenizer):
    """Return (base, {name: what its two ranks did}, {name: folder}); `one` is a single process without any
    strategy."""
    folder = tmp_path_factory.mktemp("matrix")
    base = str(make_base(folder / "base", request.param[0], tied=request.param[1]))
    start = Cell(base, "")
    own = {"zero3": {"deepspeed_config": all_in_parts(folder)}}
    cells = [start.under(name, folder / name, **own.get(name, {})) for name in NAMES]
    one = run_ranks(run_cells, 1, [start.under("ddp", folder / "one")], tokenizer)
    two = run_ranks(run_cells, 2, cells, tokenizer)
    results = {name: [two[rank][number] for rank in range(2)] for number, name in enumerate(NAMES)}
    return base, results | {"one": [one[0][0]]}, folder


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_make_the_losses_and_the_adapter_of_one_process(matrix, name):
    base, results, folder = matrix
    one, spread = results["one"][0], results[name][0]
    assert len(one["losses"]) == STEPS
    assert one["moved"] > 0.1
    assert min(one["norms"].values()) > 0
    assert_close(spread, one)
    adapters = [load_file(folder / run / "adapter" / "adapter_model.safetensors") for run in ("one", name)]
    assert adapters[0].keys() == adapters[1].keys()
    apart = max((adapters[0][key] - adapters[1][key]).abs().max().item() for key in adapters[0])
    assert apart <= CLOSE, f"adapters differ by {apart:.2e}"
    logits = [logits_of(base, folder / run / "adapter") for run in ("one", name)]
    assert (logits[0] - logits[1]).abs().max() <= CLOSE


@pytest.mark.parametrize("name", NAMES)
def test_each_strategy_holds_what_its_name_says(matrix, name):
    _, results, _ = matrix
    one, ranks = results["one"][0]["held"], [rank["held"] for rank in results[name]]
    for held in ranks:
        share = held["base_bytes"] / one["base_bytes"]
        assert 0.4 < share < 0.6 if name in ("zero3", "fsdp") else share == 1
        state = held["optimizer_numbers"] / one["optimizer_numbers"]
        assert 0.4 < state < 0.6 if name.startswith("zero") else state == 1
    assert sum(held["optimizer_numbers"] for held in ranks) >= one["optimizer_numbers"]


@pytest.mark.long
@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_hybrid_has_the_numbers_of_padded_rows_and_resumes_to_the_bit(kind, tmp_path, tokenizer):
    """Its rows lie end to end, except in the single process that the others are compared with."""
    base = str(make_base(tmp_path / "base", kind, tied=kind != "qwen3_next"))
    start = Cell(base, "", steps=4, save_steps=2, end_to_end=True)
    one = run_ranks(
        run_cells, 1, [replace(start, end_to_end=False).under("ddp", tmp_path / "one")], tokenizer
    )[0][0]
    cells = [start.under(name, tmp_path / name) for name in NAMES]
    again = start.under("ddp", tmp_path / "again", resume=str(tmp_path / "ddp" / "checkpoint-2"))
    *results, resumed = run_ranks(run_cells, 2, [*cells, again], tokenizer)[0]
    expected = logits_of(base, tmp_path / "one" / "adapter")
    for name, result in zip(NAMES, results, strict=True):
        assert_close(result, one)
        assert (logits_of(base, tmp_path / name / "adapter") - expected).abs().max() <= CLOSE, name
    assert resumed["adapter"] == results[0]["adapter"]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Cell:
    folder = tmp_path_factory.mktemp("small")
    return Cell(str(make_base(folder / "base", "qwen3", tied=True)), "", steps=6, save_steps=3)


@pytest.mark.parametrize("policy", ["rollback", pytest.param("skip", marks=pytest.mark.long)])
def test_a_step_that_is_not_finite_is_left_out_alike_under_every_strategy(small, tmp_path, tokenizer, policy):
    cells = [small.under(name, tmp_path / name, broken=5, train={"on_nan": policy}) for name in FEWER]
    ranks = run_ranks(run_cells, 2, cells, tokenizer)
    ddp = ranks[0][0]
    assert "step 5: the loss is not finite" in ddp["warnings"][0]
    adapters = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in FEWER]
    for number, name in enumerate(FEWER):
        one = ranks[0][number]
        assert one["warnings"] == ddp["warnings"], name
        apart = max(abs(one["losses"][step] - ddp["losses"][step]) for step in one["losses"] if step != 5)
        assert apart <= CLOSE, f"{name}: {apart:.2e}"
        assert max((adapters[0][key] - adapters[number][key]).abs().max() for key in adapters[0]) <= CLOSE, (
            name
        )


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_gives_the_numbers_of_one_process(small, tmp_path, tokenizer, quantization):
    names = ["ddp", "zero2", "zero3"] if quantization == "nf4" else ["ddp", "zero2"]
    start = replace(small, quantization=quantization)
    one = run_ranks(run_cells, 1, [start.under("ddp", tmp_path / "one")], tokenizer)[0][0]
    results = run_ranks(run_cells, 2, [start.under(name, tmp_path / name) for name in names], tokenizer)
    stored = {"nf4": "Params4bit", "int8": "Int8Params"}[quantization]
    first = load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors")
    for number, name in enumerate(names):
        assert_close(results[0][number], one)
        held = results[0][number]["held"]
        assert stored in held["kinds"]
        assert {"nf4": "torch.uint8", "int8": "torch.int8"}[quantization] in held["dtypes"]
        assert held["optimizer_numbers"] < 0.6 * one["held"]["optimizer_numbers"] or name == "ddp"
        adapter = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        assert max((first[key] - adapter[key]).abs().max() for key in first) <= CLOSE, name


def test_experts_are_trained_alike(tmp_path, tokenizer):
    """With nothing of the base whole on a rank, with layers computed again in the backward pass, and with the
    auxiliary loss of the routers."""
    base = str(make_base(tmp_path / "base", "qwen3_moe", tied=True))
    experts = {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    train = {"gradient_checkpointing": True, "neftune_noise_alpha": 5.0, "router_aux_loss": 0.1}
    start = Cell(base, "", steps=3, save_steps=3, lora=experts, train=train)
    own = {"zero3": {"deepspeed_config": all_in_parts(tmp_path)}}
    names = ("ddp", "fsdp", "zero3")
    cells = [start.under(name, tmp_path / name, **own.get(name, {})) for name in names]
    whole, *in_parts = run_ranks(run_cells, 2, cells, tokenizer)[0]
    for spread in in_parts:
        assert "experts" in spread["fused"]
        assert list(spread["router"]) == [1, 2, 3]
        assert_close(spread, whole)
        assert spread["held"]["base_bytes"] < 0.6 * whole["held"]["base_bytes"]


def test_experts_in_nf4_are_trained_alike_and_resume_to_the_bit(tmp_path, tokenizer):
    base = str(make_base(tmp_path / "base", "qwen3_moe", tied=True))
    train = {"router_aux_loss": 0.1}
    start = Cell(base, "", steps=4, save_steps=2, quantization="nf4", train=train, end_to_end=True)
    one = run_ranks(run_cells, 1, [start.under("ddp", tmp_path / "one")], tokenizer)[0][0]
    own = {"zero3": {"deepspeed_config": all_in_parts(tmp_path)}}
    names = ("ddp", "zero2", "zero3")
    cells = [start.under(name, tmp_path / name, **own.get(name, {})) for name in names]
    again = [
        replace(cell, folder=f"{cell.folder} again", resume=str(Path(cell.folder) / "checkpoint-2"))
        for cell in cells
    ]
    results = run_ranks(run_cells, 2, [*cells, *again], tokenizer)[0]
    assert one["moved"] > 0.1
    for result, resumed in zip(results[:3], results[3:], strict=True):
        assert "experts" in result["fused"]
        assert "Params4bit" in result["held"]["kinds"]
        assert_close(result, one)
        assert resumed["adapter"] == result["adapter"]
        assert list(result["router"].values())[2:] == list(resumed["router"].values())
    assert results[2]["held"]["base_bytes"] < 0.6 * one["held"]["base_bytes"]


@pytest.mark.long
def test_lora_plus_is_the_same_under_every_strategy_and_over_a_resume(small, tmp_path, tokenizer):
    start = replace(small, steps=4, save_steps=2, train={"loraplus_lr_ratio": 8.0, "weight_decay": 0.1})
    one = run_ranks(run_cells, 1, [start.under("ddp", tmp_path / "one")], tokenizer)[0][0]
    again = [
        start.under(name, tmp_path / f"to {name}", resume=str(tmp_path / "ddp" / "checkpoint-2"))
        for name in NAMES
    ]
    cells = [*(start.under(name, tmp_path / name) for name in NAMES), *again]
    results = run_ranks(run_cells, 2, cells, tokenizer)[0]
    first = load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors")
    for cell, result in zip(cells, results, strict=True):
        adapter = load_file(Path(cell.folder) / "adapter" / "adapter_model.safetensors")
        assert max((first[key] - adapter[key]).abs().max() for key in first) <= CLOSE, cell.folder
        assert abs(result["losses"][4] - one["losses"][4]) <= CLOSE
    assert results[len(NAMES)]["adapter"] == results[0]["adapter"]


def test_rows_of_embeddings_are_trained_alike(small, tmp_path, tokenizer):
    start = replace(small, steps=4, save_steps=2, lora={"trainable_token_indices": [300, 301, 302, 303]})
    one = run_ranks(run_cells, 1, [start.under("ddp", tmp_path / "one")], tokenizer)[0][0]
    names = [name for name in FEWER if name != "zero3"]
    again = [
        start.under(name, tmp_path / f"to {name}", resume=str(tmp_path / "ddp" / "checkpoint-2"))
        for name in ("ddp", "fsdp")
    ]
    cells = [*(start.under(name, tmp_path / name) for name in names), *again]
    results = run_ranks(run_cells, 2, cells, tokenizer)[0]
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    first = load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors")
    before = AutoModelForCausalLM.from_pretrained(small.base).get_input_embeddings().weight[300:304]
    assert (first[rows] - before).abs().amax(1).min() > 1e-4, "each row was trained"
    for cell, result in zip(cells, results, strict=True):
        assert "tokens" in result["fused"]
        adapter = load_file(Path(cell.folder) / "adapter" / "adapter_model.safetensors")
        assert max((first[key] - adapter[key]).abs().max() for key in first) <= CLOSE, cell.folder
        assert abs(result["losses"][4] - one["losses"][4]) <= CLOSE
    assert results[len(names)]["adapter"] == results[0]["adapter"], "to the bit"


def test_what_begins_with_a_part_of_the_base_is_trained_alike(small, tmp_path, tokenizer):
    """One rank makes the beginning of a layer for all; a resume has it from the checkpoint."""
    start = replace(small, steps=4, save_steps=2, lora={"init_lora_weights": "pissa_niter_4", "r": 8})
    one = run_ranks(run_cells, 1, [start.under("ddp", tmp_path / "one")], tokenizer)[0][0]
    parts = {"deepspeed_config": all_in_parts(tmp_path)}
    ddp, fsdp = (start.under(name, tmp_path / name) for name in ("ddp", "fsdp"))
    nf4 = start.under("ddp", tmp_path / "nf4", quantization="nf4")
    zero3 = start.under("zero3", tmp_path / "zero3", **parts)
    zero3_nf4 = start.under("zero3", tmp_path / "zero3-nf4", quantization="nf4")
    again = [
        replace(cell, folder=f"{cell.folder}-again", resume=f"{cell.folder}/checkpoint-2")
        for cell in (fsdp, zero3, zero3_nf4)
    ]
    moved = start.under("zero2", tmp_path / "zero2", resume=str(tmp_path / "ddp" / "checkpoint-2"))
    cells = [ddp, fsdp, zero3, nf4, zero3_nf4, *again, moved]
    results = run_ranks(run_cells, 2, cells, tokenizer)[0]
    assert {p.shape[0] for p in lora_a(tmp_path / "one")} == {16}
    expected = logits_of(small.base, tmp_path / "one" / "adapter")
    for cell, result in zip((ddp, fsdp, zero3), results, strict=False):
        assert_close(result, one)
        assert (logits_of(small.base, Path(cell.folder) / "adapter") - expected).abs().max() <= CLOSE
    assert_close(results[4], results[3])
    resumed = [result["adapter"] for result in results[5:8]]
    assert resumed == [results[number]["adapter"] for number in (1, 2, 4)]
    assert abs(results[-1]["losses"][4] - one["losses"][4]) <= CLOSE


def lora_a(run: Path) -> list[torch.Tensor]:
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    return [tensor for name, tensor in tensors.items() if "lora_A" in name]


@pytest.mark.long
def test_eva_begins_alike_on_any_number_of_ranks(small, tmp_path, tokenizer):
    start = replace(small, steps=4, save_steps=2, lora={"init_lora_weights": "eva", "r": 8})
    one = run_ranks(run_cells, 1, [start.under("ddp", tmp_path / "one")], tokenizer)[0][0]
    ddp, fsdp = (start.under(name, tmp_path / name) for name in ("ddp", "fsdp"))
    again = start.under("ddp", tmp_path / "again", resume=str(tmp_path / "ddp" / "checkpoint-2"))
    *results, resumed = run_ranks(run_cells, 2, [ddp, fsdp, again], tokenizer)[0]
    for result in results:
        assert_close(result, one)
    assert resumed["adapter"] == results[0]["adapter"]


def test_a_base_in_bfloat16_is_trained_alike(small, tmp_path, tokenizer):
    cells = [replace(small, dtype="bfloat16").under(name, tmp_path / name) for name in FEWER]
    results = run_ranks(run_cells, 2, cells, tokenizer)[0]
    for name, one in zip(FEWER, results, strict=True):
        assert one["held"]["dtypes"] == ["torch.bfloat16"]
        apart = max(abs(one["losses"][step] - results[0]["losses"][step]) for step in one["losses"])
        # ZeRO-3 has a matrix product of its own, which keeps no weights for the way back, and rounds in other
        # places
        assert apart <= (1e-2 if name == "zero3" else CLOSE), f"{name}: {apart:.2e}"
    files = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in FEWER]
    assert all(tensor.dtype == torch.float32 for file in files for tensor in file.values())


def test_groups_of_a_node_hold_a_whole_base_each(small, tmp_path, tokenizer):
    two = {"shard_group": "node", "processes": 2}
    short = replace(small, steps=3, train={"eval_steps": 3})
    cells = [
        short.under("ddp", tmp_path / "ddp"),
        short.under("fsdp", tmp_path / "fsdp", **two),
        short.under("zero3", tmp_path / "zero3", **two),
    ]
    ddp, fsdp, zero3 = run_ranks(run_cells, 4, cells, tokenizer)[0]
    assert_close(fsdp, ddp)
    assert_close(zero3, ddp)
    assert fsdp["held"]["base_bytes"] == ddp["held"]["base_bytes"] / 2  # not a quarter


def test_offload_goes_through_deepspeed_without_a_gpu_too(small, tmp_path, tokenizer):
    short = replace(small, steps=3, train={"eval_steps": 3})
    cells = [
        short.under("ddp", tmp_path / "ddp"),
        short.under("zero2", tmp_path / "zero2", offload="optimizer"),
        short.under("zero3", tmp_path / "zero3", offload="params"),
    ]
    ddp, *others = run_ranks(run_cells, 2, cells, tokenizer)[0]
    for one in others:
        assert_close(one, ddp)


def test_what_decays_and_what_does_not_go_on_to_the_bit(small, tmp_path, tokenizer):
    """Norms make a second group of parameters, which DeepSpeed steps by itself."""
    own = {"lora": {"modules_to_save": ["norm"]}, "train": {"weight_decay": 0.1}}
    names = ("ddp", "zero2")
    cells = [small.under(name, tmp_path / name, **own) for name in names]
    again = [
        cell.under(cell.name, f"{cell.folder}-again", resume=f"{cell.folder}/checkpoint-{cell.save_steps}")
        for cell in cells
    ]
    ddp, *results = run_ranks(run_cells, 2, [*cells, *again], tokenizer)[0]
    for one in results:
        shared = {step: ddp["losses"][step] for step in one["losses"]}
        assert max(abs(one["losses"][step] - loss) for step, loss in shared.items()) <= CLOSE
    whole, *resumed = (one["adapter"] for one in results)
    assert resumed == [ddp["adapter"], whole]
    norms = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in names]
    key = next(key for key in norms[0] if key.endswith("model.norm.weight"))
    assert (norms[0][key] - 1).abs().max() > 1e-4
    assert max((norms[0][key] - one[key]).abs().max() for one in norms) <= CLOSE


@pytest.mark.long
@pytest.mark.parametrize("optim", ["lion_32bit", "sgd", "rmsprop"])
def test_other_optimizers_go_on_to_the_bit(small, tmp_path, tokenizer, optim):
    own = {"train": {"optim": optim, "learning_rate": 1e-5 if optim != "sgd" else 1e-2}}
    cells = [small.under(name, tmp_path / name, **own) for name in ("ddp", "zero2", "zero3")]
    again = [
        cell.under(cell.name, f"{cell.folder}-again", resume=f"{cell.folder}/checkpoint-{cell.save_steps}")
        for cell in cells
    ]
    results = run_ranks(run_cells, 2, [*cells, *again], tokenizer)[0]
    assert [one["adapter"] for one in results[:3]] == [one["adapter"] for one in results[3:]]
    for one in results[:3]:
        assert max(abs(one["losses"][step] - results[0]["losses"][step]) for step in one["losses"]) <= 1e-4


def test_modules_that_are_trained_whole_are_so_under_fsdp_to_the_bit(small, tmp_path, tokenizer):
    own = {"lora": {"modules_to_save": ["embed_tokens", "norm"]}}
    ddp, fsdp = (small.under(name, tmp_path / name, **own) for name in ("ddp", "fsdp"))
    again = fsdp.under("fsdp", tmp_path / "again", resume=f"{fsdp.folder}/checkpoint-{fsdp.save_steps}")
    results = run_ranks(run_cells, 2, [ddp, fsdp, again], tokenizer)[0]
    assert len({one["adapter"] for one in results}) == 1
