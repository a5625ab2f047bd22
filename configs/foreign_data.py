"""The data sets that a config of another tool names, as sources of ours (data.train). No row is read."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import get_args

from qwenlora.configs.foreign import INFO, is_dataset_info
from qwenlora.configs.schema import Role
from qwenlora.configs.wording import show
from qwenlora.configs.yaml_file import Values

Note = Callable[[str], None]
Entry = str | Values  # a name, or {path: ..., columns: ...}
TURN_LISTS = ("conversations", "messages", "conversation", "dialogue", "dialogues", "dialog")
_UNREAD = {
    **dict.fromkeys(("images", "videos", "audios"), "has {}, which qwenlora does not train"),
    **dict.fromkeys(
        ("chosen", "rejected", "kto_tag"), "is preference data ({}), which qwenlora does not train"
    ),
}
# LLaMA-Factory's tags: our role, and names of it that are known without a word
_ROLES = {
    "user_tag": ("user", "human", "user"),
    "assistant_tag": ("assistant", "gpt", "assistant"),
    "observation_tag": ("tool", "observation", "tool"),
    "function_tag": ("function_call", "function_call"),
    "system_tag": ("system", "system"),
}
AXOLOTL_FIELDS = {
    "field_system": "system",
    "field_tools": "tools",
    "field_thinking": "reasoning_content",
    "message_field_training": "weight",
}


_BUILDERS = ("json", "csv", "parquet", "arrow", "text", "")  # of the datasets library: files are named beside
# what is read of an entry of Axolotl's datasets, or is not needed
_AXOLOTL_READ = {
    *("path", "type", "data_files", "split", "name", "revision", "ds_type", "field", "text_column"),
    *("field_messages", "message_property_mappings", "message_field_role", "message_field_content"),
    *("roles", "roles_to_train", "chat_template", "trust_remote_code"),
    *AXOLOTL_FIELDS,
}


def _source(path: str, columns: Mapping[str, str | None], **options: object) -> Entry:
    """Return a source. columns: our keys for theirs. What says nothing is left out."""
    renamed = {theirs: ours for theirs, ours in columns.items() if theirs and theirs != ours}
    given = {
        key: value
        for key, value in {"columns": renamed, **options}.items()
        if value and (key, value) != ("split", "train")
    }
    return {"path": path, **given} if given else path


def _text(values: Values, key: str) -> str:
    value = values.get(key)
    return value if isinstance(value, str) else ""


def _mapping(values: Values, key: str) -> Values:
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def _texts(names: object, separator: str | None = None) -> list[str]:
    if isinstance(names, list):
        return [str(name) for name in names]
    return [name.strip() for name in str(names).split(separator)]


def _turns(turns: str, role: str, content: str) -> dict[str, str | None]:
    """Return the columns of chat rows. turns: the key of a row's turns; role, content: a turn's."""
    columns: dict[str, str | None] = {} if turns in TURN_LISTS else {turns: "messages"}
    known = (role, content) in (("from", "value"), ("role", "content"))
    return columns if known else {**columns, role: "role", content: "content"}


# ---- LLaMA-Factory


def llama_factory(names: object, theirs: Values, config: Path, note: Note) -> list[Entry]:
    """Return the sources of `dataset: a, b`. theirs: all keys; config: their file."""
    wanted, folder = _texts(names, ","), Path(_text(theirs, "dataset_dir") or "data")
    if str(folder) == "ONLINE":
        return list(wanted)
    places = [Path(), *[config.parent, *config.parent.parents][:4]]
    info = next((place for root in places if (place := root / folder / INFO).is_file()), None)
    known = infos(info) if info else {}
    found: list[Entry] = []
    for name in wanted:
        if info and isinstance(entry := known.get(name), dict):
            found += of_info(name, entry, info.parent, note)
        else:
            guess = (info.parent if info else folder) / f"{name}.json"
            note(f"dataset {name}: not in {info or folder / INFO}; {guess} is a guess, name its file")
            found.append(str(guess))
    return found


def infos(path: Path) -> Values:
    """Return what a dataset_info.json says, by name. Raises: ValueError."""
    try:
        value: Values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as LLaMA-Factory's {INFO}: {error}") from None
    if not is_dataset_info(value):
        raise ValueError(f"{path} is not LLaMA-Factory's {INFO}: {{name of a data set: {{file_name: ...}}}}")
    return value


def of_info(name: str, info: Values, folder: Path, note: Note) -> list[Entry]:
    """Return a data set's source in a list; none when its rows cannot be trained."""
    columns, tags = _mapping(info, "columns"), _mapping(info, "tags")
    hub, file = _text(info, "hf_hub_url"), _text(info, "file_name")
    problems = [problem.format(key) for key, problem in _UNREAD.items() if columns.get(key)]
    if info.get("ranking"):
        problems.append("is preference data (ranking), which qwenlora does not train")
    if not (hub or file):
        problems.append("is not on the Hugging Face hub; download it and name its files")
    if problems:
        note(f"dataset {name} {problems[0]}: left out")
        return []
    if info.get("num_samples"):
        note(f"dataset {name}: all rows are read, not {info['num_samples']}; weight takes a share of them")
    ours = {_text(columns, key): key for key in ("history", "system", "tools")} | _columns(
        info, columns, tags
    )
    roles = {
        theirs: role
        for tag, (role, *known) in _ROLES.items()
        if (theirs := _text(tags, tag)) and theirs not in known
    }
    shape = "text" if "text" in ours.values() else None
    where = {"split": info.get("split"), "name": info.get("subset")} if hub else {}
    return [_source(hub or str(folder / file), ours, format=shape, roles=roles, **where)]


def _columns(info: Values, columns: Values, tags: Values) -> dict[str, str | None]:
    """Return our keys for those that hold the text."""
    if info.get("formatting", "alpaca") != "alpaca":
        turns = _text(columns, "messages") or "conversations"
        return _turns(turns, _text(tags, "role_tag") or "from", _text(tags, "content_tag") or "value")
    if not columns:
        return {}
    prompt, query = _text(columns, "prompt") or "instruction", _text(columns, "query")
    if "response" not in columns:
        return {prompt: "text"}
    question: dict[str, str | None] = {query or "input": "input" if query else None}  # not named: not read
    return {**question, prompt: "instruction", _text(columns, "response"): "output"}


def beside(path: Path) -> Entry | None:
    """Return a file as the dataset_info.json beside it describes it; None when that says nothing on it."""
    try:
        known = infos(path.with_name(INFO))
    except ValueError:  # none, or another tool's file of that name
        return None
    for name, info in known.items():
        if isinstance(info, dict) and info.get("file_name") == path.name:
            (entry,) = of_info(name, info, path.parent, lambda _: None) or [path.name]
            return None if isinstance(entry, str) else entry
    return None


# ---- ms-swift


def ms_swift(names: object, theirs: Values, config: Path, note: Note) -> list[Entry]:
    """Return the sources of `dataset: [path:subset#rows]`."""
    found = []
    for text in _texts(names):
        name, _, count = text.partition("#")
        on_hf = name.upper().startswith("HF::")
        path, _, subset = (name[4:] if on_hf or name.upper().startswith("MS::") else name).partition(":")
        if count:
            note(f"dataset={text}: all rows are read; {{path: ..., weight: 0.1}} takes a share of a source")
        if not on_hf and not _is_path(path):
            note(f"dataset={text} is a name on ModelScope; here it is looked for on the Hugging Face hub")
        found.append(_source(path, {}, name=subset))
    return found


def _is_path(name: str) -> bool:
    return Path(name).suffix in (".json", ".jsonl", ".csv", ".parquet") or name.startswith(("/", ".", "~"))


# ---- Axolotl


def axolotl(datasets: object, theirs: Values, config: Path, note: Note) -> list[Entry]:
    """Return the sources of `datasets: [{path: ..., type: ...}]`."""
    found: list[Entry] = []
    for one in datasets if isinstance(datasets, list) else [datasets]:
        dataset = one if isinstance(one, dict) else {"path": str(one)}
        options = _axolotl_options(dataset, note)
        path, files = _text(dataset, "path"), dataset.get("data_files") or []
        columns = options.pop("columns", {})
        assert isinstance(columns, dict), "as made here"
        if not (path or files):
            note(f"datasets: an entry without a path is left out: {show(dataset)}")
        elif files:
            folder = Path() if path in _BUILDERS else Path(path)
            names = [files] if isinstance(files, str) else _texts(files)
            found += [_source(str(folder / name), columns, **options) for name in names]
        elif Path(path).suffix and _is_path(path):
            found.append(_source(path, columns, **options))
        else:
            where = {key: dataset.get(key) for key in ("split", "name", "revision")}
            found.append(_source(path, columns, **options, **where))
    return found


def _axolotl_options(dataset: Values, note: Note) -> Values:
    """Return the format of a data set's rows, their columns and their roles."""
    path, kind = _text(dataset, "path"), dataset.get("type") or ""
    if unread := dataset.keys() - _AXOLOTL_READ:
        note(f"datasets: {path}: {', '.join(sorted(unread))}: no counterpart here")
    trained = dataset.get("roles_to_train")
    if trained not in (None, ["assistant"], ["gpt"]):  # []: only turns whose message_field_training says so
        note(f"roles_to_train={json.dumps(trained)} of {path}: data.train_on: assistant, last_assistant, all")
    if isinstance(kind, dict):
        note(f"type of {path}: the model's own template is used, not its format")
        fields = ("system", "instruction", "input", "output")
        return {"columns": {_text(kind, f"field_{name}"): name for name in fields}}
    kind = str(kind)
    if kind.startswith(("completion", "pretrain")):
        field = _text(dataset, "field") or _text(dataset, "text_column") or "text"
        return {"format": "text", "columns": {field: "text"}}
    if kind.startswith(("chat_template", "sharegpt")) or dataset.get("field_messages"):
        return _axolotl_chat(dataset)
    if not kind.startswith("alpaca"):
        note(f"type={kind} of {path}: the shape is found from the rows (data.format)")
    return {}


def _axolotl_chat(dataset: Values) -> Values:
    names = _mapping(dataset, "message_property_mappings")
    role = _text(names, "role") or _text(dataset, "message_field_role") or "role"
    content = _text(names, "content") or _text(dataset, "message_field_content") or "content"
    columns = _turns(_text(dataset, "field_messages") or "messages", role, content)
    columns |= {_text(dataset, theirs): ours for theirs, ours in AXOLOTL_FIELDS.items()}
    known = {name for _, *several in _ROLES.values() for name in several}
    roles = {
        theirs: ours
        for ours, several in _mapping(dataset, "roles").items()
        for theirs in _texts(several)
        if theirs not in known and ours in get_args(Role)
    }
    return {"columns": columns, "roles": roles}


READERS: Mapping[str, Callable[[object, Values, Path, Note], Iterable[Entry]]] = {
    "LLaMA-Factory": llama_factory,
    "ms-swift": ms_swift,
    "Axolotl": axolotl,
}
