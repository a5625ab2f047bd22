"""The base model: where it is, its config, its tokenizer, its weights as a whole, and their fingerprint.
spread/sharded_loading.py loads a base of which each rank holds a part."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from qwenlora.configs.schema import Config, Model
from qwenlora.data import hub
from qwenlora.data.chat import forget_calls
from qwenlora.data.turns import TURN_END
from qwenlora.run.folder import RunFolder
from qwenlora.run.format import and_more, shape
from qwenlora.trainer.hidden import show_bitsandbytes
from qwenlora.trainer.model import damage, head, quantised
from qwenlora.trainer.model.base_files import stored_in
from qwenlora.trainer.model.tiny import build_tiny

TINY = "tiny"
IGNORED = -100  # labels without a loss: torch.nn.CrossEntropyLoss, ignore_index
SAMPLE_BYTES = 2**12
UNKNOWN = "None"  # the fingerprint that older versions recorded for a base from the hub


def base_of(config: Config, run: RunFolder) -> str:
    """Return the folder or hub name of the base model; the tiny one is built in the run folder first. Raises:
    ValueError when the named folder does not exist or holds no model."""
    if config.model.name_or_path == TINY:
        tokenizer = config.model.tokenizer
        build_tiny(
            run.base_model, _tokenizer(tokenizer, config.model, "model.tokenizer") if tokenizer else None
        )
        return str(run.base_model)
    return resolve(config.model.name_or_path, "model.name_or_path")


def resolve(name: str, key: str) -> str:
    """Return a model folder's absolute path, or a hub name as it is. Raises: ValueError when it is neither,
    or the model is damaged."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if key == "model.name_or_path" and not (folder / "config.json").is_file():
            raise ValueError(f"{key}={name} has no config.json; name the folder that holds the model's files")
        if key == "model.name_or_path":
            damage.check_model(folder.absolute())
        return str(folder.absolute())
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(
            f"{key}={name}: no such folder (looked for {folder.absolute()}); a hub name has one slash"
        )
    return name


def load_tokenizer(config: Config, base: str) -> Any:
    """Return the tokenizer. Raises: ValueError when it is not a fast one, or cannot mark turns or padding."""
    name = config.model.tokenizer
    if name and config.model.name_or_path != TINY:
        return _tokenizer(name, config.model, "model.tokenizer")
    return _tokenizer(base, config.model, "model.name_or_path")


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


@contextmanager
def hub_errors(key: str, name: str) -> Iterator[None]:
    """Ask the hub, if the model is there; turn transformers' errors about a missing or broken model into a
    ValueError of one line."""
    on_hub = name.count("/") == 1 and not Path(name).expanduser().is_dir()
    if on_hub:
        hub.ask(name)
    try:
        yield
    except (OSError, ImportError, json.JSONDecodeError) as error:
        why = hub.why_offline() if on_hub else ""
        offline = f" (offline: {why})" if why else ""
        cure = hub.advice(name) if why else "the path of a folder that holds the files will do, too"
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{key}={name} cannot be loaded{offline}: {reason.rstrip('.')}; {cure}") from error


def pick_dtype(name: str) -> torch.dtype:
    """Return model.dtype as torch's. auto: bfloat16 where the GPU has it, else float16; float32 on a CPU."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def device() -> torch.device:
    """Return the device that this rank computes on."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def load_config_of(config: Config, base: str, *, download: bool = False) -> Any:
    """Return the base's transformers config, not tied where the files hold a head of their own. download: as
    has_own_head's. Raises: ValueError when transformers has no such text model."""
    model_config = _read_config_of(config, base)
    if _has_own_head(config, base, model_config, download=download):
        head.untie(model_config)
    return model_config


def notes_on(config: Config, base: str) -> list[str]:
    """Return what the user is told about the base."""
    model_config = _read_config_of(config, base)
    notes = [head.NOTE] if _has_own_head(config, base, model_config) else []
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


def _has_own_head(config: Config, base: str, model_config: Any, *, download: bool = False) -> bool:
    if not head.is_tied(model_config):
        return False
    with hub_errors("model.name_or_path", config.model.name_or_path):
        return head.has_own_head(base, config.model.revision, download=download)


def _read_config_of(config: Config, base: str) -> Any:
    with hub_errors("model.name_or_path", config.model.name_or_path):
        try:
            model_config = AutoConfig.from_pretrained(
                base, trust_remote_code=config.model.trust_remote_code, revision=config.model.revision
            )
        except (ValueError, KeyError) as error:  # an unknown model_type
            raise ValueError(
                f"model.name_or_path={config.model.name_or_path}: {str(error).splitlines()[0]}"
            ) from error
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
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


def fingerprint(config: Config, base: str) -> str:
    """Return a hash that changes when the base's weights do: a hub model's commit; for a folder, a hash of
    three samples of each safetensors tensor and 64 of any other weight file (seconds for a 72B model)."""
    if not Path(base).is_dir():
        with hub_errors("model.name_or_path", config.model.name_or_path):
            config_file = cached_file(base, CONFIG_NAME, revision=config.model.revision)
        # the hub's cache has the commit in its paths; another kind of cache does not
        commit = extract_commit_hash(config_file, None)
        return commit or hashlib.sha256(Path(config_file).read_bytes()).hexdigest()[:16]
    digest = hashlib.sha256((Path(base) / "config.json").read_bytes())
    suffixes = (".safetensors", ".bin", ".pt", ".pth")
    for path in sorted(file for file in Path(base).iterdir() if file.suffix in suffixes):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            evenly = range(0, size, max(size // 64, 1))
            for offset in _offsets(file, size) if path.suffix == ".safetensors" else evenly:
                file.seek(offset)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _offsets(file: BinaryIO, size: int) -> Iterator[int]:
    """Yield offsets of samples in a safetensors file: its header; start, middle and end of each tensor."""
    header = int.from_bytes(file.read(8), "little")
    yield from range(0, min(header + 8, size), SAMPLE_BYTES)
    with suppress(ValueError):  # a damaged file that is none of the model's
        for each in stored_in(Path(file.name)):
            yield from (each.start, (each.start + each.stop) // 2, max(each.start, each.stop - SAMPLE_BYTES))


def load_base(config: Config, base: str) -> Any:
    """Return the base model in its dtype, or quantised as the config says, whole on this rank's device."""
    dtype = pick_dtype(config.model.dtype)
    # straight to this rank's GPU, without a copy in host memory
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device_map = {"": local_rank} if torch.cuda.is_available() else None
    model_config = _read_config_of(config, base)
    if own_head := _has_own_head(config, base, model_config, download=True):
        head.untie(model_config)
    with hub_errors("model.name_or_path", config.model.name_or_path):
        model, loading = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            attn_implementation=config.model.attn_implementation,
            trust_remote_code=config.model.trust_remote_code,
            revision=config.model.revision,
            output_loading_info=True,
            device_map=device_map,
            ignore_mismatched_sizes=True,  # refuse_misfits names them
            **({"config": model_config} if own_head else {}),
            **_quantization(config, dtype),
        )
    refuse_misfits(config, loading)
    if config.strategy.quantization == "nf4" or quantised_files(model_config):
        _keep_4bit_weights_as_they_are(model)
    return model


def _quantization(config: Config, dtype: torch.dtype) -> dict[str, BitsAndBytesConfig]:
    """Return from_pretrained's argument for a quantised base; empty in full precision."""
    if config.strategy.quantization == "nf4":
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        return {"quantization_config": nf4}
    if config.strategy.quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {}


def refuse_misfits(config: Config, loading: dict[str, Any]) -> None:
    """Refuse a base whose files lack weights, or have them in other shapes: transformers would draw random
    ones at each start. loading: from_pretrained's loading info. Raises: ValueError naming the first."""
    for name, in_files, expected in sorted(loading["mismatched_keys"]):
        raise ValueError(
            f"model.name_or_path={config.model.name_or_path}: {name} is {shape(in_files)} in its files, and"
            f" {shape(expected)} by its config.json: they are of different models; download both again"
        )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"model.name_or_path={config.model.name_or_path}: its files lack {missing[0]}{and_more(missing)},"
            " which would be random numbers; download it again, or name a base that is whole"
        )


def set_up(model: Any, config: Config) -> None:
    """Prepare a base model for training, however it was loaded."""
    model.config.use_cache = False
    if config.train.gradient_checkpointing:
        # the non-reentrant kind needs no input that requires gradients, and works with DDP
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _keep_4bit_weights_as_they_are(model: torch.nn.Module) -> None:
    # on CPUs with AVX512_BF16, bitsandbytes repacks 4-bit weights in eval() and never back: training after an
    # evaluation would compute with the wrong layout
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (a plain attribute, not a Tensor)
