"""The choice for strategy.name: auto, from estimates of the bytes that a GPU holds.

1 GB is 1e9 bytes. Estimates are within a fifth of published runs of a 7B (tests/configs/test_estimate.py).
"""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from itertools import islice
from typing import Any, NamedTuple

from pydantic import BaseModel, computed_field

from qwenlora.configs.combinations import Machine, problems
from qwenlora.configs.cures import LEANER, Setting, cures
from qwenlora.configs.schema import Config

# bytes a number of nf4: 4 bits; an 8-bit scale for 64 numbers, a float32 scale for 256 of those
BITS, SCALES = 0.5, 1 / 64 + 4 / (64 * 256)
NF4 = BITS + SCALES
# what autograd keeps of a layer, relative to its activations in 16 bits; tests/trainer/test_fused.py measures
FUSED, WITH_DROPOUT = 1.0, 1.38  # our LoRA layers, and with masks of dropout
EAGER, DORA = 2.3, 3.9  # peft's layers, and with DoRA
LEAST = 0.85
SPARE = 1_500_000_000  # of RESERVE, that a run may do without
# bytes a trained number of optimizers' states: Adam's two float32 moments, unless said here
STATES = {"sgd": 0, "adafactor": 0, "rmsprop": 4, "lion_32bit": 4, "paged_lion_32bit": 4}
EIGHT_BITS = 2  # two moments, of optimizers whose name ends so
# what a gated delta net keeps of a token, in widths of its values: with flash-linear-attention's kernels (by
# their code, not measured), and as transformers computes it without them (traced)
LINEAR, EAGER_LINEAR = 12, 52
RESERVE = 2_000_000_000  # CUDA's context, NCCL's buffers, what the allocator cannot use
LIVE = 1_000_000_000  # numbers that ZeRO-3 holds gathered (stage3_max_live_parameters)
SHOWN = 4  # changes that a refusal names
LOGITS_AT_ONCE = 2**27  # bytes of float32 logits that the head makes at a time
FLOPS = 798e12  # bfloat16 matrix products of an H100, measured
PCIE, NETWORK = 25e9, 50e9  # bytes a second that a GPU gets


class Sizes(NamedTuple):
    """Counts as in run.records.Parameters. experts: of the base, which int8 does not reach; experts_trained:
    of the adapter; active: of the base, for a token; 0: all; begun: of A and B; longest:
    tokens of the longest row or pack, at most; 0: unknown."""

    total: int
    trainable: int
    body: int
    head: int
    layers: int
    hidden_size: int
    intermediate_size: int
    kv_width: int
    attention_width: int = 0
    normed_width: int = 0
    linear_width: int = 0
    experts_width: int = 0
    experts_met: int = 0
    experts: int = 0
    experts_trained: int = 0
    active: int = 0
    begun: int = 0
    longest: int = 0

    @classmethod
    def of(cls, parameters: Any, longest: int = 0) -> "Sizes":
        """Return the sizes among a Parameters' fields."""
        return cls(**{name: getattr(parameters, name) for name in cls._fields[:-1]}, longest=longest)


class MemoryNeed(BaseModel, frozen=True):
    """Bytes on a GPU, by use. spare: those of them that a run may do without if all goes well."""

    weights: int
    gathered: int
    trained: int
    activations: int
    logits: int
    reserve: int
    spare: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def total(self) -> int:
        """The bytes that a run is expected to need."""
        return self.weights + self.gathered + self.trained + self.activations + self.logits + self.reserve

    @computed_field  # type: ignore[prop-decorator]
    @property
    def least(self) -> int:
        """The bytes that a run needs at least."""
        return self.total - self.spare


class Decision(NamedTuple):
    """The strategy of a run. sentence: why, for strategy.name=auto; else empty."""

    name: str
    shard_group: str
    sentence: str


def tokens_at_once(config: Config, sizes: Sizes) -> int:
    """Return how many tokens a GPU holds at once."""
    limit = config.data.max_length
    row = min(sizes.longest or limit, limit)
    return -(-config.train.micro_batch * row // config.strategy.sequence_parallel)


def need(
    config: Config,
    sizes: Sizes,
    name: str,
    machine: Machine,
    shard_group: str = "global",
    recomputed: int | None = None,
) -> MemoryNeed:
    """Return the bytes on each GPU under a strategy. recomputed: layers that are computed again, by default
    as many as recomputed_layers says.

    With n GPUs in a sharding group, b bytes a number (bfloat16: 2), P trained numbers, t tokens at once:

    - weights: b * body + b * (embeddings and head), b of the body 0.516 (nf4) or 1 (int8); zero3, fsdp: / n,
      but for nf4's scales, 0.016 * body; zero3 in node groups holds a part of all GPUs' and a part of the
      node's; none with offload: params.
      expert_parallel: experts / N, trained ones, too.
    - gathered, zero3 and fsdp: embeddings, head, and two layers (fsdp) or 1e9 numbers (zero3).
      expert_parallel: the experts' adapter when it is saved, as far as activations leave no room for it.
    - trained, in float32: ddp, fsdp 16 P; zero1 8 P + 12 P / n; zero2 4 P + 16 P / n; zero3 20 P / n
      (DeepSpeed keeps one more copy, and n is all GPUs). offload: 12 P / n less. 8 of the bytes are Adam's;
      other optimizers have fewer (STATES). Where a beginning is kept, 4 more for each number of
      A and B, zero3 4 / n (begun).
    - activations: t * layers * b (2 h + 2 q + 2 k + 2 i), and q + k where queries and keys have norms; times
      1.38 with dropout, 2.3 with peft's layers (zero3), 3.9 with DoRA; h, q, k, i: hidden, query, key and
      value, intermediate width; mixtures and linear attention keep more (kept_a_layer). A layer that is
      computed again keeps t * b h, and for a moment all of one layer; it is computed again when those after
      it hold nothing any more.
    - logits: 12 t * vocabulary, but of at most LOGITS_AT_ONCE. reserve: 2e9.
    """
    if recomputed is None:
        recomputed = recomputed_layers(config, sizes, name, machine, shard_group)
    return _need(config, sizes, name, machine, shard_group, recomputed)


def recomputed_layers(
    config: Config, sizes: Sizes, name: str, machine: Machine, shard_group: str = "global"
) -> int:
    """Return how many layers, from the first, compute their activations again in the backward pass: by
    train.gradient_checkpointing; for auto the fewest with which a GPU's memory is enough, and none where that
    is unknown."""
    wanted = config.train.gradient_checkpointing
    if isinstance(wanted, bool):
        return sizes.layers if wanted else 0
    if isinstance(wanted, int):
        return min(wanted, sizes.layers)
    if not machine.gpus or not machine.gpu_bytes:
        return 0

    def fits(layers: int) -> bool:
        return _need(config, sizes, name, machine, shard_group, layers).total <= machine.gpu_bytes

    return next(filter(fits, range(sizes.layers)), sizes.layers)


def micro_batch(
    config: Config, sizes: Sizes, decision: Decision, machine: Machine, among: Sequence[int], memory: int
) -> int:
    """Return the largest micro-batch whose step needs no more than memory, in bytes, and no more layers that
    are computed again than the smallest: these cost more time than a larger micro-batch saves. among: sizes
    to choose from, the largest first; the smallest is taken if none fits."""
    smallest = cut_into(config, among[-1])
    layers = recomputed_layers(smallest, sizes, decision.name, machine, decision.shard_group)

    def fits(size: int) -> bool:
        cut = cut_into(config, size)
        return _need(cut, sizes, decision.name, machine, decision.shard_group, layers).total <= memory

    return next(filter(fits, among), among[-1])


def cut_into(config: Config, size: int) -> Config:
    """Return a config whose micro-batches have so many rows, or packs."""
    train = config.train.model_copy(update={"per_device_train_batch_size": size})
    return config.model_copy(update={"train": train})


def _need(
    config: Config, sizes: Sizes, name: str, machine: Machine, shard_group: str, recomputed: int
) -> MemoryNeed:
    weights, gathered = _base_on_a_gpu(config, sizes, name, machine, shard_group)
    at_once, width = tokens_at_once(config, sizes), bytes_a_number(config, machine)
    kept = recomputed * width * sizes.hidden_size
    passing = width * max(sizes.layers - recomputed, min(recomputed, 1))  # bytes a number that a layer keeps
    activations = at_once * (kept + passing * kept_a_layer(config, sizes, share=_share_kept(config, name)))
    # the kernels for linear attention may be on the GPUs' machine, and not here
    least = at_once * (kept + LEAST * passing * kept_a_layer(config, sizes, linear=LINEAR))
    spared = max(0.0, gathered - _gathered_least(config, sizes, width)) if name == "zero3" else 0.0
    trained, elsewhere = _trained(config, sizes), _trained_elsewhere(config, sizes)
    gathered += max(0.0, 4 * elsewhere - activations)
    return MemoryNeed(
        weights=int(weights),
        gathered=int(gathered),
        trained=int(
            _trained_bytes(config, trained - elsewhere, name, machine.world_size)
            + 4 * sizes.begun / (machine.world_size if name == "zero3" else 1)
        ),
        activations=int(activations),
        logits=3 * min(4 * at_once * (sizes.head // sizes.hidden_size), LOGITS_AT_ONCE),
        reserve=RESERVE if machine.gpus else 0,
        spare=int(activations - least + spared) + (SPARE if machine.gpus else 0),
    )


def _gathered_least(config: Config, sizes: Sizes, width: int) -> float:
    """Return the bytes that ZeRO-3 gathers at least: the head or a layer at a time, whatever it may hold."""
    body = NF4 if config.strategy.quantization == "nf4" else width
    return max(width * sizes.head, body * sizes.body / sizes.layers)


def _base_on_a_gpu(
    config: Config, sizes: Sizes, name: str, machine: Machine, shard_group: str
) -> tuple[float, float]:
    """Return the bytes of the base that stay on a GPU, and of what is gathered at a time."""
    width, base = bytes_a_number(config, machine), base_bytes(config, sizes, machine)
    if name not in ("zero3", "fsdp"):
        return base - _experts_elsewhere(config, sizes, width), 0.0
    outside = sizes.total - sizes.body
    scales = SCALES * sizes.body if config.strategy.quantization == "nf4" else 0.0  # they are no parameters
    sharded = base - scales
    world, group = machine.world_size, machine.processes if shard_group == "node" else machine.world_size
    weights = sharded / group
    if name == "zero3" and group < world:
        weights += sharded / world
    if config.strategy.offload == "params":
        weights = 0
    body = (sharded - width * outside) / sizes.body  # bytes a number
    together = 2 * sizes.body / sizes.layers if name == "fsdp" else min(LIVE, sizes.body)
    is_gathered = group > 1 or config.strategy.offload == "params"
    return weights + scales, body * together + width * outside if is_gathered else 0.0


def kept_a_layer(config: Config, sizes: Sizes, share: float = FUSED, linear: int = 0) -> float:
    """Return the numbers of a token that autograd keeps in a layer, as a mean over the layers. share: what
    linear layers keep, relative to ours; linear: widths of linear attention that are kept, by default those
    of the functions that are here."""
    attention = 2 * (sizes.attention_width / sizes.layers if sizes.attention_width else sizes.hidden_size)
    attention += 2 * sizes.kv_width + sizes.normed_width / sizes.layers
    # gathered inputs and products, which our function for experts with LoRA, or in nf4, makes again
    strategy = config.strategy
    ours = _trains_experts(config, sizes) or strategy.quantization == "nf4" or strategy.expert_parallel > 1
    products = (
        sizes.experts_width - sizes.experts_met * sizes.hidden_size
    )  # of the experts that a token meets
    experts = 2 * products + (sizes.experts_width if sizes.experts and not ours else 0)
    here = LINEAR if find_spec("fla") else EAGER_LINEAR
    nets = sizes.linear_width / sizes.layers * (linear or here)
    nets += sizes.hidden_size * ranks_met(config, sizes.experts_met)
    inputs = (
        3 if sizes.experts_met else 2
    ) * sizes.hidden_size  # a mixture's is kept beside that of its norm
    of_linear_layers = inputs + attention + 2 * (sizes.intermediate_size - products)
    return share * of_linear_layers + experts + nets


def _trains_experts(config: Config, sizes: Sizes) -> bool:
    return bool(sizes.experts_trained) and config.lora.experts == "all"


def _share_kept(config: Config, name: str) -> float:
    if config.lora.use_dora:
        return DORA
    if name == "zero3":
        return EAGER
    return WITH_DROPOUT if config.lora.lora_dropout else FUSED


def break_even(config: Config, sizes: Sizes, bandwidth: float) -> int:
    """Return how many tokens in a GPU's micro-batch hide the gathering of the base, on an H100.
    4 FLOP a token and number that it meets against 4 bytes a number (nf4: a quarter). bandwidth: bytes a
    second."""
    quarter = 4 if config.strategy.quantization == "nf4" else 1
    return int(FLOPS / bandwidth * (sizes.total / quarter / (sizes.active or sizes.total)))


def decide(config: Config, sizes: Sizes | None, machine: Machine) -> Decision:
    """Return the strategy of a run; no choice changes precision or results. sizes: needed for auto on GPUs.
    Raises: ValueError when strategy.name is auto and nothing fits the GPUs."""
    strategy = config.strategy
    if strategy.name != "auto":
        return Decision(strategy.name, strategy.shard_group, "")
    if not machine.gpus:
        return _ddp("no GPU: the whole model in each process")
    if not machine.gpu_bytes:
        return _ddp(
            "the whole model on each GPU, whose memory is unknown; name another strategy if that is too small"
        )
    assert sizes is not None, "they are known where GPUs are"
    return _best_fitting(config, sizes, machine)


def _best_fitting(config: Config, sizes: Sizes, machine: Machine) -> Decision:
    """Return the best strategy that fits the GPUs. Raises: ValueError when none does."""
    ways = _ways(config, sizes, machine)
    fitting = next((way for way, memory in ways.items() if memory.total <= machine.gpu_bytes), None)
    name, group = fitting or min(ways, key=lambda way: ways[way].total)
    chosen = ways[name, group]
    if chosen.least > machine.gpu_bytes:
        raise ValueError(_nothing_fits(config, sizes, machine, name, chosen))
    why = _why(config, sizes, machine, group, chosen, name=name)
    if not fitting:
        why += f"; about {_gb(chosen.total)} may be needed, which is tight"
    if hints := [] if name == "ddp" and fitting else _would_allow_ddp(config, sizes, machine):
        why += f"; {' or '.join(hints)} would {'leave room' if name == 'ddp' else 'allow ddp'}"
    return Decision(name, group, f"strategy.name=auto: {name}{_where(name, group, machine)}, {why}")


def _ddp(why: str) -> Decision:
    return Decision("ddp", "global", f"strategy.name=auto: ddp, {why}")


def _ways(config: Config, sizes: Sizes, machine: Machine) -> dict[tuple[str, str], MemoryNeed]:
    """Return the strategies that may run, the best first: those that send least, and need no DeepSpeed."""
    ways = [("ddp", "global")]
    if machine.world_size > 1:
        sharded = "zero3" if config.strategy.quantization == "nf4" else "fsdp"
        groups = ("node",) if config.strategy.shard_group == "node" else ("node", "global")
        ways += [(sharded, group) for group in groups]
    runs = {
        (name, group): need(config, sizes, name, machine, group)
        for name, group in ways
        if not problems(_changed(config, name=name, shard_group=group), machine)
    }
    return runs or {("ddp", "global"): need(config, sizes, "ddp", machine)}


def _why(config: Config, sizes: Sizes, machine: Machine, group: str, chosen: MemoryNeed, *, name: str) -> str:
    left, gpu = _left_as_it_is(config, sizes, machine), _gb(machine.gpu_bytes)
    if name == "ddp":
        return f"the base takes {_gb(chosen.weights)}{left} of each GPU's {gpu}"
    base, at_once = base_bytes(config, sizes, machine), tokens_at_once(config, sizes)
    why = f"{_gb(chosen.weights)} of the base's {_gb(base)}{left} on each GPU of {gpu}"
    if group == "global" and machine.nodes > 1:
        hidden = break_even(config, sizes, NETWORK)
        why += (
            f"; it crosses between nodes twice a micro-batch, which {hidden:,} tokens on a GPU would hide at"
            f" {NETWORK / 1e9:.0f} GB/s (here {at_once:,})"
        )
    elif not machine.nvlink:
        hidden = break_even(config, sizes, PCIE)
        why += (
            f"; without NVLink between them all it is gathered over PCIe, which {hidden:,} tokens on a GPU"
            f" would hide at {PCIE / 1e9:.0f} GB/s (here {at_once:,})"
        )
    return why


def _where(name: str, group: str, machine: Machine) -> str:
    if name == "ddp":
        return ""
    if group == "node" and machine.nodes > 1:
        return f" in each node's {machine.processes} GPUs"
    return f" over {machine.world_size} GPUs"


def _would_allow_ddp(config: Config, sizes: Sizes, machine: Machine) -> list[str]:
    """Return the settings with which each GPU would hold the whole model."""

    def fits(changed: Setting) -> str | None:
        alone = _changed(changed.config, name="ddp", shard_group="global")
        refused = problems(alone, machine)
        return "" if not refused and need(alone, sizes, "ddp", machine).total <= machine.gpu_bytes else None

    return list(cures(Setting(config, machine), fits, experts=sizes.experts_trained > 0, keys=LEANER))


def _nothing_fits(config: Config, sizes: Sizes, machine: Machine, name: str, least: MemoryNeed) -> str:
    """Return the refusal, with settings that would fit."""

    def fits(changed: Setting) -> str | None:
        ways = _ways(changed.config, sizes, changed.machine)
        way = next((way for (way, _), found in ways.items() if found.total <= machine.gpu_bytes), None)
        return way and f" ({way})"

    setting = Setting(config, machine)
    ways_out = cures(setting, fits, experts=sizes.experts_trained > 0)
    refusal = too_little(setting, sizes, least, ways_out, f" even with {name}, and there are")
    return f"{refusal}; strategy.name: {name} to try all the same"


def too_little(setting: Setting, sizes: Sizes, needed: MemoryNeed, ways_out: Iterable[str], has: str) -> str:
    """Return that a setting needs more than a GPU has, and what would fit. has: words before the bytes that
    a GPU has. Rows of unknown length count as one token, which is not told."""
    config, machine = setting
    gpus = "the GPU" if machine.world_size == 1 else f"each of {machine.world_size} GPUs"
    cure = " or ".join(islice(ways_out, SHOWN)) or "a smaller base model or larger GPUs"
    tokens = f", {_gb(needed.activations + needed.logits)} for {tokens_at_once(config, sizes):,} tokens"
    return (
        f"strategy.name={config.strategy.name}: model.name_or_path={config.model.name_or_path} needs at least"
        f" {_gb(needed.least)} of {gpus}{has} {_gb(machine.gpu_bytes)}"
        f" ({_gb(needed.weights + needed.gathered)} base{_left_as_it_is(config, sizes, machine)},"
        f" {_gb(needed.trained)} adapter{tokens * (sizes.longest != 1)}); what would fit: {cure}"
    )


def _changed(config: Config, **strategy: str) -> Config:
    return config.model_copy(update={"strategy": config.strategy.model_copy(update=strategy)})


def bytes_a_number(config: Config, machine: Machine) -> int:
    """Return the bytes of a number of the base and of activations."""
    on_cpu = config.model.dtype == "auto" and not machine.gpus
    return 4 if on_cpu or config.model.dtype == "float32" else 2


def base_bytes(config: Config, sizes: Sizes, machine: Machine) -> float:
    """Return the bytes of the whole base model. Embeddings and head are not quantised, nor, in int8, a
    mixture's experts."""
    width = bytes_a_number(config, machine)
    body = {"none": width, "nf4": NF4, "int8": 1}[config.strategy.quantization]
    quantised = sizes.body - _left_experts(config, sizes)
    return body * quantised + width * (sizes.total - quantised)


def _left_experts(config: Config, sizes: Sizes) -> int:
    """Return the numbers of experts that quantisation leaves as they are: bitsandbytes has int8 for linear
    layers alone."""
    return sizes.experts if config.strategy.quantization == "int8" else 0


def _left_as_it_is(config: Config, sizes: Sizes, machine: Machine) -> str:
    """Return what is said of experts in a quantised base."""
    if not (left := _left_experts(config, sizes)):
        return ""
    experts = _gb(bytes_a_number(config, machine) * left)
    return f" ({experts} of it experts, which {config.strategy.quantization} leaves as they are)"


def ranks_met(config: Config, experts: int) -> float:
    """Return how many ranks a token is sent to with strategy.expert_parallel, its own among them: the mean
    for experts that are chosen at random. experts: that it meets."""
    ranks = config.strategy.expert_parallel
    return ranks * (1 - (1 - 1 / ranks) ** experts) if ranks > 1 else 0.0


def _elsewhere(config: Config) -> float:
    """Return the share of the experts that other ranks have."""
    return 1 - 1 / config.strategy.expert_parallel


def _experts_elsewhere(config: Config, sizes: Sizes, width: int) -> float:
    """Return the bytes of the base that other ranks have. Parts of experts in nf4 have float32 scales."""
    if config.strategy.quantization != "nf4":
        return width * sizes.experts * _elsewhere(config)
    here = (BITS + 4 / 64) * sizes.experts / config.strategy.expert_parallel
    return (NF4 * sizes.experts - here) * (config.strategy.expert_parallel > 1)


def _trained_elsewhere(config: Config, sizes: Sizes) -> float:
    return _elsewhere(config) * sizes.experts_trained * (config.lora.experts == "all")


def _trained(config: Config, sizes: Sizes) -> int:
    return sizes.trainable - (0 if config.lora.experts == "all" else sizes.experts_trained)


def _trained_bytes(config: Config, count: float, name: str, world: int) -> float:
    optim = config.train.optim
    state = STATES.get(optim, EIGHT_BITS if optim.endswith("8bit") else 8)
    if name in ("ddp", "fsdp"):
        return (8 + state) * count
    whole = {"zero1": 8, "zero2": 4, "zero3": 0}[name]
    parts = {"zero1": 4, "zero2": 8, "zero3": 12}[name] + state
    parts -= (4 + state) * (config.strategy.offload != "none")
    return whole * count + parts * count / world


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
