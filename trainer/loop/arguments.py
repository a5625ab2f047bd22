"""The row order and transformers' arguments, made from the config and checked before a model is loaded."""

from dataclasses import fields
from types import SimpleNamespace
from typing import cast

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from qwenlora.configs import Config
from qwenlora.configs.schema import Train
from qwenlora.data.order import Order, accumulation_steps, total_steps
from qwenlora.data.packing import Packs
from qwenlora.data.prepared import Side
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.hidden import show_bitsandbytes
from qwenlora.trainer.loop.schedule import check_schedule
from qwenlora.trainer.model.loading import pick_dtype

# keys of the config that are transformers' arguments as they are
SAME_NAME = {
    *("per_device_train_batch_size", "per_device_eval_batch_size", "seed", "save_strategy", "eval_steps"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "weight_decay"),
    *("max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon"),
}

# beginnings of optimizers' names: galore and apollo need a key optim_target_modules, and lomo updates weights
# in the backward pass, before gradients are added up and averaged
NOT_FOR_LORA = ("galore", "apollo", "lomo", "adalomo")
OF_TORCH = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor")  # need no package


def order_of(config: Config, train: Side, packs: Packs | None = None) -> Order:
    """Return the run's row order."""
    return Order(
        train.lengths,
        config.train.global_batch_size,
        config.train.micro_batch,
        config.train.seed,
        packs,
        config.data.max_length,
    )


def training_arguments(
    config: Config, run: RunFolder, units: int, world_size: int, evaluates: bool, name: str = "ddp"
) -> TrainingArguments:
    """Return transformers' arguments for a config. units: rows or packs an epoch; name: the strategy's."""
    train = config.train
    dtype = pick_dtype(config.model.dtype)
    on_gpu = torch.cuda.is_available()
    if train.optim not in OF_TORCH:
        show_bitsandbytes()
    made = TrainingArguments(
        output_dir=str(run.path),
        **train.model_dump(include=SAME_NAME),
        gradient_accumulation_steps=accumulation_steps(
            train.global_batch_size,
            train.micro_batch,
            world_size,
            config.strategy.sequence_parallel,
        ),
        max_steps=total_steps(units, train.global_batch_size, train.num_train_epochs, train.max_steps),
        eval_strategy=train.eval_strategy if evaluates else "no",
        **({"save_steps": train.save_steps} if train.save_steps else {}),
        save_total_limit=None,  # checkpoints.py removes old ones, once the new one is whole
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
    # a process without LOCAL_RANK sees all GPUs, and Trainer would multiply its losses by their number
    made._n_gpu = min(made.n_gpu, 1)
    return made


def check_settings(config: Config, units: int) -> None:
    """Refuse what transformers would refuse only with the model loaded. Raises: ValueError naming the key. It
    makes no TrainingArguments: these join the process group, for which the other ranks are not ready yet."""
    train = config.train
    steps = total_steps(units, train.global_batch_size, train.num_train_epochs, train.max_steps)
    check_schedule(train, steps)


def check_optimizer(train: Train) -> None:
    """Refuse an optimizer that this machine lacks a package for. transformers' own code is asked, with its
    default arguments instead of TrainingArguments, as in check_settings. Raises: ValueError naming it."""
    try:
        name = OptimizerNames(train.optim)
    except ValueError as error:
        raise ValueError(f"train.optim={train.optim}: {str(error).splitlines()[0]}") from error
    if name.startswith(NOT_FOR_LORA):
        raise ValueError(
            f"train.optim={train.optim} saves memory where all weights are trained; an adapter's are few, and"
            " qwenlora does not support it: set train.optim: adamw_torch_fused or adamw_8bit"
        )
    if name in OF_TORCH:
        return
    show_bitsandbytes()
    from transformers import Trainer  # takes seconds, as it brings datasets and pandas

    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    arguments = SimpleNamespace(**defaults | train.model_dump(include=SAME_NAME))
    try:
        Trainer.get_optimizer_cls_and_kwargs(cast(TrainingArguments, arguments), None)
    except Exception as error:  # ImportError, ValueError, and what the package itself raises
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"train.optim={train.optim} cannot be used here: {reason}; or set train.optim: adamw_torch_fused"
        ) from error
