"""Which changes to a module do its tests not notice?

    python benchmarks/mutate.py qwenlora.run.history tests/run/test_history.py ...

Makes one change at a time (a condition negated, a statement dropped, + for -, <= for <, min for max, a type's
zero for a return value), runs the tests with -x, and prints those that pass: `history.py:94: drop:
self._close(...)`. A
change costs about a second: libraries are imported once, and each change has a forked process, in which the
module is imported from the changed tree; nothing is written. Processes that tests start see the module as it
is.
"""

import argparse
import ast
import contextlib
import copy
import importlib
import importlib.machinery
import importlib.util
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
}
CALLS = {
    "min": "max",
    "max": "min",
    "ceil": "floor",
    "floor": "ceil",
    "any": "all",
    "all": "any",
    "sorted": "list",
}
ZEROS = {
    "int": "0",
    "float": "0.0",
    "str": "''",
    "bool": "False",
    "list": "[]",
    "dict": "{}",
    "tuple": "()",
    "set": "set()",
}
Change = tuple[int, str, Callable[[ast.AST], None]]


def changes_of(tree: ast.Module) -> Iterator[tuple[int, str, ast.Module]]:
    """Yield (line, what, changed tree)."""
    count = len(list(ast.walk(tree)))
    for number in range(count):
        node = _nth(tree, number)
        for line, what, change in _changes(node):
            changed = copy.deepcopy(tree)
            change(_nth(changed, number))
            yield line, what, ast.fix_missing_locations(changed)


def _nth(tree: ast.AST, number: int) -> Any:
    for place, node in enumerate(ast.walk(tree)):
        if place == number:
            return node
    raise IndexError(number)


def _changes(node: Any) -> Iterator[Change]:
    text = " ".join(ast.unparse(node).split())[:70] if isinstance(node, ast.expr | ast.stmt) else ""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        other = COMPARISONS[type(node.ops[0])]
        yield node.lineno, f"{other.__name__}: {text}", lambda it: it.ops.__setitem__(0, other())
    if isinstance(node, ast.BoolOp):
        name, op = ("or", ast.Or) if isinstance(node.op, ast.And) else ("and", ast.And)
        yield node.lineno, f"{name}: {text}", lambda it: setattr(it, "op", op())
    if isinstance(node, ast.If | ast.IfExp):
        what = f"negate: {ast.unparse(node.test)[:70]}"
        yield node.lineno, what, lambda it: setattr(it, "test", ast.UnaryOp(ast.Not(), it.test))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        operator = OPERATORS[type(node.op)]
        yield node.lineno, f"{operator.__name__}: {text}", lambda it: setattr(it, "op", operator())
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in CALLS:
            field = "id" if isinstance(node.func, ast.Name) else "attr"
            yield node.lineno, f"{CALLS[name]}: {text}", lambda it: setattr(it.func, field, CALLS[name])
    if isinstance(getattr(node, "body", None), list) and not isinstance(node, ast.Module | ast.ClassDef):
        for place, statement in enumerate(node.body):
            if _can_be_dropped(statement):
                what = f"drop: {' '.join(ast.unparse(statement).split())[:70]}"
                yield statement.lineno, what, lambda it, place=place: it.body.__setitem__(place, ast.Pass())
    if isinstance(node, ast.FunctionDef) and node.returns is not None:
        zero = ZEROS.get(ast.unparse(node.returns).partition("[")[0])
        if ast.unparse(node.returns).endswith("| None"):
            zero = "None"
        if zero is not None and not _is_generator(node):
            value = ast.parse(f"return {zero}").body
            what = f"return {zero}: {node.name}"
            yield node.lineno, what, lambda it: setattr(it, "body", copy.deepcopy(value))


def _can_be_dropped(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Call)
    if isinstance(statement, ast.Assign):
        return not isinstance(statement.targets[0], ast.Name | ast.Tuple | ast.List)
    return isinstance(statement, ast.AugAssign | ast.Raise | ast.Continue | ast.Break)


def _is_generator(function: ast.FunctionDef) -> bool:
    return any(isinstance(node, ast.Yield | ast.YieldFrom) for node in ast.walk(function))


class Changed(importlib.machinery.SourceFileLoader):
    """Loads a module from a tree."""

    def __init__(self, name: str, path: str, tree: ast.Module) -> None:
        super().__init__(name, path)
        self.tree = tree

    def get_code(self, fullname: str) -> Any:
        return compile(self.tree, self.path, "exec")

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Find that module, and no other."""
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.name else None


def run(
    loader: Changed | None, tests: list[str], timeout_s: float, report: bool = False
) -> tuple[int, list[str]]:
    """Run the tests in a forked process; return pytest's exit code, and (report) the modules that it
    imported."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.close(reader)
        if loader:
            sys.meta_path.insert(0, loader)  # type: ignore[arg-type]
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *tests]))
        names = sorted(sys.modules) if report else []
        os.write(writer, bytes([code]) + "\n".join(names).encode()[:60_000])
        os._exit(0)
    os.close(writer)
    data, end = b"", time.monotonic() + timeout_s
    while select.select([reader], [], [], max(end - time.monotonic(), 0))[0] and (
        part := os.read(reader, 65536)
    ):
        data += part
    os.close(reader)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return (data[0] if data else -1), data[1:].decode().split("\n")


def main() -> None:
    """Print what the tests do not notice, and how many changes there were."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("module")
    parser.add_argument("tests", nargs="+", help="files, and other arguments of pytest")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds; a change that hangs is noticed")
    parser.add_argument("--lines", default="", help="FIRST-LAST: only changes there")
    given, more = parser.parse_known_args()
    tests = [*given.tests, *more]
    spec = importlib.util.find_spec(given.module)
    assert spec is not None, f"no module {given.module}"
    assert spec.origin is not None, f"{given.module} is no file"
    code, names = run(None, tests, 600, report=True)
    assert code == 0, f"the tests fail as it is: {code}"
    for name in names:
        if not name.startswith(("qwenlora", "test", "__main__", "conftest")):
            try:
                importlib.import_module(name)
            except Exception:  # noqa: S112  an alias, or of a test
                continue
    for name in [name for name in sys.modules if name.partition(".")[0] == "qwenlora"]:
        del sys.modules[name]
    path = Path(spec.origin)
    same = Changed(given.module, str(path), ast.parse(path.read_text()))
    assert run(same, tests, 600)[0] == 0, "the tests fail where modules are imported by this script"
    first, last = map(int, given.lines.split("-")) if given.lines else (0, 10**9)
    count, survivors = 0, 0
    for line, what, tree in changes_of(ast.parse(path.read_text())):
        if not first <= line <= last:
            continue
        count += 1
        if run(Changed(given.module, str(path), tree), tests, given.timeout)[0] == 0:
            survivors += 1
            print(f"{path.name}:{line}: {what}", flush=True)
    print(f"{given.module}: {count} changes, {survivors} not noticed")


if __name__ == "__main__":
    main()
