"""What cannot run together is refused in one line that says why and what would; the rest is allowed."""

from itertools import product

import pytest

from qwenlora.configs import Config
from qwenlora.configs.combinations import RULES, Machine, problems, refuse

NODE, NODES, CPU = Machine(1, 8, 8), Machine(2, 8, 8), Machine(1, 2, 0)
DIMENSIONS = {
    "name": ("auto", "ddp", "zero1", "zero2", "zero3", "fsdp"),
    "quantization": ("none", "nf4", "int8"),
    "offload": ("none", "optimizer", "params"),
    "shard_group": ("global", "node"),
}
MODEL = {"name_or_path": "Qwen/Qwen2.5-7B-Instruct"}


def config(**sections) -> Config:
    model, data = MODEL | sections.pop("model", {}), {"train": "example"} | sections.pop("data", {})
    return Config(run_dir="runs/x", model=model, data=data, **sections)


REFUSED = {
    "fsdp-quantization": (
        NODE,
        {"strategy": {"name": "fsdp", "quantization": "nf4"}},
        "strategy.name=fsdp with strategy.quantization=nf4: FSDP2 makes DTensors of the weights, and"
        " bitsandbytes' layers lose their quantisation state by that; set strategy.name: ddp, zero1, zero2"
        " or (nf4) zero3, or strategy.quantization: none",
    ),
    "zero3-int8": (
        NODE,
        {"strategy": {"name": "zero3", "quantization": "int8"}},
        "strategy.name=zero3 with strategy.quantization=int8: bitsandbytes keeps each int8 weight whole for"
        " its kernels besides, so nothing would be saved; set strategy.quantization: nf4, or strategy.name:"
        " ddp, zero1 or zero2",
    ),
    "float16": (
        NODE,
        {"strategy": {"name": "zero1"}, "model": {"dtype": "float16"}},
        "strategy.name=zero1 with model.dtype=float16: float16 needs its loss scaled, which only ddp does;"
        " set model.dtype: bfloat16 (of a run that began otherwise: with --allow-config-change model.dtype),"
        " or strategy.name: ddp",
    ),
    "sharded-dora": (
        NODE,
        {"strategy": {"name": "fsdp"}, "lora": {"use_dora": True}},
        "strategy.name=fsdp with lora.use_dora=true: DoRA takes the norm of whole base weights in each"
        " forward pass, and here a GPU has parts; set strategy.name: zero2 or ddp",
    ),
    "zero3-modules-to-save": (
        NODE,
        {"strategy": {"name": "zero3"}, "lora": {"modules_to_save": ["embed_tokens"]}},
        "strategy.name=zero3 with lora.modules_to_save=['embed_tokens']: the copy that is trained is made of"
        " the whole matrix, and here a GPU has parts; set strategy.name: fsdp, zero2 or ddp",
    ),
    "zero3-trainable-tokens": (
        NODE,
        {"strategy": {"name": "zero3"}, "lora": {"trainable_token_indices": [7]}},
        "strategy.name=zero3 with lora.trainable_token_indices: the rows that are trained begin as the"
        " base's, and here a GPU has parts; set strategy.name: fsdp, zero2 or ddp",
    ),
    "zero3-eva": (
        NODE,
        {"strategy": {"name": "zero3"}, "lora": {"init_lora_weights": "eva"}},
        "strategy.name=zero3 with lora.init_lora_weights=eva: rows are computed before DeepSpeed's engine is"
        " made, without which a base in parts cannot be called; set strategy.name: fsdp, zero2 or ddp, or"
        " lora.init_lora_weights: pissa",
    ),
    "offload-auto": (
        NODE,
        {"strategy": {"offload": "params"}},
        "strategy.name=auto with strategy.offload=params: auto looks for what fits the GPUs without host"
        " memory; name a strategy: zero2 or zero3 (optimizer), zero3 or fsdp (params); or set"
        " strategy.offload: none",
    ),
    "offload-ddp": (
        NODE,
        {"strategy": {"name": "ddp", "offload": "optimizer"}},
        "strategy.name=ddp with strategy.offload=optimizer: ddp keeps everything on each GPU; set"
        " strategy.name: zero2 (optimizer) or zero3 (optimizer, params), or strategy.offload: none",
    ),
    "offload-params-zero1-zero2": (
        NODE,
        {"strategy": {"name": "zero2", "offload": "params"}},
        "strategy.name=zero2 with strategy.offload=params: its base is whole on each GPU, and only a base in"
        " parts can wait in host memory; set strategy.name: zero3 or fsdp, or strategy.offload: optimizer",
    ),
    "offload-optimizer-fsdp": (
        NODE,
        {"strategy": {"name": "fsdp", "offload": "optimizer"}},
        "strategy.name=fsdp with strategy.offload=optimizer: there the optimizer's state is the adapter's,"
        " small and whole on each GPU; set strategy.offload: params or none, or strategy.name: zero3",
    ),
    "offload-params-fsdp-cpu": (
        CPU,
        {"strategy": {"name": "fsdp", "offload": "params"}},
        "strategy.name=fsdp with strategy.offload=params on a machine without GPUs: everything is in host"
        " memory already; set strategy.offload: none",
    ),
    "shard-group-whole-base": (
        NODES,
        {"strategy": {"name": "zero2", "shard_group": "node"}},
        "strategy.name=zero2 with strategy.shard_group=node: nothing of the base is in parts there; set"
        " strategy.name: zero3 or fsdp, or strategy.shard_group: global",
    ),
    "shard-group-one-process": (
        Machine(4, 1, 1),
        {"strategy": {"name": "zero3", "shard_group": "node"}},
        "strategy.shard_group=node on 4 nodes with 1 process each: the one process of a node would hold the"
        " whole base; set strategy.shard_group: global, or strategy.name: ddp",
    ),
    "shard-group-zero3-quantization": (
        NODES,
        {"strategy": {"name": "zero3", "shard_group": "node", "quantization": "nf4"}},
        "strategy.name=zero3 with strategy.shard_group=node and strategy.quantization=nf4: DeepSpeed's"
        " second, node-wide partition (hpZ) knows nothing of quantised weights; set strategy.shard_group:"
        " global, or strategy.name: ddp",
    ),
    "deepspeed-config": (
        NODE,
        {"strategy": {"name": "fsdp", "deepspeed_config": "ds.json"}},
        "strategy.name=fsdp with strategy.deepspeed_config=ds.json: that file is DeepSpeed's, which only"
        " zero1, zero2 and zero3 use; name one of them, or remove strategy.deepspeed_config",
    ),
    "zero-optim": (
        NODE,
        {"strategy": {"name": "zero2"}, "train": {"optim": "galore_adamw_8bit"}},
        "strategy.name=zero2 with train.optim=galore_adamw_8bit: ZeRO hands an optimizer flat pieces of all"
        " parameters, and others look at rows and columns, keep blocks of few bits, or prepare for whole"
        " parameters; set train.optim: adamw_torch_fused, or strategy.name: ddp or fsdp",
    ),
    "expert-parallel-strategy": (
        NODE,
        {"strategy": {"name": "zero2", "expert_parallel": 8}},
        "strategy.expert_parallel=8 with strategy.name=zero2: experts are divided by themselves, and all else"
        " is whole on each GPU; set strategy.name: ddp, or strategy.expert_parallel: 1",
    ),
    "expert-parallel-divides": (
        NODES,
        {"strategy": {"expert_parallel": 16}},
        "strategy.expert_parallel=16 on 8 processes of a node: the processes of a node are cut into groups of"
        " that size; set it to a divisor of their number",
    ),
    "expert-parallel-int8": (
        NODE,
        {"strategy": {"expert_parallel": 8, "quantization": "int8"}},
        "strategy.expert_parallel=8 with strategy.quantization=int8: bitsandbytes reads a whole base for"
        " int8, which leaves experts as they are; set strategy.quantization: nf4 or none, or"
        " strategy.expert_parallel: 1",
    ),
    "expert-parallel-float16": (
        NODE,
        {"strategy": {"expert_parallel": 8}, "model": {"dtype": "float16"}},
        "strategy.expert_parallel=8 with model.dtype=float16: float16 needs its loss scaled by what all"
        " gradients are, of which a GPU has some; set model.dtype: bfloat16, or strategy.expert_parallel: 1",
    ),
    "expert-parallel-optim": (
        NODE,
        {"strategy": {"expert_parallel": 8}, "train": {"optim": "adafactor"}},
        "strategy.expert_parallel=8 with train.optim=adafactor: other optimizers look at whole parameters,"
        " and here a GPU has parts; set train.optim: adamw_torch_fused, or strategy.expert_parallel: 1",
    ),
    "expert-parallel-eva": (
        NODE,
        {"strategy": {"expert_parallel": 2}, "lora": {"init_lora_weights": "eva"}},
        "strategy.expert_parallel=2 with lora.init_lora_weights=eva: rows are computed before ranks exchange"
        " what their experts have; set lora.init_lora_weights: pissa, or strategy.expert_parallel: 1",
    ),
    "sequence-parallel-divides": (
        NODES,
        {"strategy": {"sequence_parallel": 3}},
        "strategy.sequence_parallel=3 on 16 processes (2 x 8): the processes are cut into groups of that"
        " size; set it to a divisor of their number",
    ),
    "sequence-parallel-eager": (
        NODE,
        {"strategy": {"sequence_parallel": 2}, "model": {"attn_implementation": "eager"}},
        "strategy.sequence_parallel=2 with model.attn_implementation=eager: it needs a mask over the whole"
        " sequence, of which a GPU has a part; set model.attn_implementation: sdpa or flash_attention_2",
    ),
    "sequence-parallel-packing": (
        NODE,
        {"strategy": {"sequence_parallel": 2}, "data": {"packing": "on"}},
        "strategy.sequence_parallel=2 with data.packing=on and model.attn_implementation=sdpa: its kernel"
        " sees whole packs, and only flash attention's keep the rows in them apart; set data.packing: off,"
        " or model.attn_implementation: flash_attention_2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_combination_is_refused_in_one_line(name):
    machine, sections, message = REFUSED[name]
    assert problems(config(**sections), machine) == [message]


def test_each_rule_has_its_case_here():
    assert [rule.name for rule in RULES] == list(REFUSED)


def test_several_combinations_are_refused_at_once():
    wrong = config(strategy={"name": "fsdp", "quantization": "int8", "offload": "optimizer"})
    with pytest.raises(ValueError, match=".") as caught:
        refuse(wrong, NODE)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "strategy.name=fsdp with strategy.quantization=int8",
        "strategy.name=fsdp with strategy.offload=optimizer",
    ]


# name, quantization -> offload (none, optimizer, params) x shard_group (global, node): o runs, . is refused
CELLS = """
auto  none  oo .. ..
auto  nf4   oo .. ..
auto  int8  oo .. ..
ddp   none  o. .. ..
ddp   nf4   o. .. ..
ddp   int8  o. .. ..
zero1 none  o. o. ..
zero1 nf4   o. o. ..
zero1 int8  o. o. ..
zero2 none  o. o. ..
zero2 nf4   o. o. ..
zero2 int8  o. o. ..
zero3 none  oo oo oo
zero3 nf4   o. o. o.
zero3 int8  .. .. ..
fsdp  none  oo .. oo
fsdp  nf4   .. .. ..
fsdp  int8  .. .. ..
"""


def test_every_cell_runs_or_is_refused():
    found = []
    for name, quantization in product(DIMENSIONS["name"], DIMENSIONS["quantization"]):
        row = []
        for offload in DIMENSIONS["offload"]:
            cell = ""
            for group in DIMENSIONS["shard_group"]:
                strategy = {
                    "name": name,
                    "quantization": quantization,
                    "offload": offload,
                    "shard_group": group,
                }
                lines = problems(config(strategy=strategy), NODES)
                assert all("; " in line and "\n" not in line for line in lines)
                cell += "." if lines else "o"
            row.append(cell)
        found.append(f"{name:<5} {quantization:<5} {' '.join(row)}")
    assert found == CELLS.strip().splitlines()
    assert "".join(row[12:] for row in found).count("o") == 34


@pytest.mark.parametrize("name", DIMENSIONS["name"])
@pytest.mark.parametrize("machine", [Machine(1, 1, 0), Machine(1, 1, 1), CPU, NODE, NODES])
def test_the_defaults_run_everywhere(name, machine):
    refuse(config(strategy={"name": name}), machine)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd", "rmsprop", "lion_32bit"])
def test_elementwise_optimizers_run_on_flat_pieces(optim):
    refuse(config(strategy={"name": "zero2"}, train={"optim": optim}), NODE)


@pytest.mark.parametrize(
    "optim",
    [
        *(
            "adagrad",
            "ademamix",
            "adafactor",
            "lomo",
            "adalomo",
            "apollo_adamw",
            "galore_adafactor",
            "stable_adamw",
            "grokadamw",
        ),
        *("adamw_8bit", "paged_lion_8bit", "adamw_torch_4bit", "rmsprop_bnb", "schedule_free_sgd"),
    ],
)
def test_other_optimizers_run_where_parameters_are_whole(optim):
    assert len(problems(config(strategy={"name": "zero1"}, train={"optim": optim}), NODE)) == 1
    refuse(config(strategy={"name": "fsdp"}, train={"optim": optim}), NODE)


def test_packs_in_shared_sequences_want_flash_attention():
    flash = {"attn_implementation": "flash_attention_2"}
    refuse(config(strategy={"sequence_parallel": 4}, data={"packing": "on"}, model=flash), NODE)
    refuse(config(strategy={"sequence_parallel": 4}), NODE)


# which strategies a rule is for, where its case above sets another key that brings it about
MEANT_FOR = {
    "fsdp-quantization": {"fsdp"},
    "float16": {"zero1", "zero2", "zero3", "fsdp"},
    "sharded-dora": {"zero3", "fsdp"},
    "zero3-modules-to-save": {"zero3"},
    "zero3-trainable-tokens": {"zero3"},
    "deepspeed-config": {"auto", "ddp", "fsdp"},
}


@pytest.mark.parametrize("rule", MEANT_FOR)
def test_a_rule_is_for_the_strategies_it_names(rule):
    machine, sections, _ = REFUSED[rule]
    applies = next(one.applies for one in RULES if one.name == rule)
    refused = set()
    for name in DIMENSIONS["name"]:
        strategy = sections.get("strategy", {}) | {"name": name}
        if applies(config(**sections | {"strategy": strategy}), machine):
            refused.add(name)
    assert refused == MEANT_FOR[rule]
