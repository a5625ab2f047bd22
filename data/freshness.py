"""Whether a run's preparation is still current, judged by its files' states, without torch or a tokenizer.

A command repeated after a stop or a crash then prepares nothing, which saves seconds on a laptop and minutes
on a busy file system. In doubt (a hub name, any change) rows are prepared again, or come from the cache.
"""

import hashlib
import json
import time
from importlib import metadata
from itertools import chain
from pathlib import Path

from qwenlora.configs import Config
from qwenlora.data import sources
from qwenlora.data.cache import Index, read_index, state_of
from qwenlora.run.disk import free_bytes
from qwenlora.run.folder import RunFolder
from qwenlora.run.package import code_hash

# config keys that preparation does not depend on; sequence_parallel decides whether rows are packed. How long
# the run is, the ranks check, too (trainer/build.py)
_NO_MATTER: dict[str, bool | set[str]] = {
    **dict.fromkeys(("run_dir", "log", "launch", "checkpoint"), True),
    "strategy": {"name", "offload", "shard_group", "deepspeed_config"},
    "train": {
        *("max_steps", "num_train_epochs", "max_time_min", "early_stopping_patience", "final", "on_nan"),
        *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_checkpointing"),
        *("eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit"),
        "metric_for_best_model",
    },
}
_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "jinja2", "numpy", "pyarrow", "datasets")
# which preparation tells to install, or refuses to do without
_OPTIONAL = ("flash-linear-attention", "causal-conv1d", "flash-attn", "bitsandbytes")
_SETTLED_NS = 10**9  # a second change within the clock's tick would be missed
_ROOMS = ("configs", "data", "plan", "run", "trainer")


def stamp(config: Config, base: str, *, on_gpu: bool) -> str:
    """Return a hash of all that preparation depends on. base: folder or hub name of the base model.
    It is empty where a change could be missed: with hub names, and just after a file of rows was changed."""
    found = sources.find(config.data)
    folders = [Path(name).expanduser() for name in (base, config.model.tokenizer) if name]
    if not all(map(Path.is_dir, folders)) or any(source.dataset is not None for source in found):
        return ""
    rows = list(chain.from_iterable(source.files for source in found))
    model = list(chain.from_iterable(map(_files_in, folders)))
    try:
        states = {path: state_of(path) for path in [*rows, *model]}
    except OSError:
        return ""
    if time.time_ns() - max((states[path].ctime_ns for path in rows), default=0) < _SETTLED_NS:
        return ""
    parts = [
        config.model_dump(mode="json", exclude=_NO_MATTER),
        list(map(metadata.version, _LIBRARIES)),
        list(map(_version, _OPTIONAL)),
        on_gpu,
        {str(path): state.model_dump() for path, state in states.items()},
        code_hash(_ROOMS),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    """Return an installed version; None without the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _files_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_file()]


def is_current(config: Config, run: RunFolder, *, on_gpu: bool) -> bool:
    """Return whether preparation would make the run's facts.json and rows again as they are."""
    try:
        facts = run.read_facts()
    except (OSError, ValueError):
        return False
    if not facts.stamp or stamp(config, facts.base, on_gpu=on_gpu) != facts.stamp:
        return False
    if free_bytes(run.path) < facts.checkpoint_bytes:
        return False  # preparation says what is missing
    has_rows = read_index(Path(facts.data_folder), Index) is not None
    return has_rows and (not facts.bad_rows or run.bad_rows.exists())
