"""A config of ours from one of LLaMA-Factory, ms-swift or Axolotl: `qwenlora config from FILE`.

counterparts/*.yaml have the keys that are copied; here are those that depend on each other.
"""

import json
import math
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import TypeAdapter

from qwenlora.configs.foreign import INFO, Counterpart, Foreign, Tool, foreign, tools
from qwenlora.configs.foreign_data import READERS, Entry, infos, of_info
from qwenlora.configs.keys import FIELDS
from qwenlora.configs.load import set_key, takes
from qwenlora.configs.wording import show
from qwenlora.configs.yaml_file import Values

_COMPOSED = frozenset(  # of ours; not copied one by one
    {"data.train", "data.eval", "run_dir", "strategy.name", "train.global_batch_size"}
    | {f"train.{what}_{name}" for what in ("save", "eval") for name in ("strategy", "steps")}
)
_LISTS = ("log.to", "lora.modules_to_save", "lora.target_parameters", "lora.trainable_token_indices")
_SECRET = re.compile(
    r"token\b|secret|passw|key(_id)?\b|credential|webhook|\b(hf_|sk-|ms-)\w{16}|://[^/\s]*@", re.IGNORECASE
)
_WIDTH = 110


class _Result(NamedTuple):
    """values: {our dotted key: value}; differs, none: lines on what differs, and on what has no counterpart;
    unknown: `key=value` of those that no table has; unneeded: keys that have no use here."""

    values: Values
    differs: list[str]
    none: list[str]
    unknown: list[str]
    unneeded: list[str]


def convert(path: Path) -> str:
    """Return the nearest config of ours as YAML, with comments on what differs. Raises: ValueError."""
    found = foreign(path)
    if found is None:
        if not path.is_file():
            raise ValueError(f"no file {path} (looked in {Path.cwd()})")
        names = ", ".join(tool.name for tool in tools())
        raise ValueError(
            f"{path} is not known as a config of {names}, nor as LLaMA-Factory's {INFO}; name a YAML or"
            " JSON file of theirs, or a shell script that starts their training"
        )
    result = _Result(dict(found.tool.defaults) if found.tool else {}, [], [], [], [])
    if found.more:
        result.differs.append(f"{found.path} starts {found.more + 1} trainings, of which this is the first")
    if found.tool:
        theirs = {key: value for key, value in found.values.items() if value not in (None, "", [], {})}
        _copy(found.tool, theirs, result)
        _compose(found.path, found.tool, theirs, result)
    else:
        _set_sources("data.train", _all_of(found, result), result)
    if not isinstance(result.values.get("model.name_or_path"), str):
        result.values["model.name_or_path"] = "tiny"
        result.differs.append("model.name_or_path: the file names no model; tiny stands for yours")
    return _text(found, result)


# ---- keys


def _copy(tool: Tool, theirs: Values, result: _Result) -> None:
    """Copy each key that stands alone, and list what has no counterpart."""
    if theirs.get("warmup_steps"):  # transformers' order
        theirs.pop("warmup_ratio", None)
    elif "warmup_ratio" in theirs:
        theirs.pop("warmup_steps", None)
    for key, value in theirs.items():
        counterpart = tool.keys.get(key)
        known = counterpart is not None and _spelled(value) in counterpart.values
        if key in tool.not_needed:
            result.unneeded.append(key)
        elif counterpart is None:
            given = f"{key}={_spelled(value)}"
            result.unknown.append(f"{key} (not shown)" if _SECRET.search(given) else show(given))
        elif known and counterpart.values[_spelled(value)] is None:
            pass  # as it is here
        elif not counterpart.key:
            result.none.append(f"{key}={show(value)}: {counterpart.note}")
        elif counterpart.key not in _COMPOSED:
            _put(key, value, counterpart, result)


def _spelled(value: object) -> str:
    """Return a value as the tables' YAML has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _put(key: str, theirs: object, counterpart: Counterpart, result: _Result) -> None:
    """Copy a value; where our key does not take it, say so."""
    ours, value = counterpart.key, _translated(theirs, counterpart)
    if isinstance(theirs, str) and "$" in theirs:
        result.differs.append(f"{key}={show(theirs)}: the shell works this out; write {ours}")
    elif takes(TypeAdapter(FIELDS[ours].rebuild_annotation()), value):
        result.values[ours] = value
        if counterpart.note:
            result.differs.append(f"{key}={show(theirs)}: {counterpart.note}")
    else:
        result.differs.append(f"{key}={show(theirs)}: {ours} does not take it; left out")


def _translated(value: object, counterpart: Counterpart) -> object:
    """Return a value as our key has it: another word, one instead of a list, or a list of what stands in
    one text."""
    if isinstance(value, list) and counterpart.key not in _LISTS:  # the table has the one first that decides
        known = [name for name in counterpart.values if name in value]
        value = known[0] if known else value[0] if len(value) == 1 else value
    elif isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    value = counterpart.values.get(_spelled(value), value)
    if isinstance(value, str) and counterpart.key in (*_LISTS, "lora.target_modules"):
        names = [name.strip() for name in value.split(",")]
        value = names if len(names) > 1 or counterpart.key in _LISTS else value
    return value


def _compose(path: Path, tool: Tool, theirs: Values, result: _Result) -> None:
    """Set what depends on several keys."""
    for ours in ("data.train", "data.eval"):
        entries: list[Entry] = []
        for key, value in theirs.items():
            if tool.keys.get(key, Counterpart()).key == ours:
                entries += READERS[tool.name](value, theirs, path, result.differs.append)
        _set_sources(ours, entries, result)
    if "data.eval" in result.values:
        result.values.pop("data.eval_fraction", None)
    _unlike_here(tool, theirs, result)
    _batch(tool, theirs, result)
    for what in ("save", "eval"):
        _when(what, theirs, result)
    _strategy(theirs, result)
    if "output_dir" in theirs:
        result.differs.append(
            f"output_dir={show(theirs['output_dir'])}: run_dir is runs/ and the config's name"
        )


def _all_of(found: Foreign, result: _Result) -> list[Entry]:
    """Return a source for each data set of a dataset_info.json."""
    known, folder = infos(found.path), found.path.parent
    return [
        entry
        for name, info in known.items()
        if isinstance(info, dict)
        for entry in of_info(name, info, folder, result.differs.append)
    ]


def _set_sources(ours: str, entries: list[Entry], result: _Result) -> None:
    if entries:
        result.values[ours] = entries[0] if len(entries) == 1 else entries
    elif ours == "data.train":
        result.values[ours] = "my.jsonl"
        result.differs.append("data.train: no rows are named that qwenlora trains; my.jsonl stands for yours")


def _unlike_here(tool: Tool, theirs: Values, result: _Result) -> None:
    """Set, or note, what a tool works out where it is not said."""
    rank = result.values.get("lora.r")
    if tool.name == "LLaMA-Factory":
        if "lora_alpha" not in theirs and isinstance(rank, int):
            result.values["lora.lora_alpha"] = 2 * rank
        if theirs.get("stage") == "pt" and "packing" not in theirs:
            result.values["data.packing"] = "on"
    elif tool.name == "ms-swift" and "max_length" not in theirs:
        result.differs.append("max_length: ms-swift takes the model's longest; set data.max_length (2048)")


def _batch(tool: Tool, theirs: Values, result: _Result) -> None:
    """Set the rows of a step: those that a GPU holds, times accumulation steps, times processes."""
    size = result.values.setdefault("train.per_device_train_batch_size", 1)
    processes = result.values.get("launch.nproc_per_node", theirs.get("global_world_size", 1))
    if not isinstance(size, int):  # auto, which only qwenlora knows
        size = result.values["train.per_device_train_batch_size"] = 1
    if not isinstance(processes, int):
        processes = 1
    steps = theirs.get("gradient_accumulation_steps")
    if not isinstance(steps, int) or steps < 1:  # ms-swift then makes it 16 rows a step
        steps = math.ceil(16 / size / processes) if tool.name == "ms-swift" else 1
    result.values["train.global_batch_size"] = size * steps * processes
    result.differs.append(
        f"train.global_batch_size={size * steps * processes} is {size} a GPU x {steps} accumulated x"
        f" {processes} GPU{'s' * (processes > 1)}; multiply it when you train on more"
    )


def _when(what: str, theirs: Values, result: _Result) -> None:
    """Set when a run saves or evaluates. what: save or eval."""
    by_default, often = result.values[f"train.{what}_strategy"], theirs.get(f"{what}s_per_epoch")
    strategy = theirs.get(f"{what}_strategy") or (
        theirs.get("evaluation_strategy") if what == "eval" else None
    )
    steps = theirs.get(f"{what}_steps")
    strategy = strategy or ("steps" if steps else "epoch" if often else by_default)
    if strategy == "steps":
        if steps is None and what == "eval":  # transformers: as it logs; ms-swift: as it saves
            steps = theirs.get("save_steps" if by_default == "steps" else "logging_steps")
        steps = steps or 500
        if type(steps) is int and steps > 0:  # True is an int, too
            result.values[f"train.{what}_steps"] = steps
        else:
            strategy = "epoch"
            result.differs.append(f"{what}_steps={show(steps)}: not a number of steps; here after each epoch")
    elif strategy not in ("no", "epoch"):
        result.differs.append(f"{what}_strategy={show(strategy)}: here after each epoch")
        strategy = "epoch"
    if often not in (None, 0, 1):
        result.differs.append(f"{what}s_per_epoch={show(often)}: here once, or every train.{what}_steps")
    result.values[f"train.{what}_strategy"] = strategy


def _strategy(theirs: Values, result: _Result) -> None:
    """Set how the model is spread, by DeepSpeed's stage, or for FSDP."""
    config = theirs.get("deepspeed")
    if config is None:
        if theirs.get("fsdp") or theirs.get("fsdp_config"):
            result.values["strategy.name"] = "fsdp"
            result.differs.append("fsdp: FSDP2, wrapped layer by layer; no further options")
        return
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    name = f"zero{zero.get('stage')}" if isinstance(zero, dict) else Path(str(config)).name.lower()
    stage = re.search(r"(?:zero|z|stage)[_-]?([0-3])", name)
    if stage is None:
        result.none.append(f"deepspeed={show(config)}: choose strategy.name: zero1, zero2 or zero3")
        return
    result.values["strategy.name"] = f"zero{stage[1]}" if stage[1] != "0" else "ddp"
    parts = [what for what in ("param", "optimizer") if _offloads(zero, what)]
    if "offload" in name or parts:
        by_params = stage[1] == "3" and parts != ["optimizer"]
        result.values["strategy.offload"] = "params" if by_params else "optimizer"
    result.differs.append(f"deepspeed={show(config)}: qwenlora's own config of that stage is used")


def _offloads(zero: object, what: str) -> bool:
    part = zero.get(f"offload_{what}") if isinstance(zero, dict) else None
    return isinstance(part, dict) and part.get("device") not in (None, "none")


# ---- the text


def _text(found: Foreign, result: _Result) -> str:
    nested: Values = {}
    for key in FIELDS:  # in the schema's order
        if key in result.values:
            set_key(nested, key, result.values[key])
    lines = [f"from {found.path}, {found.what}"]
    for title, notes in (("differs here", result.differs), ("no counterpart here", result.none)):
        lines += [f"{title}:", *(f"  {note}" for note in notes)] if notes else []
    for title, names in (
        ("no counterpart is known of", result.unknown),
        ("not needed here", result.unneeded),
    ):
        lines += textwrap.wrap(f"{title}: {', '.join(names)}", _WIDTH - 2) if names else []
    text = yaml.safe_dump(nested, sort_keys=False, allow_unicode=True, width=_WIDTH)
    comment = "\n".join(lines).replace("\t", " ").splitlines()
    return "".join(f"# {_printable(line)}\n" for line in comment) + text


def _printable(line: str) -> str:
    """Return a line without what YAML refuses."""
    return "".join(letter if letter.isprintable() else "?" for letter in line)
