"""The keys of a config in words: for `qwenlora config keys` and docs/config.md."""

import json
from typing import Annotated, Any

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from qwenlora.configs.keys import FIELDS, SECTIONS, keys_of
from qwenlora.configs.schema import Config
from qwenlora.configs.wording import show

HEAD = """# The keys of a config

Generated from configs/schema.py by `qwenlora config keys --markdown > docs/config.md`. In the terminal,
`qwenlora config keys train` lists those of a section. A key without a default must be set.
"""


def kind_of(field: FieldInfo) -> str:
    """Return what a key's value may be, in words: a whole number, one of ddp, fsdp ..."""
    kind: Any = field.annotation
    for constraint in field.metadata:
        kind = Annotated[kind, constraint]
    return _kind(TypeAdapter(kind).json_schema())


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


def as_markdown() -> str:
    """Return the page of all keys, with a table for each section."""
    parts = [HEAD, _table([key for key in FIELDS if "." not in key])]
    for section in SECTIONS:
        of_section = Config.model_fields[section].annotation
        meaning = ((of_section.__doc__ if of_section else None) or "").strip()
        parts.append(f"## {section}\n\n{meaning}\n\n{_table(keys_of(section))}")
    return "\n".join(parts)


def _table(keys: list[str]) -> str:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        field = FIELDS[key]
        default = "" if field.is_required() else f"`{json.dumps(default_of(field), ensure_ascii=False)}`"
        cells = (f"`{key}`", kind_of(field), default, (field.description or ""))
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"
