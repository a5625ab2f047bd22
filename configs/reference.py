"""The keys of a config in words: for `qwenlora config keys` and docs/config.md."""

import json
import re
from typing import Annotated, Any

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from qwenlora.configs.combinations import RULES, Rule
from qwenlora.configs.keys import FIELDS, SECTIONS, keys_of
from qwenlora.configs.schema import FIRST, Config, SourceEntry
from qwenlora.configs.wording import show

HEAD = """# The keys of a config

Generated from configs/schema.py by `make schema`. In the terminal, `qwenlora config keys train` shows those
of a section, and `qwenlora config keys on_nan` those with a word in their name. Under "Refused" are settings
with which a key cannot run: [why, and what to set instead](strategies.md#what-cannot-run-together).
"""


def kind_of(field: FieldInfo) -> str:
    """Return what a key's value may be, in words: a whole number, one of ddp, fsdp ..."""
    return _kind(_schema_of(field))


def choices_of(field: FieldInfo) -> list[str]:
    """Return the words that a key takes; none where it takes others, too."""
    schema = _schema_of(field)
    choices: list[str] = []
    for part in schema.get("anyOf") or [schema]:
        values = part.get("enum", [part["const"]] if "const" in part else [])
        choices += [show(value) for value in values] + ["true", "false"] * (part.get("type") == "boolean")
    return list(dict.fromkeys(choices))


def _schema_of(field: FieldInfo) -> dict[str, Any]:
    kind: Any = field.annotation
    for constraint in field.metadata:
        kind = Annotated[kind, constraint]
    return TypeAdapter(kind).json_schema()


def _kind(schema: dict[str, Any]) -> str:
    if "anyOf" in schema or "oneOf" in schema:
        return " or ".join(dict.fromkeys(map(_kind, schema.get("anyOf") or schema["oneOf"])))
    if "enum" in schema:
        return ", ".join(show(value) for value in schema["enum"])
    if "const" in schema:
        return show(schema["const"])
    if "$ref" in schema:
        return "{path: ...}"
    if schema.get("type") == "array":
        return f"a list of {_kind(schema['items'])}" if "items" in schema else "a list"
    words = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true, false"}
    words |= {"object": "a mapping", "null": "null"}
    return words.get(schema.get("type", ""), "anything")


def default_of(field: FieldInfo) -> Any:
    """Return a key's default."""
    return field.get_default(call_default_factory=True)


def since(field: FieldInfo) -> str:
    """Return the version that first had a key, as 0.2."""
    extra = field.json_schema_extra
    return str(extra.get("since", FIRST)) if isinstance(extra, dict) else FIRST


def rules_of(key: str) -> list[Rule]:
    """Return the rules that refuse combinations of a key with others, or with the machine."""
    return [rule for rule in RULES if key in re.findall(r"[a-z]+\.\w+", rule.settings)]


def as_markdown() -> str:
    """Return the page of all keys: a heading for each, so that others can link to it."""
    parts = [HEAD, *(_entry(key, FIELDS[key]) for key in FIELDS if "." not in key)]
    for section in SECTIONS:
        of_section = Config.model_fields[section].annotation
        meaning = ((of_section.__doc__ if of_section else None) or "").strip()
        parts += [f"## {section}\n\n{meaning}\n", *(_entry(key, FIELDS[key]) for key in keys_of(section))]
    parts.append(f"## A source of rows\n\n{SourceEntry.__doc__}\n")
    parts += [_entry(f"{{{name}: ...}}", field) for name, field in SourceEntry.model_fields.items()]
    return "\n".join(parts)


def _entry(key: str, field: FieldInfo) -> str:
    default = "no default" if field.is_required() else f"default `{_as_json(default_of(field))}`"
    meaning = re.sub(r"([\\*])", r"\\\1", field.description or "")  # a regular expression is no Markdown
    kind = f"{kind_of(field)} · {default} · since {since(field)}"
    lines = [f"### {key}", "", meaning, "", kind]
    if refused := [f"- {rule.what}" for rule in rules_of(key)]:
        lines += ["", "Refused:", "", *refused]
    return "\n".join(lines) + "\n"


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
