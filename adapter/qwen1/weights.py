"""The weights of a first-generation Qwen under Qwen2's names: rows are copied, nothing is computed.

Qwen-1 has q, k and v in one matrix, c_attn, and calls the MLP's up projection w1 and its gate w2. Its results
differ only beyond the length that it was trained on.
"""

import math
import re
from typing import Any, NamedTuple

from qwenlora.adapter.weight_files import SafetensorsWriter, TensorSpec, WeightFiles
from qwenlora.run.format import and_more
from qwenlora.run.format import shape as shape_text
from qwenlora.run.long_work import LongWork
from qwenlora.trainer.model.base_files import SLICE

OUTSIDE = {
    "transformer.wte": ("model.embed_tokens",),
    "transformer.ln_f": ("model.norm",),
    "lm_head": ("lm_head",),
}
IN_LAYER = {
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),  # a third of the rows each
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.w1": ("mlp.up_proj",),
    "mlp.w2": ("mlp.gate_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}
_LAYER = re.compile(r"transformer\.h\.(\d+)\.")
# saved, though the model can compute them: angles, masks, the factors for long texts
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.(masked_bias|bias|logn_tensor))$")


class RowBlock(NamedTuple):
    """The source of a Qwen2 tensor: block `number` of `of` equal blocks of rows of a Qwen-1 tensor."""

    name: str
    number: int
    of: int


def modules_of(name: str) -> tuple[list[str], str]:
    """Return the modules of Qwen2 that a tensor of Qwen-1 goes to, and its name in them, such as "weight".

    name: in the files, or in an adapter's without "base_model.model.". Unknown tensors get no modules.
    """
    layer = _LAYER.match(name)
    prefix = f"model.layers.{layer[1]}." if layer else ""
    rest = name[layer.end() :] if layer else name
    for old, new in (IN_LAYER if layer else OUTSIDE).items():
        if rest.startswith(f"{old}."):
            return [prefix + module for module in new], rest.removeprefix(f"{old}.")
    return [], ""


def row_blocks(layers: int) -> dict[str, RowBlock]:
    """Return {Qwen2 tensor: its source}, in the order of a pass through the model."""
    names = ["transformer.wte.weight"]
    for layer in range(layers):
        for module in IN_LAYER:
            names.append(f"transformer.h.{layer}.{module}.weight")
            if module == "attn.c_attn":
                names.append(f"transformer.h.{layer}.{module}.bias")
    blocks: dict[str, RowBlock] = {}
    for name in [*names, "transformer.ln_f.weight", "lm_head.weight"]:
        modules, kind = modules_of(name)
        blocks |= {
            f"{module}.{kind}": RowBlock(name, number, len(modules)) for number, module in enumerate(modules)
        }
    return blocks


def plan_weights(files: WeightFiles, model: Any) -> dict[str, tuple[RowBlock, TensorSpec]]:
    """Return the source, dtype and shape of each tensor of model. Raises: ValueError if one does not fit."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    blocks = row_blocks(model.config.num_hidden_layers)
    assert set(blocks) == set(shapes), set(blocks) ^ set(shapes)
    places = {name: place for name, place in files.places.items() if not _COMPUTED.search(name)}
    needed = {block.name for block in blocks.values()}
    if unknown := sorted(set(places) - needed):
        raise ValueError(
            f"the weights hold {unknown[0]}{and_more(unknown)}, which a Qwen-1 of this config.json has not"
        )
    if missing := sorted(needed - set(places)):
        raise ValueError(f"the weights lack {missing[0]}{and_more(missing)}; download the model again")
    planned = {}
    for name, block in blocks.items():
        rows, *row = shapes[name]
        dtype, shape = places[block.name].dtype, places[block.name].shape
        expected = (rows * block.of, *row)
        if shape != expected:
            raise ValueError(
                f"{block.name} is {shape_text(shape)}; its config.json says {shape_text(expected)}"
            )
        planned[name] = (block, TensorSpec(dtype, shapes[name]))
    return planned


def write_weights(
    files: WeightFiles, planned: dict[str, tuple[RowBlock, TensorSpec]], writer: SafetensorsWriter
) -> None:
    """Write the planned tensors, a slice at a time."""
    with LongWork() as progress:
        task = progress.add_task("converting", total=writer.size)
        for name, (block, spec) in planned.items():
            count = math.prod(spec.shape)
            for start in range(0, count, SLICE):
                begin, end = (block.number * count + at for at in (start, min(start + SLICE, count)))
                writer.write(name, files.read(block.name, begin, end), start)
                progress.advance(task, (end - begin) * spec.dtype.itemsize)
    writer.finish()
