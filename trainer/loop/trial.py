"""What fits a GPU, tried before the first step: the largest micro-batch, and the fewest layers that compute
their activations again.

The estimate (configs/estimate.py) proposes both. The longest micro-batch then goes forward and backward,
without a step of the optimizer. All ranks try the same, and agree; no rank waits for another meanwhile. So
only a base that is whole on each GPU is tried: ranks that gather parts would wait for one whose memory is
full.
"""

import bisect
import gc
from collections.abc import Callable, Sequence

import torch

from qwenlora.configs import Config
from qwenlora.configs.combinations import SHARDED
from qwenlora.data.order import micro_batches
from qwenlora.trainer.loop.trainer import LoraTrainer
from qwenlora.trainer.model.loading import compute_again
from qwenlora.trainer.ranks.stop import any_rank
from qwenlora.trainer.spread.strategy import KEPT, Spread, deepspeed_settings

MOMENTS_AND_BUCKET = 12  # bytes a trained number that a real step holds besides: Adam's moments, DDP's bucket
GAPS = 2**28  # bytes that are lost between tensors of other sizes


def try_out(trainer: LoraTrainer, config: Config, spread: Spread, layers: int) -> Spread:
    """Try what auto chose, where it chose anything and the base is whole on each rank, and return what fits.
    All ranks call it, before the trainer's engine is made. layers: of the base."""
    train = config.train
    of_size, of_layers = train.per_device_train_batch_size == "auto", train.gradient_checkpointing == "auto"
    shared = config.strategy.sequence_parallel > 1 or config.strategy.expert_parallel > 1
    whole = spread.name not in SHARDED and not shared
    if not whole or not (of_size or of_layers):
        return spread
    among = micro_batches(train.global_batch_size, trainer.args.world_size) if of_size else []
    sizes = halved([spread.micro_batch, *(size for size in among if size < spread.micro_batch)])
    base = trainer.peft_model.get_base_model()

    def fits(size: int, recomputed: int) -> bool:
        compute_again(base, recomputed)
        return step_fits(trainer, size)

    numbers = range(spread.recomputed, layers + 1) if of_layers else [spread.recomputed]
    size, recomputed = search(fits, sizes, numbers, keep=spread.why_so_many == KEPT)
    compute_again(base, recomputed)  # other numbers were tried last
    if size == spread.micro_batch:
        return spread._replace(recomputed=recomputed)
    why = f"a trial step with {spread.micro_batch} did not fit"
    found = spread._replace(recomputed=recomputed, micro_batch=size, why_so_many=why)
    found = found._replace(deepspeed=deepspeed_settings(config, found))
    trainer.cut_into(size, found.deepspeed)
    return found


def halved(sizes: Sequence[int]) -> list[int]:
    """Return the first size, and of the others those that are at most half of the one before."""
    kept = list(sizes[:1])
    for size in sizes[1:]:
        if 2 * size <= kept[-1]:
            kept.append(size)
    return kept


def search(
    fits: Callable[[int, int], bool], sizes: Sequence[int], layers: Sequence[int], *, keep: bool
) -> tuple[int, int]:
    """Return a micro-batch, and how many layers are computed again, with which a step fits. If nothing does,
    the smallest of what is needed.

    sizes: to choose from, the largest first; layers: likewise, the fewest first. A smaller micro-batch costs
    less time than layers that are computed again, and is taken first; keep: rather keep the first size, with
    which the run began, since another one changes the last bits of its numbers.
    """
    size, fewest, most = sizes[0], layers[0], layers[-1]
    if fits(size, fewest):
        return size, fewest
    if not (keep and most > fewest and fits(size, most)):
        size = next((smaller for smaller in sizes[1:] if fits(smaller, fewest)), 0)
        if size:
            return size, fewest
        size = sizes[-1]
    place = bisect.bisect_left(layers, True, lo=1, key=lambda again: fits(size, again))
    return size, layers[min(place, len(layers) - 1)]


def step_fits(trainer: LoraTrainer, size: int) -> bool:
    """Whether the longest micro-batch of a size goes forward and backward on every rank; all ranks call it.
    It changes nothing that training uses: each micro-batch seeds its random numbers anew."""
    device = trainer.args.device
    full = torch.zeros(1, dtype=torch.int32, device=device)
    try:
        held = _hold(trainer)
        trainer.rehearse(size)
        del held
    except torch.OutOfMemoryError:
        full += 1
    trainer.peft_model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        gc.collect()  # the error's frames hold tensors
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # the run's peak is shown
    return not any_rank(full)[0]


def _hold(trainer: LoraTrainer) -> torch.Tensor | None:
    """Return memory that a real step needs besides. Raises: torch.OutOfMemoryError."""
    if trainer.args.device.type != "cuda":
        return None
    trained = sum(p.numel() for p in trainer.peft_model.parameters() if p.requires_grad)
    count = MOMENTS_AND_BUCKET * trained + GAPS
    return torch.empty(count, dtype=torch.uint8, device=trainer.args.device)
