"""The package's source as a graph of imports and a list of functions, for tests of its structure."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from radon.complexity import cc_visit

ROOT = Path(__file__).parents[2]
ROOMS = ("adapter", "cli", "configs", "data", "jobs", "launch", "plan", "run", "slurm", "trainer")


class Import(NamedTuple):
    """One module of the package imports another. late: inside a function."""

    source: str
    target: str
    late: bool


class Function(NamedTuple):
    """A function as it is measured. lines: with its signature and docstring; command: a user's command
    line."""

    name: str
    lines: int
    complexity: int
    parameters: int
    command: bool


def files() -> list[Path]:
    """Return the product's Python files."""
    return sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))


def module_of(file: Path) -> str:
    """Return a file's module, without `qwenlora.`: "run.folder"."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports() -> Iterator[Import]:
    """Yield every import of one module of the package by another."""
    modules = {module_of(file) for file in files()}
    for file in files():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        inside = {node for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [
                    full if full.removeprefix("qwenlora.") in modules else node.module
                    for full in (f"{node.module}.{alias.name}" for alias in node.names)
                ]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in dict.fromkeys(names):
                if name.startswith("qwenlora."):
                    yield Import(module_of(file), name.removeprefix("qwenlora."), node in inside)


def circles(arrows: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Return the groups of names that lead back to themselves (Tarjan's strongly connected components)."""
    graph: dict[str, set[str]] = {}
    for source, target in arrows:
        if source != target:
            graph.setdefault(source, set()).add(target)
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    result = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        stack.append(name)
        for target in graph.get(name, ()):
            if target not in number:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in stack:
                lowest[name] = min(lowest[name], number[target])
        if lowest[name] == number[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                result.append(group)

    for name in list(graph):
        if name not in number:
            visit(name)
    return result


def functions() -> Iterator[Function]:
    """Yield every function and method of the product."""
    for file in files():
        text = file.read_text(encoding="utf-8")
        complexity = {
            block.lineno: block.complexity
            for outer in cc_visit(text)
            for block in (outer, *getattr(outer, "methods", ()), *getattr(outer, "closures", ()))
        }
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                given = node.args
                parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs]
                count = sum(parameter.arg not in ("self", "cls") for parameter in parameters)
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                yield Function(
                    f"{module_of(file)}.{node.name}",
                    (node.end_lineno or first) - first + 1,
                    complexity.get(node.lineno, complexity.get(first, 1)),
                    count,
                    module_of(file).startswith("cli."),
                )


def classes() -> Iterator[tuple[str, str]]:
    """Yield (name, module) of every public class."""
    for file in files():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield node.name, module_of(file)
