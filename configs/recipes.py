"""The configs that come along, as the comment at the top of each describes it: for `qwenlora recipes` and
docs/recipes.md.

The comment is a sentence and what else there is to say, then `Task:`, `Needs:`, `Takes:` and `Expect:`, each
on a line of its own, and an indented command.
"""

import re
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import yaml

CONFIGS = Path(str(resources.files("qwenlora.configs")))
ITEMS = ("Task", "Needs", "Takes", "Expect")
HEAD = """# Recipes

Configs to start from. Generated from their comments by `make schema`. `qwenlora recipes` lists them,
`qwenlora recipes qwen3-8b-tools` copies one, and `qwenlora init` writes one for your own base, rows and GPUs.
Planned figures are [formulas](planning.md#the-formulas) that a test checks; these GPUs were not measured yet.
GB are powers of ten, so a GPU that is sold with 24 GB has 25.8, and one with 80 GB has 85.
"""


class Recipe(NamedTuple):
    """A config that comes along. title: a sentence; about: more of them; items: the texts of ITEMS, by name;
    command: how it is run."""

    file: Path
    base: str
    title: str
    about: str
    items: dict[str, str]
    command: str

    @property
    def name(self) -> str:
        """Its file's name, without the ending."""
        return self.file.stem


def recipes() -> list[Recipe]:
    """Return all that come along, by name, the numbers in names as numbers."""
    files = CONFIGS.glob("*.yaml")
    return sorted(map(_read, files), key=lambda recipe: _words_and_numbers(recipe.name))


def _words_and_numbers(name: str) -> list[str | float]:
    words = re.split(r"(\d+(?:\.\d+)?)", name)
    return [float(word) if number % 2 else word for number, word in enumerate(words)]


def _read(file: Path) -> Recipe:
    text = file.read_text(encoding="utf-8")
    comment = re.match(r"(?:#.*\n)*", text)
    lines = [line[1:] for line in comment[0].splitlines()] if comment else []
    command = " ".join(line.strip() for line in lines if line.startswith("   "))
    told = " ".join(line.strip() for line in lines if not line.startswith("   "))
    words, *parts = re.split(rf"\b({'|'.join(ITEMS)}): ", told)
    title, _, about = words.strip().partition(". ")
    items = dict(zip(parts[::2], map(str.strip, parts[1::2]), strict=True))
    return Recipe(file, yaml.safe_load(text)["model"]["name_or_path"], title, about, items, command)


def copy_of(recipe: Path, target: Path) -> str:
    """Return a recipe's text for a copy of it, whose commands name the copy."""
    return recipe.read_text(encoding="utf-8").replace(f"configs/{recipe.name}", str(target))


def as_markdown() -> str:
    """Return the page of all recipes, by task."""
    tasks: dict[str, list[Recipe]] = {}
    for recipe in recipes():
        tasks.setdefault(recipe.items["Task"], []).append(recipe)
    parts = [HEAD]
    for task, found in tasks.items():
        heading = task[:1].upper() + task[1:]
        rows = [
            f"| [{one.name}](#{one.name.replace('.', '')}) | {one.base} | {one.items['Needs']} |"
            for one in found
        ]
        parts.append(
            "\n".join([f"## {heading}", "", "| recipe | base | needs |", "|---|---|---|", *rows, ""])
        )
        parts += map(_entry, found)
    return "\n".join(parts)


def _entry(recipe: Recipe) -> str:
    file = f"[{recipe.file.name}](../configs/{recipe.file.name})"
    said = f"{recipe.title}. {recipe.about}".replace("<", "&lt;")
    said += "".join(f"\n- {item}: {recipe.items[item]}" for item in ITEMS[1:])
    text = re.sub(r"docs/(\S+\.md)", r"[\1](\1)", said.replace("\n", "\n\n", 1))
    commands = f"qwenlora recipes {recipe.name}\n{recipe.command.replace('configs/', '')}"
    return f"### {recipe.name}\n\n{text}\n- File: {file}\n\n```\n{commands}\n```\n"
