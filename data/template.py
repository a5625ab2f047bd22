"""Arguments of the chat template that a config gives (`data.chat_template_kwargs`).

They become defaults inside the template. So all who render with it see the same: training, preview, chat and
compare, and whoever serves the adapter, whose folder has this template.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from jinja2 import TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

ENABLE_THINKING = "enable_thinking"
Value = bool | int | float | str
# what callers of a template give, or transformers does
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}


def set_defaults(tokenizer: Any, arguments: Mapping[str, Value]) -> None:
    """Make arguments the defaults of a tokenizer's chat template. Raises: ValueError for one that it does not
    use."""
    text = tokenizer.chat_template
    if not isinstance(text, str):
        raise ValueError(
            f"data.chat_template_kwargs={dict(arguments)}: the tokenizer has several chat templates; expected"
            " one; remove the key"
        )
    known = _arguments_of(text, arguments) - _GIVEN
    for name in arguments.keys() - known:
        names = ", ".join(sorted(known - set(tokenizer.special_tokens_map)))
        raise ValueError(
            f"data.chat_template_kwargs: the chat template of {tokenizer.name_or_path} has no argument"
            f" {name}; names that it reads: {names or 'none'}"
        )
    lines = [f"{_start(name)}{json.dumps(value)}) %}}" for name, value in sorted(arguments.items())]
    if new := "".join(line for line in lines if line not in text):
        # a first line break of the template would be taken for the end of ours
        tokenizer.chat_template = new + "\n" * text.startswith("\n") + text


def has_default(tokenizer: Any, name: str) -> bool:
    """Return whether set_defaults gave a tokenizer's chat template this argument."""
    return _start(name) in str(tokenizer.chat_template)


def _start(name: str) -> str:
    return f"{{% set {name} = {name} | default("


def _arguments_of(template: str, wanted: Iterable[str]) -> set[str]:
    """Return the names that a template reads from its caller; of syntax that jinja does not know, those that
    are wanted."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return meta.find_undeclared_variables(environment.parse(template)) - set(environment.globals)
    except TemplateSyntaxError:
        return set(wanted)
