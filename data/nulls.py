"""Nulls in tools and calls. Arrow gives all calls, and all tools, the keys of any of them, and fills them
with null; an export writes these nulls out as JSON. So null means that a key is missing, unless the tool's
schema takes null there, or requires the key."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from qwenlora.data.chunks import JsonObject
from qwenlora.data.turns import Function, Message, ToolCall

_DEEP = 8  # of schemas within schemas: a $ref may name the schema that it stands in
_ALTERNATIVES = ("anyOf", "oneOf", "allOf")


def without_nulls(
    messages: list[Message], tools: list[JsonObject] | None
) -> tuple[list[Message], list[JsonObject] | None]:
    """Return turns and tools without the null keys that mean nothing."""
    tools = _tool(tools)
    schemas = dict(map(_name_and_schema, tools or ()))
    return [_message(message, schemas) for message in messages], tools


def _tool(value: Any) -> Any:
    """Return a part of a tool without null keys; a default may be null where the value may."""
    if isinstance(value, list):
        return list(map(_tool, value))
    if not isinstance(value, dict):
        return value
    return {
        key: _tool(item)
        for key, item in value.items()
        if item is not None or (key == "default" and _takes_null(list(_schemas(value, {}))))
    }


def _name_and_schema(tool: JsonObject) -> tuple[str, JsonObject]:
    function = tool.get("function", tool)
    if not isinstance(function, dict):
        return "", {}
    return str(function.get("name")), _get(function, "parameters")


def _message(message: Message, schemas: dict[str, JsonObject]) -> Message:
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [_call(call["function"], schemas) for call in message["tool_calls"]]}


def _call(function: Function, schemas: dict[str, JsonObject]) -> ToolCall:
    schema = schemas.get(function["name"], {})
    arguments = _object(function["arguments"], list(_schemas(schema, schema)), schema)
    return ToolCall(type="function", function=Function(name=function["name"], arguments=arguments))


def _object(value: JsonObject, schemas: list[JsonObject], root: JsonObject) -> JsonObject:
    kept = {}
    for key, item in value.items():
        its_schemas = list(chain.from_iterable(_schemas(_of_key(schema, key), root) for schema in schemas))
        is_required = any(key in _list(schema, "required") for schema in schemas)
        if item is not None or is_required or _takes_null(its_schemas):
            kept[key] = _value(item, its_schemas, root)
    return kept


def _of_key(schema: JsonObject, key: str) -> object:
    return _get(schema, "properties").get(key, schema.get("additionalProperties"))


def _value(value: object, schemas: list[JsonObject], root: JsonObject) -> object:
    if isinstance(value, dict):
        return _object(value, schemas, root)
    if not isinstance(value, list):
        return value
    of_items = list(chain.from_iterable(_schemas(schema.get("items"), root) for schema in schemas))
    return [_value(item, of_items, root) for item in value]


def _schemas(schema: object, root: JsonObject, depth: int = 0) -> Iterator[JsonObject]:
    """Yield a schema and its alternatives, with references resolved. root: the whole schema."""
    if not isinstance(schema, dict) or depth > _DEEP:
        return
    yield schema
    for key in _ALTERNATIVES:
        for other in _list(schema, key):
            yield from _schemas(other, root, depth + 1)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        found: JsonObject = root
        for part in reference[2:].split("/"):
            found = _get(found, part)
        yield from _schemas(found, root, depth + 1)


def _get(value: JsonObject, key: str) -> JsonObject:
    item = value.get(key)
    return item if isinstance(item, dict) else {}


def _list(value: JsonObject, key: str) -> list[object]:
    item = value.get(key)
    return item if isinstance(item, list) else []


def _takes_null(schemas: list[JsonObject]) -> bool:
    return any(
        schema.get("type") == "null"
        or "null" in _list(schema, "type")
        or None in _list(schema, "enum")
        or schema.get("nullable") is True
        for schema in schemas
    )
