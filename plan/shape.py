"""The tensors of a base, from its config.json alone: for each family of Qwens what transformers would make.

tests/plan/test_counts.py compares with transformers' models.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from qwenlora.data.chunks import JsonObject
from qwenlora.plan.flops import COUNTS_OF_EXPERTS, FULL, SLIDING

LINEAR = "linear_attention"
MIXTURES = ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text")
HYBRIDS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
FAMILIES = ("qwen2", "qwen3", *MIXTURES[:2], *HYBRIDS)
# {type in the layout of a vision model: the family whose layers its text part has}
WITH_VISION = {
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
_LACKS = "it has no {}, and what transformers takes then fits no Qwen that was published"
GATED_ATTENTION = 4  # a hybrid's every fourth layer has attention, unless its config says which


class Shape(BaseModel):
    """A base's config.json as far as it gives tensors their shapes, by transformers' names. What a file may
    leave out is filled in as transformers does. model_type: one of FAMILIES; with_vision: whether it is in
    the layout of a vision model, of which the text part alone is trained."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_type: str
    with_vision: bool = False
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: int = 0
    head_dim: int = 0
    intermediate_size: int = 0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qkv_bias: bool = True
    layer_types: list[str] = []
    full_attention_interval: PositiveInt = GATED_ATTENTION
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 28
    num_experts: int = Field(0, validation_alias=AliasChoices(*COUNTS_OF_EXPERTS))
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    decoder_sparse_step: PositiveInt = 1
    mlp_only_layers: list[int] = []
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, values: Any) -> Any:
        if "num_key_value_heads" not in values:
            raise ValueError(_LACKS.format("num_key_value_heads"))
        return {key: value for key, value in values.items() if value is not None}

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        heads, windowed = self.num_attention_heads, self.use_sliding_window and self.sliding_window
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"it has {len(self.layer_types)} layer_types and num_hidden_layers={self.num_hidden_layers}"
            )
        if unknown := set(self.layer_types) - {FULL, SLIDING, LINEAR}:
            raise ValueError(f"layer_types: expected {FULL}, {SLIDING} or {LINEAR}, not {min(unknown)}")
        wide = {"qwen3": 128} | dict.fromkeys(HYBRIDS, 256)
        known = {
            "num_key_value_heads": self.num_key_value_heads or heads,
            "head_dim": self.head_dim or wide.get(self.model_type, self.hidden_size // heads),
            "layer_types": self.layer_types or [self._kind(layer) for layer in range(self.num_hidden_layers)],
            "sliding_window": self.sliding_window if windowed else None,
        }
        for name, value in known.items():
            object.__setattr__(self, name, value)  # a validator of a frozen model
        if lacking := [name for name in self._widths() if not getattr(self, name)]:
            raise ValueError(_LACKS.format(lacking[0]))
        return self

    def _widths(self) -> Iterator[str]:
        """Yield the keys that the layers' MLPs and experts need."""
        mixed = [self.has_experts(layer) for layer in range(self.num_hidden_layers)]
        if self.model_type in MIXTURES:
            yield "num_experts"
        if any(mixed):
            yield from ("num_experts_per_tok", "moe_intermediate_size")
            if self.model_type != "qwen3_moe":
                yield "shared_expert_intermediate_size"
        if not all(mixed):
            yield "intermediate_size"

    def _kind(self, layer: int) -> str:
        """Return what transformers takes a layer for whose kind the file does not say."""
        if self.model_type in HYBRIDS:
            return LINEAR if (layer + 1) % self.full_attention_interval else FULL
        has_window = {
            "qwen2_moe": layer % 2 == 0 and layer < self.max_window_layers,
            "qwen3_moe": True,
        }.get(self.model_type, layer >= self.max_window_layers)
        return SLIDING if self.use_sliding_window and self.sliding_window and has_window else FULL

    def has_experts(self, layer: int) -> bool:
        """Whether the layer's MLP is a mixture of experts."""
        if self.model_type == "qwen3_5_moe_text":  # its class knows no dense layers
            return True
        sparse = (layer + 1) % self.decoder_sparse_step == 0 and layer not in self.mlp_only_layers
        return self.model_type in MIXTURES and self.num_experts > 0 and sparse


class Tensor(NamedTuple):
    """A layer's numbers. name: of the module, or of the parameter that holds a matrix of each expert;
    experts: how many; linear: an nn.Linear; others: numbers beside the matrix (biases, norms); tied: the
    matrix is the embeddings'."""

    name: str
    outputs: int
    inputs: int
    experts: int = 1
    linear: bool = True
    others: int = 0
    tied: bool = False

    @property
    def matrix(self) -> int:
        """Numbers of the matrix, or of all experts' matrices."""
        return self.experts * self.outputs * self.inputs

    @property
    def total(self) -> int:
        """All numbers of its own."""
        return self.others + (0 if self.tied else self.matrix)


def read_values(folder: Path) -> JsonObject:
    """Return the values of a folder's config.json. Raises: ValueError when it cannot be read."""
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected an object with model_type, hidden_size and so on")
    return values


def shape_of(values: JsonObject, where: str) -> Shape:
    """Return the shape of a base's text, by its config.json. where: for messages. Raises: ValueError when it
    is damaged, of a family that is not known, or says that the base's files are quantised."""
    kind = values.get("model_type")
    if kind not in (*FAMILIES, *WITH_VISION):
        raise ValueError(
            f"{where}: model_type={kind} is no family that a plan knows; expected one of"
            f" {', '.join((*FAMILIES, *WITH_VISION))}"
        )
    if not isinstance(values.get("text_config") or {}, dict):
        raise ValueError(f"{where}: text_config={values['text_config']}, expected an object")
    if values.get("quantization_config"):
        raise ValueError(
            f"{where}: its files are quantised (quantization_config), which a plan does not know; name the"
            " model in 16 bits that they were made from, with strategy.quantization: nf4 for about 4 bits"
        )
    try:
        return Shape.model_validate(_of_text(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {key}: {said}" if key else f"{where}: {said}") from None


def _of_text(values: JsonObject) -> JsonObject:
    """Return the values of the text part, its model_type one of FAMILIES."""
    if values["model_type"] not in WITH_VISION:
        return values
    text: Any = values.get("text_config") or values  # Qwen2.5-VL's own files have all in one
    # the whole model says whether embeddings and head are one; files of transformers 4 say it in their text
    tied = bool(values.get("tie_word_embeddings"))
    if values["model_type"] == "qwen2_5_vl":
        tied = tied or bool(text.get("tie_word_embeddings"))
    of_text = {"model_type": WITH_VISION[values["model_type"]], "with_vision": True}
    return {**text, **of_text, "tie_word_embeddings": tied}


def tensors(shape: Shape) -> Iterator[Tensor]:
    """Yield all tensors of a base, embeddings first, the head last."""
    hidden, text = shape.hidden_size, "model.language_model" if shape.with_vision else "model"
    yield Tensor(f"{text}.embed_tokens", shape.vocab_size, hidden, linear=False)
    for number, kind in enumerate(shape.layer_types):
        at = f"{text}.layers.{number}"
        yield from _linear_attention(shape, at) if kind == LINEAR else _attention(shape, at)
        if shape.has_experts(number):
            yield from _mixture(shape, f"{at}.mlp")
        else:
            yield from _mlp(f"{at}.mlp", hidden, shape.intermediate_size)
        yield Tensor(f"{at}.input_layernorm", 0, 0, linear=False, others=hidden)
        yield Tensor(f"{at}.post_attention_layernorm", 0, 0, linear=False, others=hidden)
    yield Tensor(f"{text}.norm", 0, 0, linear=False, others=hidden)
    yield Tensor("lm_head", shape.vocab_size, hidden, tied=shape.tie_word_embeddings)


def _attention(shape: Shape, at: str) -> Iterator[Tensor]:
    at, hidden = f"{at}.self_attn", shape.hidden_size
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    qkv_bias = {"qwen2": True, "qwen2_moe": shape.qkv_bias}.get(shape.model_type, shape.attention_bias)
    o_bias = qkv_bias and shape.model_type not in ("qwen2", "qwen2_moe")
    gated = 2 if shape.model_type in HYBRIDS else 1  # the output's gate comes with the queries
    yield Tensor(f"{at}.q_proj", gated * queries, hidden, others=gated * queries * qkv_bias)
    yield Tensor(f"{at}.k_proj", keys, hidden, others=keys * qkv_bias)
    yield Tensor(f"{at}.v_proj", keys, hidden, others=keys * qkv_bias)
    yield Tensor(f"{at}.o_proj", hidden, queries, others=hidden * o_bias)
    if shape.model_type not in ("qwen2", "qwen2_moe"):
        for norm in ("q_norm", "k_norm"):
            yield Tensor(f"{at}.{norm}", 0, 0, linear=False, others=shape.head_dim)


def _linear_attention(shape: Shape, at: str) -> Iterator[Tensor]:
    at, hidden = f"{at}.linear_attn", shape.hidden_size
    heads = shape.linear_num_value_heads
    keys = shape.linear_num_key_heads * shape.linear_key_head_dim
    values = heads * shape.linear_value_head_dim
    mixed = 2 * keys + values
    if shape.model_type == "qwen3_next":
        yield Tensor(f"{at}.in_proj_qkvz", mixed + values, hidden)
        yield Tensor(f"{at}.in_proj_ba", 2 * heads, hidden)
    else:
        yield Tensor(f"{at}.in_proj_qkv", mixed, hidden)
        yield Tensor(f"{at}.in_proj_z", values, hidden)
        yield Tensor(f"{at}.in_proj_b", heads, hidden)
        yield Tensor(f"{at}.in_proj_a", heads, hidden)
    yield Tensor(f"{at}.conv1d", mixed, shape.linear_conv_kernel_dim, linear=False)
    yield Tensor(at, 0, 0, linear=False, others=2 * heads)  # A_log, dt_bias
    yield Tensor(f"{at}.norm", 0, 0, linear=False, others=shape.linear_value_head_dim)
    yield Tensor(f"{at}.out_proj", hidden, values)


def _mlp(at: str, hidden: int, width: int) -> Iterator[Tensor]:
    yield Tensor(f"{at}.gate_proj", width, hidden)
    yield Tensor(f"{at}.up_proj", width, hidden)
    yield Tensor(f"{at}.down_proj", hidden, width)


def _mixture(shape: Shape, at: str) -> Iterator[Tensor]:
    hidden, width, experts = shape.hidden_size, shape.moe_intermediate_size, shape.num_experts
    yield Tensor(f"{at}.gate", experts, hidden, linear=False)
    yield Tensor(f"{at}.experts.gate_up_proj", 2 * width, hidden, experts, linear=False)
    yield Tensor(f"{at}.experts.down_proj", hidden, width, experts, linear=False)
    if shape.model_type != "qwen3_moe":
        yield from _mlp(f"{at}.shared_expert", hidden, shape.shared_expert_intermediate_size)
        yield Tensor(f"{at}.shared_expert_gate", 1, hidden)
