"""Configs of other tools: LLaMA-Factory, ms-swift, Axolotl. What they are here is in counterparts/*.yaml.

A file is YAML, JSON (ms-swift's args.json), or a shell script that starts their training. convert.py writes a
config of ours from one; messages about unknown keys look them up here.
"""

import functools
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from qwenlora.configs.yaml_file import Values, parse_yaml, read_yaml

INFO = "dataset_info.json"  # LLaMA-Factory's list of data sets
_FILES = ("llama-factory", "ms-swift", "axolotl")
# a command's words, up to what the shell does with it: `2>&1 | tee log`, `> log &`
_WORDS = re.compile(r"""(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|(?!\s\d?>)[^|&;<>])*""", re.DOTALL)
# of torchrun, accelerate and deepspeed
_PROCESSES = re.compile(r"--(?:nproc[-_]per[-_]node|num_processes|num_gpus)[= ]+(\S+)")
_URLS = frozenset({"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"})


class Counterpart(NamedTuple):
    """What a key of another tool is here. key: ours, or none; values: {theirs: ours}, None for what is done
    anyway; note: how it differs, or what there is instead."""

    key: str = ""
    values: Mapping[str, object] = {}
    note: str = ""


class Tool(NamedTuple):
    """Another tool. signs: keys that only it has; defaults: {our key: value} of what it does without the key;
    command: a pattern of what its keys are arguments of, in a script."""

    name: str
    signs: frozenset[str]
    keys: Mapping[str, Counterpart]
    not_needed: frozenset[str]
    defaults: Values
    command: str


class Foreign(NamedTuple):
    """A config of another tool. tool: None for a dataset_info.json alone; more: how many trainings a script
    starts after this one."""

    path: Path
    tool: Tool | None
    values: Values
    more: int = 0

    @property
    def what(self) -> str:
        """What it is, for messages."""
        return f"a config of {self.tool.name}" if self.tool else f"LLaMA-Factory's {INFO}"


@functools.cache
def tools() -> tuple[Tool, ...]:
    """Return the tools that are known."""
    folder = Path(__file__).parent / "counterparts"
    common, *tables = (read_yaml(folder / f"{name}.yaml")[0] for name in ("common", *_FILES))
    return tuple(_tool(common, table) for table in tables)


def _tool(common: Values, table: Values) -> Tool:
    names = {key.rpartition(".")[2]: key for key in _list(common["same"])}
    keys = {
        key: Counterpart(**value) if isinstance(value, dict) else Counterpart(str(value))
        for key, value in {**names, **_mapping(common["keys"]), **_mapping(table["keys"])}.items()
    }
    not_needed = frozenset(_list(common["not_needed"]) + _list(table["not_needed"]))
    signs, command = frozenset(_list(table["signs"])), str(table.get("command", ""))
    return Tool(str(table["name"]), signs, keys, not_needed, _mapping(table["defaults"]), command)


def _list(value: object) -> list[str]:
    assert isinstance(value, list), "a table of this package"
    return value


def _mapping(value: object) -> Values:
    assert isinstance(value, dict), "a table of this package"
    return value


def hints(name: str) -> Iterator[str]:
    """Yield what a key of another tool is here, for messages."""
    for tool in tools():
        if counterpart := tool.keys.get(name):
            note = f" ({counterpart.note})" if counterpart.note else ""
            if counterpart.key:
                yield f"did you mean {counterpart.key}?{note}"
            yield f"{tool.name}'s {name} has no counterpart here{note}; remove it"
        elif name in tool.not_needed:
            yield f"{tool.name}'s {name} is not needed here; remove it"


# ---- files


def foreign(path: Path) -> Foreign | None:
    """Return a file as a config of another tool; None when it is none, or cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if in_script := list(_in_script(path, text)):
            return in_script[0]._replace(more=len(in_script) - 1)
        values = json.loads(text) if path.suffix == ".json" else parse_yaml(text, str(path))
    except (OSError, ValueError):
        return None
    if is_dataset_info(values):
        return Foreign(path, None, values)
    tool = _tool_of(values) if isinstance(values, dict) else None
    return Foreign(path, tool, values) if tool else None


def is_dataset_info(value: object) -> bool:
    """Return whether a file's value is LLaMA-Factory's dataset_info.json."""
    entries = list(value.values()) if isinstance(value, dict) else []
    return bool(entries) and all(isinstance(entry, dict) and not _URLS.isdisjoint(entry) for entry in entries)


def _tool_of(values: Values) -> Tool | None:
    if any(isinstance(values.get(section), dict) for section in ("model", "data", "train")):
        return None  # ours
    for tool in tools():
        if tool.signs.intersection(values) and len(tool.keys.keys() & values.keys()) > 1:
            return tool
    return None


def _in_script(path: Path, text: str) -> Iterator[Foreign]:
    """Yield each training that a shell script starts, with its arguments as values."""
    text = re.sub(r"(?m)(^|\s)#(\s.*)?$", "", text)
    variables: dict[str, str] = {}  # as they are at a line
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        if assigned := re.fullmatch(r"\s*(?:export\s+)?(\w+)=(\S*)\s*", line):
            variables[assigned[1]] = assigned[2]
        for tool in tools():
            match = re.search(tool.command, line) if tool.command else None
            if match and " --" in line:
                settings = {name: value for name, value in variables.items() if name in tool.keys}
                settings |= dict(re.findall(r"\b([A-Z_]+)=(\S+)", line[: match.start()]))
                if processes := _PROCESSES.search(line[: match.start()]):
                    settings["NPROC_PER_NODE"] = processes[1]
                values = {name: _typed(_filled(value, variables)) for name, value in settings.items()}
                yield Foreign(path, tool, values | _arguments(_filled(line[match.end() :], variables)))


def _filled(text: str, variables: Mapping[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match[1], match[0]), text)


def _arguments(line: str) -> Values:
    """Return a command's `--key value ...` as values: several make a list, none is true."""
    line = re.sub(r"\$\([^()]*(\([^()]*\)[^()]*)*\)", lambda match: shlex.quote(match[0]), line)
    command = _WORDS.match(line)
    assert command is not None, "it matches nothing, too"
    try:
        words = shlex.split(command[0])
    except ValueError:  # a quote that is not closed
        words = command[0].split()
    found: dict[str, list[object]] = {}
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            found[key] = [_typed(value)] if equals else []
        elif found:
            found[key].append(_typed(word))
    return {key: several[0] if len(several) == 1 else several or True for key, several in found.items()}


def _typed(word: str) -> object:
    try:
        value = parse_yaml(word, "")
    except ValueError:
        return word
    return word if value is None else value
