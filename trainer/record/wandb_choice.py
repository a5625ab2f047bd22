"""How W&B is used: as the config says, else as W&B's own settings say. Those are its variables, its settings
files, and what `wandb login`, `wandb offline` and `wandb disabled` wrote; W&B itself reads them."""

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qwenlora.configs import Config
from qwenlora.configs.schema import Log
from qwenlora.run.folder import RunFolder

Mode = Literal["online", "offline", "off"]
MODES: dict[str, Mode] = {  # by W&B's names; the last two are old ones
    "online": "online",
    "shared": "online",
    "offline": "offline",
    "disabled": "off",
    "run": "online",
    "dryrun": "offline",
}
PROJECT = "qwenlora"
NO_KEY = "no W&B key: `wandb login`, or log.wandb=offline"


class Choice(NamedTuple):
    """How W&B is used. why: for the start-up table; id: of the W&B run, where the user chose one; folder:
    in which W&B makes its folder `wandb`; server: W&B's address."""

    mode: Mode
    why: str
    project: str = PROJECT
    name: str = ""
    id: str = ""
    folder: str = ""
    server: str = ""


def choose(config: Config, run: RunFolder) -> Choice:
    """Return how W&B is used. Raises: whatever W&B raises, where its settings are wrong."""
    log = config.log
    if log.wandb == "off":
        return Choice("off", _by_config(log))
    if log.wandb == "auto" and not _is_set_up():
        return Choice("off", NO_KEY)
    import wandb  # here: it takes a second, and starts a process

    # silent: else it asks its server who is logged in
    settings = wandb.setup(wandb.Settings(silent=True)).settings
    mode, why = _by_wandb(settings) if log.wandb == "auto" else (log.wandb, _by_config(log))
    if mode == "off":
        wandb.teardown()  # it has started a process
        return Choice(mode, why)
    names = {"project": log.wandb_project, "entity": log.wandb_entity, "name": log.wandb_name}
    overruled = [
        f"; log.wandb_{key}={ours}, not WANDB_{key.upper()}={theirs}"
        for key, ours in names.items()
        if ours and (theirs := os.environ.get(f"WANDB_{key.upper()}", ours)) != ours
    ]
    return Choice(
        mode,
        why + "".join(overruled),
        project=log.wandb_project or settings.project or PROJECT,
        name=log.wandb_name or settings.run_name or run.path.name,
        id=settings.run_id or "",
        folder=settings.root_dir if "root_dir" in settings.model_fields_set else str(run.path),
        server=settings.base_url,
    )


def _is_set_up() -> bool:
    """Whether anything exists that W&B reads: its variables (SageMaker's, too), netrc, its settings files."""
    if any(name.startswith(("WANDB_", "SM_")) or name == "NETRC" for name in os.environ):
        return True
    at_home = (".netrc", "_netrc", ".config/wandb/settings")
    files = [*(Path.home() / name for name in at_home), Path("wandb/settings"), Path(".wandb/settings")]
    return any(file.exists() for file in files)


def _by_config(log: Log) -> str:
    theirs = os.environ.get("WANDB_MODE", "")
    overruled = [f"WANDB_MODE={theirs}"] if theirs and MODES.get(theirs) != log.wandb else []
    if log.wandb != "off" and (disabled := _disabled()):
        overruled.append(disabled)
    return f"log.wandb={log.wandb}" + "".join(f", not {variable}" for variable in overruled)


def _by_wandb(settings: Any) -> tuple[Mode, str]:
    if disabled := _disabled():
        return "off", disabled
    if "mode" in settings.model_fields_set:
        variable = os.environ.get("WANDB_MODE")
        return MODES[settings.mode], f"WANDB_MODE={variable}" if variable else f"`wandb {settings.mode}`"
    if _logged_in():
        return "online", "logged in"
    return "off", NO_KEY


def _disabled() -> str:
    """Return WANDB_DISABLED, as a text, where it is true; transformers, not W&B, has this variable."""
    value = os.environ.get("WANDB_DISABLED", "")
    return f"WANDB_DISABLED={value}" if value.lower() in ("1", "true", "yes", "on") else ""


def _logged_in() -> bool:
    """Whether W&B has a key or a token for its server. A wrong one counts: the start says what is wrong."""
    import wandb

    try:
        return wandb.login(prompt=False, verify=False)
    except wandb.Error:
        return True
