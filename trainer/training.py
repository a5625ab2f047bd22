"""transformers.Trainer, with what it lacks: our row order, exact evaluation, checkpoints that say they are whole.

Every Trainer method that is overridden stands in LoraTrainer; tests/trainer/test_training.py fails when a new
transformers changes what they rely on.
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_callback import PrinterCallback, TrainerCallback, TrainerControl
from transformers.training_args import OptimizerNames

from qwenlora.configs import Config
from qwenlora.data.order import Order, accumulation_steps, total_steps
from qwenlora.data.packing import Packs
from qwenlora.data.prepared import Side
from qwenlora.jobs.run import RunFolder
from qwenlora.trainer import checkpoints
from qwenlora.trainer.batches import IGNORED, StepLoader, eval_batches
from qwenlora.trainer.model import pick_dtype


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
    config: Config, run: RunFolder, units: int, world_size: int, evaluates: bool
) -> TrainingArguments:
    """Return transformers' arguments for a config. units: rows an epoch, or packs."""
    train = config.train
    dtype = pick_dtype(config.model.dtype)
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(run.path),
        per_device_train_batch_size=train.per_device_train_batch_size,
        per_device_eval_batch_size=train.per_device_eval_batch_size,
        gradient_accumulation_steps=accumulation_steps(
            train.global_batch_size, train.per_device_train_batch_size, world_size
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
    """Refuse what transformers would refuse much later, with the model loaded. Raises: ValueError naming the key.

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
            f"train.lr_scheduler_kwargs={train.lr_scheduler_kwargs} with lr_scheduler_type={train.lr_scheduler_type}:"
            f" {error}"
        ) from error


def loss_file(checkpoint: Path, rank: int) -> Path:
    """Return the file with a rank's loss since the last logging step: {"sum", "since_step"}."""
    return checkpoint / f"loss_{rank}.json"


class _LossSoFar(TrainerCallback):
    """Gives a resumed run the loss of the steps since the last logging step, which Trainer forgets."""

    def __init__(self, trainer: "LoraTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: Any, control: TrainerControl, **_: Any) -> None:
        checkpoint = self.trainer.resumed_from
        if checkpoint and loss_file(checkpoint, args.process_index).exists():
            so_far = json.loads(loss_file(checkpoint, args.process_index).read_text())
            self.trainer._tr_loss.fill_(so_far["sum"])
            self.trainer._globalstep_last_logged = so_far["since_step"]


class LoraTrainer(Trainer):
    """Trainer over prepared rows in our order."""

    control: TrainerControl

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        order: Order,
        train: Side,
        eval_: Side | None,
        identity: dict[str, Any],
        save_total_limit: int | None,
        **kw: Any,
    ):
        self.order, self.train_side, self.eval_side = order, train, eval_
        self.identity, self.save_total_limit = identity, save_total_limit
        self.resumed_from: Path | None = None
        self.data_wait_s = 0.0  # seconds spent waiting for batches so far
        self.idle_s = 0.0  # seconds spent evaluating and saving so far
        super().__init__(model=model, args=args, eval_dataset=eval_, **kw)
        self.remove_callback(PrinterCallback)
        self.add_callback(_LossSoFar(self))

    @property
    def _pad_id(self) -> int:
        return int(self.processing_class.pad_token_id)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this rank's loader. Accelerate does not wrap it: it would change the order with the world size."""
        return StepLoader(
            self.train_side,
            self.order,
            self.args.world_size,
            self.args.process_index,
            self.args.gradient_accumulation_steps,
            self._pad_id,
            flat=self.model.config._attn_implementation.startswith("flash"),
        )

    def train(self, resume_from_checkpoint: Path | None = None, **kw: Any) -> Any:
        """Train as Trainer does. resume_from_checkpoint: a whole one, of the same world size for its loss so far."""
        self.resumed_from = resume_from_checkpoint
        if resume_from_checkpoint and checkpoints.read(resume_from_checkpoint)["world_size"] != self.args.world_size:
            self.resumed_from = None
        return super().train(resume_from_checkpoint=resume_from_checkpoint and str(resume_from_checkpoint), **kw)

    def load_adapter(self, checkpoint: Path) -> None:
        """Put a checkpoint's adapter into the model, without training."""
        self._load_from_checkpoint(str(checkpoint))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Time what Trainer waits for data (not for the other ranks' counts); the rest is Trainer's own."""
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

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: Trainer would walk all modules for each micro-batch; metrics.py knows the FLOPs of a token."""
        return 0

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return eval_loss, the mean over all trained tokens whatever the batches and ranks, and eval_perplexity."""
        start = time.perf_counter()
        assert self.eval_side is not None, "evaluation was asked for without rows"
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad(), self.accelerator.autocast():
            for batch in eval_batches(
                self.eval_side,
                self.args.per_device_eval_batch_size,
                self.args.world_size,
                self.args.process_index,
                self._pad_id,
            ):
                batch = self._prepare_inputs(batch)
                tokens = (batch["labels"][:, 1:] != IGNORED).sum()
                # num_items_in_batch=1 makes the model return the sum over tokens, not their mean
                sums += torch.stack([self.model(**batch, num_items_in_batch=1).loss.double(), tokens.double()])
        sums = self.accelerator.reduce(sums, "sum")
        loss = (sums[0] / sums[1]).item()
        metrics = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
        self.model.train(was_training)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.idle_s += time.perf_counter() - start
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as Trainer does, and the loss so far; when all ranks have written, mark the checkpoint as whole."""
        start = time.perf_counter()
        folder = RunFolder(self.args.output_dir).checkpoint(self.state.global_step)
        if checkpoints.begin(folder, self.accelerator):
            super()._save_checkpoint(model, trial)
            so_far = {"sum": self._tr_loss.item(), "since_step": self._globalstep_last_logged}
            loss_file(folder, self.args.process_index).write_text(json.dumps(so_far))
            checkpoints.finish(folder, self.accelerator, self.identity, self.save_total_limit)
        self.idle_s += time.perf_counter() - start
