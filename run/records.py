"""The JSON files of a run folder as typed records: one frozen model a file, and one way to read and write it.

| file | record | who reads and writes it |
|---|---|---|
| attempts.jsonl | Attempt, a line each | run/history.py |
| progress.json | Progress | run/history.py |
| facts.json | Facts | run/folder.py |
| code.json | Code | run/code.py |
| checkpoint-N/manifest.json | Manifest | run/checkpoints.py |
| checkpoint-N/state.json | State | run/checkpoints.py |
| ranks.json | Paces | trainer/record/pace.py |
| comparison.json | comparison.py's Comparison | run/comparison.py |

A file without `format` is of version 0.1, which had the same records. A change that an older version would
misread raises the record's FORMAT.
"""

import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, PlainSerializer, ValidationError

Reason = Literal["done", "stopped", "failed", "refused", "killed"]
SideName = Literal["train", "eval"]
Moment = Annotated[
    datetime, PlainSerializer(lambda moment: moment.isoformat(timespec="milliseconds"), return_type=str)
]


def now() -> datetime:
    """Return the time in UTC."""
    return datetime.now(UTC)


class Record(BaseModel):
    """The content of a file. format: of the file; a reader refuses a newer format than it knows."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")
    FORMAT: ClassVar[int] = 1

    format: int = 1

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Return the record in a text. Raises: ValueError saying, on one line, what is wrong with it."""
        try:
            record = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None
        if record.format > cls.FORMAT:
            raise ValueError(
                f"has format {record.format}, this version of qwenlora reads format {cls.FORMAT}: update"
                " qwenlora"
            )
        return record

    @classmethod
    def read(cls, file: Path) -> Self:
        """Return the record of a file. Raises: OSError, or ValueError saying what is wrong with its text."""
        return cls.parse(file.read_bytes())

    def text(self, indent: int | None = 1) -> str:
        """Return the record as JSON. Fields that are None are left out. indent: None for one line."""
        return self.model_dump_json(indent=indent, exclude_none=True)

    def revised(self, **changes: Any) -> Self:
        """Return the record with other values. Raises: ValidationError for values that do not fit."""
        assert changes.keys() <= type(self).model_fields.keys(), changes
        return type(self).model_validate(dict(self) | changes)


class Planned(BaseModel, frozen=True):
    """What a plan says of an attempt. device, kind: of GPU and strategy, by which it is corrected; memory: of
    tensors on a GPU, in bytes, None on a CPU, where libraries count as well; memory_by, time_by: factors by
    which earlier runs corrected the formulas."""

    device: str
    kind: str
    step_s: float
    tokens_s: float
    memory: int | None = None
    memory_by: float = 1.0
    time_by: float = 1.0


class Attempt(Record):
    """One attempt at a run. A field is None where the attempt did not get that far.

    restarts: how often Slurm had requeued the job; saved_before: the newest checkpoint's step at the start;
    reason: why it ended, killed when it could not record that itself; cause: Slurm's word, where Slurm ended
    it (TIMEOUT, PREEMPTED, NODE_FAIL, REQUEUED, CANCELLED); lost: nodes whose agents died in it; bad: nodes
    that its end showed to be bad; steps_repeated: trained before, but not saved; planned: before it began,
    None where the GPU is not known; seconds: of the start, by phase; trained_s, saving_s: seconds in steps,
    and in saves that delayed them; goodput: of the run until then.
    """

    attempt: int
    start: Moment
    host: str = ""
    job_id: str | None = None
    processes: int = 1
    nodes: list[str] = []
    restarts: int = 0
    saved_before: int = 0
    resumed_from: str | None = None
    strategy: str | None = None
    first_step: int | None = None
    last_step: int | None = None
    steps_repeated: int | None = None
    planned: Planned | None = None
    seconds: dict[str, float] | None = None
    trained_s: float = 0.0
    saving_s: float = 0.0
    end: Moment | None = None
    reason: Reason | None = None
    cause: str | None = None
    lost: list[str] = []
    bad: list[str] = []
    message: str = ""
    goodput: float | None = None

    @property
    def cause_in_words(self) -> str:
        """What outside of it ended the attempt, if anything."""
        told = [
            f"{word} {', '.join(hosts)}" for word, hosts in (("lost", self.lost), ("bad", self.bad)) if hosts
        ]
        return self.cause or "; ".join(told)

    @property
    def restart_s(self) -> float | None:
        """Seconds from the start to the end of the first step."""
        return sum(self.seconds.values()) if self.seconds else None


class Progress(Record):
    """The last step of an attempt. time: seconds since 1970; trained_s, saving_s: as Attempt's, so far."""

    attempt: int
    step: int
    time: float
    trained_s: float
    saving_s: float


class Paces(Record):
    """How fast the ranks were when a step was logged last. hosts, seconds: of each rank, the seconds that its
    forward passes of a step took, without waiting for others; slow: which ranks were found slow, in words."""

    step: int
    hosts: list[str]
    seconds: list[float]
    slow: list[str] = []

    @property
    def usual(self) -> float:
        """The median of the seconds; of two, the lower."""
        return statistics.median_low(self.seconds)


class Work(BaseModel, frozen=True):
    """What a token is multiplied with in training, in numbers. frozen, trained: of matrices, of a mixture of
    experts those that the token meets; head_frozen, head_trained: of the output matrix; attention: {window in
    tokens, 0 for none: heads * head_dim of all layers that have it}; recurrence: FLOPs of linear attention,
    forward."""

    frozen: int
    trained: int
    head_frozen: int
    head_trained: int
    attention: dict[int, int]
    recurrence: int = 0


class OfKind(BaseModel, frozen=True):
    """Numbers in a base's layers of one kind (attention, experts ...). total: in the base; trained: in the
    adapter; matrices: linear layers, and stacks of experts' matrices; adapted: those that are trained."""

    total: int
    matrices: int
    trained: int = 0
    adapted: int = 0


class Parameters(BaseModel, frozen=True):
    """Counts of numbers. body: all but embeddings and head, the output matrix; hidden_size,
    intermediate_size, kv_width: widths of a token's activations in a layer; for a mixture of experts, in
    those that the token meets; 0 in runs of a version before 0.1; attention_width, linear_width: heads *
    head_dim of all layers with attention, and of values in linear attention; normed_width: of queries and
    keys that have norms, in all layers; experts_width: of the inputs and products of the experts that a token
    meets; experts_met: how many; all five 0 in runs of 0.1; work: None in runs of 0.1; kinds: {kind of
    layers: its numbers}, empty in runs of 0.1; active: of the base, those that a token meets, 0 in them;
    begun: of the trained ones, those in A and B whose beginning is kept beside them."""

    total: int
    trainable: int
    body: int
    head: int
    layers: int
    hidden_size: int = 0
    intermediate_size: int = 0
    kv_width: int = 0
    attention_width: int = 0
    normed_width: int = 0
    linear_width: int = 0
    experts_width: int = 0
    experts_met: int = 0
    work: Work | None = None
    kinds: dict[str, OfKind] = {}
    active: int = 0
    begun: int = 0

    @property
    def experts(self) -> int:
        """The base's numbers in matrices of experts."""
        return self.kinds["experts"].total if "experts" in self.kinds else 0

    @property
    def experts_trained(self) -> int:
        """The adapter's numbers on matrices of experts."""
        return self.kinds["experts"].trained if "experts" in self.kinds else 0


class SideCounts(BaseModel, frozen=True):
    """Counts of the training or the evaluation rows, made before training.

    rows, tokens, trained_tokens, longest: of an epoch; read_rows, longest_read, longest_place (source, file,
    line): of the files, before long rows were cut; overlength: rows longer than data.max_length, which were
    truncated, dropped or split; lost_replies: not trained, since they do not fit together with their
    question; masked_replies: of weight 0, and weighted_tokens: trained, of another weight than 1, both of the
    files; packs, packs_sha256: of training rows; sha256: of all trained data; duplicates: repeated rows.
    """

    rows: int
    read_rows: int
    tokens: int
    trained_tokens: int
    longest: int
    longest_read: int = 0
    longest_place: tuple[int, int, int] = (0, 0, 0)
    overlength: int = 0
    truncated: int = 0
    dropped: int = 0
    split: int = 0
    lost_replies: int = 0
    masked_replies: int = 0
    weighted_tokens: int = 0
    duplicates: int = 0
    packs: int = 0
    packs_sha256: str = ""
    sha256: str

    @property
    def cut(self) -> dict[str, int]:
        """{outcome of over-length rows: how many}, without zeros."""
        counts = {"truncated": self.truncated, "dropped": self.dropped, "split": self.split}
        return {name: count for name, count in counts.items() if count}


class Facts(Record):
    """Facts of a run that are known before its first step.

    base: folder or hub name; base_fingerprint: changes when its weights do; data_folder: the prepared rows;
    files_key: hash of the files that they are from; data: their counts; packing: data.packing, decided;
    bad_rows: left out; notes: warnings; checkpoint_bytes: of one checkpoint; stamp: data/freshness.py's;
    text_only: no training row is a chat; base_quantised: how the base's files are, empty if they are not.
    """

    base: str
    base_fingerprint: str
    data_folder: str
    files_key: str
    data: dict[SideName, SideCounts]
    packing: bool
    bad_rows: int
    notes: list[str]
    parameters: Parameters
    checkpoint_bytes: int
    stamp: str = ""
    text_only: bool = False
    base_quantised: str = ""

    @property
    def units(self) -> int:
        """Rows an epoch, or with packing: packs."""
        train = self.data["train"]
        return train.packs if self.packing else train.rows

    @property
    def longest(self) -> int:
        """Tokens of the longest row or, where data.max_length allows, pack."""
        packed = self.data["train"].tokens if self.packing else 0  # all rows may lie in one
        return max([packed, *(counts.longest for counts in self.data.values())])

    @property
    def data_identity(self) -> str:
        """The hashes of the trained data, whichever version of the code prepared it."""
        sides = [f"{side}:{counts.sha256}" for side, counts in self.data.items()]
        return " ".join([*sides, f"packs:{self.data['train'].packs_sha256}"] if self.packing else sides)


class Code(Record):
    """The code of a run. git: the commit, None without one; versions: of packages, None where missing;
    folder: the command's working directory, empty where an older version wrote the record."""

    git: str | None = None
    versions: dict[str, str | None] = {}
    python: str = ""
    command: list[str] = []
    folder: str = ""


class Identity(BaseModel, frozen=True):
    """The run that a checkpoint belongs to. config: resolved; data, base: hashes of rows and base weights."""

    config: dict[str, Any]
    data: str
    base: str


class FileEntry(BaseModel, frozen=True):
    """The size and hash of a checkpoint's file as it was written."""

    bytes: int
    sha256: str


class Manifest(Record):
    """A checkpoint's manifest. A folder that does not match it is no checkpoint. sha256: of the manifest."""

    step: int
    world_size: int
    identity: Identity
    config_sha256: str
    files: dict[str, FileEntry]
    sha256: str = ""


class Cursor(BaseModel, frozen=True):
    """A place in the data."""

    epoch: int
    step_in_epoch: int
    steps_per_epoch: int


class Schedule(BaseModel, frozen=True):
    """A place in the learning rate's schedule."""

    last_epoch: int


class State(Record):
    """The state that a resume needs besides tensors.

    scaler: float16's; optimizer_groups: their settings; loss_so_far: of each rank, since logged_step, the
    last logging step; evaluation_due: an evaluation comes first after a resume; eval_losses: {step:
    eval_loss}; moved: whether lora_B is no longer zero; wandb_id: of the run's W&B run, or empty; dtype: of
    the base's weights; micro_batch: rows, or packs, that a rank held at once; empty and 0 in versions that
    did not keep them.
    """

    step: int
    cursor: Cursor
    scheduler: Schedule
    scaler: dict[str, Any] | None = None
    optimizer_groups: list[dict[str, Any]]
    loss_so_far: list[float]
    logged_step: int
    evaluation_due: bool
    eval_losses: dict[int, float]
    moved: bool
    wandb_id: str = ""
    dtype: str = ""
    micro_batch: int = 0


class RankError(Record):
    """Why a process failed. time: seconds since 1970; ours: the message is qwenlora's own and says all;
    bad_ranks: those whose nodes it names as bad."""

    process: str
    time: float
    message: str
    code: int
    ours: bool
    bad_ranks: list[int] = []
