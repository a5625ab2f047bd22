"""A folder, or a .zip, for a model hub: `qwenlora export runs/tiny --to tiny.zip`.

It holds the adapter, its tokenizer and a model card (card.py) filled in from what the run left; no optimizer,
no logs, no rows. What names this machine is left out, and a last look (leaks.py) refuses what still does.
Whether the adapter fits its base is verify.py's to say, what servers take serving.py's.
"""

import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from qwenlora.adapter import verify
from qwenlora.adapter.outputs import free_folder, staging
from qwenlora.adapter.publish import card
from qwenlora.adapter.publish.leaks import Private
from qwenlora.adapter.publish.run_summary import Record, read
from qwenlora.adapter.subject import CONFIG, adapter_config
from qwenlora.run import checkpoints
from qwenlora.run.disk import broken_seal, seal
from qwenlora.run.folder import RunFolder, step_of

CARD = "README.md"
VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
TEMPLATE = "chat_template.jinja"


def export(
    run: Path, to: Path, *, name: str | None = None, base: str | None = None, license: str | None = None
) -> str:
    """Make the folder or .zip, or nothing; return the lines to print: what was made, and what the card lacks.

    run: a run folder, or one of its checkpoints. name: on the card; base: the base's hub name; license: as
    hubs spell it.
    Raises: ValueError for a run that has no adapter yet, or a broken one, when the place is taken, and when
    something private would be in it.
    """
    to = free_folder(to)
    if base is not None and (card.hub_name(base) != base or Path(base).is_dir()):
        raise ValueError(f"--base {base} is no name on a hub; write it like Qwen/Qwen2.5-7B-Instruct")
    adapter, of = _find(run)
    tensors = _check(adapter)
    held = read(of)
    private = Private.of_this_machine([of.path, adapter, to.parent, *_paths(held)])
    is_final = adapter == of.adapter
    folder = to.stem if to.suffix == ".zip" else to.name
    made_card = card.make(
        held,
        adapter_config(adapter),
        tensors,
        private,
        name=name if name is not None else of.path.name + ("" if is_final else f"-{adapter.name}"),
        folder=folder,
        base=base,
        license=license,
        step=None if is_final else step_of(adapter),
        folder_in_run=adapter.name,
    )
    pack = partial(_zipped, name=folder) if to.suffix == ".zip" else None
    with staging(to, sum(file.stat().st_size for file in adapter.iterdir()), pack) as made:
        _fill(made, adapter, made_card)
        _look_over(
            made, private, " ".join([card.template(), folder, name or "", made_card.base, license or ""])
        )
        seal(made, but=CARD)
        files = list(made.iterdir())
        size = sum(file.stat().st_size for file in files)
    return "\n".join([f"wrote {to}: {len(files)} files, {size / 1e6:.1f} MB", *made_card.notes])


def _find(named: Path) -> tuple[Path, RunFolder]:
    """Return the folder of the adapter that is named, and its run's."""
    folder = named.expanduser().absolute()
    if (folder / "config.yaml").is_file():
        run = RunFolder(folder)
        if (run.adapter / CONFIG).is_file():
            return run.adapter, run
        whole = [
            str(named / path.name) for path in run.checkpoints() if not checkpoints.flaw(path, thorough=False)
        ]
        instead = (
            f"name a checkpoint ({', '.join(whole)}), or train it to its end" if whole else "train it first"
        )
        raise ValueError(f"{named} holds no finished run: {run.adapter} is not there; {instead}")
    run = RunFolder(folder.parent)
    if run.config.is_file() and (folder in run.checkpoints() or folder == run.adapter):
        return folder, run
    raise ValueError(
        f"{named} is no run (it has no config.yaml), nor a run's checkpoint; name a folder such as runs/tiny"
    )


def _check(adapter: Path) -> dict[str, int]:
    """Return {tensor: how many numbers it has} of an adapter that is whole. Raises: ValueError."""
    is_checkpoint = (adapter / checkpoints.MANIFEST).exists() or adapter.name.startswith("checkpoint-")
    if why := checkpoints.flaw(adapter) if is_checkpoint else broken_seal(adapter):
        raise ValueError(f"{adapter} {why}; it cannot be exported")
    file, weights = verify.read(adapter)
    if file.name != checkpoints.ADAPTER:
        raise ValueError(f"{file} is of an older kind; expected {checkpoints.ADAPTER}")
    for name, values in sorted(weights.items()):
        if not values.isfinite().all():
            raise ValueError(f"{file}: {name} holds numbers that are not finite; train it again")
    return {name: values.numel() for name, values in weights.items()}


def _paths(held: Record) -> Iterator[str]:
    """Yield the paths that a run knows of."""

    def within(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield from filter(_is_path, [value])
        elif isinstance(value, dict | list):
            for one in value.values() if isinstance(value, dict) else value:
                yield from within(one)

    yield from within(held.settings)
    for record in filter(None, [held.facts, held.code]):
        yield from within(record.model_dump())


def _is_path(value: str) -> bool:
    return value.startswith(("/", "~/"))


def _fill(made: Path, adapter: Path, filled: card.Card) -> None:
    """Put the files there: weights and vocabulary as they are, settings without paths, the card."""
    for name in (checkpoints.ADAPTER, *VOCABULARY, TEMPLATE):
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, made / name)
    settings = adapter_config(adapter)
    settings["base_model_name_or_path"] = filled.base
    settings["revision"] = settings.get("revision") if filled.on_hub else None
    if isinstance(settings.get("target_modules"), list):
        settings["target_modules"] = sorted(settings["target_modules"])  # peft's is a set, in any order
    _write(made / CONFIG, settings)
    for name in SETTINGS:
        if (adapter / name).is_file():
            _write(made / name, json.loads((adapter / name).read_text(encoding="utf-8")))
    (made / CARD).write_text(filled.text, encoding="utf-8")


def _write(file: Path, settings: dict[str, Any]) -> None:
    """Write a JSON file without the entries that are paths."""
    kept = {key: value for key, value in settings.items() if not (isinstance(value, str) and _is_path(value))}
    file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _look_over(made: Path, private: Private, ordinary: str) -> None:
    """Read everything that was written for what is private. Raises: ValueError naming the file and the kind.

    ordinary: words that the card may have though a user or host is called so.
    """
    for file in sorted(made.iterdir()):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                text = json.dumps([opened.metadata(), list(opened.keys())], ensure_ascii=False)
        else:
            text = file.read_text(encoding="utf-8", errors="replace")
        if file.name == CARD:
            text = re.sub(r"\\(?=[^\w\s]|_)", "", text)  # as it is shown
        words = text if file.name == TEMPLATE else ordinary
        if kinds := private.found(text, vocabulary=file.name in VOCABULARY, ordinary=words):
            here = (
                "--name, --base or --license say so, or the run" if file.name == CARD else "the run's adapter"
            )
            raise ValueError(
                f"nothing was exported: {file.name} would hold {' and '.join(kinds)}; take it out of what it"
                f" comes from ({here})"
            )


def _zipped(folder: Path, name: str) -> Path:
    """Return a .zip of a folder, beside it; the same bytes for the same files. name: the folder's in it."""
    packed = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(packed, "x", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            entry = zipfile.ZipInfo(f"{name}/{file.name}", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            with file.open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 2**20)
    return packed
