"""The keys of a config (schema), and how it is read (load). Nothing here imports torch."""

from qwenlora.configs.load import load_config
from qwenlora.configs.schema import Config

__all__ = ["Config", "load_config"]
