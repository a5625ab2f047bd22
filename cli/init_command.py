"""`qwenlora init` and `qwenlora recipes`."""

from pathlib import Path
from typing import Annotated

import typer

from qwenlora.cli.arguments import screen
from qwenlora.configs.recipes import CONFIGS, as_markdown, copy_of
from qwenlora.configs.recipes import recipes as all_recipes
from qwenlora.configs.wording import did_you_mean
from qwenlora.plan import hardware
from qwenlora.plan.bases import TINY
from qwenlora.plan.first_config import Task, Wish, first_config
from qwenlora.run.hardware import gpus_seen


def init(
    name: Annotated[str, typer.Argument(help="Of the config, NAME.yaml, and of its run.")] = "my",
    model: Annotated[str | None, typer.Option(help="A folder or hub name, as Qwen/Qwen3-8B.")] = None,
    data: Annotated[str | None, typer.Option(help="Your rows, as my.jsonl.")] = None,
    task: Annotated[Task | None, typer.Option(help="What it is for. Default: what the rows are.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Kind of GPU, as h100. Default: this machine's.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many. Default: this machine's.")] = None,
) -> int:
    """Write a config for your base, rows and GPUs, with its reasons as comments; without --model and --data
    the embedded example, which any machine trains in a minute.

    Example: qwenlora init my --model Qwen/Qwen3-8B --data my.jsonl
    """
    file = Path(f"{name}.yaml")
    if file.name != str(file) or file.exists():
        why = "exists already" if file.exists() else "is no plain name"
        raise ValueError(f"{file} {why}; choose another name: qwenlora init NAME")
    if model is None and data is None:
        text = copy_of(CONFIGS / "tiny.yaml", file)
    else:
        here = len(gpus_seen())
        kind = hardware.named(gpu) if gpu else hardware.of_this_machine()
        text = first_config(
            Wish(name, model or TINY, data or "example", task, kind, gpus or (1 if gpu else here or 1))
        )
    file.write_text(text, encoding="utf-8")
    console = screen()
    console.print(f"{file} is written; next:")
    looks = [f"qwenlora data check {file}", f"qwenlora data preview {file} -n 3"] if data else []
    for command in (*looks, f"qwenlora train {file}"):
        console.print(f"  {command}", soft_wrap=True)
    return 0


def recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe, to be copied.")] = None,
    to: Annotated[Path | None, typer.Argument(help="Where it goes. Default: this folder.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All, as docs/recipes.md has them.")] = False,
) -> int:
    """List the configs that come with qwenlora, or copy one.

    Example: qwenlora recipes qwen3-8b-tools
    """
    there = {recipe.name: recipe for recipe in all_recipes()}
    if markdown:
        print(as_markdown(), end="")
        return 0
    if name is None:
        for recipe in there.values():
            needs = recipe.items["Needs"]
            screen().print(f"{recipe.name:24}{recipe.items['Task']:16}{needs:34}", soft_wrap=True)
        screen().print(
            "\ncopy one: qwenlora recipes NAME; what they take, and what to expect: docs/recipes.md"
        )
        return 0
    found = there.get(name.removesuffix(".yaml"))
    if found is None:
        otherwise = "list them: qwenlora recipes"
        raise ValueError(f"there is no recipe {name}; {did_you_mean(name, there, otherwise)}")
    target = to or Path(found.file.name)
    target = target / found.file.name if target.is_dir() else target
    if target.exists():
        raise ValueError(f"{target} exists already; name another file: qwenlora recipes {name} FILE")
    target.write_text(copy_of(found.file, target), encoding="utf-8")
    screen().print(f"{target} is written; next: qwenlora train {target} data.train=my.jsonl", soft_wrap=True)
    return 0
