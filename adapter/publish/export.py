"""A folder, or a .zip, for a model hub: `qwenlora export runs/tiny --to tiny.zip`.

It holds the adapter, its tokenizer and a model card (card.py); no optimizer, no logs, no rows. Names of this
machine are left out, and leaks.py refuses a file that still has one. verify.py checks the base.
"""

import json
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from qwenlora.adapter.adapter_file import check_finite, read_adapter
from qwenlora.adapter.outputs import free_folder, staging
from qwenlora.adapter.publish.card import (
    Card,
    CardOptions,
    ExportedAdapter,
    card_template,
    hub_name,
    make_card,
)
from qwenlora.adapter.publish.leaks import Private
from qwenlora.adapter.publish.push import Target
from qwenlora.adapter.publish.run_summary import RunSummary, summarise_run
from qwenlora.adapter.subject import ADAPTER_CONFIG, final_adapter, read_adapter_config
from qwenlora.data.turns import TURN_END
from qwenlora.plan.shape import WITH_VISION
from qwenlora.run import checkpoints
from qwenlora.run.disk import broken_seal, seal
from qwenlora.run.folder import RunFolder, step_of
from qwenlora.trainer.model.damage import read_json
from qwenlora.trainer.model.headers import CONFIG, GENERATION_CONFIG
from qwenlora.trainer.model.names import todays

CARD = "README.md"
VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
TOKENIZER_CONFIG = "tokenizer_config.json"
SETTINGS = (TOKENIZER_CONFIG, "special_tokens_map.json", GENERATION_CONFIG)
TEMPLATE = "chat_template.jinja"


def export_and_push(
    folder: Path,
    to: Path | None,
    target: Target,
    *,
    name: str | None = None,
    base: str | None = None,
    license: str | None = None,
) -> str:
    """Make the folder, by default one that is removed afterwards, and put it on a hub; return the lines to
    print. Raises: as export(), and ValueError when the hub refuses."""
    if to is not None and to.suffix == ".zip":
        raise ValueError(f"--to {to} with --push names a folder, not a .zip: a hub takes files one by one")
    target.check()
    with TemporaryDirectory(prefix="qwenlora-") as made:
        place = Path(made) / target.name.rpartition("/")[2] if to is None else to
        _, *notes = export(folder, place, name=name, base=base, license=license, called=target.name).split(
            "\n"
        )
        address = target.push(place)
    return "\n".join([f"pushed to {address}", *notes])


def export(
    folder: Path,
    to: Path,
    *,
    name: str | None = None,
    base: str | None = None,
    license: str | None = None,
    called: str | None = None,
) -> str:
    """Make the folder or .zip, or nothing; return the lines to print: the result, and what the card lacks.

    folder: a run, or one of its checkpoints; name: the model's, on the card; base: the base's hub name;
    called: what the card's commands call the result, by default the folder's name. Raises: ValueError for a
    missing or broken adapter, a place that is taken, and private texts in a file.
    """
    to = free_folder(to)
    if base is not None and (hub_name(base) != base or Path(base).is_dir()):
        raise ValueError(f"--base {base} is no name on a hub; write it like Qwen/Qwen2.5-7B-Instruct")
    adapter, run = _find(folder)
    held, summary = _check_whole(adapter), summarise_run(run)
    tensors = todays(held) if _has_vision(summary) else held
    private = Private.of_this_machine([run.path, adapter, to.parent, *_paths(summary)])
    is_final = adapter == run.adapter
    default_name = run.path.name if is_final else f"{run.path.name}-{adapter.name}"
    options = CardOptions(
        title=default_name if name is None else name,
        folder=called or (to.stem if to.suffix == ".zip" else to.name),
        base=base,
        license=license,
    )
    step = None if is_final else step_of(adapter)
    exported = ExportedAdapter(
        adapter.name,
        read_adapter_config(adapter),
        tensors,
        step,
        (adapter / GENERATION_CONFIG).is_file(),
    )
    card = make_card(summary, exported, private, options)
    ordinary = " ".join([card_template(), options.folder, name or "", card.base, license or ""])
    pack = partial(_zip, name=options.folder) if to.suffix == ".zip" else None
    with staging(to, sum(file.stat().st_size for file in adapter.iterdir()), pack) as made:
        _write_files(made, adapter, card, renamed=tensors != held)
        _refuse_private(made, private, ordinary)
        seal(made, but=CARD)
        files = list(made.iterdir())
        size = sum(file.stat().st_size for file in files)
    return "\n".join([f"wrote {to}: {len(files)} files, {size / 1e6:.1f} MB", *card.notes])


def _find(named: Path) -> tuple[Path, RunFolder]:
    """Return the adapter folder that the user named, and its run."""
    folder = named.expanduser().absolute()
    if (folder / "config.yaml").is_file():
        run = RunFolder(folder)
        return final_adapter(named, run), run
    run = RunFolder(folder.parent)
    if run.config.is_file() and (folder in run.checkpoints() or folder == run.adapter):
        return folder, run
    raise ValueError(
        f"{named} is no run (it has no config.yaml), nor a run's checkpoint; name a folder such as runs/tiny"
    )


def _check_whole(adapter: Path) -> dict[str, int]:
    """Return {tensor: how many numbers it has}. Raises: ValueError for an adapter that is not whole."""
    is_checkpoint = (adapter / checkpoints.MANIFEST).exists() or adapter.name.startswith("checkpoint-")
    if flaw := checkpoints.flaw(adapter) if is_checkpoint else broken_seal(adapter):
        raise ValueError(f"{adapter} {flaw}; it cannot be exported")
    file, weights = read_adapter(adapter)
    if file.name != checkpoints.ADAPTER:
        raise ValueError(f"{file} is of an older kind; expected {checkpoints.ADAPTER}")
    check_finite(file, weights)
    return {name: values.raw.size for name, values in weights.items()}


def _paths(summary: RunSummary) -> Iterator[str]:
    """Yield the paths in a run's settings, facts and code."""

    def within(value: object) -> Iterator[str]:
        if isinstance(value, str) and _is_path(value):
            yield value
        elif isinstance(value, dict | list):
            for each in value.values() if isinstance(value, dict) else value:
                yield from within(each)

    yield from within(summary.settings)
    for record in filter(None, [summary.facts, summary.code]):
        yield from within(record.model_dump())


def _is_path(value: str) -> bool:
    return value.startswith(("/", "~/"))


def _write_files(made: Path, adapter: Path, card: Card, *, renamed: bool) -> None:
    """Write weights and vocabulary as they are, settings without paths, and the card. renamed: the weights
    get today's names."""
    for name in (checkpoints.ADAPTER, *VOCABULARY, TEMPLATE):
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, made / name)
    config = read_adapter_config(adapter)
    config["base_model_name_or_path"] = card.base
    config["revision"] = config.get("revision") if card.on_hub else None
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])  # peft saves a set, in any order
    _write_json(made / ADAPTER_CONFIG, config)
    if renamed:
        _write_todays_names(made, adapter)
    for name in SETTINGS:
        if (adapter / name).is_file():
            settings = read_json(adapter / name)
            if name == TOKENIZER_CONFIG and not (adapter / GENERATION_CONFIG).is_file():
                # of an earlier version, which kept the base's end
                settings["eos_token"] = TURN_END
            _write_json(made / name, settings)
    (made / CARD).write_text(card.text, encoding="utf-8")


def _has_vision(summary: RunSummary) -> bool:
    """Whether the base is known to be in the layout of a vision model: its config.json may not be at hand."""
    if summary.facts is None:
        return False
    base, revision = summary.facts.base, summary.settings.get("model.revision")
    file: object = Path(base) / CONFIG
    if not Path(base).is_dir() and (name := hub_name(base)):
        file = try_to_load_from_cache(name, CONFIG, revision=revision)
    known = isinstance(file, str | Path) and Path(file).is_file()
    return known and read_json(Path(str(file))).get("model_type") in WITH_VISION


def _write_todays_names(made: Path, adapter: Path) -> None:
    """Write weights and settings of an adapter from before it had the names that vLLM looks for."""
    save_file(todays(load_file(adapter / checkpoints.ADAPTER)), made / checkpoints.ADAPTER, {"format": "pt"})
    config = read_json(made / ADAPTER_CONFIG)
    for key in ("target_modules", "target_parameters"):
        if isinstance(names := config.get(key), list):
            config[key] = sorted(todays(dict.fromkeys(names)))
    _write_json(made / ADAPTER_CONFIG, config)


def _write_json(file: Path, settings: Mapping[str, object]) -> None:
    """Write a JSON file without the entries that are paths."""
    kept = {key: value for key, value in settings.items() if not (isinstance(value, str) and _is_path(value))}
    file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _refuse_private(made: Path, private: Private, ordinary: str) -> None:
    """Raise ValueError naming a file with a private text, and the text's kind. ordinary: as in kinds_in."""
    for file in sorted(made.iterdir()):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="numpy") as opened:
                text = json.dumps([opened.metadata(), list(opened.keys())], ensure_ascii=False)
        else:
            text = file.read_text(encoding="utf-8", errors="replace")
        if file.name == CARD:
            text = re.sub(r"\\(?=[^\w\s]|_)", "", text)  # unescaped, as readers see it
        words = text if file.name == TEMPLATE else ordinary
        if kinds := private.kinds_in(text, vocabulary=file.name in VOCABULARY, ordinary=words):
            source = "--name, --base, --license or the run" if file.name == CARD else "the run's adapter"
            raise ValueError(
                f"nothing was exported: {file.name} would hold {' and '.join(kinds)}; take it out of its"
                f" source ({source})"
            )


def _zip(folder: Path, name: str) -> Path:
    """Return a .zip beside a folder; equal files give equal bytes. name: the folder's inside the .zip."""
    packed = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(packed, "x", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            entry = zipfile.ZipInfo(f"{name}/{file.name}", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            with file.open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 2**20)
    return packed
