"""What a config may say (schema), and how one is read (load). Nothing here imports torch."""

from qwenlora.configs.load import load_config
from qwenlora.configs.schema import Config

__all__ = ["Config", "load_config"]
