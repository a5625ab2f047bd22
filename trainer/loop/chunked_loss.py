"""The loss of a causal language model, made chunk by chunk where its head is called.

A model of transformers computes the logits of all positions and hands them to its loss function, which keeps
them for the backward pass. Here the head returns the sum of the losses instead: of trained positions only, as
many at a time as LOGITS_AT_ONCE allows. A chunk's gradients are made at once, and its logits are dropped. On
a CPU a frozen head takes one block of the vocabulary after another instead (blocked_loss.py). All this is one
call of the head: what FSDP or DeepSpeed gather for it is there, and each rank gathers it once, however many
chunks it has.

Where tokens have weights a batch has loss_weights, float32 [rows, width], shifted as labels are, and the loss
is sum(weight * loss) / sum(weight) over a global batch. A model hands all that it does not know to its loss
function, which is replaced by one that knows them.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, pad

from qwenlora.configs.estimate import LOGITS_AT_ONCE
from qwenlora.trainer.loop.blocked_loss import blocked_loss, is_matrix
from qwenlora.trainer.model.loading import IGNORED


def own_the_loss(model: Any, *, accepts: bool, weighted: bool) -> str:
    """Make a model compute its loss as the module says. Return a note for the user where its logits have to
    stay whole, else an empty string. accepts: whether its loss is transformers' own for causal models;
    weighted: whether rows have weights. Raises: ValueError if they do, and the model does not accept them."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(base).__name__
    if not accepts and weighted:
        raise ValueError(
            f"the rows have weights, and {name} computes its loss by itself, without them; use weights 0 and"
            " 1 alone, or ignore their key in data.columns"
        )
    if accepts:
        base.loss_function = partial(_loss, base.loss_function)
        if head := _plain_head(base):
            _HeadWithLoss(base, head)
            return ""
    a_token = 12 * base.config.get_text_config().vocab_size / 1e6
    why = "changes its logits before the loss" if accepts else "computes its loss by itself"
    return f"{name} {why}: the logits of all positions are kept, about {a_token:.2g} MB a token"


def summed_loss(
    head: Any, states: Tensor, labels: Tensor, weights: Tensor | None = None, *, blocks: bool | None = None
) -> Tensor:
    """Return the sum of the losses of positions, a float32 scalar, by their weights if given.

    head: gives the logits of states; it may be trained, in part or whole. states: [positions, hidden];
    labels: int64 [positions]; weights: float32 [positions]. There may be no position: the sum is then 0, with
    gradients of zeros. The memory for logits does not depend on the number of positions. blocks: whether a
    frozen head takes blocks of the vocabulary; None: on a CPU (on a GPU that was not measured).
    """
    if is_matrix(head) and (states.device.type == "cpu" if blocks is None else blocks):
        of_blocks: Tensor = _BlockedLoss.apply(head.weight, labels, weights, states)  # type: ignore[no-untyped-call]
        return of_blocks
    trained = [p for p in head.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    states = states if torch.is_grad_enabled() else states.detach()
    total: Tensor = _SummedLoss.apply(head, labels, weights, states, *trained)  # type: ignore[no-untyped-call]
    return total


class _SummedLoss(torch.autograd.Function):
    """summed_loss() with its gradients, which are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, head: Any, labels: Tensor, weights: Tensor | None, states: Tensor, *trained: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        of_states = torch.empty_like(states if ctx.needs_input_grad[3] else states[:0])
        of_trained = [torch.zeros_like(parameter) for parameter in trained]
        at_once = max(1, LOGITS_AT_ONCE // (4 * _vocabulary(head)))
        count = max(1, -(-len(states) // at_once))
        given = repeat(None) if weights is None else weights.tensor_split(count)
        pieces = (tensor.tensor_split(count) for tensor in (states, labels, of_states))
        for some, their_labels, to, their_weights in zip(*pieces, given, strict=False):
            some = some.detach().requires_grad_(ctx.needs_input_grad[3])
            wanted = [some, *trained] if some.requires_grad else list(trained)
            loss, gradients = _chunk(head, some, their_labels, their_weights, wanted)
            total += loss
            if some.requires_grad:
                to.copy_(gradients.pop(0))
            for so_far, more in zip(of_trained, gradients, strict=True):
                so_far += more
        ctx.save_for_backward(of_states, *of_trained)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[3:], strict=True)
        return (None, None, None, *(made * slope if wanted else None for made, wanted in needed))


class _BlockedLoss(torch.autograd.Function):
    """summed_loss() of a frozen matrix, block by block; the gradient is made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, labels: Tensor, weights: Tensor | None, states: Tensor) -> Tensor:
        losses, slopes = blocked_loss(matrix, states, labels, gradient=ctx.needs_input_grad[3])
        if weights is not None:
            losses *= weights
        if slopes is not None:
            slopes = slopes if weights is None else slopes.mul_(weights.unsqueeze(1))
            ctx.save_for_backward(slopes.to(states.dtype))
        return losses.sum().float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, ctx.saved_tensors[0] * slope


def _chunk(
    head: Any, states: Tensor, labels: Tensor, weights: Tensor | None, wanted: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the sum of some positions' losses, float64, and its gradients: of states and parameters."""
    with torch.set_grad_enabled(bool(wanted)):
        logits = head.forward(states)
    logs = torch.log_softmax(logits.detach(), -1, dtype=torch.float32)
    losses = -logs.gather(1, labels.unsqueeze(1)).squeeze(1).double()
    loss = losses.sum() if weights is None else (losses * weights).sum()
    if not wanted:
        return loss, []
    slopes = logs.exp_()  # the loss's gradient: the probabilities, less 1 at the label
    slopes.scatter_add_(1, labels.unsqueeze(1), slopes.new_full((len(labels), 1), -1))
    if weights is not None:
        slopes *= weights.unsqueeze(1)
    return loss, list(torch.autograd.grad(logits, wanted, slopes.to(logits.dtype), materialize_grads=True))


def _vocabulary(head: Any) -> int:
    """Return how many logits a position has. peft makes a copy of a matrix with trained rows when asked."""
    own = head.original_module if isinstance(head, TrainableTokensWrapper) else head
    return int(own.weight.shape[0])


class _Expected(NamedTuple):
    """What the head needs for the loss: labels and weights, [rows, width], shifted."""

    labels: Tensor
    weights: Tensor | None


class _HeadWithLoss:
    """Makes a model's head return the sum of the losses, a scalar, where the model is called with labels."""

    def __init__(self, base: Any, head: Any) -> None:
        self._head, self._logits_of = head, head.forward
        self._expected: _Expected | None = None
        head.forward = self._forward
        base.register_forward_pre_hook(self._expect, with_kwargs=True)
        base.register_forward_hook(self._hide)

    def _expect(self, base: object, _: object, inputs: dict[str, Any]) -> None:
        labels = inputs.get("labels")
        self._expected = (
            None if labels is None else _Expected(_shifted(labels, inputs), inputs.get("loss_weights"))
        )

    def _forward(self, states: Tensor) -> Tensor:
        # a chunk's logits are asked for with nothing expected
        expected, self._expected = self._expected, None
        if expected is None or expected.labels.shape != states.shape[:-1]:
            logits: Tensor = self._logits_of(states)
            return logits
        labels = expected.labels.flatten()
        trained = (labels != IGNORED).nonzero().squeeze(1)
        labels, states = labels[trained], states.flatten(0, -2).index_select(0, trained)
        if expected.weights is None or not len(trained):
            return summed_loss(self._head, states, labels)
        weights = expected.weights.flatten()[trained]
        largest = weights.max()  # without it float16's gradients would vanish, or be infinite
        return summed_loss(self._head, states, labels, weights / largest) * largest

    @staticmethod
    def _hide(base: object, _: object, output: Any) -> Any:
        if getattr(output, "logits", None) is not None and not output.logits.ndim:
            output.logits = None  # there are none
        return output


def _shifted(labels: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Return the label of each position's next token. inputs: may have them as shift_labels."""
    given: Tensor | None = inputs.get("shift_labels")
    return pad(labels, (0, 1), value=IGNORED)[:, 1:] if given is None else given


def _loss(
    own: Any,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    *,
    loss_weights: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """A model's loss function. own: the one that it had; logits: or the sum of the losses, a scalar."""
    if logits.ndim and loss_weights is None:
        loss: Tensor = own(logits, labels, vocab_size, **options)
        return loss
    labels, total = _shifted(labels, options), logits
    weights = (labels != IGNORED).float() if loss_weights is None else loss_weights
    if logits.ndim:
        rows = logits.float().flatten(0, 1)
        losses = cross_entropy(rows, labels.flatten(), ignore_index=IGNORED, reduction="none")
        total = (losses * weights.flatten()).sum()
    number = options.get("num_items_in_batch")  # or the weight of the global batch
    return total / (weights.sum() if number is None else number)


def _plain_head(base: Any) -> nn.Module | None:
    """Return the model's head if its forward hands the head's logits to the loss function as they are. None
    where it caps or scales them, and where that cannot be read in its code."""
    head = base.get_output_embeddings()
    assert head is not None, "a causal language model has a head"
    nodes = _code_of(type(base).forward)
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    of_head = [call for call in calls if getattr(base, _attribute(call.func), None) is head]
    made = [node.targets for node in nodes if isinstance(node, ast.Assign) and node.value in of_head]
    if len(of_head) != 1 or len(made) != 1:
        return None
    name = ast.unparse(made[0][0])
    uses = [node for node in nodes if isinstance(node, ast.Name) and node.id == name]
    return head if set(uses) <= {*made[0], *_handed_over(calls)} else None


def _code_of(function: Any) -> list[ast.AST]:
    """Return all parts of a function's code; none where it cannot be read."""
    try:
        code = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return []
    return list(ast.walk(ast.parse(textwrap.dedent(code))))


def _handed_over(calls: list[ast.Call]) -> Iterator[ast.expr]:
    """Yield what calls of the loss function get, and what is named logits in any call."""
    for call in calls:
        to_loss = _attribute(call.func) == "loss_function"
        yield from call.args if to_loss else ()
        yield from (keyword.value for keyword in call.keywords if to_loss or keyword.arg == "logits")


def _attribute(function: ast.expr) -> str:
    """Return x of an expression self.x, else an empty string."""
    of_self = isinstance(function, ast.Attribute) and ast.unparse(function.value) == "self"
    return function.attr if isinstance(function, ast.Attribute) and of_self else ""
