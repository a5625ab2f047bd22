"""What a run needs on each GPU, held against published runs; and what auto makes of it on real machines."""

import pytest
from traffic import MIXTURE, traffic

from qwenlora.configs import Config
from qwenlora.configs.combinations import Machine
from qwenlora.configs.estimate import (
    LOGITS_AT_ONCE,
    SPARE,
    MemoryNeed,
    Sizes,
    break_even,
    cut_into,
    decide,
    micro_batch,
    need,
    recomputed_layers,
    tokens_at_once,
)

MIB = 2**20
GPU24, GPU40, GPU80 = 24_564 * MIB, 40_960 * MIB, 81_559 * MIB  # RTX 4090, A100-40G, H100, as nvidia-smi says


def qwen(layers, hidden, intermediate, trainable, kv=1024, vocabulary=152_064) -> Sizes:
    """Return a Qwen2.5's sizes from its config.json; trainable: at r 16, all-linear."""
    attention = 2 * hidden * hidden + hidden + 2 * (hidden * kv + kv)
    body = layers * (attention + 3 * hidden * intermediate + 2 * hidden) + hidden
    head = hidden * vocabulary
    return Sizes(body + 2 * head, trainable, body, head, layers, hidden, intermediate, kv)


QWEN = {
    "7B": qwen(28, 3584, 18_944, 40_370_176, kv=512),
    "32B": qwen(64, 5120, 27_648, 134_217_728),
    "72B": qwen(80, 8192, 29_568, 210_534_400),
}


def config(strategy=None, train=None, **data) -> Config:
    return Config(
        run_dir="runs/x",
        model={"name_or_path": "Qwen/Qwen2.5"},
        data={"train": "example"} | data,
        train={"gradient_checkpointing": True} | (train or {}),
        strategy=strategy or {},
    )


def test_the_sizes_are_the_published_ones():
    assert [sizes.total for sizes in QWEN.values()] == [7_615_616_512, 32_763_876_352, 72_706_203_648]


def test_sizes_are_taken_from_what_the_trainer_counts():
    from types import SimpleNamespace

    counted = SimpleNamespace(**QWEN["7B"]._asdict(), work=None)
    assert Sizes.of(counted, 700) == QWEN["7B"]._replace(longest=700)


# README of QwenLM/Qwen: A100-80G, batch 1, gradient checkpointing; GB of LoRA and Q-LoRA
@pytest.mark.parametrize(
    ("length", "lora", "qlora"), [(512, 20.4, 11.5), (2048, 23.8, 13.9), (8192, 36.6, 23.5)]
)
def test_a_7b_needs_what_was_published(length, lora, qlora):
    machine = Machine(1, 1, 1, GPU80)

    def with_all_logits(found: MemoryNeed) -> float:
        return (found.total - found.logits + length * 1.74 * MIB) / 1e9

    found = need(config(max_length=length), QWEN["7B"], "ddp", machine)
    assert with_all_logits(found) == pytest.approx(lora, rel=1 / 5)
    found = need(config({"quantization": "nf4"}, max_length=length), QWEN["7B"], "ddp", machine)
    assert with_all_logits(found) == pytest.approx(qlora, rel=1 / 5)


def test_divided_experts_are_on_other_gpus_and_their_adapter_is_whole_for_a_save():
    machine, elsewhere = Machine(1, 8, 8, GPU80, True), 7 / 8
    whole = need(config(), MIXTURE, "ddp", machine)
    found = need(config({"expert_parallel": 8}), MIXTURE, "ddp", machine)
    assert whole.weights - found.weights == 2 * MIXTURE.experts * elsewhere
    assert whole.trained - found.trained == 16 * MIXTURE.experts_trained * elsewhere
    assert found.gathered == int(4 * MIXTURE.experts_trained * elsewhere) - found.activations
    # the tokens that come in, of one layer that is computed again
    came = 2048 * 2 * MIXTURE.hidden_size * 8 * (1 - (7 / 8) ** 8)
    assert found.activations - whole.activations == pytest.approx(came, abs=1)


def test_activations_are_those_of_the_formula():
    found = need(config(train={"gradient_checkpointing": False}), QWEN["7B"], "ddp", Machine(1, 1, 1))
    assert found.activations == 2048 * 28 * 104 * 1024  # 104 KiB a token and layer
    assert found.least == pytest.approx(found.total - 0.15 * found.activations - SPARE, abs=2)
    zero3 = need(config(train={"gradient_checkpointing": False}), QWEN["7B"], "zero3", Machine(1, 2, 2))
    assert zero3.activations == pytest.approx(2.3 * found.activations), "by peft's layers"


@pytest.mark.parametrize(
    ("wanted", "gb", "layers"),
    [
        (True, 80, 28),
        (False, 24, 0),
        (5, 80, 5),
        (99, 80, 28),
        ("auto", 80, 0),
        ("auto", 26, 0),
        ("auto", 22, 12),
        ("auto", 18, 28),  # even all are too few
        ("auto", 0, 0),  # its memory is unknown
    ],
)
def test_the_fewest_layers_that_fit_are_computed_again(wanted, gb, layers):
    machine = Machine(1, 1, 1, int(gb * 1e9))
    plan = config(train={"gradient_checkpointing": wanted})
    assert recomputed_layers(plan, QWEN["7B"], "ddp", machine) == layers
    assert recomputed_layers(plan, QWEN["7B"], "ddp", Machine(1, 2, 0)) == (0 if wanted == "auto" else layers)


@pytest.mark.parametrize(
    ("gb", "checkpointing", "size", "layers"),
    [
        (80, "auto", 8, 0),
        (40, "auto", 2, 0),
        (26, "auto", 1, 0),
        (22, "auto", 1, 12),
        (18, "auto", 1, 28),  # even that is too much
        (80, True, 16, 28),
        (80, False, 8, 0),
    ],
)
def test_the_micro_batch_is_the_largest_that_fits_without_more_layers_computed_again(
    gb, checkpointing, size, layers
):
    machine, sizes = Machine(1, 1, 1, int(gb * 1e9)), QWEN["7B"]
    train = {"gradient_checkpointing": checkpointing, "per_device_train_batch_size": "auto"}
    plan = config({"name": "ddp"}, train)
    found = micro_batch(
        plan, sizes, decide(plan, sizes, machine), machine, [16, 8, 4, 2, 1], machine.gpu_bytes
    )
    assert found == size
    assert recomputed_layers(cut_into(plan, found), sizes, "ddp", machine) == layers
    assert tokens_at_once(plan, sizes) == 2048, "it is decided for the smallest which strategy fits"


def test_a_layer_more_needs_less():
    """But for the last: while the first layer is computed again, no other holds anything."""
    needs = [
        need(config(train={"gradient_checkpointing": layers}), QWEN["7B"], "ddp", Machine(1, 1, 1)).total
        for layers in range(29)
    ]
    assert needs[:28] == sorted(needs[:28], reverse=True)
    assert needs[27] < needs[28] == need(config(), QWEN["7B"], "ddp", Machine(1, 1, 1)).total


def test_logits_are_those_of_a_chunk():
    sizes = QWEN["7B"]
    few = need(config(max_length=64), sizes, "ddp", Machine(1, 1, 1)).logits
    assert few == pytest.approx(64 * 1.74 * MIB, rel=1e-3)
    for length in (2048, 8192):
        assert need(config(max_length=length), sizes, "ddp", Machine(1, 1, 1)).logits == 3 * LOGITS_AT_ONCE


def test_each_strategy_holds_its_share():
    machine, sizes = Machine(2, 8, 8, GPU80), QWEN["72B"]
    trained = {
        name: need(config(), sizes, name, machine).trained
        for name in ("ddp", "zero1", "zero2", "zero3", "fsdp")
    }
    count = sizes.trainable
    assert trained == {
        "ddp": 16 * count,
        "zero1": 8 * count + 12 * count // 16,
        "zero2": 4 * count + 16 * count // 16,
        "zero3": 20 * count // 16,
        "fsdp": 16 * count,
    }
    begun = sizes._replace(begun=count)
    more = {name: need(config(), begun, name, machine).trained - trained[name] for name in trained}
    assert more == {name: 4 * count // (16 if name == "zero3" else 1) for name in trained}
    base = 2 * sizes.total
    weights = {
        (name, group): need(config(), sizes, name, machine, group).weights
        for name in ("ddp", "zero2", "zero3", "fsdp")
        for group in ("global", "node")
    }
    assert weights["ddp", "global"] == weights["zero2", "global"] == base
    assert weights["fsdp", "global"] == weights["zero3", "global"] == base // 16
    assert weights["fsdp", "node"] == base // 8
    assert weights["zero3", "node"] == base * 3 // 16  # hpZ: a second part


def test_what_is_offloaded_is_not_on_the_gpu():
    machine, sizes = Machine(1, 8, 8, GPU80), QWEN["72B"]
    assert need(config({"offload": "params"}), sizes, "fsdp", machine).weights == 0
    moved = need(config({"offload": "optimizer"}), sizes, "zero2", machine).trained
    assert moved == 4 * sizes.trainable + 4 * sizes.trainable // 8


@pytest.mark.parametrize(("optim", "state"), [("adamw_torch", 8), ("paged_adamw_8bit", 2), ("adafactor", 0)])
def test_an_optimizer_has_its_own_state(optim, state):
    machine, sizes = Machine(1, 8, 8, GPU80), QWEN["72B"]
    found = {
        name: need(config(train={"optim": optim}), sizes, name, machine).trained for name in ("ddp", "zero1")
    }
    count = sizes.trainable
    assert found == {"ddp": (8 + state) * count, "zero1": 8 * count + (4 + state) * count // 8}


def test_zero3_may_do_with_the_head_or_a_layer_at_a_time():
    """Ranks may hold 1e9 numbers gathered, and DeepSpeed lets go of them earlier."""
    found = need(config(), QWEN["72B"], "zero3", Machine(1, 8, 8, GPU24))
    assert found.least < found.total - (found.gathered - 2 * QWEN["72B"].head)


def test_kernels_for_linear_attention_may_be_where_the_job_runs():
    sizes = QWEN["7B"]._replace(linear_width=28 * 4096)
    found = need(config(train={"gradient_checkpointing": False}), sizes, "ddp", Machine(1, 1, 1, GPU80))
    assert found.least < found.total - found.activations / 2


def test_tokens_at_once_are_those_of_the_longest_row_or_pack_and_of_a_slice_of_it():
    plain, batch = QWEN["7B"], {"per_device_train_batch_size": 4}
    assert tokens_at_once(config(train=batch), plain) == 4 * 2048
    assert tokens_at_once(config(train=batch), plain._replace(longest=10**6)) == 4 * 2048
    assert tokens_at_once(config(train=batch), plain._replace(longest=700)) == 4 * 700
    shared = config({"sequence_parallel": 8}, train=batch)
    assert tokens_at_once(shared, plain._replace(longest=700)) == 4 * 700 / 8


def test_traffic_is_the_adapter_s_once_a_step_and_the_base_s_twice_a_micro_batch():
    machine, sizes = Machine(2, 8, 8, GPU80), QWEN["72B"]
    base = 2 * sizes.total
    assert traffic(config(), sizes, "ddp", machine) == (int(2 * 15 / 16 * 4 * sizes.trainable), 0)
    assert traffic(config(), sizes, "fsdp", machine).micro_batch == int(2 * 15 / 16 * base)
    assert traffic(config(), sizes, "fsdp", machine, "node").micro_batch == int(2 * 7 / 8 * base)
    assert traffic(config(), sizes, "zero3", machine, "node").micro_batch == int((7 / 8 + 15 / 16) * base)
    assert break_even(config(), sizes, 370e9) == 2_156
    assert break_even(config(), sizes, 50e9) == 15_960
    assert break_even(config({"quantization": "nf4"}), sizes, 50e9) == 3_990
    # experts are gathered, all of them, for the few that a token meets
    assert break_even(config(), MIXTURE, 50e9) == int(15_960 * MIXTURE.total / MIXTURE.active)


DECISIONS = [
    (
        "7B",
        {},
        Machine(1, 8, 8, GPU80, True),
        ("ddp", "global"),
        "ddp, the base takes 15.2 GB of each GPU's 85.5 GB",
    ),
    (
        "7B",
        {},
        Machine(1, 1, 1, GPU24, True),
        ("ddp", "global"),
        "ddp, the base takes 15.2 GB of each GPU's 25.8 GB",
    ),
    (
        "7B",
        {},
        Machine(1, 4, 4, GPU40, True),
        ("ddp", "global"),
        "ddp, the base takes 15.2 GB of each GPU's 42.9 GB",
    ),
    (
        "32B",
        {},
        Machine(1, 8, 8, GPU80, True),
        ("ddp", "global"),
        "ddp, the base takes 65.5 GB of each GPU's 85.5 GB",
    ),
    (
        "32B",
        {},
        Machine(1, 4, 4, GPU40, True),
        ("fsdp", "node"),
        "fsdp over 4 GPUs, 16.4 GB of the base's 65.5 GB on each GPU of 42.9 GB; strategy.quantization: nf4"
        " would allow ddp",
    ),
    (
        "72B",
        {},
        Machine(1, 8, 8, GPU80, True),
        ("fsdp", "node"),
        "fsdp over 8 GPUs, 18.2 GB of the base's 145.4 GB on each GPU of 85.5 GB; strategy.quantization: nf4"
        " would allow ddp",
    ),
    (
        "72B",
        {},
        Machine(2, 8, 8, GPU80, True),
        ("fsdp", "node"),
        "fsdp in each node's 8 GPUs, 18.2 GB of the base's 145.4 GB on each GPU of 85.5 GB;"
        " strategy.quantization: nf4 would allow ddp",
    ),
    (
        "72B",
        {"quantization": "nf4"},
        Machine(1, 1, 1, GPU80, True),
        ("ddp", "global"),
        "ddp, the base takes 41.2 GB of each GPU's 85.5 GB",
    ),
    (
        "72B",
        {},
        Machine(2, 4, 4, GPU40, True),
        ("fsdp", "global"),
        "fsdp over 8 GPUs, 18.2 GB of the base's 145.4 GB on each GPU of 42.9 GB; it crosses between nodes"
        " twice a micro-batch, which 15,960 tokens on a GPU would hide at 50 GB/s (here 2,048)",
    ),
    (
        "72B",
        {"quantization": "nf4"},
        Machine(2, 4, 4, GPU24, True),
        ("zero3", "global"),
        "zero3 over 8 GPUs, 6.1 GB of the base's 41.2 GB on each GPU of 25.8 GB; it crosses between nodes"
        " twice a micro-batch, which 3,990 tokens on a GPU would hide at 50 GB/s (here 2,048)",
    ),
]


DECISIONS += [
    (
        "30B-A3B",
        {"quantization": "nf4"},
        Machine(1, 1, 1, GPU80, True),
        ("ddp", "global"),
        "ddp, the base takes 16.7 GB of each GPU's 85.5 GB",
    ),
    (
        "30B-A3B",
        {"quantization": "int8"},
        Machine(1, 1, 1, GPU80, True),
        ("ddp", "global"),
        "ddp, the base takes 60.1 GB (58.0 GB of it experts, which int8 leaves as they are) of each GPU's"
        " 85.5 GB",
    ),
    (
        "30B-A3B",
        {},
        Machine(1, 8, 8, GPU40, True),
        ("fsdp", "node"),
        "fsdp over 8 GPUs, 7.6 GB of the base's 61.1 GB on each GPU of 42.9 GB; strategy.quantization: nf4"
        " would allow ddp",
    ),
]


@pytest.mark.parametrize(("size", "strategy", "machine", "choice", "sentence"), DECISIONS)
def test_auto_decides(size, strategy, machine, choice, sentence):
    decision = decide(config(strategy), (QWEN | {"30B-A3B": MIXTURE})[size], machine)
    assert (decision.name, decision.shard_group) == choice
    assert decision.sentence == f"strategy.name=auto: {sentence}"


def test_without_a_gpu_or_its_memory_auto_is_ddp():
    assert decide(config(), None, Machine(1, 2, 0)) == (
        "ddp",
        "global",
        "strategy.name=auto: ddp, no GPU: the whole model in each process",
    )
    decision = decide(config(), QWEN["72B"], Machine(1, 2, 2, 0))
    assert decision[:2] == ("ddp", "global")
    assert "whose memory is unknown" in decision.sentence


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "zero3", "fsdp"])
def test_a_strategy_that_is_named_is_taken(name):
    assert decide(config({"name": name}), QWEN["72B"], Machine(1, 1, 1, GPU24)) == (name, "global", "")


def test_more_than_the_least_and_less_than_the_expected_is_tried():
    plain = config(train={"gradient_checkpointing": False})
    decision = decide(plain, QWEN["7B"], Machine(1, 1, 1, 22 * 1024 * MIB))
    assert decision.sentence == (
        "strategy.name=auto: ddp, the base takes 15.2 GB of each GPU's 23.6 GB; about 24.4 GB may be needed,"
        " which is tight; train.gradient_checkpointing: auto or strategy.quantization: nf4 would leave room"
    )


def test_what_cannot_be_in_parts_is_not_decided_to_be():
    dora = config().model_copy(update={"lora": config().lora.model_copy(update={"use_dora": True})})
    with pytest.raises(ValueError, match="even with ddp"):
        decide(dora, QWEN["72B"], Machine(1, 8, 8, GPU80))
    with pytest.raises(ValueError, match="even with ddp"):
        decide(config({"quantization": "int8"}), QWEN["72B"], Machine(1, 8, 8, GPU40))


def test_node_groups_that_were_asked_for_are_kept():
    asked = config({"shard_group": "node"})
    assert decide(asked, QWEN["7B"], Machine(2, 8, 8, GPU80))[:2] == ("ddp", "global")
    assert decide(asked, QWEN["72B"], Machine(2, 8, 8, GPU80))[:2] == ("fsdp", "node")
    with pytest.raises(ValueError, match="even with fsdp"):
        decide(asked, QWEN["72B"], Machine(2, 4, 4, GPU40))


REFUSED = "strategy.name=auto: model.name_or_path=Qwen/Qwen2.5 needs at least "


@pytest.mark.parametrize(
    ("size", "train", "machine", "says"),
    [
        (
            "72B",
            {},
            Machine(2, 4, 4, GPU24),
            "34.0 GB of each of 8 GPUs even with fsdp, and there are 25.8 GB (26.7 GB base, 3.4 GB adapter,"
            " 3.5 GB for 2,048 tokens); what would fit: strategy.quantization: nf4 (zero3) or 32 such GPUs"
            " and train.global_batch_size: 32 (fsdp); strategy.name: fsdp to try all the same",
        ),
        (
            "7B",
            {"gradient_checkpointing": False},
            Machine(1, 1, 1, 20 * 1024 * MIB),
            "22.0 GB of the GPU even with ddp, and there are 21.5 GB (15.2 GB base, 0.6 GB adapter, 6.5 GB"
            " for 2,048 tokens); what would fit: train.gradient_checkpointing: auto (ddp) or"
            " strategy.quantization: nf4 (ddp) or 2 such GPUs (fsdp) or data.max_length: 1024 (ddp);"
            " strategy.name: ddp to try all the same",
        ),
        (
            "30B-A3B",
            {},
            Machine(1, 2, 2, GPU40),
            "46.0 GB of each of 2 GPUs even with fsdp, and there are 42.9 GB (34.3 GB base, 10.3 GB adapter,"
            " 0.9 GB for 2,048 tokens); what would fit: strategy.quantization: nf4 (ddp) or lora.experts:"
            " shared (fsdp) or 4 such GPUs (fsdp); strategy.name: fsdp to try all the same",
        ),
        (
            "72B",
            {},
            Machine(1, 1, 1, GPU24),
            "152.7 GB of the GPU even with ddp, and there are 25.8 GB (145.4 GB base, 3.4 GB adapter, 3.5 GB"
            " for 2,048 tokens); what would fit: strategy.quantization: nf4 with 4 such GPUs (zero3) or 16"
            " such GPUs with data.max_length: 1024 (fsdp); strategy.name: ddp to try all the same",
        ),
    ],
)
def test_what_fits_nowhere_is_refused_with_what_would_fit(size, train, machine, says):
    with pytest.raises(ValueError, match=".") as caught:
        decide(config(train=train), (QWEN | {"30B-A3B": MIXTURE})[size], machine)
    assert str(caught.value) == REFUSED + says


def test_auto_says_what_gathering_over_pcie_takes():
    linked, unlinked = (
        decide(config(), QWEN["72B"], Machine(1, 8, 8, GPU80, nvlink)).sentence for nvlink in (True, False)
    )
    assert "PCIe" not in linked
    assert unlinked.startswith(
        linked.partition(";")[0] + "; without NVLink between them all it is gathered over PCIe"
    )
    assert "which 31,920 tokens on a GPU would hide at 25 GB/s (here 2,048)" in unlinked
