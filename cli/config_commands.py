"""`qwenlora config show`, `config keys`, `config from` and `config schema`."""

import json
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from qwenlora.cli.arguments import ConfigFile, Overrides, screen
from qwenlora.configs import Config, load_config
from qwenlora.configs.convert import convert
from qwenlora.configs.keys import FIELDS, SECTIONS
from qwenlora.configs.load import to_yaml
from qwenlora.configs.reference import as_markdown, default_of, kind_of, rules_of, since
from qwenlora.configs.wording import did_you_mean
from qwenlora.run.format import as_yaml


def show(config: ConfigFile, overrides: Overrides = None) -> int:
    """Print the resolved config: defaults < CONFIG < overrides.

    Example: qwenlora config show my.yaml lora.r=32
    """
    print(to_yaml(load_config(config, overrides or [])), end="")
    return 0


def from_(
    file: Annotated[Path, typer.Argument(help="A config, a script or a dataset_info.json of theirs.")],
) -> int:
    """Print the config nearest to one of LLaMA-Factory, ms-swift or Axolotl; comments say what differs.

    Example: qwenlora config from llamafactory.yaml > my.yaml
    """
    text = convert(file)
    print(text, end="")
    if not sys.stdout.isatty():  # else it is on the screen already
        print(
            "".join(line for line in text.splitlines(keepends=True) if line[0] == "#"),
            end="",
            file=sys.stderr,
        )
    return 0


def keys(
    part: Annotated[
        str | None, typer.Argument(help="A section, as train, or a part of a key's name.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All, as docs/config.md has them.")] = False,
) -> int:
    """List the keys that a config may have: type, default, meaning, since when, what they exclude.

    Example: qwenlora config keys train
    """
    wanted = (part or "").lower()
    found = {key: field for key, field in FIELDS.items() if wanted in key.lower()}
    if not found:
        names = {key.rpartition(".")[2] for key in FIELDS}
        otherwise = f"the sections are {', '.join(SECTIONS)}"
        raise ValueError(f"no key has {part} in its name; {did_you_mean(wanted, names, otherwise)}")
    if markdown:
        print(as_markdown(), end="")
        return 0
    console = screen()
    for key, field in found.items():
        default = f" = {as_yaml(default_of(field))}" if not field.is_required() else ""
        console.print(f"{key}: {kind_of(field)}{default}", style="bold", soft_wrap=True)
        lines = [f"{field.description} (since {since(field)})"]
        lines += [f"Refused: {rule.what}." for rule in rules_of(key)]
        for line in lines:
            console.print(textwrap.indent(textwrap.fill(line, console.width - 4), "    "))
    return 0


def schema() -> int:
    """Print the JSON Schema of a config, for editors.

    Example: qwenlora config schema > schema.json
    """
    print(json.dumps(Config.model_json_schema(), indent=1, ensure_ascii=False))
    return 0
