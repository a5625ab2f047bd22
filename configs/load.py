"""From a YAML file and `key=value` overrides to one validated Config.

`load_config("configs/tiny.yaml", {"lora.r": 32})`. Every refusal is a ValueError whose lines each name the
place, the key, the value and what was expected. What the keys mean is schema.py's.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from qwenlora.configs.schema import Config, Section, SourceEntry

COMMAND_LINE = "command line"


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: 1e-4 is a number, `on` and 2026-01-01 are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own shape)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def load_config(
    path: str | Path,
    overrides: Mapping[str, Any] | Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
    defaults_of: str = "site",
) -> Config:
    """Return the resolved config: the schema's defaults < defaults < the YAML file < overrides.

    overrides: `key=value` texts as typed on a command line (the value is YAML), or a mapping of dotted key to
    value.
    defaults: dotted key to value, of a site file; defaults_of: what messages call it.
    Raises: ValueError, one line a problem.
    """
    path = Path(path)
    values, places = read(path)
    below = {key: value for key, value in (defaults or {}).items() if not _says(key, values, places)}
    problems = _apply(below, values, places, defaults_of)
    problems += _apply(overrides, values, places)
    if values.get("run_dir") is None:
        values["run_dir"] = f"runs/{path.stem}"
    try:
        # JSON mode is what makes strict types work for YAML: lists become tuples, but true is no integer
        config = Config.model_validate_json(json.dumps(values))
    except ValidationError as error:
        problems += _explain(error, places, path)
    if problems:
        raise ValueError("\n".join(problems))
    return config


def to_yaml(config: Config) -> str:
    """Return the config as YAML text that load_config reads back to an equal config."""
    return yaml.safe_dump(
        config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True, width=110
    )


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return {dotted key: (old value, new value)} for every key in which the two differ."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    return {key: (flat_old[key], flat_new[key]) for key in flat_old if flat_old[key] != flat_new[key]}


def _flatten(section: Section, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for attribute, field in type(section).model_fields.items():
        name, value = field.alias or attribute, getattr(section, attribute)
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Section) else {prefix + name: value}
    return flat


def _fields(section: type[Section] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    """Return {dotted key: field} of the whole schema, sections themselves left out."""
    fields: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            fields |= _fields(field.annotation, f"{prefix}{name}.")
        else:
            fields[prefix + (field.alias or name)] = field
    return fields


FIELDS = _fields()
SECTIONS = list(dict.fromkeys(key.split(".")[0] for key in FIELDS if "." in key))

# what people bring from other tools, where no nearness of spelling helps
ELSEWHERE = {
    "mask_history": "data.train_on",
    "neat_packing": "data.packing",
    "preprocessing_num_workers": "data.num_proc",
    "sample_packing": "data.packing",
    "train_on_inputs": "data.train_on",
    "val_size": "data.eval_fraction",
    "batch_size": "train.per_device_train_batch_size",
    "cutoff_len": "data.max_length",
    "dataset": "data.train",
    "dropout": "lora.lora_dropout",
    "epochs": "train.num_train_epochs",
    "gradient_accumulation_steps": "train.global_batch_size",
    "load_in_4bit": "strategy.quantization",
    "load_in_8bit": "strategy.quantization",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lr": "train.learning_rate",
    "max_seq_length": "data.max_length",
    "model_name_or_path": "model.name_or_path",
    "output_dir": "run_dir",
    "rank": "lora.r",
    "report_to": "log.wandb",
    "sequence_len": "data.max_length",
}


def read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the file's plain values and the place (`file:line`) of every dotted key in it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise ValueError(f"no config file {path} (looked in {Path.cwd()}){hint}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise ValueError(f"cannot read config {path}: {error.strerror}") from None
    places: dict[str, str] = {}
    value = parse(text, str(path), places)
    if not isinstance(value, dict | None):
        raise ValueError(f"{path}: expected `key: value` lines, found {_show(value)}")
    return value or {}, places


def parse(text: str, name: str, places: dict[str, str] | None = None) -> Any:
    """Return YAML text as plain values. name: what messages call it; places is filled with `name:line`."""
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # its constructor reads ahead
        raise ValueError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None
    try:
        node = loader.get_single_node()
        return None if node is None else _plain(loader, node, "", name, {} if places is None else places, ())
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{name}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ValueError(f"{name}: not a config: nested too deeply") from None
    finally:
        loader.dispose()


def _plain(
    loader: _Loader,
    node: yaml.Node,
    key: str,
    name: str,
    places: dict[str, str],
    above: tuple[yaml.Node, ...],
) -> Any:
    line = node.start_mark.line + 1
    if node in above:
        raise ValueError(f"{name}:{line}: {key} contains itself; write the value out")
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, child, key, name, places, above) for child in node.value]
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, child in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"{name}:{key_node.start_mark.line + 1}: a key must be a word")
            child_key = f"{key}.{key_node.value}" if key else key_node.value
            place = f"{name}:{key_node.start_mark.line + 1}"
            if key_node.value in mapping:
                raise ValueError(
                    f"{place}: {child_key} stands twice (first at {places[child_key]}); keep one"
                )
            places[child_key] = place
            mapping[key_node.value] = _plain(loader, child, child_key, name, places, above)
        return mapping
    return loader.construct_object(node)


def _says(key: str, values: dict[str, Any], places: dict[str, str]) -> bool:
    """Whether the file has the key, or something else than a section where its section would be."""
    section = key.partition(".")[0]
    return key in places or (section in places and not isinstance(values[section], dict))


def _apply(
    overrides: Mapping[str, Any] | Iterable[str],
    values: dict[str, Any],
    places: dict[str, str],
    place: str = COMMAND_LINE,
) -> list[str]:
    """Lay overrides over values; return the problems found. place: where they come from."""
    problems = []
    if isinstance(overrides, Mapping):
        pairs = list(overrides.items())
    else:
        pairs = []
        for text in overrides:
            key, equals, raw = text.partition("=")
            if not equals:
                problems.append(f"{place}: {text!r} is no key=value; write it like lora.r=32")
            elif key in FIELDS:
                pairs.append((key, _typed(FIELDS[key], raw)))
            else:
                pairs.append((key, raw))
    for key, value in pairs:
        if key in SECTIONS:
            keys = ", ".join(k for k in FIELDS if k.startswith(f"{key}."))
            problems.append(f"{place}: {key} is a section; set one of its keys: {keys}")
        elif key not in FIELDS:
            problems.append(f"{place}: {_unknown(key, value)}")
        else:
            *sections, last = key.split(".")
            target = values
            for section in sections:
                if not isinstance(target.get(section), dict):
                    target[section] = {}
                target = target[section]
            target[last] = value
            places[key] = place
    return problems


def _typed(field: FieldInfo, raw: str) -> Any:
    """Return the override's value as YAML reads it, or as the text it is where the key wants text."""
    try:
        value = parse(raw, COMMAND_LINE)
    except ValueError:
        return raw
    adapter: TypeAdapter[Any] = TypeAdapter(field.rebuild_annotation())
    # YAML drops spaces and what follows a #; a name on a command line means what it says, unless it is quoted
    as_typed = (isinstance(value, str) and raw[:1] not in "\"'") or (value is None and "#" in raw)
    candidates = [raw, value] if as_typed else [value, raw]
    if isinstance(value, dict | list) and _takes(adapter, ["a"]):
        candidates = [value]  # a list with a mistake in it is no text
    for candidate in candidates:
        if _takes(adapter, candidate):
            return candidate
    return value


def _takes(adapter: TypeAdapter[Any], candidate: Any) -> bool:
    try:
        adapter.validate_json(json.dumps(candidate), strict=True)
    except (ValidationError, TypeError):
        return False
    return True


def _explain(error: ValidationError, places: dict[str, str], path: Path) -> list[str]:
    """Return one line a problem, in the order of the file."""
    found: dict[tuple[str, str], list[str]] = {}
    inputs: dict[tuple[str, str], Any] = {}
    for item in error.errors():
        key, inside = _key_of(item["loc"], item["type"])
        if inside:
            place = places.get(key, str(path))
            found[place, f"{key}{inside}"] = [_inside(key, inside, item["type"], item["msg"], item["input"])]
            inputs[place, f"{key}{inside}"] = _EXPLAINED
            continue
        place = next((places[k] for k in _upwards(key) if k in places), str(path))
        found.setdefault((place, key), []).append(_problem(key, item["type"], item["msg"]))
        inputs[place, key] = item["input"]
    lines = []
    for (place, key), problems in found.items():
        value = inputs[place, key]
        if value is _EXPLAINED:
            lines.append(f"{place}: {problems[0]}")
        elif problems == ["unknown"]:
            lines.append(f"{place}: {_unknown(key, value)}")
        elif problems == ["missing"]:
            lines.append(f"{place}: {key} is missing: {_what_it_is(key)}")
        elif isinstance(value, dict) and key in SECTIONS:  # a rule between the keys of one section
            lines.append(f"{place}: {key}: {problems[0]}")
        else:
            lines.append(
                f"{place}: {key}={json.dumps(value, ensure_ascii=False)}: expected"
                f" {' or '.join(dict.fromkeys(problems))}"
            )
    return lines


def _key_of(loc: tuple[int | str, ...], kind: str) -> tuple[str, str]:
    """Return the dotted key of a pydantic location, and where inside its value, as `[0].weight`.

    The tags of unions (`<source>`) are left out.
    """
    if kind in ("extra_forbidden", "missing") and ".".join(map(str, loc[:2])) not in FIELDS:
        return ".".join(str(part) for part in loc), ""
    key = ""
    for number, part in enumerate(loc):
        longer = f"{key}.{part}" if key else str(part)
        if longer not in FIELDS and longer not in SECTIONS:
            rest = [part for part in loc[number:] if not str(part).startswith("<")]
            is_source = any(part == "<source>" for part in loc)
            return key, "".join(
                f"[{p}]" if isinstance(p, int) else f".{p}" for p in rest
            ) if is_source else ""
        key = longer
    return key, ""


_EXPLAINED = object()


def _inside(key: str, inside: str, kind: str, message: str, value: Any) -> str:
    """Return the line on a mistake inside a value that is a section of its own, a source of rows."""
    above, _, name = f"{key}{inside}".rpartition(".")
    names = list(SourceEntry.model_fields)
    if kind == "missing":
        return f"{above}: {name} is missing: {_described(SourceEntry.model_fields[name])}"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"a source has: {', '.join(names)}"
        return f"{above}.{name}={_show(value)}: no such key; {hint}"
    return f"{key}{inside}={_show(value)}: expected {_problem(key, kind, message)}"


def _upwards(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _problem(key: str, kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return "unknown"
    if kind == "missing":
        return "missing"
    if kind == "model_type":
        return "a section with " + ", ".join(k for k in FIELDS if k.startswith(f"{key}."))
    message = re.sub(r"^(Value error, |Input should be |(String|List) should have )|, not \d+$", "", message)
    return message.replace("a valid ", "a ").replace("a integer", "an integer").replace("array", "list")


def _what_it_is(key: str) -> str:
    field = FIELDS.get(key)
    if field is None:
        needed = [k for k in FIELDS if k.startswith(f"{key}.") and FIELDS[k].is_required()]
        return f"add a section `{key}:` with {', '.join(k.split('.')[-1] for k in needed)}"
    return _described(field)


def _described(field: FieldInfo) -> str:
    description = (field.description or "").split(". ")[0].rstrip(".")
    return description[:1].lower() + description[1:]


def _unknown(key: str, value: Any) -> str:
    """Return the message for a key that is not in the schema, with the nearest one that is."""
    section, _, leaf = key.rpartition(".")
    leaves = [k.rpartition(".")[2] for k in FIELDS]
    siblings = [k.rpartition(".")[2] for k in FIELDS if k.rpartition(".")[0] == section]
    moved = [k for k in FIELDS if k.rpartition(".")[2] == leaf]
    longer = [k for k in siblings if len(leaf) > 2 and k.startswith(leaf)]
    near = [
        f"{section}.{k}".lstrip(".")
        for k in longer + difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.7)
    ]
    by_leaf = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)
    far = [k for k in FIELDS if by_leaf and k.rpartition(".")[2] == by_leaf[0]]
    sections = [] if section else difflib.get_close_matches(leaf, SECTIONS, n=1, cutoff=0.6)
    elsewhere = [ELSEWHERE[leaf]] if leaf in ELSEWHERE else []
    if nearest := ((longer and near) or moved or elsewhere or sections or near or far)[:1]:
        hint = f"did you mean {nearest[0]}?"
    elif section in SECTIONS:
        hint = f"{section} has: {', '.join(siblings)}"
    else:
        hint = f"the sections are: {', '.join(SECTIONS)}"
    return f"{key}={_show(value)}: no such key; {hint}"


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    text = text.replace("\n", "\\n")
    return text if len(text) <= 60 else text[:57] + "..."
