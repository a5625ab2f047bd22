"""The weights of a first-generation Qwen under Qwen2's names, moved tensor by tensor.

Both do the same arithmetic: Qwen-1 holds q, k and v in one matrix, c_attn, and calls the first two of the
gated MLP w1 (what passes) and w2 (the gate). Nothing is computed: rows are copied. What else Qwen-1 does, it
does past the length that it was trained on.
"""

import math
import re
import sys
from typing import Any, NamedTuple

from rich.progress import Progress

from qwenlora.adapter.weight_files import Entry, Files, MergedFiles
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
# what can be computed and was saved all the same: angles, masks, the factors for long texts
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.(masked_bias|bias|logn_tensor))$")


class Part(NamedTuple):
    """Where a tensor of Qwen2 comes from: one of several equal parts of a tensor's rows."""

    name: str
    number: int
    of: int


def modules_of(name: str) -> tuple[list[str], str]:
    """Return the modules of Qwen2 that a tensor of Qwen-1 goes to, and which one of theirs it is, such as
    "weight".

    name: as in the files, or in an adapter's without "base_model.model.". No modules: such a tensor is not
    known.
    """
    layer = _LAYER.match(name)
    prefix = f"model.layers.{layer[1]}." if layer else ""
    rest = name[layer.end() :] if layer else name
    for old, new in (IN_LAYER if layer else OUTSIDE).items():
        if rest.startswith(f"{old}."):
            return [prefix + module for module in new], rest.removeprefix(f"{old}.")
    return [], ""


def parts(layers: int) -> dict[str, Part]:
    """Return each tensor of Qwen2 and where it comes from, in the order of a pass through the model."""
    names = ["transformer.wte.weight"]
    for layer in range(layers):
        for module in IN_LAYER:
            names.append(f"transformer.h.{layer}.{module}.weight")
            if module == "attn.c_attn":
                names.append(f"transformer.h.{layer}.{module}.bias")
    found: dict[str, Part] = {}
    for name in [*names, "transformer.ln_f.weight", "lm_head.weight"]:
        modules, kind = modules_of(name)
        found |= {
            f"{module}.{kind}": Part(name, number, len(modules)) for number, module in enumerate(modules)
        }
    return found


def plan(files: Files, model: Any) -> dict[str, tuple[Part, Entry]]:
    """Return where each tensor comes from and what it will be.

    model: the Qwen2 to be, on torch's meta device. Raises: ValueError naming a tensor that is missing,
    unknown or of another size.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wanted = parts(model.config.num_hidden_layers)
    assert set(wanted) == set(shapes), set(wanted) ^ set(shapes)
    there = {name: place for name, place in files.places.items() if not _COMPUTED.search(name)}
    names = {part.name for part in wanted.values()}
    if unknown := sorted(set(there) - names):
        raise ValueError(
            f"the weights hold {unknown[0]}{_more(unknown)}, which a Qwen-1 of this config.json has not"
        )
    if missing := sorted(names - set(there)):
        raise ValueError(f"the weights lack {missing[0]}{_more(missing)}; download the model again")
    found = {}
    for name, part in wanted.items():
        rows, *row = shapes[name]
        dtype, shape = there[part.name].dtype, there[part.name].shape
        if shape != (rows * part.of, *row):
            raise ValueError(
                f"{part.name} is {_size(shape)}; its config.json says {_size((rows * part.of, *row))}"
            )
        found[name] = (part, Entry(dtype, shapes[name]))
    return found


def write(files: Files, planned: dict[str, tuple[Part, Entry]], made: MergedFiles) -> None:
    """Write the planned tensors, a slice at a time."""
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("converting", total=made.size)
        for name, (part, entry) in planned.items():
            count = math.prod(entry.shape)
            for start in range(0, count, SLICE):
                begin, end = (part.number * count + at for at in (start, min(start + SLICE, count)))
                made.write(name, files.read(part.name, begin, end), start)
                progress.advance(task, (end - begin) * entry.dtype.itemsize)
    made.finish()


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
