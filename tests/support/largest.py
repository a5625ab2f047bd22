"""The largest tensor that operations make."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """Knows how many numbers the largest tensor has that an operation made, views left out; of: those of one
    dtype, or of all."""

    def __init__(self, of: torch.dtype | None = None) -> None:
        super().__init__()
        self.of, self.numbers = of, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **kwargs or {})
        for result in tree_leaves(results) if not function.is_view else ():
            if isinstance(result, torch.Tensor) and self.of in (None, result.dtype):
                self.numbers = max(self.numbers, result.numel())
        return results
