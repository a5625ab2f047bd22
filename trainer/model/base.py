"""The base model, its tokenizer and the adapter on it.

`load_base` and `add_lora` are what a rank calls; `count_parameters` needs no weights, only a config.json.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from qwenlora.configs.schema import Config, Lora, Model
from qwenlora.data.turns import TURN_END, TURN_START
from qwenlora.run.folder import RunFolder
from qwenlora.run.records import Parameters
from qwenlora.trainer.model.tiny import build_tiny

TINY = "tiny"
IGNORED = -100  # labels without a loss: torch.nn.CrossEntropyLoss, ignore_index
EMBEDDINGS = ("embed_tokens", "lm_head")
SAMPLE_BYTES = 2**12
UNKNOWN = "None"  # what older versions took for the fingerprint of a base from the hub
# of the logits' spread: rows kept apart differ by rounding, or by int8's outlier columns; others by 0.4
LEAK = 0.02


def base_of(config: Config, run: RunFolder) -> str:
    """Return the folder or hub name of the base model; the tiny one is built in the run folder first.

    Raises: ValueError when a folder is named that is not there or holds no model.
    """
    if config.model.name_or_path == TINY:
        tokenizer = config.model.tokenizer
        build_tiny(
            run.base_model, _tokenizer(tokenizer, config.model, "model.tokenizer") if tokenizer else None
        )
        return str(run.base_model)
    return resolve(config.model.name_or_path, "model.name_or_path")


def resolve(name: str, key: str) -> str:
    """Return a model folder's absolute path, or a hub name as it is."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if key == "model.name_or_path" and not (folder / "config.json").is_file():
            raise ValueError(f"{key}={name} has no config.json; name the folder that holds the model's files")
        return str(folder.absolute())
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(
            f"{key}={name}: no such folder (looked for {folder.absolute()}); a hub name has one slash"
        )
    return name


def load_tokenizer(config: Config, base: str) -> Any:
    """Return the tokenizer, fast and with a chat template. Raises: ValueError when it is not so."""
    name = config.model.tokenizer
    if name and config.model.name_or_path != TINY:
        return _tokenizer(name, config.model, "model.tokenizer")
    return _tokenizer(base, config.model, "model.name_or_path")


def _tokenizer(name: str, config: Model, key: str) -> Any:
    with hub_errors(key, name):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve(name, key),
            trust_remote_code=config.trust_remote_code,
            revision=config.revision if key == "model.name_or_path" else None,
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{key}={name}: its tokenizer has no fast version (tokenizer.json), which masks need"
        )
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
    """Turn what transformers raises for a missing or broken model into one line."""
    try:
        yield
    except (OSError, ImportError, json.JSONDecodeError) as error:
        offline = " (offline: HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"{key}={name} cannot be loaded{offline}: {reason.rstrip('.')}; the path of a folder that holds"
            " the files will do, too"
        ) from error


def pick_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of model.dtype; auto: bfloat16 where the GPU has it, else float16, float32 on
    CPU."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def device() -> torch.device:
    """Return what this rank computes on."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def load_config_of(config: Config, base: str) -> Any:
    """Return the base model's transformers config. Raises: ValueError when transformers knows no such text
    model."""
    with hub_errors("model.name_or_path", config.model.name_or_path):
        try:
            found = AutoConfig.from_pretrained(
                base, trust_remote_code=config.model.trust_remote_code, revision=config.model.revision
            )
        except (ValueError, KeyError) as error:  # an unknown model_type
            raise ValueError(
                f"model.name_or_path={config.model.name_or_path}: {str(error).splitlines()[0]}"
            ) from error
    if found.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not config.model.trust_remote_code:
        qwens = ", ".join(
            sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name.startswith("qwen"))
        )
        raise ValueError(
            f"model.name_or_path={config.model.name_or_path} is of type {found.model_type}, which this"
            f" transformers has no text model for; it has {qwens}"
        )
    return found


def fingerprint(config: Config, base: str) -> str:
    """Return a hash that changes when the base's weights do: a hub commit, or samples of a folder's weight
    files.

    Of each tensor in a safetensors file three samples are hashed, of another weight file 64: a 72B takes
    seconds.
    """
    if not Path(base).is_dir():
        with hub_errors("model.name_or_path", config.model.name_or_path):
            held = cached_file(base, CONFIG_NAME, revision=config.model.revision)
        # as the hub's cache names it; a cache of another kind: the one file that is known
        return extract_commit_hash(held, None) or hashlib.sha256(Path(held).read_bytes()).hexdigest()[:16]
    digest = hashlib.sha256((Path(base) / "config.json").read_bytes())
    for path in sorted(
        file for file in Path(base).iterdir() if file.suffix in (".safetensors", ".bin", ".pt", ".pth")
    ):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in (
                _samples(file, size) if path.suffix == ".safetensors" else range(0, size, max(size // 64, 1))
            ):
                file.seek(place)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _samples(file: BinaryIO, size: int) -> Iterator[int]:
    """Yield places in a safetensors file: its header's, and start, middle and end of each tensor."""
    header = int.from_bytes(file.read(8), "little")
    yield from range(0, min(header + 8, size), SAMPLE_BYTES)
    file.seek(8)
    try:
        tensors = json.loads(file.read(header)) if header < size else {}
    except ValueError:  # loading it will say so
        return
    tensors.pop("__metadata__", None)
    for tensor in tensors.values():
        start, end = (8 + header + offset for offset in tensor["data_offsets"])
        yield from (start, (start + end) // 2, max(start, end - SAMPLE_BYTES))


def load_base(config: Config, base: str) -> Any:
    """Return the base model in its dtype, or quantised as the config says, whole on this rank's device."""
    arguments: dict[str, Any] = {}
    dtype = pick_dtype(config.model.dtype)
    if config.strategy.quantization == "nf4":
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif config.strategy.quantization == "int8":
        arguments["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if torch.cuda.is_available():  # straight to this rank's GPU, not by way of host memory
        arguments["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    with hub_errors("model.name_or_path", config.model.name_or_path):
        model, loading = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            attn_implementation=config.model.attn_implementation,
            trust_remote_code=config.model.trust_remote_code,
            revision=config.model.revision,
            output_loading_info=True,
            **arguments,
        )
    refuse_missing(config, loading)
    if config.strategy.quantization == "nf4":
        _keep_4bit_weights_as_they_are(model)
    return model


def refuse_missing(config: Config, loading: dict[str, Any]) -> None:
    """Refuse a base whose files lack weights: transformers would draw them, each time others. Raises:
    ValueError.

    loading: what from_pretrained says of it.
    """
    if missing := sorted(loading["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"model.name_or_path={config.model.name_or_path}: its files lack {missing[0]}{more}, which would"
            " be random numbers; download it again, or name a base that is whole"
        )


def set_up(model: Any, config: Config) -> None:
    """Make a base model ready to be trained, however it was loaded."""
    model.config.use_cache = False
    if config.train.gradient_checkpointing:
        # the non-reentrant kind needs no input that requires gradients, and DDP is at ease with it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _keep_4bit_weights_as_they_are(model: torch.nn.Module) -> None:
    # on CPUs with AVX512_BF16, bitsandbytes repacks a 4-bit weight for good in eval(): training after is then
    # wrong
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (a plain attribute, not a Tensor)


def lora_config(lora: Lora, tied: bool) -> LoraConfig:
    """Return peft's config. tied: whether the base's embeddings and head are one matrix."""
    saved = list(dict.fromkeys(lora.modules_to_save or ()))
    if tied and any(name in EMBEDDINGS for name in saved):
        # naming either trains the one matrix; peft then ties the head's copy to the embeddings' again
        saved = [name for name in saved if name not in EMBEDDINGS] + ["embed_tokens"]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        target_parameters=lora.target_parameters,
        modules_to_save=saved or None,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        ensure_weight_tying=tied and "embed_tokens" in saved,
    )


def add_lora(model: Any, lora: Lora, revision: str | None = None) -> Any:
    """Return the model with its adapter, the only trainable part, in float32.

    revision: of a base from the hub; adapter_config.json keeps it, so that peft loads the same one later.
    Raises: ValueError when the modules named are not there, or lora.init_from does not fit.
    """
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    _check_names("modules_to_save", lora.modules_to_save, [name for name, _ in model.named_modules()])
    _check_names("target_parameters", lora.target_parameters, [name for name, _ in model.named_parameters()])
    try:
        peft_model = get_peft_model(model, lora_config(lora, tied), revision=revision)
    except ValueError as error:  # peft names the modules it did not find
        raise ValueError(
            f"lora.target_modules={lora.target_modules}: {str(error).splitlines()[0]}"
        ) from error
    for parameter in peft_model.parameters():
        if (
            parameter.requires_grad
        ):  # peft leaves modules_to_save in the base's dtype, too coarse for Adam's small steps
            parameter.data = parameter.data.float()
    if lora.init_from:
        _load_adapter(peft_model, lora)
    return peft_model


def _check_names(key: str, wanted: list[str] | None, there: list[str]) -> None:
    """Refuse a name that peft would pass over without a word."""
    for name in wanted or ():
        if not any(full == name or full.endswith(f".{name}") for full in there):
            last = sorted({full.rpartition(".")[2] for full in there} - {""})
            raise ValueError(
                f"lora.{key}: the model has no {name}; names in it end in {', '.join(last[:40])}"
            )


def _load_adapter(model: PeftModel, lora: Lora) -> None:
    folder = Path(lora.init_from or "").expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"lora.init_from={lora.init_from} is no adapter folder: it has no adapter_config.json"
        )
    theirs = json.loads((folder / "adapter_config.json").read_text())
    for key in ("r", "lora_alpha", "use_rslora", "use_dora"):
        if theirs.get(key, getattr(lora, key)) != getattr(lora, key):
            raise ValueError(
                f"lora.init_from={lora.init_from} has {key}={theirs[key]}, the config says"
                f" {getattr(lora, key)}; set lora.{key}: {theirs[key]}"
            )
    for key in ("rank_pattern", "alpha_pattern"):
        if theirs.get(key):
            raise ValueError(f"lora.init_from={lora.init_from} has a {key}, which qwenlora has no key for")
    weights = load_peft_weights(str(folder), device="cpu")
    try:
        result = set_peft_model_state_dict(model, weights)
    except KeyError as error:  # a whole module
        raise ValueError(
            f"lora.init_from={lora.init_from} does not fit lora.modules_to_save={lora.modules_to_save}: the"
            f" adapter lacks {error.args[0]}"
        ) from error
    except RuntimeError as error:  # shapes
        raise ValueError(
            f"lora.init_from={lora.init_from} does not fit: {str(error).splitlines()[-1]}"
        ) from error
    missing = [name for name in result.missing_keys if "lora_" in name or "modules_to_save" in name]
    if missing or result.unexpected_keys:
        name = (missing or result.unexpected_keys)[0]
        raise ValueError(
            f"lora.init_from={lora.init_from} does not fit lora.target_modules={lora.target_modules}:"
            f" {'the adapter lacks' if missing else 'the model lacks'} {name}"
        )


def check_isolation(model: Any) -> None:
    """Refuse to pack rows where attention lets one see another: some kernels and versions do, without a word.

    Two rows are packed; the first is changed, and the second must not notice. Raises: ValueError when it
    does.
    """
    width, count = 16, int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(count, 1000), (3, width), generator=generator)
    positions = torch.arange(width).repeat(2).unsqueeze(0).to(model.device)
    was_training = model.training
    model.eval()
    seen = []
    with torch.no_grad():
        for first in (0, 1):
            pack = torch.cat([ids[first], ids[2]]).unsqueeze(0).to(model.device)
            seen.append(
                model(input_ids=pack, position_ids=positions, use_cache=False).logits[0, width:].float()
            )
    model.train(was_training)
    noticed, scale = (seen[0] - seen[1]).abs().max().item(), seen[0].std().item()
    if not noticed <= LEAK * scale:
        raise ValueError(
            "packed rows would see each other: with"
            f" model.attn_implementation={model.config._attn_implementation} and this model, changing one row"
            f" moves the next one's logits by {noticed:.2g} (their spread: {scale:.2g}); set data.packing:"
            " off, or model.attn_implementation: sdpa"
        )


def count_parameters(config: Config, base: str) -> Parameters:
    """Return the run's parameter counts without loading a weight (on torch's meta device)."""
    model_config = load_config_of(config, base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            model_config, trust_remote_code=config.model.trust_remote_code, dtype=torch.float32
        )
        total = sum(p.numel() for p in model.parameters())
        head = model.get_output_embeddings().weight
        embeddings = model.get_input_embeddings().weight
        body = total - embeddings.numel() - (0 if head is embeddings else head.numel())
        lora = config.lora.model_copy(update={"init_from": None})
        trainable = sum(p.numel() for p in add_lora(model, lora).parameters() if p.requires_grad)
    text = model_config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Parameters(
        total=total,
        trainable=trainable,
        body=body,
        head=head.numel(),
        layers=text.num_hidden_layers,
        attention_width=text.num_attention_heads * head_dim,
        hidden_size=text.hidden_size,
        intermediate_size=_intermediate_size(text),
        kv_width=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_dim,
    )


def _intermediate_size(text: Any) -> int:
    """Return the numbers between an MLP's matrices that a token passes; with experts, of all that it
    meets."""
    experts = getattr(text, "num_experts_per_tok", None)
    if not experts:
        return int(text.intermediate_size)
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    return int(experts * text.moe_intermediate_size + shared)


def whole(weight: Tensor) -> Tensor:
    """Return a weight of the base as one tensor; where it is in parts, all ranks call it."""
    if isinstance(weight, DTensor):
        gathered: Tensor = DTensor.full_tensor(weight).detach()
        return gathered
    if hasattr(weight, "ds_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight.detach()


def untrained_turn_tokens(model: Any, tokenizer: Any) -> list[str]:
    """Return those of <|im_start|> and <|im_end|> whose embeddings the base model never learnt.

    Rows past the tokenizer's last id were never trained: they lie close together. A turn token among them was
    not either. Empty when there are no such rows, or they are as scattered as words are (random weights).
    """
    weight = whole(model.get_input_embeddings().weight)
    unused = weight[len(tokenizer) :].float()
    if len(unused) < 8:
        return []
    centre = unused.mean(0)
    spread = (unused - centre).norm(dim=-1).max()
    words = weight[torch.linspace(0, len(tokenizer) - 1, 1000, device=weight.device).long()].float()
    typical = (words - centre).norm(dim=-1).median()
    if spread > typical / 2:
        return []
    tokens = [TURN_START, TURN_END]
    rows = weight[
        torch.tensor([tokenizer.convert_tokens_to_ids(t) for t in tokens], device=weight.device)
    ].float()
    near = (rows - centre).norm(dim=-1) <= 2 * spread + 1e-6 * typical
    return [token for token, untrained in zip(tokens, near.tolist(), strict=True) if untrained]
