"""The model card of an exported adapter: card.md, filled in from what a run left, with nothing of the machine
on it.

Paths become names of files; a text that holds something private (leaks.py) becomes WITHHELD. Data rows are
never on it.
"""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePath
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData

from qwenlora.adapter.publish import serving
from qwenlora.adapter.publish.curves import Series
from qwenlora.adapter.publish.leaks import Private
from qwenlora.adapter.publish.run_summary import Record, number
from qwenlora.adapter.subject import CONFIG
from qwenlora.run.format import as_yaml, printable

WITHHELD = "(withheld)"
NO_BASE = "BASE"  # stands where the base's name on the hub is not known
SETTINGS = (
    *("lora.r", "lora.lora_alpha", "lora.lora_dropout", "lora.target_modules", "lora.target_parameters"),
    *("lora.modules_to_save", "lora.use_rslora", "lora.use_dora", "lora.init_from"),
    *(
        "train.learning_rate",
        "train.lr_scheduler_type",
        "train.warmup_steps",
        "train.optim",
        "train.weight_decay",
    ),
    *("train.global_batch_size", "train.num_train_epochs", "train.max_steps", "train.seed"),
    *("data.max_length", "data.packing", "data.train_on", "model.dtype", "strategy.quantization"),
)
SHARED = ("model.", "data.", "lora.", "train.", "strategy.")  # of the other sections nobody else has a use
OWN = ("data.num_proc", "data.cache_dir", "train.max_time_min", "strategy.deepspeed_config")
PATHS = ("model.name_or_path", "model.tokenizer", "data.train", "data.eval", "lora.init_from")
_CACHED = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/")  # where hubs' models are kept


@dataclass(frozen=True)
class Card:
    """text: of README.md. base: its base's name, on a hub if on_hub. notes: what the one who exports should
    know."""

    text: str
    base: str
    on_hub: bool
    notes: list[str]


def template() -> str:
    """Return the card's text before anything is filled in."""
    return resources.files("qwenlora.adapter.publish").joinpath("card.md").read_text(encoding="utf-8")


def make(
    held: Record,
    adapter: dict[str, Any],
    tensors: dict[str, int],
    private: Private,
    *,
    name: str,
    folder: str,
    base: str | None,
    license: str | None,
    step: int | None,
    folder_in_run: str,
) -> Card:
    """Return the card of an adapter.

    adapter: its adapter_config.json. tensors: {name: how many numbers it has}. name: its title. folder: where
    it will be. base: its base's name on a hub, as the user says. step: of a checkpoint; None: the last.
    folder_in_run: its folder's name there.
    """
    title = " ".join(printable(name.replace("\n", " ")).split()) or "adapter"
    on_hub = base or hub_name(str(adapter.get("base_model_name_or_path") or ""))
    ordinary = " ".join([template(), title, folder, on_hub or "", license or ""])

    def shown(text: str) -> str:
        return WITHHELD if private.found(text, ordinary=ordinary) else text

    said = str(
        held.settings.get("model.name_or_path") or adapter.get("base_model_name_or_path") or "an unnamed base"
    )
    label = on_hub or shown(file_name(said))
    values = {
        shown(key): shown_value(key, value, shown) for key, value in held.settings.items() if is_shared(key)
    }
    values |= {"model.name_or_path": label} if values else {}
    obstacles = serving.obstacles(adapter, list(tensors))
    results = _results(held, step)
    labels, compared = _compared(held, folder_in_run)
    text = _filled(
        name=title,
        kind=_kind(adapter, values),
        base=label,
        on_hub=on_hub is not None,
        base_hash=held.facts.base_fingerprint if held.facts else "",
        base_name=on_hub or NO_BASE,
        revision=f", revision={revision!r}" if on_hub and (revision := values.get("model.revision")) else "",
        numbers=f"{sum(tensors.values()):,}",
        megabytes=f"{sum(tensors.values()) * 4 / 1e6:,.1f}",
        training=_training(held, values, step),
        data_names=[shown(found) for found in _names(held.settings, "data.train")],
        sides=list(held.facts.data) if held.facts else [],
        counts=held.counts,
        results=[(what, number(value)) for what, value in results.items()],
        labels=list(map(shown, labels)),
        compared=compared,
        folder=folder,
        served=re.sub(r"[^\w.-]+", "-", title).strip("-.") or "adapter",
        rank=None if serving.VLLM in obstacles else serving.max_lora_rank(adapter),
        obstacles=list(obstacles),
        reasons=list(dict.fromkeys(why for reasons in obstacles.values() for why in reasons)),
        versions=_versions(held),
        settings=yaml.safe_dump(
            _tree(values), sort_keys=False, allow_unicode=True, width=float("inf")
        ).strip(),
    )
    data = ModelCardData(
        base_model=on_hub,
        library_name="peft",
        pipeline_tag="text-generation",
        license=license,
        model_name=title,
        eval_results=[
            EvalResult("text-generation", "text", "evaluation rows", what.replace(" ", "_"), value)
            for what, value in results.items()
            if what in ("evaluation loss", "perplexity")
        ]
        or None,
        tags=["lora", "qwenlora", "transformers", *([f"base_model:adapter:{on_hub}"] if on_hub else [])],
    )
    given = [f"note: nothing here compared {base} (--base) with the base that was trained on"] if base else []
    notes = [
        *_notes(on_hub, label, license, obstacles),
        *(f"note: {unread}" for unread in held.unread),
        *given,
    ]
    return Card(f"---\n{data.to_yaml()}\n---\n\n{text}", label, on_hub is not None, notes)


def hub_name(base: str) -> str | None:
    """Return the hub's name of a base, of a folder in the hub's cache, too; None for a folder elsewhere."""
    if cached := _CACHED.search(base):
        return f"{cached[1]}/{cached[2]}"
    return base if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", base) else None


def is_shared(key: str) -> bool:
    """Whether a setting says how the adapter came about, and not where."""
    return key.startswith(SHARED) and key not in OWN


def shown_value(key: str, value: Any, shown: Callable[[str], str]) -> Any:
    """Return a setting's value as it may be seen: of a path the last name alone."""
    if isinstance(value, list):
        return [shown_value(key, one, shown) for one in value]
    if isinstance(value, dict):
        return {shown(str(name)): shown_value(f"{key}.{name}", one, shown) for name, one in value.items()}
    if not isinstance(value, str):
        return value
    return shown(file_name(value) if key.startswith(PATHS) else value)


def file_name(path: str) -> str:
    """Return the last name of a path; a hub name as it is."""
    last = PurePath(path).name or path
    is_file = re.search(r"\.[A-Za-z]\w*$", last) or any(character in last for character in "*?[")
    return path if hub_name(path) == path and not is_file else last


def plain(text: Any) -> str:
    """Return a text that Markdown, in a table or elsewhere, shows as it is, on one line."""
    return re.sub(
        r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", " ".join(printable(str(text).replace("\n", " ")).split())
    )


def _filled(**values: Any) -> str:
    environment = jinja2.Environment(
        autoescape=False,  # noqa: S701 - it is Markdown; plain does it
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plain": plain, "python": repr, "shell": shlex.quote}
    return re.sub(r"\n{3,}", "\n\n", environment.from_string(template()).render(**values))


def _kind(adapter: dict[str, Any], settings: dict[str, Any]) -> str:
    kind = "DoRA" if adapter.get("use_dora") else "rsLoRA" if adapter.get("use_rslora") else "LoRA"
    quantized = settings.get("strategy.quantization") not in (None, "none")
    return (
        f"Q{kind}"
        if quantized and kind == "LoRA"
        else f"{kind} (over a quantised base)"
        if quantized
        else kind
    )


def _training(held: Record, settings: dict[str, Any], step: int | None) -> list[tuple[str, str]]:
    """Return (setting, value) of what made the adapter."""
    lines = [] if step is None else [("checkpoint", f"of step {step:,}")]
    lines += [
        (f"`{key}`", as_yaml(settings[key])) for key in SETTINGS if settings.get(key) not in (None, False)
    ]
    if held.facts:
        trained, total = held.facts.parameters.trainable, held.facts.parameters.total
        lines.append(("trained parameters", f"{trained:,} beside the base's {total:,}"))
    if last := next((attempt for attempt in reversed(held.attempts) if attempt.strategy), None):
        ranks = last.processes
        lines.append(("ran as", f"{last.strategy}, {ranks} process{'es' * (ranks != 1)}"))
    return lines


def _results(held: Record, step: int | None) -> dict[str, float | int]:
    """Return {what: number} as they were at a step; None: at the end."""
    found: dict[str, float | int] = {}
    for what, name in (
        ("epochs", "epoch"),
        ("training loss", "loss"),
        ("evaluation loss", "eval_loss"),
        ("perplexity", "eval_perplexity"),
    ):
        if name in held.curves:
            steps, values = _until(held.curves[name], step).finite
            if len(values):
                found |= {"steps": max(int(steps[-1]), int(found.get("steps", 0))), what: float(values[-1])}
    return found


def _until(series: Series, step: int | None) -> Series:
    kept = slice(None) if step is None else series.steps <= step
    return Series(series.steps[kept], series.values[kept])


def _compared(held: Record, folder: str) -> tuple[list[str], list[list[str]]]:
    """Return labels and rows of what the base and the run's adapter in folder were asked; [] if they were
    not."""
    if held.compared is None:
        return [], []
    asked = held.compared.subjects
    chosen = [n for n, one in enumerate(asked) if one.adapter is None or (one.own and one.adapter == folder)]
    if not any(held.compared.subjects[place].adapter for place in chosen):
        return [], []
    rows = []
    for measure in held.compared.measures:
        values = [measure.values[place] for place in chosen]
        cells = [
            f"{value:.1%}" if measure.kind == "share" and value is not None else number(value)
            for value in values
        ]
        rows.append([measure.set, measure.measure, number(measure.count), *cells])
    return [held.compared.subjects[place].label for place in chosen], rows


def _names(settings: dict[str, Any], key: str) -> list[str]:
    """Return the names of the files or data sets that a setting names, without their folders."""
    said = settings.get(f"{key}.path", settings.get(key))
    entries = said if isinstance(said, list) else [said]
    return [file_name(str(one["path"] if isinstance(one, dict) else one)) for one in entries if one]


def _versions(held: Record) -> list[str]:
    known = held.code.versions | {"python": held.code.python}
    return [f"{name} {version}" for name, version in known.items() if version] or [
        "versions that are not known"
    ]


def _tree(flat: dict[str, Any]) -> dict[str, Any]:
    """Return settings as the sections of a config."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return tree


def _notes(on_hub: str | None, label: str, license: str | None, obstacles: dict[str, list[str]]) -> list[str]:
    notes = []
    if on_hub is None:
        notes.append(
            f"note: the base was a folder ({label}), so the card and {CONFIG} do not say where it is on the"
            " hub; --base OWNER/NAME would, if it is there"
        )
    if license is None:
        notes.append("note: the card names no licence; --license apache-2.0 would")
    for reasons in dict.fromkeys(map(tuple, obstacles.values())):
        servers = [server for server, why in obstacles.items() if tuple(why) == reasons]
        notes.append(f"note: not served unmerged by {', '.join(servers)}: {'; '.join(reasons)}")
    return notes
