"""What a user names after training: a run, a checkpoint, an adapter, or a model: `find("runs/tiny")`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.peft_utils import find_adapter_config_file

from qwenlora.configs import load_config
from qwenlora.configs.schema import Config, Data, Model
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.model import base as models

CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Subject:
    """named: as the user said it. base: the base model's folder or hub name. adapter: None for a model alone.

    config: the run's, or a stand-in that says which model, so that trainer/model.py takes either. run: if it
    is one's.
    """

    named: str
    config: Config
    base: str
    adapter: Path | None
    run: RunFolder | None

    @property
    def label(self) -> str:
        """A short name to show: of a run its own, of its checkpoint both."""
        if self.run is None:
            return Path(self.adapter or self.base).name
        if self.adapter is None or self.adapter == self.run.adapter:
            return self.run.path.name
        return f"{self.run.path.name}/{self.adapter.name}"


def find(named: str, *, base: str | None = None, trust_remote_code: bool = False) -> Subject:
    """Return what is named. base: the base model, where it is not where the run or adapter says.

    Raises: ValueError when there is nothing of the kind, or its base is not there.
    """
    folder = Path(named).expanduser().absolute()
    if (folder / "config.yaml").is_file():
        run = RunFolder(folder)
        if not (run.adapter / CONFIG).is_file():
            held = ", ".join(str(Path(named) / path.name) for path in run.checkpoints())
            instead = f"name a checkpoint ({held}), or train it to its end" if held else "train it first"
            raise ValueError(f"{named} holds no finished run: {run.adapter} is not there; {instead}")
        return _of_run(named, run, run.adapter, base, trust_remote_code)
    if (folder / CONFIG).is_file():
        if (folder.parent / "config.yaml").is_file():
            return _of_run(named, RunFolder(folder.parent), folder, base, trust_remote_code)
        return _alone(named, folder, base, trust_remote_code)
    if (folder / "config.json").is_file():
        if base:
            raise _no_adapter(named, base)
        return Subject(named, _stand_in(str(folder), None, trust_remote_code), str(folder), None, None)
    if folder.exists():
        raise ValueError(
            f"{named} is no run (config.yaml), no adapter ({CONFIG}) and no model (config.json); name the"
            " folder that holds one of these files"
        )
    if named.startswith((".", "/", "~")) or named.count("/") != 1 or folder.parent.is_dir():
        raise ValueError(
            f"{named}: no such folder; name a run, a checkpoint, an adapter, a model, or a hub name"
        )
    with models.hub_errors("the hub's model", named):
        held = find_adapter_config_file(named)
    if held:
        return _alone(named, Path(held).parent, base, trust_remote_code)
    if base:
        raise _no_adapter(named, base)
    return Subject(named, _stand_in(named, None, trust_remote_code), named, None, None)


def adapter_config(folder: Path) -> dict[str, Any]:
    """Return what an adapter says of itself. Raises: ValueError when that cannot be read, or it is no
    LoRA."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read: {error}") from None
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        kind = found.get("peft_type") if isinstance(found, dict) else found
        raise ValueError(f"{folder / CONFIG} says peft_type={kind}; qwenlora knows LORA")
    return found


def _no_adapter(named: str, base: str) -> ValueError:
    return ValueError(f"{named} is a model by itself: --base {base} goes with an adapter")


def _of_run(named: str, run: RunFolder, adapter: Path, base: str | None, trust_remote_code: bool) -> Subject:
    adapter_config(adapter)
    config = load_config(run.config)
    model: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    if base and base != config.model.name_or_path:  # whose revision another one has not
        model |= {"name_or_path": base, "revision": None}
    config = config.model_copy(update={"model": config.model.model_copy(update=model)})
    if base:
        return Subject(named, config, _base(base, f"--base {base}"), adapter, run)
    return Subject(named, config, models.base_of(config, run), adapter, run)


def _alone(named: str, adapter: Path, base: str | None, trust_remote_code: bool) -> Subject:
    settings = adapter_config(adapter)
    said = settings.get("base_model_name_or_path")
    revision = settings.get("revision") if base in (None, said) else None
    if base:
        found = _base(base, f"--base {base}")
    elif said:
        found = _base(str(said), f"{named} needs the base model {said}")
    else:
        raise ValueError(f"{named}: its {CONFIG} does not say which base it needs; name it with --base")
    tokenizer = str(adapter) if (adapter / "tokenizer.json").is_file() else None
    return Subject(named, _stand_in(found, tokenizer, trust_remote_code, revision), found, adapter, None)


def _base(name: str, said: str) -> str:
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder.absolute())
    if folder.is_dir() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"{said}, and there is no model at {folder.absolute()}; name its folder with --base")
    return name


def _stand_in(
    base: str, tokenizer: str | None, trust_remote_code: bool, revision: str | None = None
) -> Config:
    model = Model(
        name_or_path=base, revision=revision, tokenizer=tokenizer, trust_remote_code=trust_remote_code
    )
    return Config(run_dir=".", model=model, data=Data(train="example"))  # the rows are not looked at
