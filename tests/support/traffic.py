"""What docs/strategies.md says that a GPU sends: once a step, and in each micro-batch."""

from typing import NamedTuple

from qwenlora.configs import Config
from qwenlora.configs.combinations import Machine
from qwenlora.configs.estimate import SCALES, Sizes, base_bytes
from qwenlora.configs.schema import Lora
from qwenlora.plan.bases import known
from qwenlora.plan.counts import count
from qwenlora.plan.shape import shape_of


def sizes_of(name: str) -> Sizes:
    """Return the sizes of a known base at r 16."""
    return Sizes.of(count(shape_of(known()[name], name), Lora()))


MIXTURE = sizes_of("Qwen3-30B-A3B")
NVLINK = 370e9  # bytes a second that a GPU gets


class Traffic(NamedTuple):
    """Bytes that a GPU sends: once a step, and in each micro-batch."""

    step: int
    micro_batch: int


def traffic(
    config: Config, sizes: Sizes, name: str, machine: Machine, shard_group: str = "global"
) -> Traffic:
    """Return the bytes that a GPU sends, with n GPUs in all and g in a sharding group.

    step: the adapter's gradients, float32, are averaged: 2 (n - 1) / n * 4 P, whoever holds the result.
    micro_batch, zero3 and fsdp: the base is gathered forward and backward, 2 (g - 1) / g * its bytes without
    nf4's scales; zero3 in node groups gathers from all GPUs forward, from the node's backward.
    """
    world, near = machine.world_size, machine.processes if shard_group == "node" else machine.world_size
    far = world if name == "zero3" else near
    step = 2 * (world - 1) / world * 4 * sizes.trainable
    shares = (near - 1) / near + (far - 1) / far if name in ("zero3", "fsdp") else 0
    scales = SCALES * sizes.body if config.strategy.quantization == "nf4" else 0
    return Traffic(int(step), int(shares * (base_bytes(config, sizes, machine) - scales)))
