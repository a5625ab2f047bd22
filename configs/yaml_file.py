"""YAML as plain values, and the line of every key.

ruamel.yaml gives lines, too, but reads dates and 1_000 as such, and hides where a repeated key stood first.
"""

import difflib
import re
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from qwenlora.configs.wording import show
from qwenlora.configs.yaml_errors import explain

Values = dict[str, object]
Places = dict[str, str]  # dotted key -> `file:line`
_MERGE = "<<"  # of YAML 1.1, which the configs of other tools are


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


def read_yaml(path: Path) -> tuple[Values, Places]:
    """Return a file's values, and the place of every key. Raises: ValueError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        there = {other.stem: other for other in path.parent.glob("*.yaml")}
        near = difflib.get_close_matches(path.stem, there, n=1)
        hint = f"; did you mean {there[near[0]]}?" if near else ""
        raise ValueError(f"no config file {path} (looked in {Path.cwd()}){hint}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise ValueError(f"cannot read config {path}: {error.strerror}") from None
    places: Places = {}
    value = parse_yaml(text, str(path), places)
    if not isinstance(value, dict | None):
        raise ValueError(f"{path}: expected `key: value` lines, found {show(value)}")
    return value or {}, places


def parse_yaml(text: str, name: str, places: Places | None = None) -> Any:
    """Return a YAML text's value; fill places. name: for messages. Raises: ValueError naming the line."""
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # its constructor reads ahead
        raise ValueError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None
    try:
        node = loader.get_single_node()
        return None if node is None else _Composer(loader, name, {} if places is None else places).value(node)
    except yaml.MarkedYAMLError as error:
        line, problem = explain(error, text)
        raise ValueError(f"{name}:{line}: not valid YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ValueError(f"{name}: not a config: nested too deeply") from None
    finally:
        loader.dispose()


def _several(node: yaml.Node) -> list[yaml.Node]:
    return node.value if isinstance(node, yaml.SequenceNode) else [node]


class _Composer:
    """Makes values of YAML nodes, and notes the place of each key."""

    def __init__(self, loader: _Loader, name: str, places: Places) -> None:
        self.loader, self.name, self.places = loader, name, places

    def value(self, node: yaml.Node, key: str = "", above: tuple[yaml.Node, ...] = ()) -> object:
        """Return a node's value. key: its dotted key; above: the nodes that it is in."""
        if node in above:
            raise ValueError(f"{self._place(node)}: {key} contains itself; write the value out")
        above = (*above, node)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, key, above) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key, above)
        return self.loader.construct_object(node)

    def _mapping(self, node: yaml.MappingNode, key: str, above: tuple[yaml.Node, ...]) -> Values:
        merged: Values = {}
        mapping: Values = {}
        for key_node, value_node in sorted(node.value, key=lambda pair: pair[0].value != _MERGE):
            place, name = self._place(key_node), key_node.value
            if name == _MERGE:
                merged |= self._merged(value_node, key, above)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"{place}: a key must be a word")
            dotted = f"{key}.{name}" if key else name
            if name in mapping:
                raise ValueError(f"{place}: {dotted} stands twice (first at {self.places[dotted]}); keep one")
            self.places[dotted] = place
            mapping[name] = self.value(value_node, dotted, above)
        return merged | mapping

    def _merged(self, node: yaml.Node, key: str, above: tuple[yaml.Node, ...]) -> Values:
        """Return the keys of `<<: *anchor`, or of a list of anchors, of which the first decides."""
        values = [self.value(one, key, above) for one in reversed(_several(node))]
        if not all(isinstance(value, dict) for value in values):
            raise ValueError(f"{self._place(node)}: {_MERGE} takes keys from a mapping, found {show(values)}")
        return dict(chain.from_iterable(value.items() for value in values if isinstance(value, dict)))

    def _place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"
