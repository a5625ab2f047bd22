"""A validated Config from a YAML file and `key=value` overrides.

`load_config("configs/tiny.yaml", {"lora.r": 32})`. Errors name place, key, value and what was expected.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from qwenlora.configs.foreign import foreign
from qwenlora.configs.keys import FIELDS, SECTIONS, keys_of, unknown_key
from qwenlora.configs.schema import Config, SourceEntry
from qwenlora.configs.wording import did_you_mean, expected, show
from qwenlora.configs.yaml_file import Places, Values, parse_yaml, read_yaml

COMMAND_LINE = "command line"


def load_config(
    path: str | Path,
    overrides: Mapping[str, object] | Iterable[str] = (),
    defaults: Mapping[str, object] | None = None,
    defaults_of: str = "site",
) -> Config:
    """Return the resolved config: the schema's defaults < defaults < the YAML file < overrides.

    overrides: `key=value` texts as typed on a command line (the value is YAML), or a mapping of dotted key to
    value; defaults: dotted key to value, of a site file; defaults_of: their origin, for messages.
    Raises: ValueError, one line a problem; one line for a config of another tool.
    """
    path = Path(path)
    try:
        return _load(path, overrides, defaults, defaults_of)
    except ValueError:
        if found := foreign(path):
            raise ValueError(
                f"{path} is {found.what}; write one for qwenlora, and look at it: qwenlora config from {path}"
                " > my.yaml"
            ) from None
        raise


def _load(
    path: Path,
    overrides: Mapping[str, object] | Iterable[str],
    defaults: Mapping[str, object] | None,
    defaults_of: str,
) -> Config:
    values, places = read_yaml(path)
    missing = {key: value for key, value in (defaults or {}).items() if not _has(key, values, places)}
    problems = _apply(missing, values, places, defaults_of)
    problems += _apply(overrides, values, places)
    if values.get("run_dir") is None:
        values["run_dir"] = f"runs/{path.stem}"
    try:
        # JSON mode makes strict types work for YAML: lists become tuples, and yet true is no integer
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


def _has(key: str, values: Values, places: Places) -> bool:
    """Return whether the file has the key, or something other than a section in its section's place."""
    section = key.partition(".")[0]
    return key in places or (section in places and not isinstance(values[section], dict))


def _apply(
    overrides: Mapping[str, object] | Iterable[str], values: Values, places: Places, place: str = COMMAND_LINE
) -> list[str]:
    """Lay overrides over values; return the problems. place: the overrides' origin, for messages."""
    problems, pairs = [], []
    if isinstance(overrides, Mapping):
        pairs = list(overrides.items())
    else:
        for text in overrides:
            key, equals, raw = text.partition("=")
            if equals:
                pairs.append((key, _typed(FIELDS[key], raw) if key in FIELDS else raw))
            else:
                problems.append(f"{place}: {text!r} is no key=value; write it like lora.r=32")
    for key, value in pairs:
        if key in SECTIONS:
            problems.append(f"{place}: {key} is a section; set one of its keys: {', '.join(keys_of(key))}")
        elif key not in FIELDS:
            problems.append(f"{place}: {unknown_key(key, value)}")
        else:
            set_key(values, key, value)
            places[key] = place
    return problems


def set_key(values: Values, key: str, value: object) -> None:
    """Set a dotted key in nested values."""
    *sections, name = key.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict):
            inner = values[section] = {}
        values = inner
    values[name] = value


def _typed(field: FieldInfo, raw: str) -> object:
    """Return the override's value as YAML reads it, or as it was typed where the key takes text."""
    try:
        value = parse_yaml(raw, COMMAND_LINE)
    except ValueError:
        return raw
    adapter: TypeAdapter[object] = TypeAdapter(field.rebuild_annotation())
    # YAML drops spaces and text after a #; on a command line both belong to the value, unless it is quoted
    as_typed = (isinstance(value, str) and raw[:1] not in "\"'") or (value is None and "#" in raw)
    candidates = [raw, value] if as_typed else [value, raw]
    if isinstance(value, dict | list) and takes(adapter, ["a"]):
        candidates = [value]  # a list with a mistake in it is no text
    return next((candidate for candidate in candidates if takes(adapter, candidate)), value)


def takes(adapter: TypeAdapter[object], candidate: object) -> bool:
    """Return whether a value is valid as YAML has it."""
    try:
        adapter.validate_json(json.dumps(candidate), strict=True)
    except (ValidationError, TypeError):
        return False
    return True


# ---- messages


def _explain(error: ValidationError, places: Places, path: Path) -> list[str]:
    """Return one line a problem, in pydantic's order, which is the schema's."""
    groups: dict[tuple[str, str, str], list[ErrorDetails]] = {}
    for item in error.errors():
        key, inside = _key_of(item["loc"], item["type"])
        if inside:
            place = places.get(key, str(path))
        else:
            place = next((places[above] for above in _upwards(key) if above in places), str(path))
        groups.setdefault((place, key, inside), []).append(item)
    return [
        f"{place}: {_problem_inside(key, inside, items[-1]) if inside else _problem(key, items)}"
        for (place, key, inside), items in groups.items()
    ]


def _key_of(loc: tuple[int | str, ...], kind: str) -> tuple[str, str]:
    """Return a pydantic location's dotted key, and the place inside it, as `[0].weight` of a source."""
    names = [str(part) for part in loc]
    if kind in ("extra_forbidden", "missing") and ".".join(names[:2]) not in FIELDS:
        return ".".join(names), ""
    known = 0
    while known < len(names) and ".".join(names[: known + 1]) in (*FIELDS, *SECTIONS):
        known += 1
    key = ".".join(names[:known])
    if "<source>" not in names:
        return key, ""
    return key, "".join(map(_step, loc[known:]))


def _step(part: int | str) -> str:
    """Return a part of a pydantic location as it is written after a key; empty for the tag of a union."""
    if isinstance(part, int):
        return f"[{part}]"
    return "" if part.startswith("<") else f".{part}"


def _upwards(key: str) -> list[str]:
    """Return a key and the sections that it is in."""
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _problem(key: str, errors: list[ErrorDetails]) -> str:
    """Return what is wrong with a key. errors: pydantic's, one for each type that its value may have."""
    kind, value = errors[0]["type"], errors[-1]["input"]
    if kind == "extra_forbidden":
        return unknown_key(key, value)
    if kind == "missing":
        return f"{key} is missing: {_meaning(key)}"
    if kind == "model_type":
        return (
            f"{key}={json.dumps(value, ensure_ascii=False)}: expected a section with"
            f" {', '.join(keys_of(key))}"
        )
    if isinstance(value, dict) and key in SECTIONS:  # a rule between the keys of one section
        return f"{key}: {expected(errors)}"
    return f"{key}={json.dumps(value, ensure_ascii=False)}: expected {expected(errors)}"


def _problem_inside(key: str, inside: str, error: ErrorDetails) -> str:
    """Return what is wrong inside a source of rows, which has keys of its own."""
    fields = SourceEntry.model_fields
    above, _, name = f"{key}{inside}".rpartition(".")
    if error["type"] == "missing":
        return f"{above}: {name} is missing: {_described(fields[name])}"
    if error["type"] == "extra_forbidden":
        hint = did_you_mean(name, fields, f"a source has: {', '.join(fields)}")
        return f"{above}.{name}={show(error['input'])}: no such key; {hint}"
    return f"{key}{inside}={show(error['input'])}: expected {expected([error])}"


def _meaning(key: str) -> str:
    if key in FIELDS:
        return _described(FIELDS[key])
    needed = [name for name in keys_of(key) if FIELDS[name].is_required()]
    return f"add a section `{key}:` with {', '.join(name.split('.')[-1] for name in needed)}"


def _described(field: FieldInfo) -> str:
    description = (field.description or "").split(". ")[0].rstrip(".")
    return description[:1].lower() + description[1:]
