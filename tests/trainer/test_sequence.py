"""Ranks that share sequences compute what one process does: losses, gradients, evaluations, adapters."""

import json

import numpy as np
import pytest
import torch
from made import side_of
from ranks import run_ranks
from sharing import Sharing, make_base, run_all
from transformers import MistralConfig, Qwen2Config, Qwen3Config, Qwen3NextConfig

from qwenlora.configs.schema import Config, Data, Launch, Model, Strategy
from qwenlora.data.order import accumulation_steps
from qwenlora.trainer.loop.batches import collate, collate_packs, seed_micro_batch
from qwenlora.trainer.model.loading import IGNORED
from qwenlora.trainer.prepare import packs_rows
from qwenlora.trainer.spread.sequence import Team, check, share_attention

CLOSE, CLOSE_GRADIENT = 1e-5, 1e-6


def config_of(size: int, attention: str = "sdpa", packing: str = "auto") -> Config:
    return Config(
        run_dir="unused",
        model=Model(name_or_path="my-qwen", attn_implementation=attention),
        data=Data(train="unused", packing=packing),
        strategy=Strategy(sequence_parallel=size),
        launch=Launch(),
    )


def furthest(one: dict, other: dict) -> float:
    """Return the largest difference of two dicts of numbers or arrays with the same keys."""
    assert one.keys() == other.keys()
    assert one
    return max(float(np.abs(np.asarray(one[key]) - np.asarray(other[key])).max()) for key in one)


def assert_same_run(one: dict, other: dict) -> None:
    apart = {what: furthest(one[what], other[what]) for what in ("losses", "eval", "adapter", "gradients")}
    print(", ".join(f"{what} {value:.1e}" for what, value in apart.items()))
    assert max(apart["losses"], apart["eval"], apart["adapter"]) < CLOSE
    assert max(np.abs(gradient).max() for gradient in one["gradients"].values()) > 1e3 * CLOSE_GRADIENT
    assert apart["gradients"] < CLOSE_GRADIENT
    assert one["tokens"] == other["tokens"], "metrics count each token once"


# ---- slices


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("rows", [[0, 1, 2], [3], []])
def test_slices_of_a_batch_side_by_side_are_the_batch(size, rows):
    side = side_of(4)
    batch = collate([side.row(number) for number in rows], pad_id=7)
    slices = [Team(size, place).cut(batch, 7) for place in range(size)]
    assert len({piece["input_ids"].shape for piece in slices}) == 1, "collectives want equal parts"
    whole = {name: torch.cat([piece[name] for piece in slices], 1) for name in slices[0]}
    length = batch["input_ids"].shape[1]
    assert "attention_mask" not in whole
    assert torch.equal(whole["input_ids"][:, :length], batch["input_ids"])
    assert (whole["input_ids"][:, length:] == 7).all()
    assert torch.equal(whole["shift_labels"][:, : length - 1], batch["labels"][:, 1:])
    assert (whole["shift_labels"][:, length - 1 :] == IGNORED).all()
    assert torch.equal(whole["labels"], whole["shift_labels"])
    assert (whole["position_ids"] == torch.arange(whole["input_ids"].shape[1])).all()


def test_a_rank_by_itself_gets_the_batch_as_it_is():
    batch = collate([side_of(1).row(0)], pad_id=7)
    assert Team().cut(batch, 7) is batch


def test_slices_of_packs_know_all_positions():
    side = side_of(3)
    packs = collate_packs([[side.row(number) for number in range(3)]], pad_id=7)
    length = packs["input_ids"].shape[1]
    slices = [Team(4, place).cut(packs, 7) for place in range(4)]
    for piece in slices:
        positions = torch.cat([other["position_ids"] for other in slices], 1)
        assert torch.equal(piece["whole_position_ids"], positions)
        assert torch.equal(piece["whole_position_ids"][:, :length], packs["position_ids"])
        assert (piece["whole_position_ids"][:, length:] == 0).all(), "padding is rows of one token"


def test_slices_of_a_micro_batch_have_dropout_of_their_own():
    def drawn(*place: int) -> list[float]:
        seed_micro_batch(42, 3, 1, *place)
        return torch.rand(4).tolist()

    assert drawn(1) != drawn(2) != drawn(0)
    assert drawn(0) == drawn(), "with nothing shared, as ever"


# ---- refusals


def test_heads_that_the_ranks_cannot_share_equally_are_refused():
    with pytest.raises(ValueError, match="heads") as refusal:
        check(config_of(4), Qwen2Config(num_attention_heads=14, num_key_value_heads=2))
    assert str(refusal.value) == (
        "strategy.sequence_parallel=4 with model.name_or_path=my-qwen: its 14 attention heads are no multiple"
        " of 4; set it to one of 1, 2, 7, 14"
    )
    check(config_of(7), Qwen2Config(num_attention_heads=14, num_key_value_heads=2))
    check(config_of(1), Qwen2Config(num_attention_heads=13, num_key_value_heads=13))


def test_layers_without_full_attention_are_refused():
    with pytest.raises(
        ValueError,
        match=r"it has layers of linear_attention, whose state runs .*; set strategy\.sequence_parallel: 1",
    ):
        check(config_of(2), Qwen3NextConfig())
    sliding = Qwen2Config(
        use_sliding_window=True, sliding_window=64, max_window_layers=1, num_hidden_layers=2
    )
    with pytest.raises(
        ValueError, match=r"sliding_attention, .*; set model\.attn_implementation: flash_attention_2"
    ):
        check(config_of(2), sliding)
    check(config_of(2, "flash_attention_2"), sliding)
    with pytest.raises(ValueError, match="it has layers of sliding_attention"):
        check(config_of(2), MistralConfig(sliding_window=64))  # which has no layer_types
    dynamic = Qwen3Config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6})
    with pytest.raises(ValueError, match="its rope_type is dynamic, which depends on a sequence's length"):
        check(config_of(2), dynamic)


def test_a_model_with_an_attention_of_its_own_is_refused():
    with pytest.raises(ValueError, match="Linear has an attention of its own"):
        share_attention(torch.nn.Linear(2, 2), Team(2))


def test_processes_that_make_no_teams_are_refused():
    with pytest.raises(ValueError, match="processes") as refusal:
        accumulation_steps(16, 1, 6, 4)
    assert str(refusal.value) == (
        "strategy.sequence_parallel=4 does not divide the number of processes, 6; set it to one of 1, 2, 3,"
        " 6, or change launch.nproc_per_node"
    )
    with pytest.raises(ValueError, match="3 micro-batches .* fewer than 8 processes / 2 a sequence"):
        accumulation_steps(12, 4, 8, 2)
    assert accumulation_steps(24, 4, 8, 2) == accumulation_steps(32, 4, 8, 2) == 2


def test_packing_is_left_to_flash_attention(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [
        packs_rows(config_of(size, kernel)) for size in (1, 2) for kernel in ("sdpa", "flash_attention_2")
    ] == [True, True, False, True]


# ---- real ranks

HEADS = {"few-kv": (4, 8, 1), "odd-kv": (2, 6, 3)}  # ranks that share a sequence, heads, KV heads


STRATEGIES = ("zero2", "zero3", "fsdp")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tiny):
    """Return what each rank did, by the number of ranks and the name of the run."""
    folder = tmp_path_factory.mktemp("sharing")
    bases = {kind: make_base(folder / "bases" / kind, kind) for kind in ("qwen2", "qwen3")}
    bases |= {
        name: make_base(folder / "bases" / name, "qwen3", *heads) for name, (_, *heads) in HEADS.items()
    }

    def run(name: str, count: int, size: int = 1, base: str = "", **more) -> Sharing:
        more = {"steps": 4, "recompute": size > 1} if name in HEADS else more
        more = {"steps": 4} | more if name == "qwen2" else more  # qwen3 goes on into a second epoch
        return Sharing(bases[base or name], str(folder / f"{name}-{count}"), size, **more)

    # an epoch has 7 steps
    saved = {kind: str(folder / f"{kind}-2" / "checkpoint-4") for kind in ("qwen3", "dropout")}
    two = {name: run(name, 2, 2) for name in ("qwen2", "qwen3", "odd-kv")}
    two |= {name: run(name, 2, 2, "qwen3", strategy=name, steps=4) for name in STRATEGIES}
    two["dropout"] = run("dropout", 2, 2, "qwen3", dropout=0.1)
    two["dropout-again"] = run("dropout-again", 2, 2, "qwen3", dropout=0.1, resume=saved["dropout"])
    four = {"qwen3": run("qwen3", 4, 2), "few-kv": run("few-kv", 4, 4)}
    four["2-kv-4-ranks"] = run("2-kv-4-ranks", 4, 4, "qwen3")
    results = {2: run_ranks(run_all, 2, two, str(tiny), bases["qwen3"])}
    alone = {name: run(name, 1) for name in bases} | {"short": run("short", 1, 1, "qwen3", steps=4)}
    alone |= {"alone": run("alone", 1, 1, "qwen3", resume=saved["qwen3"])}
    results[1] = run_ranks(run_all, 1, alone, str(tiny))
    results[4] = run_ranks(run_all, 4, four, str(tiny))
    return results


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps"), [("qwen2", 4), ("qwen3", 8)])
def test_2_ranks_and_2_teams_of_2_train_as_one_process(ranks, kind, steps):
    one = ranks[1][0][kind]
    assert (len(one["losses"]), len(one["eval"])) == (steps, steps // 4)
    for rank in ranks[2] + ranks[4] * (kind == "qwen3"):
        assert_same_run(one, rank[kind])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "name", "alone"),
    [(4, "2-kv-4-ranks", "qwen3"), (4, "few-kv", "few-kv"), (2, "odd-kv", "odd-kv")],
)
def test_kv_heads_that_are_too_few_or_no_multiple_are_repeated(ranks, count, name, alone):
    for rank in ranks[count]:
        assert_same_run(ranks[1][0][alone], rank[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_sequences_are_shared_under_any_strategy(ranks, name):
    one = ranks[1][0]["short"]
    for rank in ranks[2]:
        apart = {what: furthest(one[what], rank[name][what]) for what in ("losses", "eval", "adapter")}
        print(name, apart)
        assert max(apart.values()) < CLOSE
        assert rank[name]["norms"] == pytest.approx(one["norms"], rel=1e-4)


@pytest.mark.slow
def test_a_resume_in_mid_epoch_is_bit_identical(ranks):
    for rank in ranks[2]:
        whole, resumed = rank["dropout"], rank["dropout-again"]
        assert resumed["losses"] == {step: loss for step, loss in whole["losses"].items() if step > 4}
        assert furthest(whole["adapter"], resumed["adapter"]) == 0
        assert furthest(rank["qwen3"]["losses"], rank["dropout"]["losses"]) > CLOSE


@pytest.mark.slow
def test_one_process_goes_on_from_what_two_ranks_shared(ranks):
    shared, alone = ranks[2][0]["qwen3"], ranks[1][0]["alone"]
    assert furthest({step: shared["losses"][step] for step in range(5, 9)}, alone["losses"]) < CLOSE
    assert furthest(shared["adapter"], alone["adapter"]) < CLOSE


@pytest.mark.slow
def test_rows_of_a_pack_stay_apart_for_a_kernel_that_goes_by_positions(ranks):
    for rank in ranks[2]:
        alone, shared, apart = rank["packs"]
        assert shared == pytest.approx(alone, abs=CLOSE)
        assert apart < CLOSE


@pytest.mark.slow
def test_a_broken_micro_batch_is_named_once_by_its_number(ranks):
    assert [rank["broken"] for rank in ranks[2]] == [[1]] * 2
    assert [rank["broken"] for rank in ranks[4]] == [[3]] * 4


@pytest.mark.slow
def test_the_command_shares_sequences(qwenlora, tmp_path):
    (tmp_path / "my.yaml").write_text(
        "model: {name_or_path: tiny}\n"
        "data: {train: example, eval: example}\n"
        "train: {global_batch_size: 16, per_device_train_batch_size: 4, max_steps: 4, learning_rate: 1e-3,\n"
        "        warmup_steps: 1, eval_strategy: steps, eval_steps: 2, save_strategy: 'no'}\n"
        "log: {logging_steps: 1, wandb: off}\n"
    )
    lines = []
    for name, *settings in (("one",), ("two", "--nproc", "2", "strategy.sequence_parallel=2")):
        answer = qwenlora("train", "my.yaml", f"run_dir={name}", *settings)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        lines.append(
            [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        )
    assert "2 processes / 2 a sequence x 4 x 4 accumulated" in " ".join(answer.stdout.split())
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for one, two in zip(*lines, strict=True):
        for key in {"loss", "eval_loss", "grad_norm", "learning_rate"} & one.keys():
            assert two[key] == pytest.approx(one[key], abs=CLOSE if key != "grad_norm" else 1e-3), (
                one["step"],
                key,
            )


@pytest.mark.slow
def test_the_command_refuses_what_cannot_be_shared(qwenlora, tmp_path):
    (tmp_path / "my.yaml").write_text(
        "model: {name_or_path: tiny}\ndata: {train: example}\ntrain: {global_batch_size: 18}\nlog: {wandb:"
        " off}\n"
    )
    answer = qwenlora("train", "my.yaml", "--nproc", "3", "strategy.sequence_parallel=3")
    assert answer.returncode == 2, answer.stdout + answer.stderr
    output = " ".join((answer.stdout + answer.stderr).split())
    assert "its 8 attention heads are no multiple of 3; set it to one of 1, 2, 4, 8" in output
    answer = qwenlora("train", "my.yaml", "--nproc", "3", "strategy.sequence_parallel=2")
    assert answer.returncode == 2
    assert "strategy.sequence_parallel=2" in answer.stdout + answer.stderr


def test_a_dry_run_says_how_many_share_a_sequence(qwenlora, tmp_path):
    (tmp_path / "my.yaml").write_text(
        "model: {name_or_path: tiny}\ndata: {train: example}\nlog: {wandb: off}\n"
    )
    answer = qwenlora("train", "my.yaml", "--nproc", "4", "strategy.sequence_parallel=2", "--dry-run")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "# global batch        16 rows = 4 processes / 2 a sequence x 1 x 8 accumulated\n" in answer.stdout
