"""What pages tell a reader to type is accepted: commands with their options, keys with their values."""

import re

import pytest
import typer
import yaml
from pages import KEY, PAGES, commands, fences, name_of, spans
from pydantic import TypeAdapter

from qwenlora.cli.main import COMMANDS, GROUPS, load
from qwenlora.configs.keys import FIELDS, SECTIONS
from qwenlora.configs.load import _typed, takes
from qwenlora.jobs.submission.site import Site

USED = [page for page in PAGES if page.name != "CHANGELOG.md"]  # an old version may have had other commands
_STRING = re.compile(r"\"([^\"]*)\"")
_ELSEWHERE = {"model.layers", "model.language_model"}  # names in transformers' models
_UsageError = typer.BadParameter.__base__  # click's, which typer has its own copy of
_FILES = ("md", "sh", "json", "jsonl", "yaml", "log", "py", "safetensors", "html")


def parsed(words: list[str]) -> dict[str, object]:
    """Return the parameters of a command; a sentence may leave some out. Raises: click's errors."""
    words = [
        word for word, before in zip(words, ["", *words], strict=False) if word != "..." or before[:1] == "-"
    ]
    if not words or words[0] in ("--help", "--version") or words in [[group] for group in GROUPS]:
        return {}
    name = next((name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS), None)
    if name is None:
        raise _UsageError(f"there is no command {words[0]}")
    try:
        command = load(name)
    except ModuleNotFoundError:  # a library is not installed here; tests/cli/test_cli.py needs them all
        return {}
    try:
        return command.make_context(name, words[len(name.split()) :]).params
    except typer.BadParameter as error:
        if not hasattr(error, "param_type"):  # it is there, and wrong
            raise
        return {}


def refuses(key: str, raw: str) -> bool:
    """Return whether a key does not take a value. Words in capitals stand for one."""
    field = FIELDS[key]
    adapter = TypeAdapter(field.rebuild_annotation())
    return not raw.isupper() and not takes(adapter, _typed(field, raw))


@pytest.mark.parametrize("page", USED, ids=name_of)
def test_commands_and_their_options_exist(page):
    for words in commands(page):
        try:
            found = parsed(words)
        except _UsageError as error:
            pytest.fail(f"{name_of(page)} has `qwenlora {' '.join(words)}`: {error.format_message()}")
        for override in found.get("overrides") or []:
            key, _, raw = override.partition("=")
            if override == "key=value":
                continue
            assert key in FIELDS, f"{name_of(page)} sets {override}"
            assert not refuses(key, raw), f"{name_of(page)} sets {override}"


@pytest.mark.parametrize("page", USED, ids=name_of)
def test_keys_exist_and_take_what_a_page_writes(page):
    strings = [text for code in fences(page, "python") for text in _STRING.findall(code)]
    for text in (*spans(page), *fences(page, "", "bash", "yaml"), *strings):
        for key in KEY.findall(text):
            known = key in FIELDS or key in _ELSEWHERE or key.rpartition(".")[2] in _FILES
            assert known, f"{name_of(page)} names {key}"
        pair = re.fullmatch(rf"({KEY.pattern})(?:=|: )(\S+)", text)
        if pair and pair[1] in FIELDS:
            assert not refuses(pair[1], pair[2]), f"{name_of(page)} writes {text}"


@pytest.mark.parametrize("page", USED, ids=name_of)
def test_yaml_in_a_page_is_a_config_or_a_site_file(page):
    for text in fences(page, "yaml"):
        for line in re.split(r"\n(?=\S)", text):
            for section, value in (yaml.safe_load(line) or {}).items():
                if section not in SECTIONS:
                    assert section in Site.model_fields, f"{name_of(page)} writes {line}"
                    continue
                for key in value:
                    assert f"{section}.{key}" in FIELDS, f"{name_of(page)} writes {line}"


def test_what_is_wrong_would_be_found(tmp_path):
    page = tmp_path / "page.md"
    wrong, right = (
        ("trian my.yaml", "train my.yaml --nprocs 2", "plan my.yaml --nodes two"),
        "plan my.yaml --nodes 2",
    )
    page.write_text("\n".join(["```", *(f"qwenlora {words}  # x" for words in (*wrong, right)), "```"]))
    refused = 0
    for words in commands(page):
        try:
            parsed(words)
        except _UsageError:
            refused += 1
    assert refused == len(wrong)
    assert refuses("train.on_nan", "stopp")
    assert not refuses("train.on_nan", "skip")
