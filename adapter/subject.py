"""The run, checkpoint, adapter or model that a user names after training: `find("runs/tiny")`."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlora.adapter.deferred import Deferred
from qwenlora.configs.schema import Config, Data, Model
from qwenlora.run import checkpoints
from qwenlora.run.folder import RunFolder, meant
from qwenlora.trainer.hidden import hidden
from qwenlora.trainer.model import base as models
from qwenlora.trainer.model.damage import read_json

if TYPE_CHECKING:
    from qwenlora.trainer.model import pretrained
else:
    pretrained = Deferred("qwenlora.trainer.model.pretrained", quietly=False)

ADAPTER_CONFIG = "adapter_config.json"
MODEL = "model.name_or_path"
AdapterConfig = dict[str, Any]  # adapter_config.json, as any version of peft wrote it


@dataclass(frozen=True)
class Subject:
    """A run, checkpoint, adapter or model, as the user named it. base: the base model's folder or hub name.

    adapter: None for a plain model; run: None for an adapter or model that belongs to no run. config: the
    run's; without a run, one made up around the model, since trainer/model/ works from configs.
    """

    name: str
    config: Config
    base: str
    adapter: Path | None
    run: RunFolder | None

    @property
    def label(self) -> str:
        """The name to show: the run's, followed by a checkpoint's; without a run, the folder's."""
        if self.run is None:
            return Path(self.adapter or self.base).name
        if self.adapter is None or self.adapter == self.run.adapter:
            return self.run.path.name
        return f"{self.run.path.name}/{self.adapter.name}"


def find(name: str, *, base: str | None = None, trust_remote_code: bool = False) -> Subject:
    """Return what the user named. base: replaces its own. Raises: ValueError when either is missing."""
    folder = Path(name).expanduser().absolute()
    if (folder / "config.yaml").is_file():
        run = RunFolder(folder)
        return _of_run(name, run, final_adapter(name, run), base, trust_remote_code)
    if (folder / ADAPTER_CONFIG).is_file():
        if (folder.parent / "config.yaml").is_file():
            return _of_run(name, RunFolder(folder.parent), folder, base, trust_remote_code)
        return _without_run(name, folder, base, trust_remote_code)
    if (folder / "config.json").is_file():
        return _plain_model(name, models.resolve(str(folder), MODEL), base, trust_remote_code)
    if folder.exists():
        raise ValueError(
            f"{name} is no run (config.yaml), no adapter ({ADAPTER_CONFIG}) and no model (config.json); name"
            " the folder that holds one of these files"
        )
    if not _may_be_hub_name(name) or folder.parent.is_dir():
        raise ValueError(
            f"{name}: no such folder; name a run, a checkpoint, an adapter, a model, or a hub name"
            f"{meant(name)}"
        )
    with models.hub_errors("the hub's model", name):
        with hidden():
            from transformers.utils.peft_utils import find_adapter_config_file
        adapter_file = find_adapter_config_file(name)
    if adapter_file:
        return _without_run(name, Path(adapter_file).parent, base, trust_remote_code)
    return _plain_model(name, name, base, trust_remote_code)


def final_adapter(name: str | Path, run: RunFolder) -> Path:
    """Return a run's adapter folder. Raises: ValueError naming the whole checkpoints of an unfinished run."""
    if (run.adapter / ADAPTER_CONFIG).is_file():
        return run.adapter
    whole = [path for path in run.checkpoints() if not checkpoints.flaw(path, thorough=False)]
    names = ", ".join(str(Path(name) / path.name) for path in whole)
    instead = f"name a checkpoint ({names}), or train it to its end" if names else "train it first"
    raise ValueError(f"{name} holds no finished run: {run.adapter} is not there; {instead}")


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Return adapter_config.json. Raises: ValueError when it cannot be read, or is not LoRA's."""
    file = folder / ADAPTER_CONFIG
    config = read_json(file)
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"{file} says peft_type={kind}; qwenlora knows LORA")
    return config


def lora_kind(config: Mapping[str, object]) -> str:
    """Return DoRA, rsLoRA or LoRA. config: adapter_config.json."""
    return "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"


def _of_run(name: str, run: RunFolder, adapter: Path, base: str | None, trust_remote_code: bool) -> Subject:
    read_adapter_config(adapter)
    config = run.read_config()
    model: dict[str, object] = {"trust_remote_code": True} if trust_remote_code else {}
    if base and base != config.model.name_or_path:  # the revision is not another base's
        model |= {"name_or_path": base, "revision": None}
    config = config.model_copy(update={"model": config.model.model_copy(update=model)})
    if base:
        found = _find_base(base, f"--base {base}")
    elif (named := config.model.name_or_path) == models.TINY:
        is_built = (run.base_model / "config.json").is_file()
        found = str(run.base_model) if is_built else pretrained.base_of(config, run)
    else:
        found = _find_base(_recorded_base(run, config), f"{name} needs the base model {named}")
    return Subject(name, config, found, adapter, run)


def _recorded_base(run: RunFolder, config: Config) -> str:
    """Return the base's name as its config has it; where that is no folder, the folder on record."""
    named = config.model.name_or_path
    if Path(named).expanduser().is_dir():
        return named
    with suppress(OSError, ValueError):
        return run.read_facts().base
    return named


def _without_run(name: str, adapter: Path, base: str | None, trust_remote_code: bool) -> Subject:
    settings = read_adapter_config(adapter)
    trained_on = settings.get("base_model_name_or_path")
    revision = settings.get("revision") if base in (None, trained_on) else None
    if base:
        found = _find_base(base, f"--base {base}")
    elif trained_on:
        found = _find_base(str(trained_on), f"{name} needs the base model {trained_on}")
    else:
        raise ValueError(
            f"{name}: its {ADAPTER_CONFIG} does not say which base it needs; name it with --base"
        )
    tokenizer = str(adapter) if (adapter / "tokenizer.json").is_file() else None
    return Subject(name, _made_up_config(found, trust_remote_code, tokenizer, revision), found, adapter, None)


def _plain_model(name: str, model: str, base: str | None, trust_remote_code: bool) -> Subject:
    if base:
        raise ValueError(f"{name} is a model by itself: --base {base} goes with an adapter")
    return Subject(name, _made_up_config(model, trust_remote_code), model, None, None)


def _find_base(name: str, problem: str) -> str:
    """Return a base model's folder or hub name. problem: how the message begins when it is not there."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return models.resolve(name, MODEL)
    if folder.is_dir() or not _may_be_hub_name(name):
        raise ValueError(
            f"{problem}, and there is no model at {folder.absolute()}; name its folder with --base"
        )
    return name


def _may_be_hub_name(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and name.count("/") == 1


def _made_up_config(
    base: str, trust_remote_code: bool, tokenizer: str | None = None, revision: str | None = None
) -> Config:
    model = Model(
        name_or_path=base, revision=revision, tokenizer=tokenizer, trust_remote_code=trust_remote_code
    )
    return Config(run_dir=".", model=model, data=Data(train="example"))  # the rows are never read
