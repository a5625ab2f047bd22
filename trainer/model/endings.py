"""What ends a reply, in the files that servers read. A base that is not -Instruct ends with <|endoftext|>.
Chat rows teach it to end with <|im_end|>: a server that knows only the first would never stop."""

import json
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

from qwenlora.data.turns import END_OF_TEXT, TURN_END
from qwenlora.trainer.model.damage import read_json

EOS = "eos_token_id"
Settings = dict[str, object]  # generation_config.json or config.json, as anyone wrote it


def set_end(tokenizer: Any, *, text_only: bool) -> None:
    """Make <|im_end|> the tokenizer's end of a sequence. text_only: rows of text were trained, no chat; they
    end with <|endoftext|>, and the tokenizer stays as it is."""
    if not text_only:
        tokenizer.eos_token = TURN_END


def generation_settings(base: str, revision: str | None, tokenizer: Any, *, text_only: bool) -> Settings:
    """Return generation_config.json for a model that is trained on a base: the base's own, with the trained
    end. base: a folder or hub name. Raises: ValueError when a file of the base is no JSON."""
    files = [_read(base, revision, name) for name in (CONFIG_NAME, GENERATION_CONFIG_NAME)]
    own = files[1].get(EOS, files[0].get(EOS))
    # transformers would take the ends of config.json instead
    settings = {key: value for key, value in files[1].items() if key != "_from_model_config"}
    return settings | {EOS: _ends(own, tokenizer, text_only=text_only)}


def set_model_end(config: Settings, tokenizer: Any) -> None:
    """Make the tokenizer's end that of a config.json."""
    inner = config.get("text_config")
    places = [part for part in (config, inner) if isinstance(part, dict) and EOS in part]
    for part in places or [config]:
        part[EOS] = tokenizer.eos_token_id


def is_text_only(generation: Settings, tokenizer: Any) -> bool:
    """Whether an adapter's generation_config.json says that only text was trained: its end comes first."""
    return _list(generation.get(EOS))[:1] == [tokenizer.get_vocab().get(END_OF_TEXT)]


def settings_text(settings: Settings) -> str:
    """Return a JSON file's text."""
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"


def _ends(own: object, tokenizer: Any, *, text_only: bool) -> list[int]:
    """Return the ids that end generation: the trained one, the base's own, and the end of a text. A list, as
    in Qwen's -Instruct models: a model may still end a text as its base did."""
    known = tokenizer.get_vocab()
    end_of_text = known.get(END_OF_TEXT, tokenizer.eos_token_id)
    trained = end_of_text if text_only else known[TURN_END]
    return list(dict.fromkeys([trained, *_list(own), end_of_text]))


def _list(ends: object) -> list[int]:
    return ends if isinstance(ends, list) else [ends] if isinstance(ends, int) else []


def _read(base: str, revision: str | None, name: str) -> Settings:
    file = cached_file(base, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return read_json(Path(file)) if file else {}
