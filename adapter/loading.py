"""A model ready to answer: the base and, once verify.py finds nothing wrong, the adapter on it."""

import sys
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from qwenlora.adapter import verify
from qwenlora.adapter.subject import Subject
from qwenlora.configs.schema import Config
from qwenlora.trainer.model import loading, pretrained, targets
from qwenlora.trainer.model.fused_experts import fuse_experts
from qwenlora.trainer.model.fused_tokens import fuse_tokens
from qwenlora.trainer.ranks import gpus

DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class LoadedModel(NamedTuple):
    """A model in eval mode that caches keys and values. A PeftModel is its base within disable_adapter()."""

    model: Any
    tokenizer: Any


def load(
    subject: Subject, *, dtype: str | None = None, quantization: str | None = None, tokenizer: Any = None
) -> LoadedModel:
    """Return a subject's model and tokenizer, on the GPU if there is one. tokenizer: if it is loaded already.

    dtype: one of DTYPES; quantization: none, nf4 or int8. None: as the config says (auto: as it would be
    chosen here; plain models: auto, none). Raises: ValueError when the base or the adapter cannot be loaded,
    or do not fit each other, or torch cannot use the GPUs.
    """
    gpus.check()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config = override_model(subject.config, dtype, quantization)
    if subject.adapter:
        verify.check_adapter(subject)
    tokenizer = tokenizer or load_tokenizer(subject)
    model = loading.load_base(config, subject.base)
    for note in pretrained.notes_on(config, subject.base):
        print(f"note: {note}", file=sys.stderr)
    # not the model's own, which may suppress tokens or search with beams
    model.generation_config = GenerationConfig()
    if subject.adapter:
        settings = targets.saved_settings(model, subject.adapter)
        if (
            settings.init_lora_weights == "orthogonal"
        ):  # a quantised base has none, and A and B are read after
            settings.init_lora_weights = True
        with targets.as_named(model, settings) as names:
            model = PeftModel.from_pretrained(model, str(subject.adapter), config=names)
        fuse_experts(model)  # peft copies all of them for each token, and cannot read those in nf4
        fuse_tokens(model)
    model.config.use_cache = True
    return LoadedModel(model.eval(), tokenizer)


def load_tokenizer(subject: Subject) -> Any:
    """Return the tokenizer that the adapter was trained with: its own, else the run's or the base's."""
    has_own = subject.adapter and (subject.adapter / "tokenizer.json").is_file()
    tokenizer = str(subject.adapter) if has_own else subject.config.model.tokenizer
    model = subject.config.model.model_copy(update={"name_or_path": subject.base, "tokenizer": tokenizer})
    return pretrained.load_tokenizer(subject.config.model_copy(update={"model": model}), subject.base)


def override_model(config: Config, dtype: str | None, quantization: str | None) -> Config:
    """Return the config with another dtype or quantisation. Raises: ValueError for an unknown one."""
    if dtype is not None:
        if dtype not in DTYPES:
            raise ValueError(f"--dtype {dtype} is unknown; expected {', '.join(DTYPES)}")
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": DTYPES[dtype]})})
    if quantization is not None:
        if quantization not in ("none", "nf4", "int8"):
            raise ValueError(f"--quantization {quantization} is unknown; expected none, nf4 or int8")
        strategy = config.strategy.model_copy(update={"quantization": quantization})
        config = config.model_copy(update={"strategy": strategy})
    return config
