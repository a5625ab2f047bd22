"""Every key a config may have, with its type, default and meaning.

This file is the one owner of defaults. Keys are spelled as transformers, peft and Slurm spell them.
`configs/schema.json` is generated from here: `qwenlora config schema > configs/schema.json`.
"""

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Text = Annotated[str, Field(min_length=1)]
ALL_LINEAR = "all-linear"  # of lora.target_modules
FIRST = "0.1"  # the version that had each key that is not marked as newer
SINCE_0_2: JsonDict = {"since": "0.2"}
Start = Literal["gaussian", "orthogonal", "pissa", "olora", "eva"]  # of lora.init_lora_weights
PISSA_NITER = r"^pissa_niter_[1-9][0-9]*$"
# {start of peft's: why it is refused}
NO_STARTS = {
    "loftq": "makes a new base in 4 bits, which neither a merge nor a server would have; over the one that"
    " they have (strategy.quantization: nf4), set pissa",
    "corda": "needs a covariance of each layer's inputs, together larger than the base; set pissa",
    "lora_ga": "needs gradients of the whole base before the start; set pissa",
    "mica": "trains A alone, which is not built; set pissa or orthogonal",
}


def _each_once(ids: list[int]) -> list[int]:
    if twice := [one for number, one in enumerate(ids) if one in ids[:number]]:
        raise ValueError(f"each token once ({twice[0]} stands there twice)")
    return ids


TokenIds = Annotated[list[NonNegativeInt], Field(min_length=1), AfterValidator(_each_once)]


class Section(BaseModel):
    """A part of the config: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Section):
    """The base model."""

    name_or_path: Text = Field(
        description="A folder, a hub name (Qwen/Qwen2.5-7B-Instruct), or `tiny`: a small Qwen3 made on the"
        " spot."
    )
    revision: Text | None = Field(None, description="Branch, tag or commit of a hub model.")
    tokenizer: Text | None = Field(
        None, description="Folder or hub name of another tokenizer. Default: the model's own."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="auto: bfloat16 where the GPU has it, else float16; on a CPU float32, or bfloat16 if it"
        " multiplies that in hardware. A run keeps its dtype when it is resumed elsewhere.",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = Field(
        "sdpa", description="The attention kernel, by its transformers name."
    )


Format = Literal["auto", "chat", "alpaca", "query_response", "prompt_completion", "text"]
Columns = dict[Text, Text | None]
Role = Literal["system", "user", "assistant", "tool", "function_call"]
_COLUMNS = "New names for the file's keys, as {question: instruction, answer: output}; null: ignore the key."
_ROLES = "What the file's roles mean, as {bot: assistant}."
_ENCODING = (
    "Encoding of text files, as gb18030. Default: UTF-8; for CSV and TSV also GB18030, where it is detected."
)


class SourceEntry(Section):
    """An entry of data.train or data.eval. What is left out is as the section `data` has it."""

    path: Text = Field(description="A file, a folder, a glob, a hub name, or `example`.")
    weight: Annotated[float, Field(gt=0.0)] = Field(
        1.0,
        description="How often an epoch sees its rows: 2 is twice; 0.5 is half of them, chosen by a hash.",
    )
    format: Format | None = Field(None, description="As data.format, for this source.")
    columns: Columns | None = Field(None, description="As data.columns, for this source.")
    roles: dict[Text, Role] | None = Field(None, description="As data.roles, for this source.")
    encoding: Text | None = Field(None, description="As data.encoding, for this source.")
    name: Text | None = Field(
        None, description="Configuration of a hub data set, or of a folder whose README.md lists some."
    )
    split: Text = Field("train", description="Split of a hub data set, or of a folder.")
    revision: Text | None = Field(None, description="Branch, tag or commit of a hub data set.")


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "<name>"
    if isinstance(value, list | tuple):
        return "<list>"
    return "<source>" if isinstance(value, dict | SourceEntry) else None


_EXPECTED = {
    "custom_error_type": "source",
    "custom_error_message": "a name, {path: ..., weight: ...}, or a list of these",
}
# the kind of a value decides what it is checked as, so that a mistake gives one message, not one for each
Entry = Annotated[
    Annotated[Text, Tag("<name>")] | Annotated[SourceEntry, Tag("<source>")],
    Discriminator(_kind, **_EXPECTED),
]
Sources = Annotated[
    Annotated[Text, Tag("<name>")]
    | Annotated[SourceEntry, Tag("<source>")]
    | Annotated[list[Entry], Field(min_length=1), Tag("<list>")],
    Discriminator(_kind, **_EXPECTED),
]


class Data(Section):
    """The rows to train and to evaluate on. Paths are relative to the working directory."""

    train: Sources = Field(
        description="A file, folder, glob or hub name, or a list; {path: my.jsonl, weight: 2} adds options."
        " `example`: the rows that come with qwenlora."
    )
    eval: Sources | None = Field(
        None, description="Rows to evaluate on, named like train's. `example`: 20 rephrased questions."
    )
    eval_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None, description="Share of the training rows to evaluate on instead, chosen by a hash of each row."
    )
    format: Format = Field("auto", description="Shape of the rows; auto: found from each file's first row.")
    columns: Columns = Field(default_factory=dict, description=_COLUMNS)
    roles: dict[Text, Role] = Field(default_factory=dict, description=_ROLES)
    encoding: Text | None = Field(None, description=_ENCODING)
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="What to do when rows cannot be trained; they are listed in either case."
    )
    train_on: Literal["assistant", "last_assistant", "all"] = Field(
        "assistant", description="What is learnt: every reply, the last reply of a row, or everything."
    )
    chat_template_kwargs: dict[Text, bool | int | float | str] = Field(
        default_factory=dict,
        description="Arguments of the chat template, as {preserve_thinking: true}: its defaults from then on,"
        " in the adapter's folder, too.",
        json_schema_extra=SINCE_0_2,
    )
    max_length: Annotated[int, Field(ge=8)] = Field(
        2048, description="Longest row, and length of a pack, in tokens."
    )
    overlength: Literal["error", "truncate", "drop", "split"] = Field(
        "error", description="What to do with rows longer than max_length; the outcome is counted and shown."
    )
    split_replies: bool = Field(
        False,
        description="With overlength: split. A reply too long for one row continues in rows without its"
        " question.",
    )
    packing: Literal["auto", "on", "off"] = Field(
        "auto", description="Several rows in one sequence of max_length, kept apart. auto: on with a GPU."
    )
    num_proc: PositiveInt | None = Field(
        None, description="Processes that prepare the rows. Default: one a core."
    )
    cache_dir: Text | None = Field(
        None,
        description="Where prepared rows are kept for all runs. Default: .prepared beside the run folders.",
    )

    @model_validator(mode="after")
    def _keys_go_together(self) -> "Data":
        if self.eval is not None and self.eval_fraction is not None:
            raise ValueError("eval and eval_fraction both say what to evaluate on; remove one of them")
        if self.split_replies and self.overlength != "split":
            raise ValueError("split_replies=true has no effect without overlength: split")
        return self


class Lora(Section):
    """The adapter, in peft's words."""

    r: PositiveInt = Field(16, description="Rank.")
    lora_alpha: PositiveInt = Field(
        32, description="Updates are scaled by lora_alpha / r (rslora: / sqrt(r))."
    )
    lora_dropout: Share = Field(0.0, description="Dropout before each LoRA layer.")
    target_modules: Text | list[Text] = Field(
        ALL_LINEAR,
        description="Module names, a regular expression, or all-linear: all but the head, and the router of a"
        " mixture of experts.",
    )
    experts: Literal["all", "shared", "none"] = Field(
        "all",
        description="What all-linear has of a mixture's experts: all of them, the shared ones, or none.",
        json_schema_extra=SINCE_0_2,
    )
    target_parameters: list[Text] | None = Field(
        None,
        description="nn.Parameter names, for MoE experts that are not nn.Linear: [mlp.experts.gate_up_proj].",
    )
    rank_pattern: dict[Text, PositiveInt] = Field(
        default_factory=dict,
        description="Other ranks, as {down_proj: 32, 'layers\\.0\\..*': 4}: regular expressions for ends of"
        " names.",
        json_schema_extra=SINCE_0_2,
    )
    alpha_pattern: dict[Text, PositiveInt] = Field(
        default_factory=dict,
        description="Other lora_alpha, as rank_pattern has ranks.",
        json_schema_extra=SINCE_0_2,
    )
    exclude_modules: Text | list[Text] | None = Field(
        None,
        description="What target_modules leave out: ends of names, or a regular expression.",
        json_schema_extra=SINCE_0_2,
    )
    layers_to_transform: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = Field(
        None, description="The layers that get LoRA, from 0. Default: all.", json_schema_extra=SINCE_0_2
    )
    init_lora_weights: Literal[True, Start] | Annotated[str, Field(pattern=PISSA_NITER)] = Field(
        True,
        description="How A and B begin. true: A uniform (Kaiming), B zero; gaussian: A normal, B zero;"
        " orthogonal: both, with a product of zero; pissa, pissa_niter_16 (quicker), olora: with a part of"
        " the base, which is taken from it meanwhile; eva: A by the rows, B zero.",
        json_schema_extra=SINCE_0_2,
    )
    modules_to_save: list[Text] | None = Field(
        None, description="Modules trained in full and saved whole, as [embed_tokens]."
    )
    trainable_token_indices: TokenIds | dict[Literal["embed_tokens", "lm_head"], TokenIds] | None = Field(
        None,
        description="Tokens whose embeddings are trained, by id, as [151665]; of a base whose head is a"
        " matrix of its own as {embed_tokens: [151665], lm_head: [151665]}.",
        json_schema_extra=SINCE_0_2,
    )
    use_rslora: bool = Field(False, description="Rank-stabilised scaling.")
    use_dora: bool = Field(False, description="Weight-decomposed LoRA.")
    init_from: Text | None = Field(
        None,
        description="An adapter folder to continue from. Its own r, alpha and modules are used and must"
        " match.",
    )

    @field_validator("target_modules")
    @classmethod
    def _all_linear_in_peft_s_spellings(cls, value: str | list[str]) -> str | list[str]:
        return ALL_LINEAR if isinstance(value, str) and value.lower() == ALL_LINEAR else value

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _starts_that_cannot_be_kept(cls, value: object) -> object:
        if not isinstance(value, str) or value in get_args(Start) or re.search(PISSA_NITER, value):
            return value
        why = next((NO_STARTS[name] for name in NO_STARTS if value.lower().startswith(name)), "")
        expected = f"expected true, {', '.join(get_args(Start))} or pissa_niter_16"
        raise ValueError(f"init_lora_weights={value}{f' {why}' if why else f': {expected}'}")

    @model_validator(mode="after")
    def _starts_and_layers_have_their_conditions(self) -> "Lora":
        odd = [r for r in (self.r, *self.rank_pattern.values()) if r % 2]
        if self.init_lora_weights == "orthogonal" and odd:
            raise ValueError(f"init_lora_weights=orthogonal needs even ranks, and {odd[0]} is odd")
        pattern = isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR
        if self.layers_to_transform is not None and pattern:
            raise ValueError(
                f"layers_to_transform does not go with a pattern, target_modules={self.target_modules}; write"
                " the layers into the pattern"
            )
        return self

    @model_validator(mode="after")
    def _what_is_taken_from_the_base_is_plain_lora(self) -> "Lora":
        setting, eva = f"init_lora_weights={self.init_lora_weights}", self.init_lora_weights == "eva"
        if (self.takes_from_base or eva) and self.init_from:
            raise ValueError(f"{setting} begins anew, and init_from={self.init_from} goes on; remove one")
        if eva and self.rank_pattern:
            raise ValueError(f"{setting}: peft would change the ranks of rank_pattern; remove one of them")
        if not self.takes_from_base:
            return self
        if self.use_dora:
            raise ValueError(f"{setting}: its adapter becomes plain LoRA, which use_dora=true is not")
        if self.use_rslora and (self.rank_pattern or self.alpha_pattern):
            raise ValueError(
                f"{setting}: peft has no plain adapter for use_rslora=true with rank_pattern or"
                " alpha_pattern; leave one of them out"
            )
        return self

    @property
    def takes_from_base(self) -> bool:
        """Whether the adapter begins with a part of the base (trainer/model/initial.py)."""
        return str(self.init_lora_weights).startswith(("pissa", "olora"))

    @property
    def in_files(self) -> "Lora":
        """The settings that adapter_config.json has: those of plain LoRA, whatever it began with."""
        changed: dict[str, Any] = {"init_lora_weights": True}
        if not self.takes_from_base:
            return self.model_copy(update=changed) if self.init_lora_weights == "eva" else self
        changed["r"] = 2 * self.r
        changed["lora_alpha"] = self.lora_alpha * (2**0.5 if self.use_rslora else 2)
        for pattern in ("rank_pattern", "alpha_pattern"):
            changed[pattern] = {name: 2 * number for name, number in getattr(self, pattern).items()}
        return self.model_copy(update=changed)

    @property
    def trained_tokens(self) -> dict[str, list[int]]:
        """trainable_token_indices, as {module: ids}."""
        given = self.trainable_token_indices or {}
        return {"embed_tokens": given} if isinstance(given, list) else {name: given[name] for name in given}

    @model_validator(mode="after")
    def _trained_tokens_are_named_once(self) -> "Lora":
        for module in self.trained_tokens:
            if module in (self.modules_to_save or ()):
                raise ValueError(
                    f"modules_to_save={self.modules_to_save} trains all of {module}; leave it out there, or"
                    " in trainable_token_indices"
                )
        return self

    @model_validator(mode="after")
    def _experts_are_part_of_all_linear(self) -> "Lora":
        if self.experts != "all" and self.target_modules != ALL_LINEAR:
            raise ValueError(
                f"experts={self.experts} has no effect without target_modules: all-linear, here"
                f" {self.target_modules}; name the experts' matrices in target_parameters, or remove experts"
            )
        return self


SchedulerName = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]


class Train(Section):
    """The training, in transformers' words."""

    global_batch_size: PositiveInt = Field(
        16, description="Rows (with packing: packs) an optimizer step, over all GPUs and accumulation steps."
    )
    per_device_train_batch_size: PositiveInt | Literal["auto"] = Field(
        1,
        description="Rows (with packing: packs) a GPU holds at once. The accumulation steps follow from it."
        " auto: the most that fit its memory, found before the first step.",
    )
    per_device_eval_batch_size: PositiveInt = Field(4, description="Rows a GPU evaluates at once.")
    num_train_epochs: Annotated[float, Field(gt=0.0)] = Field(3.0, description="Passes over the rows.")
    max_steps: PositiveInt | None = Field(None, description="Optimizer steps; overrides num_train_epochs.")
    learning_rate: Annotated[float, Field(gt=0.0)] = Field(2e-4, description="Peak learning rate.")
    loraplus_lr_ratio: Annotated[float, Field(gt=0.0)] | None = Field(
        None,
        description="LoRA+: B learns so many times as fast as A, whose rate is learning_rate.",
        json_schema_extra=SINCE_0_2,
    )
    lr_scheduler_type: SchedulerName = Field("cosine", description="Schedule, by its transformers name.")
    lr_scheduler_kwargs: dict[str, float | int | str | bool] = Field(
        default_factory=dict, description="Further arguments of the schedule, as {min_lr_rate: 0.1}."
    )
    warmup_steps: NonNegative = Field(0.03, description="Warm-up: a share of all steps below 1, else steps.")
    optim: Text = Field("adamw_torch_fused", description="Optimizer, by its transformers name.")
    weight_decay: NonNegative = Field(0.0, description="Weight decay (AdamW's).")
    adam_beta1: Share = Field(0.9, description="AdamW's decay of the first moment.")
    adam_beta2: Share = Field(0.999, description="AdamW's decay of the second moment.")
    adam_epsilon: NonNegative = Field(1e-8, description="AdamW's epsilon.")
    router_aux_loss: Annotated[float, Field(gt=0.0)] | Literal["model", "off"] = Field(
        "model",
        description="A mixture's auxiliary loss, which keeps its experts used evenly: model: as the base's"
        " config.json says (output_router_logits, router_aux_loss_coef); off; or what it is multiplied with.",
        json_schema_extra=SINCE_0_2,
    )
    max_grad_norm: NonNegative = Field(1.0, description="Gradients are clipped to this norm; 0: not at all.")
    neftune_noise_alpha: Annotated[float, Field(gt=0.0)] | None = Field(
        None,
        description="NEFTune: noise on the embeddings of training rows, as 5. Default: none.",
        json_schema_extra=SINCE_0_2,
    )
    gradient_checkpointing: Annotated[int, Field(ge=0, strict=True)] | bool | Literal["auto"] = Field(
        "auto",
        description="Layers whose activations are computed again in the backward pass, for less memory: true:"
        " all, up to a third slower; false: none; a number: so many; auto: the fewest that fit the GPU.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        42, description="Adapter's start, row order, dropout."
    )
    eval_strategy: Literal["no", "steps", "epoch"] = Field("epoch", description="When to evaluate data.eval.")
    eval_steps: PositiveInt | None = Field(None, description="With eval_strategy: steps.")
    save_strategy: Literal["no", "steps", "epoch"] = Field("epoch", description="When to save a checkpoint.")
    save_steps: PositiveInt | None = Field(None, description="With save_strategy: steps.")
    save_total_limit: PositiveInt | None = Field(3, description="Checkpoints to keep; null: all.")
    metric_for_best_model: Literal["eval_loss", "eval_perplexity"] | None = Field(
        None, description="The checkpoint that is best by it is kept, too. Each save needs an evaluation."
    )
    early_stopping_patience: PositiveInt | None = Field(
        None,
        description="Training ends when so many evaluations in a row are no better than the best before.",
        json_schema_extra=SINCE_0_2,
    )
    final: Literal["last", "best"] = Field(
        "last",
        description="The adapter at the end: of the last step, or of the best checkpoint.",
        json_schema_extra=SINCE_0_2,
    )
    on_nan: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="When a loss or gradient is not finite. stop: the run ends, and names the rows of the"
        " step; skip: that step changes nothing; rollback: the weights also go back to the newest"
        " checkpoint's. Both go on with the next rows, ten bad steps in a row at most.",
    )
    max_time_min: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Minutes after which an attempt saves and stops, as if asked to. Default: no limit."
    )

    @property
    def micro_batch(self) -> int:
        """per_device_train_batch_size; 1, which divides every batch, where it is not found yet."""
        size = self.per_device_train_batch_size
        return 1 if size == "auto" else size

    @model_validator(mode="after")
    def _steps_go_with_their_strategy(self) -> "Train":
        for what in ("eval", "save"):
            strategy, steps = getattr(self, f"{what}_strategy"), getattr(self, f"{what}_steps")
            if strategy == "steps" and steps is None:
                raise ValueError(f"{what}_strategy=steps needs {what}_steps; add {what}_steps: 100")
            if strategy == "epoch" and steps is not None:
                raise ValueError(
                    f"{what}_steps={steps} has no effect with {what}_strategy=epoch; set {what}_strategy:"
                    f" steps, or remove {what}_steps"
                )
        return self

    @model_validator(mode="after")
    def _the_best_is_evaluated_and_saved(self) -> "Train":
        if self.metric_for_best_model is None:
            for key, default in (("early_stopping_patience", None), ("final", "last")):
                if (value := getattr(self, key)) != default:
                    raise ValueError(
                        f"{key}={value} needs metric_for_best_model; add metric_for_best_model: eval_loss"
                    )
            return self
        same = self.eval_strategy == self.save_strategy != "no"
        if not same or (self.eval_steps and self.save_steps and self.save_steps % self.eval_steps):
            raise ValueError(
                f"metric_for_best_model={self.metric_for_best_model} needs an evaluation at each save: set"
                " eval_strategy and save_strategy alike, and save_steps to a multiple of eval_steps"
            )
        return self


class Checkpoint(Section):
    """How checkpoints are written. train has when, and how many are kept."""

    async_: bool = Field(
        True,
        alias="async",
        description="Write in the background; training waits only for the copy to memory.",
    )
    timeout_s: PositiveInt = Field(600, description="Seconds after which a save that hangs ends the run.")
    memory_steps: NonNegativeInt | None = Field(
        None,
        description="In a Slurm job: steps between snapshots in the memory of each node, from which a"
        " restart in the job goes on; 0: none. Default: about every 20 s.",
        json_schema_extra=SINCE_0_2,
    )


class Strategy(Section):
    """How the model is spread over GPUs and stored."""

    name: Literal["auto", "ddp", "zero1", "zero2", "zero3", "fsdp"] = Field(
        "auto",
        description="ddp: the whole model on every GPU; zero1, zero2: with the optimizer's state in parts;"
        " zero3: all in"
        " parts (DeepSpeed); fsdp: the base in parts (FSDP2). auto: ddp where the base fits, else fsdp"
        " (nf4: zero3).",
    )
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none",
        description="Storage of the frozen base (bitsandbytes): nf4 is QLoRA's, with double quantisation.",
    )
    offload: Literal["none", "optimizer", "params"] = Field(
        "none",
        description="What is kept in host memory instead of the GPU's; params: the base (zero3: and the"
        " optimizer's state).",
    )
    shard_group: Literal["global", "node"] = Field(
        "global",
        description="node: each node holds a whole base, in parts, so that no weights travel between nodes.",
    )
    sequence_parallel: PositiveInt = Field(
        1, description="GPUs that share each sequence (Ulysses), for rows that are too long for one."
    )
    expert_parallel: PositiveInt = Field(
        1,
        description="GPUs of a node that divide the experts of a mixture's layers among them.",
        json_schema_extra=SINCE_0_2,
    )
    deepspeed_config: Text | None = Field(
        None,
        description="A DeepSpeed config of your own (JSON), for zero1 to zero3; what it leaves out is"
        " filled in.",
    )


TrackerName = Literal["wandb", "tensorboard", "mlflow", "swanlab", "trackio"]


class Log(Section):
    """What is written down while training."""

    logging_steps: PositiveInt = Field(10, description="Steps between two lines of metrics.jsonl.")
    profile_steps: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="The first and the last step that torch's profiler watches on rank 0, as [10, 13]; the"
        " trace and a page about it are written to profile/ in the run folder.",
        json_schema_extra=SINCE_0_2,
    )
    to: list[TrackerName] = Field(
        ["wandb"],
        description="Where the numbers of metrics.jsonl go as well. Each but wandb is an extra: pip install"
        " 'qwenlora[mlflow]'.",
        json_schema_extra=SINCE_0_2,
    )
    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto",
        description="How log.to: wandb is used. auto: as W&B's own settings say (WANDB_MODE, `wandb"
        " offline`), else online after `wandb login`.",
    )
    wandb_project: Text | None = Field(
        None, description="W&B project. Default: WANDB_PROJECT, else qwenlora."
    )
    wandb_entity: Text | None = Field(None, description="W&B team or user. Default: WANDB_ENTITY.")
    wandb_name: Text | None = Field(
        None, description="Name of the W&B run. Default: WANDB_NAME, else the run folder's name."
    )

    @model_validator(mode="after")
    def _the_first_comes_first(self) -> "Log":
        if self.profile_steps and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(
                f"profile_steps={self.profile_steps} has the last step before the first; write"
                f" {self.profile_steps[::-1]}"
            )
        return self


class Launch(Section):
    """How processes start."""

    launcher: Literal["torchrun", "deepspeed"] = Field(
        "torchrun",
        description="What starts the processes of a node: qwenlora, as torchrun does, or DeepSpeed's"
        " launcher; in Slurm jobs always torchrun.",
    )
    hostfile: Text | None = Field(
        None,
        description="Several machines without Slurm: a file with a line `HOST slots=PROCESSES` for each,"
        " this machine"
        " first. The others are reached by ssh.",
    )
    nproc_per_node: PositiveInt | None = Field(
        None,
        description="Processes on a node. Default: the hostfile's slots, else one a GPU, or 1 without GPUs.",
    )
    ddp_timeout_s: PositiveInt = Field(1800, description="Seconds after which a hanging collective fails.")
    stall_timeout_s: PositiveInt = Field(
        1200,
        description="Seconds without any progress of a rank after which the attempt ends, with all ranks'"
        " stacks in their logs. In a job of sbatch or submit, an agent that hangs for so long is killed.",
    )
    preflight: Literal["full", "quick", "off"] = Field(
        "full",
        description="Checks before the start. quick: nodes have the same code and config, and share the run"
        " folder;"
        " full: all ranks also reduce and multiply, with speeds.",
    )
    plan: Literal["refuse", "warn", "off"] = Field(
        "refuse",
        description="What to do with a run that cannot fit its GPUs by the plan's formulas, before anything"
        " is loaded.",
        json_schema_extra=SINCE_0_2,
    )
    join_timeout_s: PositiveInt = Field(
        25, description="Seconds that nodes, then ranks, wait for each other to come."
    )
    max_restarts: NonNegativeInt = Field(
        5, description="How often a Slurm job that failed, but saved steps before, is tried again."
    )
    min_nodes: PositiveInt | None = Field(
        None,
        description="Fewest nodes with which a Slurm job goes on when others are lost; with fewer it is"
        " requeued. Default: half of its nodes.",
        json_schema_extra=SINCE_0_2,
    )
    spare_nodes: NonNegativeInt = Field(
        0,
        description="How many of a Slurm job's nodes wait, with the base in their page cache, until they take"
        " the place of lost ones.",
        json_schema_extra=SINCE_0_2,
    )


def _run_dir_has_a_default(schema: dict[str, Any]) -> None:
    schema["required"].remove("run_dir")  # load_config fills it in from the file's name


class Config(Section):
    """A whole run."""

    model_config = ConfigDict(json_schema_extra=_run_dir_has_a_default, title="qwenlora config")

    run_dir: Text = Field(description="Run folder. Default: runs/ and the config file's name.")
    model: Model
    data: Data
    lora: Lora = Lora()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    strategy: Strategy = Strategy()
    log: Log = Log()
    launch: Launch = Launch()

    @model_validator(mode="after")
    def _orthogonal_weights_have_the_base_s_dtype(self) -> "Config":
        if self.lora.init_lora_weights == "orthogonal" and self.strategy.quantization != "none":
            raise ValueError(
                "lora.init_lora_weights=orthogonal makes weights in the base's dtype, which"
                f" strategy.quantization={self.strategy.quantization} makes integers; set it to gaussian"
            )
        return self

    @model_validator(mode="after")
    def _the_best_has_rows_to_be_found_by(self) -> "Config":
        if self.train.metric_for_best_model and self.data.eval is None and self.data.eval_fraction is None:
            raise ValueError(
                f"train.metric_for_best_model={self.train.metric_for_best_model} needs rows to evaluate on:"
                " set data.eval or data.eval_fraction"
            )
        return self
