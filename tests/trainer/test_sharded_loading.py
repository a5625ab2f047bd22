"""A sharded base: each rank reads and holds its shard, and together they compute what the whole model
does."""

import json

import pytest
import torch
from parts import (
    config_of,
    in_turn,
    make_base,
    part_of_fsdp,
    part_of_zero3,
    read_in_two,
    rename,
    tensors_in,
    turns,
    untie,
)
from ranks import run_ranks
from safetensors.torch import save_file

from qwenlora.trainer.model import base_files
from qwenlora.trainer.model.base_files import BaseFiles
from qwenlora.trainer.spread import sharded_loading
from qwenlora.trainer.spread.sharded_loading import skeleton, weights_of


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: make_base(folder / kind, kind) for kind in ("qwen2", "qwen3", "moe")}


def assert_read_once(ranks, base):
    """Of each tensor the ranks read ranges that follow one another, from its first element to its last."""
    tensors = tensors_in(base)
    assert sum(rank["bytes"] for rank in ranks) == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        ranges = sorted(
            (start, stop) for rank in ranks for read, start, stop in rank["reads"] if read == name
        )
        assert [0, *(stop for _, stop in ranges)] == [*(start for start, _ in ranges), tensor.numel()]
    assert max(rank["bytes"] for rank in ranks) < 1.1 * sum(rank["bytes"] for rank in ranks) / len(ranks)


def assert_same_tensors(whole, base, dtype=torch.float32):
    files = tensors_in(base)
    assert set(whole) == set(files)
    for name, tensor in whole.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, files[name].to(dtype)), name


def test_a_range_of_a_tensor_costs_only_its_bytes(bases):
    files = BaseFiles(str(bases["qwen3"]))
    with files:
        for name, tensor in tensors_in(bases["qwen3"]).items():
            middle = tensor.numel() // 2
            assert torch.equal(files.read(name, middle - 3, middle), tensor.flatten()[middle - 3 : middle])
        assert files.bytes_read == 3 * 4 * len(files.places)
        assert files.read("lm_head.weight", 5, 5).numel() == 0
        assert files.size == sum(tensor.nbytes for tensor in tensors_in(bases["qwen3"]).values())


def test_a_range_is_converted_on_its_way(monkeypatch, bases):
    monkeypatch.setattr(base_files, "SLICE", 100)
    with BaseFiles(str(bases["qwen3"])) as files:
        values = torch.empty(7, 37, dtype=torch.bfloat16)
        files.copy("lm_head.weight", 11, values)
        files.copy("model.norm.weight", 0, short := torch.empty(5, dtype=torch.float64))
    tensors = tensors_in(bases["qwen3"])
    assert torch.equal(values.flatten(), tensors["lm_head.weight"].flatten()[11 : 11 + 7 * 37].bfloat16())
    assert torch.equal(short, tensors["model.norm.weight"][:5].double())
    assert files.bytes_read == 4 * (7 * 37 + 5)


def test_a_file_that_is_cut_short_is_named(tmp_path):
    base = make_base(tmp_path / "base", "qwen3")
    last = max((place for place in BaseFiles(str(base)).places.items()), key=lambda p: p[1].offset)
    name, place = last
    place.file.write_bytes(place.file.read_bytes()[:-2])
    with (
        BaseFiles(str(base)) as files,
        pytest.raises(ValueError, match=f"{place.file.name} is cut short: {name}"),
    ):
        files.read(name, 0, torch.Size(place.shape).numel())


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_skeleton_has_no_weights_but_real_buffers_and_ties(bases, kind):
    from transformers import AutoModelForCausalLM

    model = skeleton(config_of(bases[kind]), str(bases[kind]))
    whole = AutoModelForCausalLM.from_pretrained(bases[kind])
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert [(n, p.shape, p.dtype) for n, p in model.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in whole.named_parameters()
    ]
    ours, theirs = dict(model.named_buffers()), dict(whole.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert model.name_or_path == whole.name_or_path
    assert (model.training, model.config._attn_implementation) == (False, "sdpa")


def run_in_turn(function, count, calls) -> dict:
    """Return by name of a call what each rank returned."""
    results = run_ranks(in_turn, count, function, list(calls.values()))
    return {name: [rank[number] for rank in results] for number, name in enumerate(calls)}


@pytest.fixture(scope="module")
def fsdp(bases):
    copied = {"modules_to_save": ["embed_tokens"]}
    calls = {kind: (bases[kind], (2,)) for kind in ("qwen2", "qwen3")}
    return run_in_turn(part_of_fsdp, 2, calls | {"copied": (bases["qwen2"], (2,), copied)})


@pytest.fixture(scope="module")
def zero3(bases):
    return run_in_turn(part_of_zero3, 2, {kind: (bases[kind], {}) for kind in ("qwen2", "qwen3")})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_fsdp_ranks_read_hold_and_compute_their_shards(bases, fsdp, kind):
    ranks = fsdp[kind]
    assert_read_once(ranks, bases[kind])
    assert_same_tensors(ranks[0]["whole"], bases[kind])
    size = sum(tensor.nbytes for tensor in tensors_in(bases[kind]).values())
    for rank in ranks:
        assert rank["tied"] is (kind == "qwen2")
        assert rank["frozen"]
        assert rank["held"] < 0.51 * size
        assert rank["held after"] < 0.51 * size  # after evaluation and a backward pass
        assert rank["loss differs"] < 1e-6
        assert rank["gradient"] > 0.1
        assert rank["gradient differs"] < 1e-5 * rank["gradient"]
        assert rank["adapter"] == rank["plain adapter"]
        assert rank["adapter"]
        assert all(torch.equal(rank["buffers"][name], value) for name, value in rank["plain buffers"].items())


@pytest.mark.slow
def test_each_replica_of_fsdp_reads_the_base_once(bases):
    ranks = run_ranks(part_of_fsdp, 4, bases["qwen2"], (2, 2))
    assert_read_once(ranks[:2], bases["qwen2"])
    assert_read_once(ranks[2:], bases["qwen2"])
    assert_same_tensors(ranks[0]["whole"], bases["qwen2"])
    assert all(rank["loss differs"] < 1e-6 and rank["adapter"] == rank["plain adapter"] for rank in ranks)


@pytest.mark.slow
def test_a_tensor_may_have_fewer_rows_than_fsdp_has_ranks(bases):
    ranks = run_ranks(part_of_fsdp, 3, bases["qwen3"], (3,), None, "bfloat16")
    assert_same_tensors(ranks[0]["whole"], bases["qwen3"], torch.bfloat16)
    assert all(rank["loss differs"] < 1e-6 for rank in ranks)


@pytest.mark.slow
def test_fsdp_leaves_whole_what_peft_copies(bases, fsdp):
    ranks = fsdp["copied"]
    assert_same_tensors(ranks[0]["whole"], bases["qwen2"])
    assert all(rank["loss differs"] < 1e-6 for rank in ranks)
    assert all(rank["gradient differs"] < 1e-5 * rank["gradient"] for rank in ranks)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_zero3_ranks_read_hold_and_compute_their_shards(bases, zero3, kind):
    assert_zero3(zero3[kind], bases[kind])
    assert not any(any(rank["secondary"]) for rank in zero3[kind])


@pytest.mark.slow
@pytest.mark.long
def test_zero3_keeps_a_second_copy_within_a_node_that_is_right(bases):
    ranks = run_ranks(part_of_zero3, 4, bases["qwen2"], {"zero_hpz_partition_size": 2})
    assert_zero3(ranks, bases["qwen2"])
    assert all(all(rank["secondary"]) for rank in ranks)


def assert_zero3(ranks, base):
    assert_read_once(ranks, base)
    assert_same_tensors(ranks[0]["whole"], base)
    assert_same_tensors(ranks[0]["whole again"], base)
    size = sum(tensor.nbytes for tensor in tensors_in(base).values())
    for rank in ranks:
        assert rank["sent"] == 0
        assert rank["held"] < 1.02 * size / len(ranks)
        assert rank["tied"] is ("lm_head.weight" not in ranks[0]["whole"])
        assert torch.equal(rank["adapter"], ranks[0]["adapter"])
        assert rank["losses"][0] == pytest.approx(rank["plain loss"], abs=1e-6)
        assert rank["losses"][2] < rank["losses"][1] < rank["losses"][0]


@pytest.mark.slow
def test_a_base_that_cannot_be_read_by_ranges_is_loaded_whole_by_one_rank_at_a_time(tmp_path, bases):
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "pickled", "qwen3")
    expected = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    rename(base)
    ranks = run_ranks(turns, 2, base)
    assert ranks[0]["times"][1] < ranks[1]["times"][0]
    size = sum(p.nbytes for p in expected.values())
    for rank in ranks:
        assert rank["held"] < 0.51 * size
        assert all(torch.equal(rank["whole"][key], value) for key, value in expected.items())


@pytest.mark.parametrize("layout", ["", "language_model."])
def test_experts_and_text_models_of_models_that_see_are_read_by_ranges(tmp_path, bases, layout):
    """The files have a matrix for each expert, and a text model within another has longer names."""
    from transformers import AutoModelForCausalLM

    expected = dict(AutoModelForCausalLM.from_pretrained(bases["moe"]).named_parameters())
    tensors = {
        name.replace("model.", f"model.{layout}", 1): t for name, t in tensors_in(bases["moe"]).items()
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with BaseFiles(str(tmp_path)) as files:
        for weight in weights_of(skeleton(config_of(bases["moe"]), str(bases["moe"]))):
            whole = read_in_two(files, weight)
            assert torch.equal(whole, expected[weight.names[0]].flatten()), weight.names
        assert files.bytes_read == sum(tensor.nbytes for tensor in tensors.values())
    del tensors[f"model.{layout}layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with BaseFiles(str(tmp_path)) as files:
        missing = [
            w
            for w in weights_of(skeleton(config_of(bases["moe"]), str(bases["moe"])))
            if not sharded_loading._source_of(files, w)
        ]
    assert [w.names for w in missing] == [["model.layers.1.mlp.experts.gate_up_proj"]]


@pytest.mark.slow
def test_a_head_of_its_own_is_used_whatever_the_config_says(tmp_path):
    base = make_base(tmp_path / "base", "qwen2")
    untie(base)
    (rank,) = run_ranks(turns, 1, base)
    held = tensors_in(base)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(rank["whole"][name], held[name])


@pytest.mark.slow
def test_what_cannot_be_sharded_is_refused(tmp_path):
    base = make_base(tmp_path / "base", "qwen2")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="is quantised in its files"):
        skeleton(config_of(base), str(base))
