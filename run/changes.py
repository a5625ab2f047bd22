"""The config keys that may change between two attempts, and those that make it another run."""

from collections.abc import Sequence
from typing import Any

from qwenlora.configs.keys import differences
from qwenlora.configs.schema import Config

# how a run is watched, started, spread over GPUs, cut into micro-batches, evaluated and saved, and its length
FREE_TO_CHANGE = (
    "run_dir",
    "log.",
    "launch.",
    "checkpoint.",
    "data.num_proc",
    "data.cache_dir",
    "strategy.name",
    "strategy.offload",
    "strategy.shard_group",
    "strategy.expert_parallel",
    "strategy.sequence_parallel",
    "strategy.deepspeed_config",
    "train.early_stopping_patience",
    "train.eval_",
    "train.final",
    "train.gradient_checkpointing",
    "train.max_steps",
    "train.max_time_min",
    "train.metric_for_best_model",
    "train.num_train_epochs",
    "train.on_nan",
    "train.per_device_",
    "train.save_",
)


class Changes(dict[str, tuple[Any, Any]]):
    """{key: (was, is now)} of two configs."""

    def refused(self, allowed: Sequence[str] = ()) -> "Changes":
        """Return those that make it another run. allowed: keys, or sections, that may change nevertheless."""
        free = [
            key for key in self if key.startswith(FREE_TO_CHANGE) or {key, key.split(".")[0]} & set(allowed)
        ]
        return Changes({key: values for key, values in self.items() if key not in free})

    def __str__(self) -> str:
        return ", ".join(
            f"{key} was {_as_yaml(old)}, now {_as_yaml(new)}" for key, (old, new) in self.items()
        )

    @property
    def length(self) -> bool:
        """Whether they make the run longer or shorter."""
        return bool({"train.max_steps", "train.num_train_epochs"} & set(self))

    @property
    def permit(self) -> str:
        """The options by which a user permits them."""
        return " ".join(f"--allow-config-change {key}" for key in self)


def _as_yaml(value: Any) -> str:
    known = {None: "null", True: "true", False: "false"}
    return known[value] if value is None or isinstance(value, bool) else str(value)


def allows(section: str, allowed: Sequence[str]) -> bool:
    """Return whether allowed permits other rows (section data) or base weights (model); free keys do not."""
    if section in allowed:
        return True
    if section == "model":
        return bool({"model.name_or_path", "model.revision"} & set(allowed))
    return any(key.startswith(f"{section}.") and not key.startswith(FREE_TO_CHANGE) for key in allowed)


def changes(before: Config, config: Config) -> Changes:
    """Return how a config differs from an earlier one, except in run_dir."""
    return Changes({key: values for key, values in differences(before, config).items() if key != "run_dir"})
