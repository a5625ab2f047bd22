"""Whether what was prepared for a run still stands, judged by the states of its files alone: no torch, no
tokenizer.

The same command, given again after a stop or a crash, then prepares nothing: that is seconds on a laptop and
minutes on a busy file system. In doubt (a hub name, anything that changed) it is prepared again, and finds
its rows in the cache.
"""

import hashlib
import json
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from qwenlora.configs import Config
from qwenlora.data import sources
from qwenlora.data.cache import read_index, state_of
from qwenlora.run.folder import RunFolder
from qwenlora.run.package import code_hash

# to what is prepared; sequence_parallel decides whether rows are packed
_NO_MATTER: dict[str, Any] = dict.fromkeys(("run_dir", "log", "launch", "checkpoint"), True)
_NO_MATTER["strategy"] = {"name", "quantization", "offload", "shard_group", "deepspeed_config"}
_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "jinja2", "numpy", "pyarrow", "datasets")
_SETTLED_NS = 10**9  # a change within the clock's tick after another looks the same
_ROOMS = ("configs", "data", "run", "trainer")


def stamp(config: Config, base: str, *, on_gpu: bool) -> str:
    """Return a hash of all that preparation depends on; empty where that cannot be told without asking the
    hub.

    base: folder or hub name of the base model.
    """
    folders = [base, *([config.model.tokenizer] if config.model.tokenizer else [])]
    found = sources.find(config.data)
    if not all(Path(folder).expanduser().is_dir() for folder in folders) or any(one.dataset for one in found):
        return ""
    files = [path for one in found for path in one.files]
    files += [
        path for folder in folders for path in sorted(Path(folder).expanduser().iterdir()) if path.is_file()
    ]
    settings = config.model_dump(mode="json", exclude=_NO_MATTER)
    versions = [metadata.version(name) for name in _LIBRARIES]
    try:
        states = [[str(path), state_of(path)] for path in files]
        changed = max((state_of(path)["ctime_ns"] for one in found for path in one.files), default=0)
    except OSError:
        return ""
    if time.time_ns() - changed < _SETTLED_NS:
        return ""
    parts = [settings, versions, on_gpu, states, code_hash(_ROOMS)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def is_current(config: Config, run: RunFolder, *, on_gpu: bool) -> bool:
    """Whether the run's facts.json, and the rows it names, are what preparation would make again."""
    try:
        facts = run.read_facts()
    except (OSError, ValueError):
        return False
    if not facts.stamp or stamp(config, facts.base, on_gpu=on_gpu) != facts.stamp:
        return False
    space = (
        shutil.disk_usage(run.path).free >= facts.checkpoint_bytes
    )  # else preparation says what is missing
    rows = read_index(Path(facts.data_folder)) is not None
    return space and rows and (not facts.bad_rows or run.bad_rows.exists())
