"""Imports what training imports of others, and no line of qwenlora: for processes that others are forked
from."""

import gc
import importlib

NAMES = """
accelerate annotated_types charset_normalizer datasets deepspeed jinja2 peft psutil pyarrow.parquet
pydantic.json_schema pydantic.main requests rich._emoji_codes rich.console rich.progress
safetensors.numpy safetensors.torch torch.distributed.checkpoint.state_dict
torch.distributed.elastic.rendezvous.c10d_rendezvous_backend torch.distributed.fsdp
torch.distributed.run transformers.generation.utils transformers.models.qwen2.modeling_qwen2
transformers.models.qwen2.tokenization_qwen2 transformers.models.qwen3.modeling_qwen3
transformers.trainer transformers.trainer_callback typer._adapters yaml
"""

for name in NAMES.split():
    importlib.import_module(name)
# kept by transformers; a second of regular expressions in each process otherwise
importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("qwen3")
# as trainer/forkserver.py does: collections of garbage would look through all of this each time
gc.collect()
gc.freeze()
