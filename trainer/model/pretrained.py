"""What transformers reads of a base besides its weights: config and tokenizer. They need no torch."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qwenlora.configs.schema import Config, Model
from qwenlora.data import template
from qwenlora.data.chat import forget_calls
from qwenlora.data.turns import TURN_END
from qwenlora.plan.shape import WITH_VISION
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.hidden import show_bitsandbytes
from qwenlora.trainer.model import damage, head, quantised
from qwenlora.trainer.model.base import TINY, hub_errors, resolve
from qwenlora.trainer.model.tiny import build_tiny


def base_of(config: Config, run: RunFolder, *, weights: bool = True) -> str:
    """Return the folder or hub name of the base model; the tiny one is built in the run folder first, with
    weights or without. Raises: ValueError when the named folder does not exist or holds no model."""
    if config.model.name_or_path == TINY:
        tokenizer = config.model.tokenizer
        chosen = _tokenizer(tokenizer, config.model, "model.tokenizer") if tokenizer else None
        build_tiny(run.base_model, chosen, weights=weights)
        return str(run.base_model)
    return resolve(config.model.name_or_path, "model.name_or_path")


def load_tokenizer(config: Config, base: str) -> Any:
    """Return the tokenizer, with the config's chat template arguments. Raises: ValueError when it is not a
    fast one, cannot mark turns or padding, or its template does not use an argument."""
    name, key = config.model.tokenizer, "model.tokenizer"
    if not name or config.model.name_or_path == TINY:
        name, key = base, "model.name_or_path"
    tokenizer = _tokenizer(name, config.model, key)
    if arguments := config.data.chat_template_kwargs:
        template.set_defaults(tokenizer, arguments)
    return tokenizer


def _tokenizer(name: str, config: Model, key: str) -> Any:
    folder = resolve(name, key)
    damage.check_tokenizer(Path(folder))
    with hub_errors(key, name):
        tokenizer = AutoTokenizer.from_pretrained(
            folder,
            trust_remote_code=config.trust_remote_code,
            revision=config.revision if key == "model.name_or_path" else None,
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{key}={name}: its tokenizer has no fast version (tokenizer.json), which masks need"
        )
    forget_calls(tokenizer)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{key}={name}: its tokenizer has no chat template; set model.tokenizer to one that has"
        )
    if tokenizer.convert_tokens_to_ids(TURN_END) is None:
        raise ValueError(
            f"{key}={name}: its tokenizer has no {TURN_END} token; set model.tokenizer to a Qwen's"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token == TURN_END:
        raise ValueError(
            f"{key}={name}: its pad token is {tokenizer.pad_token}, expected one that ends no turn, as"
            ' <|endoftext|>; set "pad_token" in its tokenizer_config.json'
        )
    return tokenizer


def load_config_of(config: Config, base: str, *, download: bool = False) -> Any:
    """Return the base's transformers config, not tied where the files hold a head of their own. download: as
    has_own_head's. Raises: ValueError when transformers has no such text model."""
    model_config = read_config_of(config, base)
    if unties(config, base, model_config, download=download):
        head.untie(model_config)
    return model_config


def notes_on(config: Config, base: str) -> list[str]:
    """Return what the user is told about the base."""
    model_config = read_config_of(config, base)
    notes = [head.NOTE] if unties(config, base, model_config) else []
    return notes + [quantised.note(kind) for kind in [quantised_files(model_config)] if kind]


def layer_kinds(model_config: Any) -> set[str]:
    """Return the kinds of attention of a model's layers, as `full_attention`. Some configs, as Mistral's, say
    only by sliding_window that their layers have a window."""
    text = model_config.get_text_config()
    window = getattr(text, "sliding_window", None)
    return set(getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"])


def quantised_files(model_config: Any) -> str:
    """Return how a base's files are quantised, by its transformers config; empty when they are not."""
    return quantised.kind_of(getattr(model_config, "quantization_config", None))


def unties(config: Config, base: str, model_config: Any, *, download: bool = False) -> bool:
    """Whether a base's files hold a head of their own, against its config. download: as has_own_head's."""
    if not head.is_tied(model_config):
        return False
    with hub_errors("model.name_or_path", config.model.name_or_path):
        return head.has_own_head(base, config.model.revision, download=download)


def read_config_of(config: Config, base: str) -> Any:
    """Return the base's transformers config as its file is. Raises: as load_config_of."""
    with hub_errors("model.name_or_path", config.model.name_or_path):
        try:
            model_config = AutoConfig.from_pretrained(
                base, trust_remote_code=config.model.trust_remote_code, revision=config.model.revision
            )
        except (ValueError, KeyError) as error:  # an unknown model_type
            raise ValueError(
                f"model.name_or_path={config.model.name_or_path}: {str(error).splitlines()[0]}"
            ) from error
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *WITH_VISION}
    if model_config.model_type not in known and not config.model.trust_remote_code:
        qwens = ", ".join(sorted(name for name in known if name.startswith("qwen")))
        raise ValueError(
            f"model.name_or_path={config.model.name_or_path} is of type {model_config.model_type}, which this"
            f" transformers has no text model for; it has {qwens}"
        )
    if config.strategy.quantization != "none" or quantised_files(model_config):
        show_bitsandbytes()
    return model_config


def embeddings_of(config: Config, base: str) -> int:
    """Return how many tokens the base has an embedding for."""
    return int(load_config_of(config, base).get_text_config().vocab_size)
