"""EVA: each A begins as the directions in which the inputs of its layer vary most, by peft's own code, over
trained tokens of the run's first rows. B begins as zero, so the base is what it was.

All ranks compute the same rows, so that A does not depend on their number, and take rank 0's result. A resume
has A from its checkpoint. Source: https://arxiv.org/abs/2410.07170
"""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from peft.tuners.lora import EvaConfig, LoraLayer
from peft.tuners.lora.eva import _get_eva_state_dict
from torch import Tensor

from qwenlora.configs import Config
from qwenlora.data.chat import Tokens
from qwenlora.data.order import Order
from qwenlora.data.prepared import Side
from qwenlora.trainer.loop.batches import collate
from qwenlora.trainer.model.fused_lora import ADAPTER
from qwenlora.trainer.model.loading import IGNORED, device
from qwenlora.trainer.model.row_attention import takes_rows_end_to_end

BATCHES = 1000  # in which the directions have settled, or never do


def begin(model: Any, config: Config, order: Order, side: Side, beat: Callable[[], None]) -> None:
    """Begin the adapter of a PeftModel whose layers are not fused yet; all ranks call it. beat: is called for
    each batch. Raises: ValueError when the rows do not give each layer as many directions as its rank."""
    settings = LoraConfig(r=config.lora.r, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    base = model.get_base_model()

    def forward(_: Any, batch: dict[str, Tensor]) -> None:
        ids = batch["input_ids"].to(device())
        # rows are padded on the right, which no token before sees
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        where = {"position_ids": places} if takes_rows_end_to_end(model) else {}
        base(input_ids=ids, logits_to_keep=1, **where)
        beat()

    with torch.no_grad(), model.disable_adapter():
        found = _get_eva_state_dict(
            model,
            _Batches(config, order, side),
            settings,
            target_module_check_fn=lambda _, module: isinstance(module, LoraLayer),
            forward_fn=forward,
            prepare_model_inputs_fn=lambda batch, _: (batch["labels"] != IGNORED).flatten().to(device()),
            prepare_layer_inputs_fn=_at_trained_tokens,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            a = found[name].to(device(), torch.float32).contiguous()
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.broadcast(a, src=0)
            layer.lora_A[ADAPTER].weight.data = a


def _at_trained_tokens(inputs: tuple[Tensor, ...], trained: Tensor, _: str) -> Tensor:
    """Return a layer's inputs, [tokens, width]. trained: which tokens of the batch are, bool [tokens]."""
    return inputs[0].reshape(-1, inputs[0].shape[-1])[trained]


class _Batches:
    """Batches of rows in the order of training, each of at most data.max_length tokens with their padding,
    but with no fewer trained ones than the rank."""

    def __init__(self, config: Config, order: Order, side: Side) -> None:
        self.config, self.order, self.side = config, order, side

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows: list[Tokens] = []
        made = 0
        for row in self._rows():
            size = max(len(one.ids) for one in (*rows, row)) * (len(rows) + 1)
            trained = sum(int(one.trained.sum()) for one in rows)
            if rows and size > self.config.data.max_length and trained >= self.config.lora.r:
                yield collate(rows, 0)
                rows, made = [], made + 1
                if made == BATCHES:
                    break
            rows.append(row)
        raise ValueError(
            f"lora.init_lora_weights=eva: the inputs of the layers have no {self.config.lora.r} settled"
            f" directions after {BATCHES} batches of rows; set a smaller lora.r, or another start"
        )

    def _rows(self) -> Iterator[Tokens]:
        for step in count():
            for number in self.order.rows(step):
                yield self.side.row(number)
