"""transformers.Trainer with our row order, exact evaluation, exact resume, and a rule for non-finite steps.
LoraTrainer has every Trainer method that is overridden. tests/trainer/test_trainer.py and
test_deepspeed_parts.py fail when a new transformers changes code that it relies on."""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerControl

from qwenlora.configs import Config
from qwenlora.configs.estimate import cut_into
from qwenlora.data.order import accumulation_steps
from qwenlora.run import checkpoints
from qwenlora.run.checkpoints import ADAPTER, OPTIMIZER, STATE
from qwenlora.run.records import Cursor, Schedule, State
from qwenlora.trainer.loop import state as states
from qwenlora.trainer.loop.batches import Rows, StepLoader, seed_micro_batch, weight_of
from qwenlora.trainer.loop.chunked_loss import own_the_loss
from qwenlora.trainer.loop.evaluation import eval_batches, evaluations_since_best, metrics_of, sum_losses
from qwenlora.trainer.loop.keeper import Keeper
from qwenlora.trainer.loop.neftune import Noise
from qwenlora.trainer.loop.nonfinite import NonFiniteSteps
from qwenlora.trainer.loop.resume import ResumeCallback
from qwenlora.trainer.loop.saver import Saver
from qwenlora.trainer.loop.schedule import begin_above_zero, quicken_b, restore_schedule
from qwenlora.trainer.model.loading import pick_dtype
from qwenlora.trainer.model.router_loss import own_the_router_loss
from qwenlora.trainer.model.row_attention import takes_rows_end_to_end
from qwenlora.trainer.ranks import faults
from qwenlora.trainer.ranks.from_rank_0 import from_rank_0
from qwenlora.trainer.ranks.rendezvous import is_pretended
from qwenlora.trainer.ranks.stop import Stop
from qwenlora.trainer.spread.experts import DividedExperts
from qwenlora.trainer.spread.sequence import Team
from qwenlora.trainer.spread.strategy import check_same_base, replicate_trained
from qwenlora.trainer.spread.zero import DeepSpeedConfig, OptimizerOfZero, Zero

log = logging.getLogger("qwenlora")


class Services(NamedTuple):
    """saver: writes checkpoints, None except on rank 0; stop: decides when to stop; warn: shows a line;
    keeper: keeps snapshots in memory, on the first rank of each node, where that is wanted."""

    saver: Saver | None = None
    stop: Stop | None = None
    warn: Callable[[str], None] = log.warning
    keeper: Keeper | None = None


class LoraTrainer(Trainer):
    """Trainer over prepared rows in our order.

    deepspeed: DeepSpeed's config, for zero1 to zero3. team: the ranks that share this one's sequences.
    experts: those of which this rank has a part.
    resumed: the state of the checkpoint that this attempt continues, if any. data_wait_s, evaluating_s,
    saving_s: seconds so far of waiting for batches, of evaluations, and of saves that held up training;
    idle_s: of all that is no training.
    wandb_id: the W&B run's, for checkpoints. only_memory: the next save is a snapshot in memory.
    end_to_end: rows are not padded, but lie one after the other.
    """

    control: TrainerControl

    def __init__(
        self,
        model: Any,
        config: Config,
        args: TrainingArguments,
        rows: Rows,
        services: Services = Services(),  # noqa: B008 (frozen)
        *,
        deepspeed: DeepSpeedConfig | None = None,
        team: Team | None = None,
        experts: DividedExperts | None = None,
        **kwargs: Any,
    ):
        self.config, self.rows, self.order, self.train_side = config, rows, rows.order, rows.train
        self.saver, self.stop, self.warn = services.saver, services.stop or Stop(), services.warn
        self.keeper = services.keeper
        self.resumed: State | None = None
        self.losses: dict[int, float] = {}  # {step: eval_loss} of all evaluations, the same on all ranks
        self.zero: Zero | None = None
        self.wandb_id = ""
        self.only_memory = False
        self.data_wait_s = self.evaluating_s = self.saving_s = self.idle_s = 0.0
        self._deepspeed, self.experts = deepspeed, experts
        self.end_to_end = takes_rows_end_to_end(model)
        self._names_in_file: dict[str, str] = {}  # by parameter; read while these are whole
        self._memory = states.HostMemory()
        self._losses: list[Tensor] = []  # of this rank's micro-batches in the current step
        self._loss_before: Tensor | None = None  # Trainer's sum of losses before the current step
        super().__init__(
            model=model, args=args, eval_dataset=rows.evaluation, callbacks=[self.stop], **kwargs
        )
        self.team = team or Team(number=args.process_index, teams=args.world_size)
        alpha, embeddings = config.train.neftune_noise_alpha, model.get_input_embeddings()
        self.noise = alpha and Noise(embeddings, alpha, args.seed, rows.train.lengths, self.team)
        self.nonfinite = NonFiniteSteps(config, rows, self.team)
        of_transformers = self.model_accepts_loss_kwargs and self._loss_shifts_labels
        if note := own_the_loss(self.model, accepts=of_transformers, weighted=rows.weighted):
            self.warn(note)
        self.router_loss = own_the_router_loss(self.model, config.train.router_aux_loss)
        self.remove_callback(PrinterCallback)
        self.add_callback(ResumeCallback(self))

    @property
    def peft_model(self) -> Any:
        """The model with its adapter, without wrappers."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def gave_up(self) -> bool:
        """Whether train.early_stopping_patience evaluations in a row were not better than the best before."""
        patience = self.config.train.early_stopping_patience
        return patience is not None and evaluations_since_best(self.losses) >= patience

    @property
    def _flat(self) -> bool:
        """Whether a micro-batch's rows lie one after the other in a single line."""
        flash = self.config.model.attn_implementation.startswith("flash")
        return self.end_to_end or (self.order.packs is not None and flash)

    @property
    def _pad_id(self) -> int:
        return int(self.processing_class.pad_token_id)

    @property
    def _adam(self) -> Any:
        """torch's optimizer, without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    # ---- how the model is spread

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """Return the model that a step calls: DeepSpeed's engine, or with several ranks DDP over what is
        trained. Trainer's own DDP would begin by sending the base, which each rank has read already, from
        rank 0 to all."""
        if self.zero:
            return self.zero.engine
        if model is not self.model:
            return super()._wrap_model(model, training, dataloader)
        # with these arguments accelerate only adds autocast; it would put one rank alone under DDP, too
        self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        if not self._deepspeed:
            if self.args.world_size > 1 and not any(isinstance(p, DTensor) for p in model.parameters()):
                check_same_base(model)
            wrapped = replicate_trained(model, self.experts.names if self.experts else ())
            if wrapped is not model and self.args.world_size > 2:  # two numbers have one sum in any order
                self._settle_buckets(wrapped)
            return wrapped
        self._names_in_file = states.names_in_file(model)
        self.zero = Zero(model, self._adam, self._deepspeed)
        self.zero.check()
        self.accelerator.backward = self._backward_of_zero
        return self.zero.engine

    def _settle_buckets(self, model: Any) -> None:
        """Have DDP put gradients into the buckets of a run's later steps. It does so after its first backward
        pass; numbers of three ranks and more are added in an order that follows from their places in buckets,
        and the first step after a resume would otherwise be rounded as the first of a run is."""
        self.rehearse(0, model)
        model.zero_grad(set_to_none=True)

    def _backward_of_zero(self, loss: Tensor, **_: Any) -> None:
        assert self.zero
        self.zero.backward(loss, last=self.accelerator.sync_gradients)

    def whole(self) -> AbstractContextManager[Any]:
        """Gather all trained parameters, to read them while the context is open; all ranks must enter it."""
        in_parts = self.zero or self.experts
        return in_parts.whole() if in_parts else nullcontext()

    def make_engine(self) -> None:
        """Make DeepSpeed's engine, where the strategy has one: ZeRO-3's base cannot be called without it."""
        if self._deepspeed and not self.zero:
            self._prepare_for_training(self.args.max_steps, self.get_train_dataloader(), None)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this rank's loader, unwrapped: accelerate would tie its order to the world size."""
        return StepLoader(
            self.train_side,
            self.order,
            self.team.teams,
            self.team.number,
            self.args.gradient_accumulation_steps,
            self._pad_id,
            flat=self._flat,
            cut=self.team.cut,
        )

    def create_optimizer(self, model: Any = None) -> Any:
        """Return Trainer's optimizer; with LoRA+, B has groups and a rate of its own."""
        ratio, is_new = self.config.train.loraplus_lr_ratio, self.optimizer is None
        made: Any = super().create_optimizer(model)
        if ratio is not None and is_new:
            quicken_b(made, self.model if model is None else model, ratio)
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return transformers' schedule, whose first step trains, too."""
        schedule: Any = super().create_scheduler(num_training_steps, optimizer)
        begin_above_zero(schedule)
        return schedule

    # ---- a step

    def cut_into(self, size: int, deepspeed: DeepSpeedConfig | None = None) -> None:
        """Cut the steps into micro-batches of so many rows, or packs, instead; before the engine is made.
        deepspeed: the config for that. Raises: ValueError when there are fewer than ranks."""
        train, strategy, world_size = self.config.train, self.config.strategy, self.args.world_size
        self.args.gradient_accumulation_steps = accumulation_steps(
            train.global_batch_size, size, world_size, strategy.sequence_parallel
        )
        self.args.per_device_train_batch_size = self._train_batch_size = size
        self.config, self._deepspeed = cut_into(self.config, size), deepspeed
        self.order = dataclasses.replace(self.order, per_device_batch_size=size)
        self.rows = self.rows._replace(order=self.order)
        self.nonfinite = NonFiniteSteps(self.config, self.rows, self.team)

    def rehearse(self, size: int, model: Any = None) -> None:
        """Compute the longest micro-batch of a size forward and backward, before training; of size 0 a blank
        token. model: with its engine; None: there is none yet."""
        loader = self.get_train_dataloader()
        batch = loader.collate_fn([loader.dataset[unit] for unit in self.order.longest(size)])
        model = model or self.model
        model.train()
        with self.accelerator.autocast():
            one = torch.ones((), device=self.args.device)
            loss = self.compute_loss(model, self._prepare_inputs(batch), num_items_in_batch=one)
        self.accelerator.backward(loss)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Measure the wait for data, without Trainer's wait for the other ranks' counts of tokens."""
        self._losses, self._loss_before = [], self._tr_loss.clone()
        if self.router_loss:
            rows = self.order.rows(self.state.global_step)
            self.router_loss.begin(int(self.order.lengths[rows].sum()))
        samples: tuple[list[Any], Tensor | int | None]
        samples = super().get_batch_samples(self._timed(epoch_iterator), num_batches, device)
        return samples

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Return what the losses of a step are divided by: the weight of its tokens on all ranks."""
        if self.train_side.weights is None:
            number: Tensor | int | None = super()._get_num_items_in_batch(batch_samples, device)
        else:
            number = self.accelerator.gather(weight_of(batch_samples, device)).sum().float()
        # others' tokens are then not counted, and a rank may have none
        return max(number or 1, 1) if is_pretended() else number

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.data_wait_s += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def training_step(
        self, model: Any, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Compute a micro-batch as Trainer does; its dropout depends only on seed, step and its number."""
        shape = tuple(inputs["input_ids"].shape)
        number, step = len(self._losses) * self.team.teams + self.team.number, self.state.global_step
        seed_micro_batch(self.args.seed, step, number, self.team.rank)
        try:
            with self.noise.over(step, self._lines(step, number)) if self.noise else nullcontext():
                loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(shape, trained=True) from error
        if self.experts and self.accelerator.sync_gradients:
            self.experts.reduce()
        self._losses.append(loss.detach())
        return loss

    def _lines(self, step: int, number: int) -> list[list[int]]:
        """Return the row numbers in each line of a micro-batch's tensors. step: from 0; number: in it."""
        units = self.order.micro_batch(step, number)
        return [[row for unit in units for row in unit]] if self._flat else units

    def _out_of_memory(self, shape: tuple[int, ...], *, trained: bool = False) -> faults.TrainingFault:
        return faults.out_of_memory(
            self.config, self.state.global_step, self.args.process_index, shape, trained
        )

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip, where DeepSpeed does not."""
        if self.experts:
            return self.experts.clip(model, self.args.max_grad_norm)
        return None if self.zero else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the gradient's norm; all ranks agree whether it is finite before the optimizer's step."""
        if self.zero:
            return self._step_of_zero(self.zero)
        if self.experts and grad_norm is None:
            grad_norm = self.experts.clip(model, math.inf)
        norm = super()._get_grad_norm(model, grad_norm)
        finite = torch.stack(self._losses).isfinite().all()
        if self.accelerator.scaler is None:  # float16's scaler checks gradients itself, and expects infinity
            finite &= torch.as_tensor(norm, device=finite.device).isfinite()
        if self.stop.agree(self.args.device, also=~finite):
            self._leave_step_out()
        else:
            self.nonfinite.in_a_row = 0
        return norm

    def _step_of_zero(self, zero: Zero) -> float:
        """Take the step, unless all ranks agree not to, and return the gradient's norm before it."""
        if broken := self.stop.agree(self.args.device, also=~torch.stack(self._losses).isfinite().all()):
            zero.spoil()
        norm = zero.step()  # the same on all ranks
        if broken or not math.isfinite(norm):
            self._leave_step_out()
        else:
            self.nonfinite.in_a_row = 0
        return norm

    def _leave_step_out(self) -> None:
        """Stop, or leave the current step out, as train.on_nan says; all ranks call it."""
        what = self.nonfinite.describe(self.state.global_step + 1, self._losses)
        self.nonfinite.leave_out(what)
        done = "left out"
        if self.nonfinite.policy == "rollback":
            checkpoint = self._newest_checkpoint()
            if checkpoint is None:
                raise faults.TrainingFault(
                    f"{what}; train.on_nan=rollback has no checkpoint to go back to yet"
                )
            self.restore_adapter(checkpoint)
            self._restore_optimizer(checkpoint)
            done = f"left out, and the weights are those of {checkpoint.name} again"
        assert self._loss_before is not None, "a step has begun"
        self._tr_loss.copy_(self._loss_before)
        self._globalstep_last_logged += 1  # the mean is over the other steps
        if self.accelerator.scaler is None and not self.zero:
            self.model.zero_grad(set_to_none=True)  # the optimizer skips parameters without a gradient
        self.warn(f"{what}: {done}")

    def _newest_checkpoint(self) -> Path | None:
        """Return the newest whole checkpoint, the same on all ranks."""
        newest: list[Path | None] = [None]
        if self.saver:
            self.saver.wait()
            newest = [
                next((path for path in self.saver.run.checkpoints() if not checkpoints.flaw(path)), None)
            ]
        if dist.is_initialized():
            dist.broadcast_object_list(newest)
        return newest[0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the auxiliary loss of the last step's routers to a training log; all ranks call it."""
        if self.router_loss and "loss" in logs:
            value: Tensor = self.accelerator.reduce(self.router_loss.value.to(self.args.device), "sum")
            logs["router_aux_loss"] = value.item()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        """Return 0: Trainer would walk all modules in each micro-batch; metrics.py knows a token's FLOPs."""
        return 0

    # ---- evaluation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return eval_loss (mean over all trained tokens, whatever the batches and ranks) and
        eval_perplexity. Empty when ranks agree to stop meanwhile: the checkpoint then records that this
        evaluation is due."""
        start = time.perf_counter()
        was_training = self.model.training
        self.model.eval()
        sums = self._sum_losses()
        self.model.train(was_training)
        seconds = time.perf_counter() - start
        self.idle_s += seconds
        self.evaluating_s += seconds
        if sums is None:
            self.stop.end(self.control)
            return {}
        metrics = metrics_of(sums)
        self.losses[self.state.global_step] = metrics["eval_loss"]
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.gave_up:  # on all ranks: they have the same losses, after a resume, too
            self.control.should_save = self.control.should_training_stop = True
        return metrics

    def _sum_losses(self) -> Tensor | None:
        """Return sum_losses() over all ranks."""
        side, size = self.rows.evaluation, self.args.per_device_eval_batch_size
        assert side is not None, "there are no rows to evaluate"
        mine = eval_batches(side, size, self.team.teams, self.team.number, self._pad_id, flat=self.end_to_end)
        batches = (self._prepare_inputs(self.team.cut(batch, self._pad_id)) for batch in mine)
        with torch.no_grad(), self.accelerator.autocast():
            sums = sum_losses(self.model, batches, self.stop, self.args.device, self._out_of_memory)
        return None if sums is None else self.accelerator.reduce(sums, "sum")

    def _evaluation_due(self, step: int) -> bool:
        """Whether an evaluation falls on a step. Trainer also evaluates after the last step."""
        by_epoch = self.args.eval_strategy == "epoch"
        every = self.order.steps_per_epoch if by_epoch else int(self.args.eval_steps or 1)
        return bool(self.args.eval_strategy != "no") and (step % every == 0 or step == self.state.max_steps)

    # ---- saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Copy all that a resume needs to host memory, and have it written: Trainer writes in place."""
        only_memory, self.only_memory = self.only_memory, False
        if only_memory and not self.control.should_training_stop:
            self._keep_in_memory()
            return
        start = time.perf_counter()
        losses = self._losses_of_all_ranks()
        self.wait_for_saves()  # they read the buffers that are overwritten next
        snapshot = self._snapshot(copied=self.saver is not None)
        if self.saver:
            # the best by eval_perplexity is the best by eval_loss
            best_by = dict(self.losses) if self.config.train.metric_for_best_model else {}
            self.saver.save(self.state.global_step, snapshot, self._texts(snapshot, losses), best_by)
        stall = time.perf_counter() - start
        self.idle_s += stall
        self.saving_s += stall
        before = self.saver.last_seconds if self.saver else 0.0
        self.stop.longest_save_s = max(self.stop.longest_save_s, stall, before)

    def _keep_in_memory(self) -> None:
        """Copy the same to host memory, and have it kept there, unless a save is still under way."""
        start = time.perf_counter()
        if from_rank_0(self._can_keep):
            losses = self._losses_of_all_ranks()
            self.wait_for_saves()
            snapshot = self._snapshot(copied=self.keeper is not None)
            texts = from_rank_0(lambda: self._texts(snapshot, losses))  # it alone knows the tracker's run
            if self.keeper:
                self.keeper.keep(self.state.global_step, snapshot, texts)
        stall = time.perf_counter() - start
        self.idle_s += stall
        self.saving_s += stall

    def _can_keep(self) -> bool:
        """Whether rank 0 can keep a snapshot: a save to disk, which may take long, reads the same copies."""
        saves = self.saver is not None and self.saver.is_saving
        return not saves and self.keeper is not None and self.keeper.can_keep()

    def wait_for_saves(self) -> None:
        """Wait until this rank has written the last checkpoint, and kept the last snapshot."""
        for one in (self.saver, self.keeper):
            if one:
                one.wait()

    def _snapshot(self, *, copied: bool) -> states.Snapshot:
        """Return copies of all that training changes, empty where they are not wanted; all ranks call it."""
        with self.whole():
            tensors = states.in_file(self.peft_model)
            states.check_alike(tensors, self.args.device)
            adapter = self._memory.copy("adapter", tensors.items() if copied else ())
        state = self.zero.state() if self.zero else states.optimizer_state(self.peft_model, self._adam)
        if experts := self.experts:
            state = ((name, key, experts.gathered(name, value)) for name, key, value in state)
        named = ((f"{name}/{key}", value) for name, key, value in state)
        if copied:
            optimizer = self._memory.copy("optimizer", named)
            snapshot = states.Snapshot(adapter, optimizer, states.changed_settings(self._adam))
        else:
            for _ in named if self.zero or experts else ():  # others need this rank in each gathering
                pass
            snapshot = states.Snapshot({}, {}, [])
        self._memory.sync()
        return snapshot

    def _losses_of_all_ranks(self) -> list[float]:
        """Return each rank's loss since the last logging step."""
        if self.args.world_size == 1:
            return [float(self._tr_loss)]
        losses = [torch.zeros_like(self._tr_loss) for _ in range(self.args.world_size)]
        dist.all_gather(losses, self._tr_loss)
        return [float(loss) for loss in losses]

    def _texts(self, snapshot: states.Snapshot, losses: list[float]) -> dict[str, str]:
        """Return a checkpoint's small files by name. losses: of all ranks."""
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
            # an evaluation comes later in this step (at an epoch's end), or the run stops before it
            evaluation_due=step not in self.losses and self._evaluation_due(step),
            eval_losses=self.losses,
            moved=any(bool(tensor.any()) for name, tensor in snapshot.adapter.items() if "lora_B" in name),
            wandb_id=self.wandb_id,
            dtype=str(pick_dtype(self.config.model.dtype)).removeprefix("torch."),
            micro_batch=self.args.per_device_train_batch_size,
        )
        without_log = dataclasses.replace(self.state, log_history=[], stateful_callbacks={})
        return {
            STATE: state.text(),
            "trainer_state.json": json.dumps(dataclasses.asdict(without_log), indent=1, sort_keys=True),
        }

    # ---- resuming

    def load(self, checkpoint: Path) -> None:
        """Put a checkpoint's adapter into the model, and continue at its step; train() restores the rest."""
        self.resumed = checkpoints.read_state(checkpoint)
        self.losses = dict(self.resumed.eval_losses)
        self.state.global_step = self.resumed.step
        self.state.max_steps = self.args.max_steps
        self.state.epoch = self.state.global_step / self.order.steps_per_epoch
        self.restore_adapter(checkpoint)

    def restore_adapter(self, checkpoint: Path) -> None:
        """Put a checkpoint's adapter into the model; all ranks call it."""
        content = checkpoints.content(checkpoint, ADAPTER)
        if self.zero:
            with self.whole():
                saved = states.check_fits(self.peft_model, content, checkpoint)
            self.zero.restore_parameters({name: saved[own] for name, own in self._names_in_file.items()})
        else:
            with self.whole():
                states.restore_adapter(self.peft_model, content, checkpoint)

    def _restore_optimizer(self, checkpoint: Path) -> None:
        settings = checkpoints.read_state(checkpoint).optimizer_groups
        content = checkpoints.content(checkpoint, OPTIMIZER)
        if self.zero:
            self.zero.restore_state(states.state_by_parameter(self.peft_model, content))
            states.restore_settings(self._adam, settings)
        else:
            cut = {"part_of": self.experts.cut} if self.experts else {}
            states.restore_optimizer(self.peft_model, self._adam, content, settings, **cut)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: load() has done it."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Do nothing: seed_micro_batch() seeds each micro-batch anew."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Prepare as Trainer does, but restore optimizer, schedule and scaler from our files."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.zero:
            self.optimizer = OptimizerOfZero(self._adam, device_placement=False)
        if resume_from_checkpoint:
            assert self.resumed, "load() comes first"
            self._restore_optimizer(Path(resume_from_checkpoint))
            restore_schedule(self.lr_scheduler, self._adam, self.resumed.scheduler.last_epoch)
            if self.accelerator.scaler and self.resumed.scaler:
                self.accelerator.scaler.load_state_dict(self.resumed.scaler)
        return prepared
