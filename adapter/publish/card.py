"""The model card of an exported adapter: card.md, filled in from a run's files, with nothing private on it.

Paths are cut to their last name; texts with something private (leaks.py) become WITHHELD; rows are left out.
"""

import re
import shlex
from collections.abc import Callable
from importlib import resources
from pathlib import PurePath
from typing import Any, NamedTuple

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData

from qwenlora.adapter.publish import serving
from qwenlora.adapter.publish.leaks import Private
from qwenlora.adapter.publish.run_summary import (
    LORA_SETTINGS,
    NOT_SHOWN,
    OPTIMIZER_SETTINGS,
    RunSummary,
    Settings,
)
from qwenlora.adapter.publish.series import Series
from qwenlora.adapter.subject import ADAPTER_CONFIG, AdapterConfig, lora_kind
from qwenlora.run.comparison import ComparedModel
from qwenlora.run.format import as_yaml, count, number, printable
from qwenlora.trainer.model.quantised import trained_over

WITHHELD = "(withheld)"
NO_BASE = "BASE"  # in place of a base whose name on the hub is not known
SETTINGS = (
    *LORA_SETTINGS,
    *OPTIMIZER_SETTINGS,
    *("train.global_batch_size", "train.num_train_epochs", "train.max_steps", "train.seed"),
    *("data.max_length", "data.packing", "data.train_on", "model.dtype", "strategy.quantization"),
)
SHARED = ("model.", "data.", "lora.", "train.", "strategy.")  # other sections are of no use to other people
NOT_SHARED = ("data.num_proc", "data.cache_dir", "train.max_time_min", "strategy.deepspeed_config")
PATHS = ("model.name_or_path", "model.tokenizer", "data.train", "data.eval", "lora.init_from")
RESULTS = {  # {name on the card: curve}
    "epochs": "epoch",
    "training loss": "loss",
    "evaluation loss": "eval_loss",
    "perplexity": "eval_perplexity",
}
_CACHED = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/")  # the hub's cache


class Card(NamedTuple):
    """A model card. text: README.md's; base: the base's name, a hub's if on_hub; notes: for the user."""

    text: str
    base: str
    on_hub: bool
    notes: list[str]


class CardOptions(NamedTuple):
    """The user's options. title: the model's name; folder: the export's name; base: the base's hub name."""

    title: str
    folder: str
    base: str | None = None
    license: str | None = None


class ExportedAdapter(NamedTuple):
    """A run's adapter. folder: its name; tensors: {name: count of numbers}; step: None if final; says_ends:
    whether a generation_config.json is with it."""

    folder: str
    config: AdapterConfig
    tensors: dict[str, int]
    step: int | None
    says_ends: bool


class _Base(NamedTuple):
    """The base as the card names it. hub_name: None if it is not known."""

    label: str
    hub_name: str | None


def card_template() -> str:
    """Return the text of card.md, not filled in."""
    return resources.files("qwenlora.adapter.publish").joinpath("card.md").read_text(encoding="utf-8")


def make_card(summary: RunSummary, adapter: ExportedAdapter, private: Private, options: CardOptions) -> Card:
    """Return the card of an adapter. private: texts that must not be on it."""
    title = " ".join(printable(options.title.replace("\n", " ")).split()) or "adapter"
    named = str(adapter.config.get("base_model_name_or_path") or "")
    on_hub = options.base or hub_name(named)
    ordinary = " ".join([card_template(), title, options.folder, on_hub or "", options.license or ""])

    def shown(text: str) -> str:
        return WITHHELD if private.kinds_in(text, ordinary=ordinary) else text

    path = str(summary.settings.get("model.name_or_path") or named or "an unnamed base")
    base = _Base(on_hub or shown(file_name(path)), on_hub)
    settings = _shown_settings(summary, base, shown)
    in_files = bool(summary.facts and trained_over(summary.facts))
    in_memory = settings.get("strategy.quantization") not in (None, "none")
    obstacles = serving.obstacles(adapter.config, list(adapter.tensors))
    results = _results(summary, adapter.step)
    text = _fill(
        name=title,
        folder=options.folder,
        sides=list(summary.facts.data) if summary.facts else [],
        counts=summary.counts,
        data_names=[shown(name) for name in _source_names(summary.settings, "data.train")],
        training=_training(summary, settings, adapter.step),
        results=[(name, number(value)) for name, value in results.items()],
        versions=_versions(summary),
        settings=_settings_text(settings),
        **_base_values(base, summary, settings),
        quantised_files=in_files,
        **_adapter_values(adapter, is_quantised=in_files or in_memory),
        **_serving_values(adapter, title, obstacles),
        **_comparison_values(summary, adapter.folder, shown),
    )
    header = _header(title, on_hub, options.license, results)
    notes = _notes(summary, base, options, obstacles)
    return Card(f"---\n{header}\n---\n\n{text}", base.label, on_hub is not None, notes)


def _shown_settings(summary: RunSummary, base: _Base, shown: Callable[[str], str]) -> Settings:
    """Return the settings that are useful to other people, as the card shows them."""
    settings = {
        shown(key): shown_value(key, value, shown)
        for key, value in summary.settings.items()
        if is_shared(key)
    }
    return settings | {"model.name_or_path": base.label} if settings else {}


def _header(title: str, base: str | None, license: str | None, results: dict[str, float]) -> str:
    """Return the YAML at the card's beginning, which the hub reads."""
    evaluations = [
        EvalResult("text-generation", "text", "evaluation rows", name.replace(" ", "_"), value)
        for name, value in results.items()
        if name in ("evaluation loss", "perplexity")
    ]
    tags = ["lora", "qwenlora", "transformers"]
    return ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="text-generation",
        license=license,
        model_name=title,
        eval_results=evaluations or None,
        tags=[*tags, f"base_model:adapter:{base}"] if base else tags,
    ).to_yaml()


def _base_values(base: _Base, summary: RunSummary, settings: Settings) -> dict[str, object]:
    """Return the template's variables on the base."""
    revision = settings.get("model.revision")
    return {
        "base": base.label,
        "on_hub": base.hub_name is not None,
        "base_hash": summary.facts.base_fingerprint if summary.facts else "",
        "base_name": base.hub_name or NO_BASE,
        "revision": f", revision={revision!r}" if base.hub_name and revision else "",
    }


def _adapter_values(adapter: ExportedAdapter, *, is_quantised: bool) -> dict[str, object]:
    """Return the template's variables on the adapter. is_quantised: as the base was, in files or memory."""
    kind = lora_kind(adapter.config)
    if is_quantised:
        kind = "QLoRA" if kind == "LoRA" else f"{kind} (over a quantised base)"
    numbers = sum(adapter.tensors.values())
    # Qwen3-VL has no class for AutoModelForCausalLM
    with_vision = any(".language_model." in name for name in adapter.tensors)
    return {
        "kind": kind,
        "numbers": f"{numbers:,}",
        "megabytes": f"{numbers * 4 / 1e6:,.1f}",
        "loader": "AutoModelForImageTextToText" if with_vision else "AutoModelForCausalLM",
    }


def _serving_values(
    adapter: ExportedAdapter, title: str, obstacles: dict[str, list[str]]
) -> dict[str, object]:
    """Return the template's variables on servers."""
    return {
        "served": re.sub(r"[^\w.-]+", "-", title).strip("-.") or "adapter",
        "says_ends": adapter.says_ends,
        "rank": None if serving.VLLM in obstacles else serving.max_lora_rank(adapter.config),
        "obstacles": list(obstacles),
        "reasons": list(dict.fromkeys(why for reasons in obstacles.values() for why in reasons)),
    }


def hub_name(base: str) -> str | None:
    """Return a base's hub name, also from a folder in the hub's cache; None for a folder elsewhere."""
    if cached := _CACHED.search(base):
        return f"{cached[1]}/{cached[2]}"
    return base if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", base) else None


def is_shared(key: str) -> bool:
    """Whether a setting tells how the adapter was trained, not where."""
    return key.startswith(SHARED) and key not in NOT_SHARED


def shown_value(key: str, value: Any, shown: Callable[[str], str]) -> Any:
    """Return a setting's value as the card shows it: paths cut to their last name."""
    if isinstance(value, list):
        return [shown_value(key, each, shown) for each in value]
    if isinstance(value, dict):
        return {shown(str(name)): shown_value(f"{key}.{name}", each, shown) for name, each in value.items()}
    if not isinstance(value, str):
        return value
    return shown(file_name(value) if key.startswith(PATHS) else value)


def file_name(path: str) -> str:
    """Return the last name of a path, or a whole hub name."""
    last = PurePath(path).name or path
    is_file = re.search(r"\.[A-Za-z]\w*$", last) or any(character in last for character in "*?[")
    return path if hub_name(path) == path and not is_file else last


def plain(text: Any) -> str:
    """Return a text on one line, escaped for Markdown, in tables too."""
    line = " ".join(printable(str(text).replace("\n", " ")).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", line)


def _fill(**values: object) -> str:
    environment = jinja2.Environment(
        autoescape=False,  # noqa: S701 - it is Markdown; plain escapes it
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plain": plain, "python": repr, "shell": shlex.quote}
    return re.sub(r"\n{3,}", "\n\n", environment.from_string(card_template()).render(**values))


def _training(summary: RunSummary, settings: Settings, step: int | None) -> list[tuple[str, str]]:
    """Return (setting, value) lines on how the adapter was trained."""
    lines = [] if step is None else [("checkpoint", f"of step {step:,}")]
    lines += [(f"`{key}`", as_yaml(settings[key])) for key in SETTINGS if settings.get(key) not in NOT_SHOWN]
    if summary.facts:
        trained, total = summary.facts.parameters.trainable, summary.facts.parameters.total
        lines.append(("trained parameters", f"{trained:,} beside the base's {total:,}"))
    if last := summary.last_started:
        lines.append(("ran as", f"{last.strategy}, {count(last.processes, 'process', 'es')}"))
    return lines


def _results(summary: RunSummary, step: int | None) -> dict[str, float]:
    """Return {name: number} as logged up to a step; None: up to the end."""
    results: dict[str, float] = {}
    for name, curve in RESULTS.items():
        if curve in summary.curves:
            steps, values = _until(summary.curves[curve], step).finite
            if len(values):
                results |= {"steps": max(int(steps[-1]), results.get("steps", 0)), name: float(values[-1])}
    return results


def _until(series: Series, step: int | None) -> Series:
    kept = slice(None) if step is None else series.steps <= step
    return Series(series.steps[kept], series.values[kept])


def _comparison_values(summary: RunSummary, folder: str, shown: Callable[[str], str]) -> dict[str, list[Any]]:
    """Return the template's labels and rows that compare the base with the run's adapter in folder."""
    comparison = summary.comparison
    places = _places(comparison.subjects, folder) if comparison else []
    if not comparison or not places:
        return {"labels": [], "compared": []}
    rows = []
    for measure in comparison.measures:
        cells = [_cell(measure.values[place], is_share=measure.kind == "share") for place in places]
        rows.append([measure.set, measure.measure, number(measure.count), *cells])
    return {"labels": [shown(comparison.subjects[place].label) for place in places], "compared": rows}


def _places(models: list[ComparedModel], folder: str) -> list[int]:
    """Return the indices of the bases and of the run's adapter in folder; [] without the adapter."""
    own = [n for n, model in enumerate(models) if model.own and model.adapter == folder]
    return sorted([*own, *(n for n, model in enumerate(models) if model.adapter is None)]) if own else []


def _cell(value: float | None, *, is_share: bool) -> str:
    return f"{value:.1%}" if is_share and value is not None else number(value)


def _source_names(settings: Settings, key: str) -> list[str]:
    """Return the names of the files or data sets that a setting names, without their folders."""
    value = settings.get(f"{key}.path", settings.get(key))
    entries = value if isinstance(value, list) else [value]
    return [file_name(str(each["path"] if isinstance(each, dict) else each)) for each in entries if each]


def _versions(summary: RunSummary) -> list[str]:
    versions = summary.code.versions | {"python": summary.code.python}
    return [f"{name} {version}" for name, version in versions.items() if version] or [
        "versions that are not known"
    ]


def _settings_text(settings: Settings) -> str:
    """Return settings as YAML, in the sections of a config."""
    tree: Settings = {}
    for key, value in settings.items():
        *sections, last = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=float("inf")).strip()


def _notes(
    summary: RunSummary, base: _Base, options: CardOptions, obstacles: dict[str, list[str]]
) -> list[str]:
    notes = []
    if base.hub_name is None:
        notes.append(
            f"note: the base was a folder ({base.label}), so the card and {ADAPTER_CONFIG} do not say where"
            " it is on the hub; --base OWNER/NAME would, if it is there"
        )
    if options.license is None:
        notes.append("note: the card names no licence; --license apache-2.0 would")
    for reasons in dict.fromkeys(map(tuple, obstacles.values())):
        servers = [server for server, why in obstacles.items() if tuple(why) == reasons]
        notes.append(f"note: not served unmerged by {', '.join(servers)}: {'; '.join(reasons)}")
    notes += [f"note: {unread}" for unread in summary.unread]
    if options.base:
        notes.append(f"note: nothing here compared {options.base} (--base) with the base that was trained on")
    return notes
