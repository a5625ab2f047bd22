"""A step takes what docs/planning.md says: by hand, from the data sheet's numbers and published shapes."""

import numpy as np
import pytest
from planned import case_of

from qwenlora.configs.estimate import NF4
from qwenlora.plan.flops import flops
from qwenlora.plan.speed import EAGER, FUSED, sent, step_time

FLOPS, BANDWIDTH = 0.7 * 0.8 * 989e12, 0.7 * 3.35e12  # of an H100, as published runs reach them
TOKENS, ROW = 2048, 500  # of a pack; of the case's rows
H, KV, WIDE, LAYERS = 3584, 512, 18_944, 28  # Qwen2.5-7B
KEPT = 4 * H + 2 * KV + 2 * WIDE


def dense(**more):
    return case_of("Qwen/Qwen2.5-7B", "h100", gpus_per_node=8, **more)


def useful(case):
    return TOKENS / ROW * flops(case.parameters.work, np.array([ROW]), 200)


def test_a_micro_batch_computes_useful_operations_and_moves_activations_and_the_base():
    case = dense()
    took = step_time(case, "ddp", "global", 0)
    assert took.products == pytest.approx(useful(case) / FLOPS, rel=1e-6)
    moved = 2 * 13 * TOKENS * LAYERS * KEPT + 2 * 2 * case.parameters.total
    assert took.traffic == pytest.approx(moved / BANDWIDTH, rel=1e-6)
    assert took.gathering == 0
    assert took.launches == pytest.approx(LAYERS * 1.7e-3)
    assert took.micro_batches == 8
    assert took.micro_batch == took.products + took.traffic
    assert took.seconds == pytest.approx(8 * took.micro_batch + took.reducing)
    assert took.reducing == pytest.approx(2 * 4 * case.parameters.trainable * 7 / 8 / (0.8 * 450e9))


def test_layers_that_are_computed_again_cost_a_forward_pass():
    case = dense()
    took, again = step_time(case, "ddp", "global", 0), step_time(case, "ddp", "global", LAYERS)
    work = case.parameters.work
    pairs = sum(width * ROW * (ROW + 1) / 2 for width in work.attention.values())
    forward = 2 * TOKENS * (work.frozen + work.trained) + TOKENS / ROW * 4 * pairs
    assert again.products - took.products == pytest.approx(forward / FLOPS, rel=1e-6)
    moved = 2 * 13 / 3 * TOKENS * LAYERS * KEPT + 2 * case.parameters.total
    assert again.traffic - took.traffic == pytest.approx(moved / BANDWIDTH, rel=1e-6)
    assert again.launches == pytest.approx(took.launches * 4 / 3)


def test_products_of_experts_are_as_many_times_slower():
    case = case_of("Qwen/Qwen3-30B-A3B", "h100", gpus_per_node=8)
    experts = 48 * 3 * 2048 * 768 * 8  # that a token meets: 8 of 128
    trained = 48 * 16 * (2 * 768 + 2048 + 768 + 2048) * 8
    slower = (1 / 0.12 - 1) * TOKENS * (4 * experts + 6 * trained)
    for recomputed, more in ((0, 1), (48, 1.5)):
        took = step_time(case, "ddp", "global", recomputed)
        plain = step_time(
            case._replace(parameters=case.parameters.model_copy(update={"kinds": {}})),
            "ddp",
            "global",
            recomputed,
        )
        assert took.products - plain.products == pytest.approx(more * slower / FLOPS, rel=1e-6)


def test_weights_of_4_bits_are_made_16_bits_in_each_pass():
    case = dense(strategy={"quantization": "nf4"})
    parameters = case.parameters
    base = NF4 * parameters.body + 2 * (parameters.total - parameters.body)
    moved = 2 * 13 * TOKENS * LAYERS * KEPT + 2 * (base + 4.5 * parameters.body)
    assert step_time(case, "ddp", "global", 0).traffic == pytest.approx(moved / BANDWIDTH, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "group", "sharing", "link"),
    [
        ("fsdp", "global", 16, 50e9),
        ("fsdp", "node", 8, 450e9),
        ("zero3", "global", 16, 50e9),
        ("ddp", "global", 1, 50e9),
    ],
)
def test_a_base_in_parts_is_gathered_twice_over_its_slowest_link(name, group, sharing, link):
    case = dense(nodes=2)
    gathered = 2 * 2 * case.parameters.total * (sharing - 1) / sharing
    assert sent(case, name, group).gathered == pytest.approx(gathered, rel=1e-6)
    assert sent(case, name, group).reduced == pytest.approx(8 * case.parameters.trainable * 15 / 16)
    took = step_time(case, name, group, 0)
    assert took.gathering == pytest.approx(gathered / (0.8 * link), rel=1e-6)
    assert took.reducing == pytest.approx(8 * case.parameters.trainable * 15 / 16 / (0.8 * 50e9))
    alone = took.micro_batches * max(took.products + took.traffic, took.launches)
    assert took.efficiency == pytest.approx(alone / took.seconds)


@pytest.mark.parametrize("recomputed", [0, 48])
def test_tokens_go_to_experts_on_other_gpus_and_back_in_each_pass(recomputed):
    case = case_of("Qwen/Qwen3-30B-A3B", "h100", gpus_per_node=8, nodes=2, strategy={"expert_parallel": 8})
    reached = 8 * (1 - (7 / 8) ** 8)  # GPUs that have one of a token's 8 experts
    rows = TOKENS * reached * 7 / 8 * (4 + 2 * recomputed // 48)
    moved, took = sent(case, "ddp", "global", recomputed), step_time(case, "ddp", "global", recomputed)
    assert moved.exchanged == pytest.approx(rows * 48 * 2048 * 2, rel=1e-6)
    assert took.exchanging == pytest.approx(moved.exchanged / (0.8 * 450e9))
    assert took.micro_batch == pytest.approx(took.products + took.traffic + took.exchanging)
    assert took.efficiency < 0.96
    dense = case.parameters.trainable - case.parameters.experts_trained
    # the same experts are on one GPU of each node
    reduced = 8 * dense * 15 / 16 + 8 * case.parameters.experts_trained / 8 * 1 / 2
    assert moved.reduced == pytest.approx(reduced, rel=1e-6)


def test_peft_s_layers_are_those_of_zero3_and_dora():
    def layers(name, **lora):
        case = dense(lora=lora)
        return step_time(case, name, "global", 0).launches / LAYERS

    assert layers("ddp") == pytest.approx(FUSED.launch_s)
    assert layers("zero3") == layers("ddp", use_dora=True) == pytest.approx(EAGER.launch_s)


def test_rows_that_are_not_packed_count_their_mean_and_gpus_that_share_them_a_part():
    rows = {
        "data": {"train": "example", "packing": "off"},
        "train": {"global_batch_size": 64, "per_device_train_batch_size": 4},
    }
    assert dense(**rows).tokens == 4 * ROW
    assert dense(**rows, strategy={"sequence_parallel": 2}).tokens == 2 * ROW
    assert dense().tokens == TOKENS
