"""`qwenlora init`: the text of a config that fits a base, its rows and its GPUs, with reasons as comments."""

from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal, NamedTuple

from qwenlora.configs.combinations import Machine
from qwenlora.configs.schema import Config, Data
from qwenlora.data import sources
from qwenlora.data.bad_row import BadRow
from qwenlora.data.survey import rows_of_side
from qwenlora.data.tokenise import read_rows
from qwenlora.plan.bases import TINY, shape_of_base
from qwenlora.plan.counts import count
from qwenlora.plan.hardware import Gpu
from qwenlora.plan.plan import Way, best_way
from qwenlora.plan.rows import RowCounts, guess
from qwenlora.plan.speed import Case, Links
from qwenlora.run.format import as_yaml, size
from qwenlora.run.format import count as in_words

Task = Literal["chat", "tools", "thinking", "pretrain", "qlora"]
LOOKED_AT = 200  # rows, to see what they are
CURES = 3  # of the keys of a row, of those of its turns, of their roles
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
ROOM = 1.15  # guessed lengths may be so much too short
FEWEST_STEPS = 10  # of an epoch, as long as the batch can be smaller
SMALLEST_BATCH = 4
FEWEST_ROWS = 100  # below, none is kept for evaluation
NETWORK = 50e9  # bytes a second
FILLED = 0.9  # share of a GPU that is planned with: the formulas may be a tenth off


class Wish(NamedTuple):
    """What a user wants. model, data: as in a config; task: None: what the rows are; gpu: None: unknown."""

    name: str
    model: str
    data: str
    task: Task | None
    gpu: Gpu | None
    gpus: int


class Line(NamedTuple):
    """A line of a section. why: its comment."""

    key: str
    value: Any
    why: str = ""


def first_config(wish: Wish) -> str:
    """Return the text of a config. Raises: ValueError when rows cannot be read, or nothing fits the GPUs."""
    source = _readable(Data(train=wish.data, max_length=2**20))
    rows = guess(source)
    task = wish.task or _task_of(source)
    length = next((length for length in LENGTHS if length >= ROOM * rows.longest), LENGTHS[-1])
    packs = rows.tokens / length
    few = packs < FEWEST_STEPS * SMALLEST_BATCH
    packed = wish.gpu is not None and not few
    sections = {
        "model": [Line("name_or_path", wish.model)],
        "data": list(_data(source, rows, length, task, few=few)),
        "lora": [Line("r", r := 64 if task == "pretrain" else 16), Line("lora_alpha", 2 * r)],
        "train": list(_train(wish, packs if packed else rows.rows, task, packed=packed)),
    }
    if task == "qlora":
        sections["strategy"] = [Line("quantization", "nf4", "the frozen base in 4 bits")]
    head = f"# {wish.model}, {task}: made by `qwenlora init`, to be read and changed."
    said = _fitted(wish, rows, sections) if wish.gpu else [_no_gpu(wish)]
    return "".join(f"{line}\n" for line in (head, *said, *_text(sections)))


def _readable(data: Data) -> Data:
    """Return the data with the columns and roles that its first rows need, as their messages guess them."""
    for _ in range(CURES):
        first = islice(read_rows(sources.find(data)), LOOKED_AT)
        bad = [row for *_, row in first if isinstance(row, BadRow)]
        columns = next((row.columns for row in bad if row.columns), {})
        roles = {role: ours for row in reversed(bad) for role, ours in row.roles.items()}
        if not columns and not roles:
            break
        data = data.model_copy(
            update={"columns": {**data.columns, **columns}, "roles": {**data.roles, **roles}}
        )
    return data


def _task_of(data: Data) -> Task:
    """Return what the first rows are for."""
    for number, (_, row) in enumerate(rows_of_side(data, "train")):
        if row.text is not None:
            return "pretrain"
        if row.tools or any("tool_calls" in turn for turn in row.messages):
            return "tools"
        if any("reasoning_content" in turn or "<think>" in turn["content"] for turn in row.messages):
            return "thinking"
        if number == LOOKED_AT:
            break
    return "chat"


def _data(source: Data, rows: RowCounts, length: int, task: Task, *, few: bool) -> Iterator[Line]:
    yield Line("train", source.train, f"{in_words(rows.rows, 'row')}, about {rows.tokens:,} tokens")
    for key, names in (("columns", source.columns), ("roles", source.roles)):
        if names:
            yield Line(key, names, "guessed: `qwenlora data preview` shows what rows are then")
    if rows.rows >= FEWEST_ROWS:
        share = round(min(0.1, max(0.02, 20 / rows.rows)), 3)
        yield Line(
            "eval_fraction", share, f"about {round(share * rows.rows):,} rows are not trained, but evaluated"
        )
    yield Line("max_length", length, f"tokens; the longest row has about {rows.longest:,}")
    cut = {"pretrain": ("split", "a longer text becomes several rows")}
    cut |= dict.fromkeys(("tools", "thinking"), ("drop", "a row that is cut would lose its call or answer"))
    how, why = cut.get(task, ("truncate", "longer rows are cut; how many is said at the start"))
    yield Line("overlength", how, why)
    if few:
        yield Line("packing", "off", "so few rows, in packs, would be very few steps")


def _train(wish: Wish, units: float, task: Task, *, packed: bool) -> Iterator[Line]:
    """units: the rows or, where they are packed, the packs of an epoch."""
    batch = 16
    while batch > wish.gpus and units / batch < FEWEST_STEPS and batch > SMALLEST_BATCH:
        batch //= 2
    batch = -(-batch // wish.gpus) * wish.gpus
    yield Line("global_batch_size", batch, f"{'packs' if packed else 'rows'} a step, over all GPUs")
    yield Line("per_device_train_batch_size", 1)
    yield Line("num_train_epochs", 1 if task == "pretrain" else 3)
    rate = 1e-4 if task == "pretrain" else 2e-4
    yield Line("learning_rate", rate, "LoRA's: ten times that of full fine-tuning")
    yield Line("save_total_limit", 3, "checkpoints; one is written at the end of each epoch")


def _no_gpu(wish: Wish) -> str:
    if wish.model == TINY:
        return "# The embedded model has random weights: it shows that data and config are right."
    return "# Not fitted to GPUs, since there is none here: `qwenlora init --gpu h100` fits it to yours."


def _fitted(wish: Wish, rows: RowCounts, sections: dict[str, list[Line]]) -> list[str]:
    """Set the micro-batch and strategy that fit best, and return comments on it. Raises: ValueError when
    nothing fits, even in 4 bits."""
    assert wish.gpu is not None
    way = _best(wish, rows, sections)
    if way is None and "strategy" not in sections:
        sections["strategy"] = [Line("quantization", "nf4", "in 16 bits the base does not fit")]
        way = _best(wish, rows, sections)
    if way is None or way.memory is None:
        raise ValueError(
            f"--model {wish.model} does not fit {in_words(wish.gpus, wish.gpu.name)} of"
            f" {size(wish.gpu.bytes)}, even in 4 bits; name more with --gpus, or a smaller base with --model"
        )
    train = sections["train"]
    train[1] = Line("per_device_train_batch_size", way.per_device, "the fastest that fits")
    if way.strategy != "ddp":
        strategy = sections.setdefault("strategy", [])
        strategy.insert(0, Line("name", way.strategy, "the base in parts: it does not fit a GPU as a whole"))
    gpus = f"{wish.gpus} {wish.gpu.name}"
    return [
        f"# Planned on {gpus}: {size(way.memory.total)} of {size(wish.gpu.bytes)}, {way.step_s:.2f} s a step,"
        f" {way.tokens_s:,.0f} tokens/s (`qwenlora plan {wish.name}.yaml`)."
    ]


def _best(wish: Wish, rows: RowCounts, sections: dict[str, list[Line]]) -> Way | None:
    assert wish.gpu is not None
    values = {name: {line.key: line.value for line in lines} for name, lines in sections.items()}
    config = Config.model_validate({"run_dir": f"runs/{wish.name}"} | values)
    shape, _ = shape_of_base(config.model)
    gpu = wish.gpu.model_copy(update={"memory_mib": FILLED * wish.gpu.memory_mib})
    machine = Machine(1, wish.gpus, wish.gpus, gpu.bytes, gpu.nvlink > 0)
    case = Case(config, count(shape, config.lora), rows, machine, gpu, Links(gpu.link, NETWORK))
    return best_way(case)


def _text(sections: dict[str, list[Line]]) -> Iterator[str]:
    for name, lines in sections.items():
        yield ""
        yield f"{name}:"
        for line in lines:
            text = f"  {line.key}: {as_yaml(line.value)}"
            yield f"{text:35}  # {line.why}" if line.why else text
