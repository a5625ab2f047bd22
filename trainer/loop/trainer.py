"""transformers.Trainer, with what it lacks: our row order, exact evaluation, exact resume, faults that are
seen.

Every Trainer method that is overridden stands in LoraTrainer; tests/trainer/test_training.py and
test_deepspeed_parts.py fail when a new transformers changes what they rely on.
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_callback import PrinterCallback, TrainerCallback, TrainerControl
from transformers.training_args import OptimizerNames

from qwenlora.configs import Config
from qwenlora.data.order import Order, accumulation_steps, total_steps
from qwenlora.data.packing import Packs
from qwenlora.data.prepared import Side
from qwenlora.run import checkpoints
from qwenlora.run.checkpoints import ADAPTER, OPTIMIZER, STATE
from qwenlora.run.folder import RunFolder, step_of
from qwenlora.run.records import Cursor, Schedule, State
from qwenlora.trainer.loop import state as states
from qwenlora.trainer.loop.batches import StepLoader, eval_batches
from qwenlora.trainer.loop.saver import Saver
from qwenlora.trainer.model.base import IGNORED, pick_dtype
from qwenlora.trainer.ranks import faults
from qwenlora.trainer.ranks.stop import Stop
from qwenlora.trainer.spread.sequence import Team
from qwenlora.trainer.spread.zero import Zero

log = logging.getLogger("qwenlora")


def order_of(config: Config, train: Side, packs: Packs | None = None) -> Order:
    """Return the run's row order."""
    return Order(
        train.lengths,
        config.train.global_batch_size,
        config.train.per_device_train_batch_size,
        config.train.seed,
        packs,
        config.data.max_length,
    )


def training_arguments(
    config: Config, run: RunFolder, units: int, world_size: int, evaluates: bool, name: str = "ddp"
) -> TrainingArguments:
    """Return transformers' arguments for a config. units: rows an epoch, or packs; name: the strategy's,
    decided."""
    train = config.train
    dtype = pick_dtype(config.model.dtype)
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(run.path),
        per_device_train_batch_size=train.per_device_train_batch_size,
        per_device_eval_batch_size=train.per_device_eval_batch_size,
        gradient_accumulation_steps=accumulation_steps(
            train.global_batch_size,
            train.per_device_train_batch_size,
            world_size,
            config.strategy.sequence_parallel,
        ),
        max_steps=total_steps(units, train.global_batch_size, train.num_train_epochs, train.max_steps),
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        lr_scheduler_kwargs=dict(train.lr_scheduler_kwargs),
        warmup_steps=train.warmup_steps,
        optim=train.optim,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        eval_strategy=train.eval_strategy if evaluates else "no",
        eval_steps=train.eval_steps,
        save_strategy=train.save_strategy,
        **({"save_steps": train.save_steps} if train.save_steps else {}),
        save_total_limit=None,  # checkpoints.py drops old ones, after the new one is whole
        logging_steps=config.log.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a NaN loss is shown as NaN
        # DeepSpeed adds up gradients itself, and has no no_sync
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": name.startswith("zero")}},
        average_tokens_across_devices=True,  # the loss is a mean over the trained tokens of the global batch
        bf16=dtype == torch.bfloat16,
        fp16=on_gpu and dtype == torch.float16,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=False,
        ddp_timeout=config.launch.ddp_timeout_s,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
    )


def check_settings(config: Config, units: int) -> None:
    """Refuse what transformers would refuse much later, with the model loaded. Raises: ValueError naming the
    key.

    It makes no TrainingArguments: these join the process group, for which the other ranks are not ready yet.
    """
    train = config.train
    steps = total_steps(units, train.global_batch_size, train.num_train_epochs, train.max_steps)
    try:
        OptimizerNames(train.optim)
    except ValueError as error:
        raise ValueError(f"train.optim={train.optim}: {str(error).splitlines()[0]}") from error
    try:
        get_scheduler(
            train.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1, requires_grad=True)]),
            num_warmup_steps=int(train.warmup_steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(train.lr_scheduler_kwargs),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"train.lr_scheduler_kwargs={train.lr_scheduler_kwargs} with"
            f" lr_scheduler_type={train.lr_scheduler_type}: {error}"
        ) from error


class _GoOn(TrainerCallback):
    """Gives a resumed run what Trainer does not: the loss since the last logging step, and the config's
    intervals."""

    def __init__(self, trainer: "LoraTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: Any, control: TrainerControl, **_: Any) -> None:
        if saved := self.trainer.resumed:
            state.compute_steps(args, state.max_steps)  # those of the checkpoint may be others
            losses = saved.loss_so_far
            same = len(losses) == args.world_size
            self.trainer._tr_loss.fill_(losses[args.process_index] if same else sum(losses) / len(losses))
            self.trainer._globalstep_last_logged = saved.logged_step


class _Stepped(AcceleratedOptimizer):
    """The optimizer as Trainer's loop knows it, when DeepSpeed has taken the step already."""

    _is_accelerate_prepared = True  # else its state would be copied, and DeepSpeed's views of it left behind

    def step(self, closure: Any = None) -> None:
        """Do nothing."""

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Do nothing."""


class LoraTrainer(Trainer):
    """Trainer over prepared rows in our order.

    saver: writes checkpoints; on rank 0 alone, None on the others. place: where a training row stands, by its
    number.
    deepspeed: DeepSpeed's config, for zero1 to zero3. team: the ranks that share this one's sequences.
    """

    control: TrainerControl

    def __init__(
        self,
        model: Any,
        config: Config,
        args: TrainingArguments,
        order: Order,
        train: Side,
        eval_: Side | None,
        *,
        saver: Saver | None = None,
        stop: Stop | None = None,
        place: Callable[[int], str] = str,
        warn: Callable[[str], None] = log.warning,
        deepspeed: dict[str, Any] | None = None,
        team: Team | None = None,
        **kw: Any,
    ):
        self.config, self.order, self.train_side, self.eval_side = config, order, train, eval_
        self.saver, self.stop, self.place, self.warn = saver, stop or Stop(), place, warn
        self.resumed: State | None = None  # of the checkpoint that this attempt goes on from
        self.losses: dict[int, float] = {}  # {step: eval_loss}, to find the best checkpoint by
        self.zero: Zero | None = None
        self._deepspeed = deepspeed
        self._file_names: dict[str, str] = {}  # of parameters, while they are whole
        self.wandb_id = ""
        self.data_wait_s = 0.0  # seconds spent waiting for batches so far
        self.saving_s = 0.0  # seconds that saves held up training so far
        self.idle_s = 0.0  # seconds spent evaluating and saving so far
        self._memory = states.HostMemory()
        self._losses: list[Tensor] = []  # of this rank's micro-batches in the step under way
        self._loss_before: Tensor | None = None  # that step
        self._left_out = 0  # steps in a row
        super().__init__(model=model, args=args, eval_dataset=eval_, callbacks=[self.stop], **kw)
        self.team = team or Team(number=args.process_index, teams=args.world_size)
        self.remove_callback(PrinterCallback)
        self.add_callback(_GoOn(self))

    @property
    def _pad_id(self) -> int:
        return int(self.processing_class.pad_token_id)

    @property
    def _adam(self) -> Any:
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # without accelerate's wrapper
        return optimizer

    # ---- how the model is spread

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """Return what a step goes through. Trainer's way is DDP over all of the model, and none for a sharded
        one."""
        if self.zero:
            return self.zero.engine
        sharded = any(isinstance(p, DTensor) for p in model.parameters())
        if model is not self.model or not (self._deepspeed or sharded):
            return super()._wrap_model(model, training, dataloader)
        self.accelerator.prepare_model(
            model, device_placement=False, evaluation_mode=True
        )  # autocast, and no more
        if self._deepspeed:
            self._file_names = states.file_names(model)
            self.zero = Zero(model, self._adam, self._deepspeed)
            self.zero.check()
            self.accelerator.backward = self._backward_of_zero
            return self.zero.engine
        if not dist.is_initialized() or self.args.world_size == 1:
            return model
        # FSDP2 holds the frozen base; what is trained is whole on every rank, and DDP's alone
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        frozen += [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)  # type: ignore[no-untyped-call]
        return DistributedDataParallel(model, find_unused_parameters=False)

    def _backward_of_zero(self, loss: Tensor, **_: Any) -> None:
        assert self.zero
        self.zero.backward(loss, last=self.accelerator.sync_gradients)

    def whole(self) -> AbstractContextManager[Any]:
        """Have all that is trained whole on this rank, to be read; all ranks enter."""
        return self.zero.whole() if self.zero else nullcontext()

    def make_engine(self) -> None:
        """Make DeepSpeed's engine, if there is to be one: without it, ZeRO-3's base cannot be looked at."""
        if self._deepspeed and not self.zero:
            self._prepare_for_training(self.args.max_steps, self.get_train_dataloader(), None)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this rank's loader. Accelerate does not wrap it: it would change the order with the world
        size."""
        return StepLoader(
            self.train_side,
            self.order,
            self.team.teams,
            self.team.number,
            self.args.gradient_accumulation_steps,
            self._pad_id,
            flat=self.config.model.attn_implementation.startswith("flash"),
            cut=self.team.cut,
        )

    # ---- a step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Time what Trainer waits for data (not for the other ranks' counts); the rest is Trainer's own."""
        self._losses, self._loss_before = [], self._tr_loss.clone()
        samples: tuple[list[Any], Tensor | int | None]
        samples = super().get_batch_samples(self._timed(epoch_iterator), num_batches, device)
        return samples

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.data_wait_s += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Compute a micro-batch as Trainer does. Its dropout depends on seed, step and its number in the step
        alone."""
        shape = tuple(inputs["input_ids"].shape)
        number = len(self._losses) * self.team.teams + self.team.number
        seed_micro_batch(self.args.seed, self.state.global_step, number, self.team.place)
        try:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(shape, trained=True) from error
        self._losses.append(loss.detach())
        return loss

    def _out_of_memory(self, shape: tuple[int, ...], *, trained: bool) -> faults.TrainingFault:
        return faults.out_of_memory(
            self.config, self.state.global_step, self.args.process_index, shape, trained
        )

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip, where DeepSpeed does not."""
        return None if self.zero else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the gradient's norm; before the optimizer uses it, all ranks agree on whether it is one."""
        if self.zero:
            return self._step_of_zero(self.zero)
        norm = super()._get_grad_norm(model, grad_norm)
        finite = torch.stack(self._losses).isfinite().all()
        if (
            self.accelerator.scaler is None
        ):  # float16's scaler looks for it itself, and expects it now and then
            finite &= torch.as_tensor(norm, device=finite.device).isfinite()
        if self.stop.agree(self.args.device, also=~finite):
            self._not_finite()
        else:
            self._left_out = 0
        return norm

    def _step_of_zero(self, zero: Zero) -> float:
        """Take the step, unless all ranks agree not to, and return the gradient's norm before it."""
        if broken := self.stop.agree(self.args.device, also=~torch.stack(self._losses).isfinite().all()):
            zero.spoil()
        norm = zero.step()  # the same on all ranks
        if broken or not math.isfinite(norm):
            self._not_finite()
        else:
            self._left_out = 0
        return norm

    def _not_finite(self) -> None:
        """Stop, or leave this step out, as train.on_nan says."""
        step, per_device = self.state.global_step + 1, self.args.per_device_train_batch_size
        broken = faults.broken_micro_batches(self._losses, self.team.number, self.team.teams)
        units = self.order.step(*divmod(step - 1, self.order.steps_per_epoch))
        of_loss = [
            unit for number in broken for unit in units[number * per_device : (number + 1) * per_device]
        ]
        rows = sorted(row for unit in of_loss or units for row in unit)
        what = faults.describe(step, "loss" if of_loss else "gradient", rows, self.place)
        self._left_out += 1
        policy = self.config.train.on_nan
        if policy == "stop":
            raise faults.TrainingFault(
                f"{what}; it changed no weight, and the checkpoints are from before it: look at these rows,"
                " lower train.learning_rate, or set train.on_nan: skip or rollback"
            )
        if self._left_out > faults.IN_A_ROW:
            raise faults.TrainingFault(
                f"{what}; train.on_nan={policy} gives up: so were the {faults.IN_A_ROW} before"
            )
        then = "left out"
        if policy == "rollback":
            checkpoint = self._newest_checkpoint()
            if checkpoint is None:
                raise faults.TrainingFault(
                    f"{what}; train.on_nan=rollback has no checkpoint to go back to yet"
                )
            self._restore_adapter(checkpoint)
            self._restore_optimizer(checkpoint)
            then = f"left out, and the weights are those of {checkpoint.name} again"
        assert self._loss_before is not None, "a step has begun"
        self._tr_loss.copy_(self._loss_before)
        self._globalstep_last_logged += 1  # the mean is over the other steps
        if self.accelerator.scaler is None and not self.zero:
            self.model.zero_grad(set_to_none=True)  # an optimizer passes over what has no gradient
        self.warn(f"{what}: {then}")

    def _newest_checkpoint(self) -> Path | None:
        """Return the newest whole checkpoint, the same on all ranks."""
        found: list[Path | None] = [None]
        if self.saver:
            self.saver.wait()
            found = [next((one for one in self.saver.run.checkpoints() if not checkpoints.flaw(one)), None)]
        if dist.is_initialized():
            dist.broadcast_object_list(found)
        return found[0]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: Trainer would walk all modules for each micro-batch; metrics.py knows the FLOPs of a
        token."""
        return 0

    # ---- evaluation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return eval_loss, the mean over all trained tokens whatever the batches and ranks, and
        eval_perplexity.

        Asked to stop meanwhile, it returns nothing: the checkpoint then knows that this evaluation is due.
        """
        start = time.perf_counter()
        assert self.eval_side is not None, "evaluation was asked for without rows"
        was_training = self.model.training
        self.model.eval()
        sums = self._evaluated()
        self.model.train(was_training)
        self.idle_s += time.perf_counter() - start
        if sums is None:
            self.stop.stopped = self.control.should_save = self.control.should_training_stop = True
            return {}
        loss = (sums[0] / sums[1]).item()
        metrics = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
        self.losses[self.state.global_step] = loss
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluated(self) -> Tensor | None:
        """Return float64 [2]: the sum of losses and the number of trained tokens of all ranks; None when
        stopped."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad(), self.accelerator.autocast():
            for batch in eval_batches(
                self.eval_side,  # type: ignore[arg-type]
                self.args.per_device_eval_batch_size,
                self.team.teams,
                self.team.number,
                self._pad_id,
            ):
                self.stop.agree(self.args.device)
                if self.stop.agreed:
                    return None
                batch = self._prepare_inputs(self.team.cut(batch, self._pad_id))
                labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, 1:]
                tokens = (labels != IGNORED).sum()
                try:
                    # num_items_in_batch=1 makes the model return the sum over tokens, not their mean
                    loss = self.model(**batch, num_items_in_batch=1).loss.double()
                except torch.OutOfMemoryError as error:
                    raise self._out_of_memory(tuple(batch["input_ids"].shape), trained=False) from error
                sums += torch.stack([loss, tokens.double()])
        reduced: Tensor = self.accelerator.reduce(sums, "sum")
        return reduced

    def _due(self, strategy: Any, every: float | None, step: int) -> bool:
        """Whether evaluation or saving falls on a step: Trainer does both after the last one, too."""
        every = self.order.steps_per_epoch if strategy == "epoch" else int(every or 1)
        return bool(strategy != "no") and (step % every == 0 or step == self.state.max_steps)

    # ---- saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Copy all that a resume needs to host memory, and have it written. Trainer's own would write in
        place."""
        start = time.perf_counter()
        everyones = self._losses_of_all_ranks()
        if self.saver:
            self.saver.wait()  # it reads what is overwritten next
        snapshot = self._snapshot()
        if self.saver:
            there = {step_of(folder) for folder in self.saver.run.checkpoints()} | {self.state.global_step}
            self.losses = {step: loss for step, loss in self.losses.items() if step in there}
            # the best by eval_perplexity is the best by eval_loss
            losses = dict(self.losses) if self.config.train.metric_for_best_model else {}
            self.saver.save(self.state.global_step, snapshot, self._texts(snapshot, everyones), losses)
        stall = time.perf_counter() - start
        self.idle_s += stall
        self.saving_s += stall
        written = self.saver.last[1] if self.saver and self.saver.last else 0.0
        self.stop.longest_save_s = max(self.stop.longest_save_s, stall, written)

    def _snapshot(self) -> states.Snapshot:
        """Return copies of all that training changes; empty but on rank 0. All ranks call it."""
        with self.whole():
            adapter = states.adapter_of(self.peft_model)
            states.check_alike(adapter, self.args.device)
            kept = self._memory.take("adapter", adapter.items() if self.saver else ())
        state = self.zero.state() if self.zero else states.state_of(self.peft_model, self._adam)
        named = ((f"{name}/{key}", value) for name, key, value in state)
        if self.saver:
            snapshot = states.Snapshot(
                kept, self._memory.take("optimizer", named), states.groups_of(self._adam)
            )
        else:
            for _ in named if self.zero else ():  # the others' parts
                pass
            snapshot = states.Snapshot({}, {}, [])
        self._memory.sync()
        return snapshot

    @property
    def peft_model(self) -> Any:
        """The model with its adapter, without wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def _losses_of_all_ranks(self) -> list[float]:
        losses = [torch.zeros_like(self._tr_loss) for _ in range(self.args.world_size)]
        if self.args.world_size == 1:
            losses = [self._tr_loss]
        else:
            dist.all_gather(losses, self._tr_loss)
        return [float(loss) for loss in losses]

    def _texts(self, snapshot: states.Snapshot, losses: list[float]) -> dict[str, str]:
        """Return a checkpoint's small files."""
        step, every = self.state.global_step, self.order.steps_per_epoch
        scaler = self.accelerator.scaler
        state = State(
            step=step,
            cursor=Cursor(epoch=step // every, step_in_epoch=step % every, steps_per_epoch=every),
            scheduler=Schedule(last_epoch=self.lr_scheduler.last_epoch),
            scaler=scaler.state_dict() if scaler else None,
            optimizer_groups=snapshot.groups,
            loss_so_far=losses,
            logged_step=self._globalstep_last_logged,
            # stopped before it, or saved before it, as at an epoch's end
            evaluation_due=step not in self.losses
            and self._due(self.args.eval_strategy, self.args.eval_steps, step),
            eval_losses=self.losses,
            moved=any(bool(tensor.any()) for name, tensor in snapshot.adapter.items() if "lora_B" in name),
            wandb_id=self.wandb_id,
        )
        kept = dataclasses.replace(self.state, log_history=[], stateful_callbacks={})
        return {
            STATE: state.text(),
            "trainer_state.json": json.dumps(dataclasses.asdict(kept), indent=1, sort_keys=True),
        }

    # ---- resuming

    def load(self, checkpoint: Path) -> None:
        """Put a whole checkpoint's adapter into the model, and take over where it was. train() restores the
        rest."""
        self.resumed = checkpoints.read_state(checkpoint)
        self.losses = dict(self.resumed.eval_losses)
        self.state.global_step = self.resumed.step
        self.state.max_steps = self.args.max_steps
        self.state.epoch = self.state.global_step / self.order.steps_per_epoch
        self._restore_adapter(checkpoint)

    def _restore_adapter(self, checkpoint: Path) -> None:
        content = checkpoints.content(checkpoint, ADAPTER)
        if self.zero:
            with self.whole():
                states.check_fits(self.peft_model, content, checkpoint)
            self.zero.restore_parameters(states.by_parameter_name(content, self._file_names))
        else:
            states.restore_adapter(self.peft_model, content, checkpoint)

    def _restore_optimizer(self, checkpoint: Path) -> None:
        groups = checkpoints.read_state(checkpoint).optimizer_groups
        content = checkpoints.content(checkpoint, OPTIMIZER)
        if self.zero:
            self.zero.restore_state(states.by_parameter(content))
            states.restore_groups(self._adam, groups)
        else:
            states.restore_optimizer(self.peft_model, self._adam, content, groups)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: load() has done it."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Do nothing: what is random in a step depends on the step."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Prepare as Trainer does, but restore optimizer, schedule and scaler from our files."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.zero:
            self.optimizer = _Stepped(self._adam, device_placement=False)
        if resume_from_checkpoint:
            assert self.resumed, "load() comes first"
            self._restore_optimizer(Path(resume_from_checkpoint))
            at = self.lr_scheduler.last_epoch = self.resumed.scheduler.last_epoch
            self.lr_scheduler._step_count = at + 1
            rates = zip(self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas, strict=True)
            self.lr_scheduler._last_lr = [base * factor(at) for base, factor in rates]
            for group, rate in zip(self._adam.param_groups, self.lr_scheduler._last_lr, strict=True):
                group["lr"] = rate
            if self.accelerator.scaler and self.resumed.scaler:
                self.accelerator.scaler.load_state_dict(self.resumed.scaler)
        return prepared


def seed_micro_batch(seed: int, step: int, number: int, place: int = 0) -> None:
    """Make what is random in a micro-batch (dropout) depend on the run's seed, the step and its number there
    alone.

    So it is the same after a resume, and on any number of ranks. place: of this rank's slice in the
    micro-batch, where
    ranks share it: each slice has masks of its own.
    """
    entropy = [seed, step, number, place] if place else [seed, step, number]
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 1)
