"""The ordinary case: plain LoRA on the projections of a dense Qwen2 or Qwen3, known from its two JSON files.
verify answers it without transformers and peft, which take seconds to import; they decide about others."""

from contextlib import suppress
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from qwenlora.adapter.subject import MODEL, AdapterConfig, Subject
from qwenlora.trainer.model import head
from qwenlora.trainer.model.base import hub_errors
from qwenlora.trainer.model.damage import Keys, read_json
from qwenlora.trainer.model.headers import CONFIG, find_file

# keys that mean nothing where all others that are not below are empty
NO_MATTER = (
    *("base_model_name_or_path", "revision", "peft_type", "peft_version", "inference_mode", "use_rslora"),
    *("megatron_core", "qalora_group_size"),
)
UNUSUAL = ("quantization_config", "auto_map", "text_config", "pruned_heads")  # keys of config.json
Shapes = dict[str, tuple[int, ...]]


class PlainLora(BaseModel):
    """adapter_config.json of LoRA with nothing added to it."""

    model_config = ConfigDict(strict=True, extra="allow")

    task_type: Literal["CAUSAL_LM"]
    r: PositiveInt
    lora_alpha: float
    lora_dropout: Annotated[float, Field(ge=0, le=1)]
    bias: Literal["none"]
    init_lora_weights: Literal[True] = True
    target_modules: Annotated[
        list[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]],
        Field(min_length=1),
    ]


class DenseQwen(BaseModel):
    """config.json of a dense Qwen2 or Qwen3, which says all sizes: none is transformers' default."""

    model_config = ConfigDict(strict=True)

    model_type: Literal["qwen2", "qwen3"]
    architectures: Annotated[list[str], Field(min_length=1)]
    tie_word_embeddings: bool
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt

    def projections(self) -> dict[str, tuple[int, int]]:
        """Return (out, in) features of each linear module of a layer, by its name in it."""
        width, inner = self.hidden_size, self.intermediate_size
        wide, narrow = (n * self.head_dim for n in (self.num_attention_heads, self.num_key_value_heads))
        return {
            "self_attn.q_proj": (wide, width),
            "self_attn.k_proj": (narrow, width),
            "self_attn.v_proj": (narrow, width),
            "self_attn.o_proj": (width, wide),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }


class OrdinaryBase(NamedTuple):
    """A dense base, and what the user is told about it."""

    config: DenseQwen
    notes: list[str]


def ordinary_base(subject: Subject) -> OrdinaryBase | None:
    """Return what config.json says of a subject's base; None where transformers should read it."""
    keys: Keys = {}
    model = subject.config.model
    with suppress(ValueError), hub_errors(MODEL, model.name_or_path):  # transformers says what is wrong
        file = find_file(subject.base, CONFIG, revision=model.revision)
        keys = read_json(file) if file else {}
    if any(keys.get(name) for name in UNUSUAL):
        return None
    with suppress(TypeError, ZeroDivisionError, KeyError):  # the default of Qwen2
        if keys["model_type"] == "qwen2" and not keys["hidden_size"] % keys["num_attention_heads"]:
            keys.setdefault("head_dim", keys["hidden_size"] // keys["num_attention_heads"])
    try:
        config = DenseQwen.model_validate(keys)
    except ValidationError:
        return None
    with hub_errors(MODEL, model.name_or_path):
        untied = config.tie_word_embeddings and head.has_own_head(subject.base, model.revision)
    return OrdinaryBase(config, [head.NOTE] * untied)


def ordinary_shapes(adapter: AdapterConfig, base: DenseQwen) -> Shapes | None:
    """Return the tensors of an adapter as peft makes them: {name: shape}; None where peft should decide."""
    try:
        lora = PlainLora.model_validate(adapter)
    except ValidationError:
        return None
    if any(value for key, value in (lora.model_extra or {}).items() if key not in NO_MATTER):
        return None
    found: Shapes = {}
    for layer in range(base.num_hidden_layers):
        for module, (out, into) in base.projections().items():
            if module.partition(".")[2] in lora.target_modules:
                name = f"base_model.model.model.layers.{layer}.{module}"
                found |= {f"{name}.lora_A.weight": (lora.r, into), f"{name}.lora_B.weight": (out, lora.r)}
    return found
