"""What tests of plan/ plan."""

from qwenlora.configs.combinations import Machine
from qwenlora.configs.schema import Config
from qwenlora.plan.bases import shape_of_base
from qwenlora.plan.counts import count
from qwenlora.plan.hardware import named
from qwenlora.plan.rows import RowCounts
from qwenlora.plan.speed import Case, Links

ROWS = RowCounts(rows=100_000, tokens=50_000_000, trained=20_000_000, longest=2000, counted=True)


def case_of(base, gpu, *, nodes=1, gpus_per_node=1, rows=ROWS, network=50e9, **sections):
    values = {"run_dir": "r", "model": {"name_or_path": base}, "data": {"train": "example"}}
    config = Config.model_validate(values | {"train": {"global_batch_size": 64}} | sections)
    shape, _ = shape_of_base(config.model)
    kind = named(gpu)
    machine = Machine(nodes, gpus_per_node, gpus_per_node, kind.bytes, kind.nvlink > 0)
    return Case(config, count(shape, config.lora), rows, machine, kind, Links(kind.link, network))
