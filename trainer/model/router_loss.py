"""The auxiliary loss of a mixture's routers, which keeps experts used evenly, independent of batches.

transformers' loss is of all tokens of a batch together: E * sum over experts e of f_e * P_e, where f_e is the
share of tokens that are routed to e, P_e its mean probability, both over all layers, and E the number of
experts. So it depends on which rows share a micro-batch. Here it is each row's own, and a step's is their
mean, weighted by their tokens: the same on any number of ranks, in any micro-batches and packs. For one row
it is transformers'. Padding is in no row.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qwenlora.configs.schema import Config
from qwenlora.run.records import Parameters

RECORDED = "router_logits"  # transformers' name for what a router is asked for


def coefficient(wanted: str | float, model_config: Any) -> float:
    """Return what the loss is multiplied with; 0: there is none. wanted: train.router_aux_loss."""
    text = model_config.get_text_config()
    if wanted != "model":
        return 0.0 if wanted == "off" else float(wanted)
    return float(text.router_aux_loss_coef) if getattr(text, "output_router_logits", False) else 0.0


def check(config: Config, model: Any) -> None:
    """Refuse the loss where it cannot be made. model: the base, on any device. Raises: ValueError."""
    wanted = config.train.router_aux_loss
    if not coefficient(wanted, model.config):
        return
    asked = f"train.router_aux_loss={wanted}" + " (output_router_logits in config.json)" * (wanted == "model")
    if not _routers(model):
        raise ValueError(
            f"{asked}: model.name_or_path={config.model.name_or_path} has no routers that transformers knows"
            " of; set train.router_aux_loss: off"
        )
    if config.strategy.sequence_parallel > 1:
        shared = f"strategy.sequence_parallel={config.strategy.sequence_parallel}"
        raise ValueError(
            f"{asked} with {shared}: it is made of whole rows, of which each rank has a part; set"
            " train.router_aux_loss: off"
        )


def notes_on(config: Config, model_config: Any, parameters: Parameters) -> list[str]:
    """Return what the user is told of a loss that the base asks for, or that no router learns from."""
    share = coefficient(config.train.router_aux_loss, model_config)
    if not share:
        return []
    router = parameters.kinds.get("router")
    frozen = "" if router and router.trained else "; routers are frozen, so LoRA before them learns from it"
    return [
        "train.router_aux_loss: the routers' auxiliary loss, each row's own, is added, times"
        f" {share:g}{frozen}"
    ]


def own_the_router_loss(model: Any, wanted: str | float) -> "RouterLoss | None":
    """Turn the model's own auxiliary loss off; return ours, or None if it is not wanted. wanted:
    train.router_aux_loss."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    share = coefficient(wanted, base.config)
    base.config.get_text_config().output_router_logits = False
    return RouterLoss(base, share) if share else None


class RouterLoss:
    """Adds the gradient of the auxiliary loss to that of a model in training; the loss itself stays that of
    the tokens. tokens: of the global batch; value: of this rank's micro-batches in it, to be added to the
    other ranks'; both begin anew with a step."""

    def __init__(self, base: Any, share: float) -> None:
        text = base.config.get_text_config()
        self._share, self._top_k = share, int(text.num_experts_per_tok)
        self.tokens, self.value = 1, torch.zeros(())
        self._logits: list[Tensor] | None = None  # of the layers so far, [tokens, experts]
        for router, index in _routers(base):
            router.register_forward_hook(lambda _, __, output, index=index: self._record(output[index]))
        base.register_forward_pre_hook(self._begin, with_kwargs=True)
        base.register_forward_hook(self._add, with_kwargs=True)

    def begin(self, tokens: int) -> None:
        """Begin a step. tokens: of its global batch, on all ranks."""
        self.tokens, self.value = tokens, torch.zeros_like(self.value)

    def _record(self, logits: Tensor) -> None:
        if self._logits is not None:  # not while a layer is computed again
            self._logits.append(logits)

    def _begin(self, base: Any, _: object, inputs: dict[str, Any]) -> None:
        trains = base.training and torch.is_grad_enabled() and inputs.get("labels") is not None
        self._logits = [] if trains else None

    def _add(self, base: object, _: object, inputs: dict[str, Any], output: Any) -> Any:
        logits, self._logits = self._logits, None
        if logits:
            loss = summed_over_rows(logits, self._top_k, rows_of(inputs)) / self.tokens
            self.value = self.value.to(loss.device) + loss.detach()
            output.loss = output.loss + self._share * (loss - loss.detach())
        return output


class RowsOfTokens(NamedTuple):
    """The row of each token of a batch, int64 [tokens], and whether it counts, float32 [tokens]; number: of
    rows."""

    row: Tensor
    counts: Tensor
    number: int


def rows_of(inputs: dict[str, Tensor]) -> RowsOfTokens:
    """Return the rows of a batch of data/batches.py, padded or packed. A row of one token trains nothing, and
    is padding, or blank."""
    ids, positions, mask = (inputs.get(name) for name in ("input_ids", "position_ids", "attention_mask"))
    assert ids is not None
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    row = (positions == 0).flatten().cumsum(0) - 1
    attended = torch.ones(ids.shape, device=ids.device) if mask is None else mask.float()
    number = int(row[-1]) + 1
    lengths = torch.zeros(number, device=ids.device).index_add_(0, row, attended.flatten())
    return RowsOfTokens(row, attended.flatten() * (lengths > 1)[row], number)


def summed_over_rows(logits: list[Tensor], top_k: int, rows: RowsOfTokens) -> Tensor:
    """Return the sum over rows of each one's auxiliary loss times its tokens, a float32 scalar. logits: of
    each layer, [tokens, experts].

    Source: transformers.models.qwen3_moe.modeling_qwen3_moe.load_balancing_loss_func.
    """
    experts, device = logits[0].shape[1], rows.row.device
    chosen = torch.zeros(rows.number * experts, device=device)
    probabilities = torch.zeros(rows.number, experts, device=device)
    weights = rows.counts.repeat_interleave(top_k)
    for of_layer in logits:
        shares = of_layer.float().softmax(-1)
        numbers = shares.detach().topk(top_k, -1).indices + experts * rows.row.unsqueeze(1)
        chosen.index_add_(0, numbers.flatten(), weights)
        probabilities = probabilities.index_add(0, rows.row, shares * rows.counts.unsqueeze(1))
    tokens = torch.zeros(rows.number, device=device).index_add_(0, rows.row, rows.counts)
    of_rows = (chosen.view_as(probabilities) * probabilities).sum(1) / tokens.clamp(min=1)
    return of_rows.sum() * experts / len(logits) ** 2


def _routers(model: Any) -> list[tuple[nn.Module, int]]:
    """Return each router of a model, and where in its output its logits are, as transformers has them."""
    asked = [getattr(type(module), "_can_record_outputs", None) or {} for module in model.modules()]
    recorders = [found[RECORDED] for found in asked if RECORDED in found]
    return [
        (module, recorder.index)
        for recorder in recorders[:1]
        for module in model.modules()
        if isinstance(module, recorder.target_class)
    ]
