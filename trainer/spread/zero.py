"""DeepSpeed's ZeRO under Trainer: the engine, a step, and the sharded state as whole tensors by name.

Hugging Face's integration is not used: it would cast the adapter to the base's dtype, take over loading and
checkpoints, and take a step before ranks could agree to leave it out. Nothing is compiled: the optimizer is
torch's. Source: https://deepspeed.readthedocs.io/en/latest/zero3.html#debugging
"""

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from qwenlora.trainer.model.fused_lora import INITIAL
from qwenlora.trainer.ranks.faults import TrainingFault

DeepSpeedConfig = dict[str, Any]  # DeepSpeed's own, which configs/deepspeed.py makes
OptimizerState = dict[str, dict[str, Tensor]]  # {parameter's name: {key: whole tensor}}


def start_communication() -> None:
    """Have DeepSpeed use torch's process group, and compile nothing."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    # only inference uses this all-reduce, and compiling it takes 90 seconds on each new machine
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


class OptimizerOfZero(AcceleratedOptimizer):
    """The optimizer that Trainer's loop calls when DeepSpeed has taken the step already."""

    _is_accelerate_prepared = True  # else accelerate copies its state, and DeepSpeed has views of the old

    def step(self, closure: Any = None) -> None:
        """Do nothing."""

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Do nothing."""


class Zero:
    """DeepSpeed's engine for a model. optimizer: torch's, over the model's trained parameters; from now on it
    holds this rank's shards of them, flattened."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, settings: DeepSpeedConfig) -> None:
        start_communication()
        import deepspeed

        self.model, self.optimizer = model, optimizer
        self.stage = int(settings["zero_optimization"]["stage"])
        self.parameters: list[tuple[str, Any]] = [
            (name, p) for name, p in model.named_parameters() if p.requires_grad
        ]
        if self.stage == 3 and list((head := model.get_output_embeddings()).children()):
            # LoRA's parts of a head are gathered together: ranks call them for different numbers of chunks
            deepspeed.utils.set_z3_leaf_module(head, True)
        self.engine: Any = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=[p for _, p in self.parameters],
            config=settings,
            dist_init_required=False,
        )[0]

    # ---- a step

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradients. last: whether it is the step's last micro-batch."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """Clip, take the optimizer's step, and return the gradients' norm before both. If that is not finite,
        DeepSpeed drops the gradients and changes nothing."""
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def spoil(self) -> None:
        """Make the current step change nothing, by setting a gradient that is not finite."""
        from deepspeed.utils import safe_get_local_grad, safe_set_full_grad, safe_set_local_grad

        parameter = self.parameters[0][1]
        if self.stage == 3:
            safe_set_local_grad(parameter, torch.full_like(safe_get_local_grad(parameter), math.nan))
        else:
            safe_set_full_grad(parameter, torch.full_like(parameter, math.nan))

    # ---- the sharded state

    def whole(self) -> AbstractContextManager[Any]:
        """Gather all trained parameters, and their beginnings, to read them while the context is open; all
        ranks must enter it."""
        read = [
            p for name, p in self.model.named_parameters() if p.requires_grad or INITIAL in name.split(".")
        ]
        return self._gathered(read) if self.stage == 3 else nullcontext()

    @staticmethod
    def _gathered(parameters: list[Any], modifier_rank: int | None = None) -> AbstractContextManager[Any]:
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters, modifier_rank)
        return gathered

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (parameter's name, key, whole tensor) of the optimizer's state; all ranks must exhaust it."""
        from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

        self._link()
        per_number, shared = self._keys()
        for name, parameter in self.parameters:
            for key, value in shared.items():
                yield name, key, torch.as_tensor(value)
            for key in per_number:
                if self.stage < 3:
                    yield name, key, safe_get_full_optimizer_state(parameter, key)
                    continue
                shard = safe_get_local_optimizer_state(parameter, key)
                shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
                dist.all_gather(shards, shard.contiguous())
                yield name, key, torch.cat(shards)[: parameter.ds_numel].view(parameter.ds_shape)

    def _link(self) -> None:
        """Have DeepSpeed link each parameter to its part of the optimizer's state."""
        # DeepSpeed itself links all groups after the first group's step, when the others have no state yet
        if self.stage < 3 and any(self.optimizer.state.get(flat) for flat in self._flat()):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _keys(self) -> tuple[list[str], dict[str, Tensor | float]]:
        """Return the state's keys with a value per trained number, and its items that a parameter has once,
        as step. Sorted, so that all ranks gather in the same order: a restored state has its keys in any."""
        flat = next(iter(self._flat()), None)
        values = {} if flat is None else self.optimizer.state[flat]
        if flat is None or not values:
            return [], {}
        each = sorted(
            key for key, value in values.items() if isinstance(value, Tensor) and value.shape == flat.shape
        )
        return each, {
            key: value for key, value in sorted(values.items()) if key not in each and value is not None
        }

    def _flat(self) -> list[Tensor]:
        """Return this rank's shards of all trained parameters, as the optimizer has them."""
        optimizer = self.engine.optimizer
        if self.stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return list(optimizer.single_partition_of_fp32_groups)

    def restore_state(self, saved: OptimizerState) -> None:
        """Put a saved optimizer state back."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        per_number = self._make_state(saved)
        self._link()
        for name, parameter in self.parameters:
            for key in per_number:
                value = saved[name][key]
                if self.stage < 3:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
                else:
                    safe_set_local_optimizer_state(parameter, self._shard(value, parameter), key)

    def _make_state(self, saved: OptimizerState) -> list[str]:
        """Give the optimizer a state of the saved one's keys; return those that each trained number has."""
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.parameters}
        name, first = next(iter(sorted(saved.items())), ("", {}))
        per_number = sorted(key for key, value in first.items() if tuple(value.shape) == shapes.get(name, ()))
        for flat in self._flat():
            state = self.optimizer.state[flat]
            for key, value in first.items():
                if key not in per_number:
                    state[key] = value.clone()
                elif key not in state:  # before the first step; otherwise keep it: DeepSpeed has views of it
                    state[key] = torch.zeros_like(flat)
        return per_number

    def restore_parameters(self, saved: dict[str, Tensor]) -> None:
        """Put saved parameters back. saved: whole tensors by parameter's name."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for name, parameter in self.parameters:
            value = saved[name].to(parameter.device, torch.float32)
            if self.stage < 3:
                safe_set_full_fp32_param(parameter, value)
                parameter.data.copy_(value)
            else:
                safe_set_local_fp32_param(parameter, self._shard(value, parameter))
                with self._gathered([parameter], modifier_rank=0):  # DeepSpeed also keeps small ones whole
                    parameter.data.copy_(value)

    def _shard(self, whole: Tensor, parameter: Any) -> Tensor:
        """Return this rank's shard of a parameter's tensor, padded as ZeRO-3 pads it."""
        size = parameter.ds_tensor.ds_numel
        flat = torch.zeros(
            size * dist.get_world_size(), dtype=torch.float32, device=parameter.ds_tensor.device
        )
        flat[: whole.numel()] = whole.flatten()
        return flat[dist.get_rank() * size :][:size]

    def check(self) -> None:
        """Raise TrainingFault when this rank holds more than its share of the optimizer's state."""
        if dist.get_world_size() == 1:
            return
        trained = sum(getattr(p, "ds_numel", p.numel()) for _, p in self.parameters)
        here = sum(flat.numel() for flat in self._flat())
        most = math.ceil(trained / dist.get_world_size()) + len(self.parameters) * dist.get_world_size() * 2
        if here > most:
            raise TrainingFault(
                f"ZeRO holds {here:,} of {trained:,} trained numbers on a rank, expected {most:,}"
            )
