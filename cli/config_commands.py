"""`qwenlora config show` and `qwenlora config schema`."""

import json

from qwenlora.cli.arguments import ConfigFile, Overrides
from qwenlora.configs import Config, load_config
from qwenlora.configs.load import to_yaml


def show(config: ConfigFile, overrides: Overrides = None) -> int:
    """Print the resolved config: defaults < CONFIG < overrides."""
    print(to_yaml(load_config(config, overrides or [])), end="")
    return 0


def schema() -> int:
    """Print the JSON Schema of a config, for editors."""
    print(json.dumps(Config.model_json_schema(), indent=1, ensure_ascii=False))
    return 0
