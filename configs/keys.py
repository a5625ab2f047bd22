"""The keys of a config by their dotted names, as messages, tables and command lines use them."""

import difflib
from collections.abc import Iterator

from pydantic.fields import FieldInfo

from qwenlora.configs.foreign import hints
from qwenlora.configs.schema import Config, Section
from qwenlora.configs.wording import show


def _fields(section: type[Section] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    """Return {dotted key: field} of the whole schema, without the sections themselves."""
    fields: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            fields |= _fields(field.annotation, f"{prefix}{name}.")
        else:
            fields[prefix + (field.alias or name)] = field
    return fields


FIELDS = _fields()
# names that people know from elsewhere; foreign.py has those of other tools
_ELSEWHERE = {
    "alpha": "lora.lora_alpha",
    "batch_size": "train.per_device_train_batch_size",
    "dropout": "lora.lora_dropout",
    "epochs": "train.num_train_epochs",
    "lr": "train.learning_rate",
    "max_seq_length": "data.max_length",
    "model_name": "model.name_or_path",
    "rank": "lora.r",
}
SECTIONS = list(dict.fromkeys(key.split(".")[0] for key in FIELDS if "." in key))


def keys_of(section: str) -> list[str]:
    """Return the dotted keys of a section."""
    return [key for key in FIELDS if key.startswith(f"{section}.")]


def differences(old: Config, new: Config) -> dict[str, tuple[object, object]]:
    """Return {dotted key: (old value, new value)} for every key in which the two differ."""
    flat_old, flat_new = flat(old), flat(new)
    return {key: (flat_old[key], flat_new[key]) for key in flat_old if flat_old[key] != flat_new[key]}


def flat(section: Section, prefix: str = "") -> dict[str, object]:
    """Return {dotted key: value}."""
    found: dict[str, object] = {}
    for attribute, field in type(section).model_fields.items():
        name, value = field.alias or attribute, getattr(section, attribute)
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Section) else {prefix + name: value}
    return found


def unknown_key(key: str, value: object) -> str:
    """Return the message on a key that is not in the schema, with the nearest one that is."""
    section, _, name = key.rpartition(".")
    if nearest := next(_longer_or_same(section, name), None):
        hint = f"did you mean {nearest}?"
    elif elsewhere := next(hints(name), None):
        hint = elsewhere
    elif nearest := next(_similar(section, name), None):
        hint = f"did you mean {nearest}?"
    elif section in SECTIONS:
        hint = f"{section} has: {', '.join(_names_in(section))}"
    else:
        hint = f"the sections are: {', '.join(SECTIONS)}"
    return f"{key}={show(value)}: no such key; {hint}"


def _longer_or_same(section: str, name: str) -> Iterator[str]:
    """Yield the keys that have the name, also in another section, or begin with it."""
    prefix = f"{section}." if section else ""
    if name in _ELSEWHERE:
        yield _ELSEWHERE[name]
    if len(name) > 2:
        yield from (prefix + longer for longer in _names_in(section) if longer.startswith(name))
    yield from (key for key in FIELDS if _name(key) == name)


def _similar(section: str, name: str) -> Iterator[str]:
    """Yield the keys that are spelled alike."""
    prefix = f"{section}." if section else ""
    if not section:
        yield from difflib.get_close_matches(name, SECTIONS, n=1, cutoff=0.6)
    yield from (
        prefix + near for near in difflib.get_close_matches(name, _names_in(section), n=1, cutoff=0.7)
    )
    nearest = difflib.get_close_matches(name, map(_name, FIELDS), n=1, cutoff=0.7)
    yield from (key for key in FIELDS if _name(key) in nearest)


def _names_in(section: str) -> list[str]:
    return [_name(key) for key in FIELDS if key.rpartition(".")[0] == section]


def _name(key: str) -> str:
    return key.rpartition(".")[2]
