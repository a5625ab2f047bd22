"""DeepSpeed's ZeRO under Trainer: the engine, a step, and what ranks hold in parts as whole tensors by name.

Without Hugging Face's integration, which would cast the adapter to the base's dtype, take over loading and
checkpoints, and step before anyone could ask whether to. Nothing is compiled: the optimizer is torch's.
Source: https://deepspeed.readthedocs.io/en/latest/zero3.html#debugging
"""

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qwenlora.trainer.ranks.faults import TrainingFault


def start_communication() -> None:
    """Have DeepSpeed use torch's process group, and compile nothing."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    # would be compiled for a minute and a half in every new place, for an all-reduce that only inference uses
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


class Zero:
    """The engine of a model. settings: DeepSpeed's config.

    optimizer: torch's, over the model's trained parameters. From now on it holds this rank's parts of them,
    flat.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
    ) -> None:
        start_communication()
        import deepspeed

        self.model, self.optimizer = model, optimizer
        self.stage = int(settings["zero_optimization"]["stage"])
        self.parameters: list[tuple[str, Any]] = [
            (name, p) for name, p in model.named_parameters() if p.requires_grad
        ]
        self.engine: Any = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=[p for _, p in self.parameters],
            config=settings,
            dist_init_required=False,
        )[0]

    # ---- a step

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradients. last: of its step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """Clip, and let the optimizer take its step; return the gradients' norm before that.

        A norm that is not finite changes nothing, and the gradients are gone.
        """
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def spoil(self) -> None:
        """Have the step under way change nothing."""
        from deepspeed.utils import safe_get_local_grad, safe_set_full_grad, safe_set_local_grad

        parameter = self.parameters[0][1]
        if self.stage == 3:
            safe_set_local_grad(parameter, torch.full_like(safe_get_local_grad(parameter), math.nan))
        else:
            safe_set_full_grad(parameter, torch.full_like(parameter, math.nan))

    # ---- what is held in parts

    def whole(self) -> AbstractContextManager[Any]:
        """Have all that is trained whole on every rank, to be read; all ranks enter."""
        return self._gathered([p for _, p in self.parameters]) if self.stage == 3 else nullcontext()

    @staticmethod
    def _gathered(parameters: list[Any], modifier_rank: int | None = None) -> AbstractContextManager[Any]:
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters, modifier_rank)
        return gathered

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (parameter's name, key, what the optimizer keeps of it), whole; all ranks walk through it."""
        from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

        self._link()
        like_parameters, shared = self._keys()
        for name, parameter in self.parameters:
            for key, value in shared.items():
                yield name, key, torch.as_tensor(value)
            for key in like_parameters:
                if self.stage < 3:
                    yield name, key, safe_get_full_optimizer_state(parameter, key)
                    continue
                part = safe_get_local_optimizer_state(parameter, key)
                parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
                dist.all_gather(parts, part.contiguous())
                yield name, key, torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)

    def _link(self) -> None:
        """Have DeepSpeed know each parameter's part of the state: it links all groups after the first one's
        step."""
        if self.stage < 3 and any(self.optimizer.state.get(flat) for flat in self._flat()):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _keys(self) -> tuple[list[str], dict[str, Any]]:
        """Return the keys of what the optimizer keeps for each number, and what it keeps once for all, as the
        step.

        Sorted: all ranks gather one after the other, and a file's keys come in any order.
        """
        flat, values = next(((one, self.optimizer.state[one]) for one in self._flat()), (None, {}))
        if flat is None or not values:
            return [], {}
        whole = sorted(
            key for key, value in values.items() if isinstance(value, Tensor) and value.shape == flat.shape
        )
        return whole, {
            key: value for key, value in sorted(values.items()) if key not in whole and value is not None
        }

    def _flat(self) -> list[Tensor]:
        """Return this rank's parts of all that is trained, as the optimizer sees them."""
        optimizer = self.engine.optimizer
        parts = (
            optimizer.fp32_partitioned_groups_flat
            if self.stage == 3
            else optimizer.single_partition_of_fp32_groups
        )
        return list(parts)

    def restore_state(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """Put the optimizer's state back. saved: whole tensors, {parameter's name: {key: value}}."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        one, first = next(iter(sorted(saved.items())), ("", {}))
        shape = next(
            (tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.parameters if name == one), ()
        )
        like_parameters = sorted(key for key, value in first.items() if tuple(value.shape) == shape)
        for flat in self._flat():
            state = self.optimizer.state[flat]
            for key, value in first.items():
                if key not in like_parameters:
                    state[key] = value.clone()
                elif key not in state:  # before the first step; DeepSpeed keeps views of it, so it stays
                    state[key] = torch.zeros_like(flat)
        self._link()
        for name, parameter in self.parameters:
            for key in like_parameters:
                value = saved[name][key]
                if self.stage < 3:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
                else:
                    safe_set_local_optimizer_state(parameter, self._part(value, parameter), key)

    def restore_parameters(self, saved: dict[str, Tensor]) -> None:
        """Put all that is trained back. saved: whole tensors by parameter's name."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for name, parameter in self.parameters:
            value = saved[name].to(parameter.device, torch.float32)
            if self.stage < 3:
                safe_set_full_fp32_param(parameter, value)
                parameter.data.copy_(value)
            else:
                safe_set_local_fp32_param(parameter, self._part(value, parameter))
                with self._gathered([parameter], modifier_rank=0):  # small ones are kept whole besides
                    parameter.data.copy_(value)

    def _part(self, whole: Tensor, parameter: Any) -> Tensor:
        """Return this rank's part of a parameter's tensor, padded as ZeRO-3 pads it."""
        size = parameter.ds_tensor.ds_numel
        flat = torch.zeros(
            size * dist.get_world_size(), dtype=torch.float32, device=parameter.ds_tensor.device
        )
        flat[: whole.numel()] = whole.flatten()
        return flat[dist.get_rank() * size :][:size]

    def check(self) -> None:
        """Make sure that it does what its name says. Raises: TrainingFault when ranks hold more than their
        part."""
        if dist.get_world_size() == 1:
            return
        trained = sum(getattr(p, "ds_numel", p.numel()) for _, p in self.parameters)
        held = sum(flat.numel() for flat in self._flat())
        most = math.ceil(trained / dist.get_world_size()) + len(self.parameters) * dist.get_world_size() * 2
        if held > most:
            raise TrainingFault(
                f"ZeRO holds {held:,} of {trained:,} trained numbers on a rank, expected {most:,}"
            )
