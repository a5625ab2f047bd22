"""How long a step takes, and what it sends: formulas over a GPU's data sheet, without torch.

A micro-batch takes the longest of three: what the GPU computes and moves through its memory, what it gathers
from other GPUs meanwhile, and the time to start its kernels. docs/planning.md has the sources, and how far
published figures are from it (benchmarks/plan_accuracy.py).
"""

from typing import NamedTuple

import numpy as np

from qwenlora.configs.combinations import SHARDED, Machine, packs_rows
from qwenlora.configs.estimate import Sizes, base_bytes, bytes_a_number, kept_a_layer, ranks_met
from qwenlora.configs.schema import Config
from qwenlora.data.order import accumulation_steps
from qwenlora.plan.flops import flops
from qwenlora.plan.hardware import Gpu
from qwenlora.plan.measured import Correction, Measured, Rates, kind_of_strategy
from qwenlora.plan.rows import RowCounts
from qwenlora.run.records import Parameters, Work

REACHED = 0.8  # share of the data sheet's FLOP/s in large matrix products: 798 of an H100's 989 were measured
LINK_REACHED = 0.8  # share of a link's data sheet in long collectives
COPIED = 0.9  # share of a memory's data sheet that long copies reach
# share of what the formula says that the fastest published runs reach: 14,110 tokens/s, Qwen2.5-7B on an H100
PUBLISHED = 0.7
EXPERTS_REACHED = 0.12  # share of REACHED in grouped products of many small experts
NETWORK = 50e9  # bytes a second of a GPU to other nodes, where it is not said
DEQUANTISED = 4.5  # bytes moved to make a 4-bit number 16 bits, and to read it again


class Layers(NamedTuple):
    """How layers are computed. passes: how often a step reads or writes each activation; launch_s: seconds to
    start a layer's kernels for a micro-batch, forward and backward."""

    passes: float
    launch_s: float


FUSED, EAGER = Layers(13, 1.7e-3), Layers(40, 5e-3)  # ours, and peft's


class Links(NamedTuple):
    """Bytes a second that a GPU sends, one way. node: to its node's others; network: to other nodes."""

    node: float
    network: float


class Case(NamedTuple):
    """What a plan is of: a config on GPUs. parameters: with their work, as this version counts it; measured:
    by which it is calibrated and corrected. Without GPUs gpu is a CPU."""

    config: Config
    parameters: Parameters
    rows: RowCounts
    machine: Machine
    gpu: Gpu
    links: Links
    measured: Measured = Measured()

    @property
    def rates(self) -> Rates | None:
        """What was measured of the GPU; None if it was not."""
        return self.measured.devices.get(self.gpu.name)

    def correction(self, name: str) -> Correction:
        """Return by how much runs under a strategy were off."""
        return self.measured.correction(self.gpu.name, kind_of_strategy(self.config, name))

    @property
    def sizes(self) -> Sizes:
        """The sizes for estimates of memory."""
        longest = self.rows.tokens if self.is_packed else self.rows.longest
        return Sizes.of(self.parameters, longest)

    @property
    def is_packed(self) -> bool:
        """Whether rows are packed."""
        return packs_rows(self.config, on_gpu=self.machine.gpus > 0)

    @property
    def tokens(self) -> float:
        """Tokens of rows in a micro-batch on a GPU, on average."""
        each = self.config.data.max_length if self.is_packed else self.rows.mean
        return self.config.train.micro_batch * each / self.config.strategy.sequence_parallel

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on a GPU. Raises: ValueError when GPUs cannot share the batch evenly."""
        train, strategy = self.config.train, self.config.strategy
        return accumulation_steps(
            train.global_batch_size,
            train.micro_batch,
            self.machine.world_size,
            strategy.sequence_parallel,
        )


class Sent(NamedTuple):
    """Bytes that a GPU sends. gathered: of the base, a micro-batch; exchanged: of tokens that go to experts
    on other GPUs of the node, a micro-batch; reduced: of gradients, a step."""

    gathered: float
    exchanged: float
    reduced: float

    @property
    def a_micro_batch(self) -> float:
        """Bytes of a micro-batch."""
        return self.gathered + self.exchanged


class StepTime(NamedTuple):
    """Seconds of a step on a GPU, by part. products, traffic: matrix products and memory, of a micro-batch;
    gathering: the base's parts; exchanging: tokens, which everything waits for; launches: starting kernels;
    reducing: gradients, once a step."""

    products: float
    traffic: float
    gathering: float
    exchanging: float
    launches: float
    reducing: float
    micro_batches: int

    @property
    def micro_batch(self) -> float:
        """Seconds of a micro-batch."""
        return max(self.products + self.traffic, self.gathering, self.launches) + self.exchanging

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return self.micro_batches * self.micro_batch + self.reducing

    @property
    def efficiency(self) -> float:
        """The share of the step that a GPU which held all of the base alone would take."""
        alone = self.micro_batches * max(self.products + self.traffic, self.launches)
        return alone / self.seconds


def sent(case: Case, name: str, group: str, recomputed: int = 0) -> Sent:
    """Return what a GPU sends under a strategy: of a base in parts what it lacks, forward and backward; of
    tokens those whose experts are elsewhere, there and back in each pass; of the adapter's gradients, in
    float32, twice what it lacks. recomputed: layers whose activations are computed again."""
    world, of = case.machine.world_size, case.parameters
    sharing = case.machine.processes if group == "node" else world
    gathered = 0.0
    if name in SHARDED:
        gathered = 2 * base_bytes(case.config, case.sizes, case.machine) * (sharing - 1) / sharing
    size = case.config.strategy.expert_parallel
    rows = case.tokens * ranks_met(case.config, of.experts_met) * (1 - 1 / size)
    exchanged = 2 * rows * of.hidden_size * (4 * of.layers + 2 * recomputed)
    whole = 2 * 4 * (of.trainable - of.experts_trained * (size > 1)) * (world - 1) / world
    in_parts = 2 * 4 * of.experts_trained / size * (1 - size / world) * (size > 1)
    return Sent(gathered, exchanged, whole + in_parts)


def step_time(case: Case, name: str, group: str, recomputed: int, layers: Layers | None = None) -> StepTime:
    """Return the seconds of a step under a strategy. recomputed: layers whose activations are computed again;
    layers: how they are computed, by default as this project does under the strategy. Raises: ValueError when
    the GPUs cannot share the batch evenly."""
    if layers is None:
        layers = EAGER if name == "zero3" or case.config.lora.use_dora else FUSED
    reached, several = _reached(case), case.machine.nodes > 1
    moved, again = sent(case, name, group, recomputed), recomputed / case.parameters.layers
    return StepTime(
        products=_products(case, again) / (PUBLISHED * reached.products),
        traffic=_traffic(case, again, layers.passes) / (PUBLISHED * reached.memory),
        gathering=moved.gathered / (reached.network if several and group != "node" else reached.node),
        exchanging=moved.exchanged / reached.node,
        launches=case.parameters.layers * layers.launch_s * (1 + again / 3),
        reducing=moved.reduced / (reached.network if several else reached.node),
        micro_batches=case.micro_batches,
    )


class _Reached(NamedTuple):
    """What long operations reach, a second. products: FLOP; memory, node, network: bytes."""

    products: float
    memory: float
    node: float
    network: float


def _reached(case: Case) -> _Reached:
    """Return what was measured of the GPU, else what of its data sheet is reached as a rule."""
    gpu, links, rates = case.gpu, case.links, case.rates
    network = LINK_REACHED * links.network
    if rates is None:
        return _Reached(REACHED * gpu.flops, gpu.bandwidth, LINK_REACHED * links.node, network)
    wanted = case.config.model.dtype
    dtype = wanted if wanted != "auto" else "bfloat16" if case.machine.gpus else "float32"
    products = rates.products.get(dtype) or max(rates.products.values())
    return _Reached(products, rates.memory / COPIED, rates.link or LINK_REACHED * links.node, network)


def _products(case: Case, again: float) -> float:
    """Return the FLOPs of a micro-batch, those of experts as many more as they are slower. again: the share
    of the layers that are computed again."""
    of, length = case.parameters, round(case.rows.mean)
    work, one = of.work, np.array([length])
    assert work is not None, "this version counts it"
    useful = flops(work, one, round(length * case.rows.trained / case.rows.tokens))
    nothing = dict.fromkeys(("frozen", "trained", "head_frozen", "head_trained"), 0)
    attention = flops(Work(**nothing, attention=work.attention, recurrence=work.recurrence), one, 0)
    forward = 2 * length * (work.frozen + work.trained) + attention / 3
    met = 1 - (of.total - of.active) / of.experts if of.experts else 0.0  # share of the experts
    experts = met * length * (4 * of.experts + 6 * of.experts_trained)
    slower = (1 / EXPERTS_REACHED - 1) * experts * (1 + again / 2)
    return case.tokens / length * (useful + again * forward + slower)


def _traffic(case: Case, again: float, passes: float) -> float:
    """Return the bytes that a micro-batch moves through a GPU's memory: activations, and the base."""
    of, nf4 = case.parameters, case.config.strategy.quantization == "nf4"
    numbers = of.layers * kept_a_layer(case.config, case.sizes)
    width = bytes_a_number(case.config, case.machine)
    activations = width * passes * (1 + again / 3) * case.tokens * numbers
    quantised = DEQUANTISED * of.body if nf4 else 0.0
    return activations + (2 + again) * (base_bytes(case.config, case.sizes, case.machine) + quantised)
