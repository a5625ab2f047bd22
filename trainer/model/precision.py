"""The dtype of the base's weights in a run: chosen when the run begins, and kept wherever it goes on."""

import os

import torch

from qwenlora.configs.schema import Config
from qwenlora.trainer.model.base import TINY
from qwenlora.trainer.model.loading import pick_dtype

# values of ONEDNN_MAX_CPU_ISA with which oneDNN, torch's library for CPUs, multiplies bfloat16 in hardware
WITH_BFLOAT16 = ("ALL", "DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512")


def resolve_dtype(config: Config, before: str | None) -> tuple[str, str]:
    """Return the dtype of the base's weights in this attempt, and what the user is told about it, or nothing.

    before: the dtype of the checkpoint that the run goes on from; None if it begins; empty if the checkpoint
    is of a version that did not keep it, which took float32 on every CPU. Raises: ValueError when that dtype
    needs a GPU, and there is none.
    """
    if config.model.dtype != "auto":
        return config.model.dtype, ""
    here = _of_a_new_run(config)
    dtype = here if before is None else before or str(pick_dtype("auto")).removeprefix("torch.")
    if dtype == "float16" and not torch.cuda.is_available():
        raise ValueError(
            "model.dtype=auto: the run began in float16, on a GPU, and there is none here; resume it on a"
            " GPU, or go on in bfloat16: model.dtype=bfloat16 --allow-config-change model.dtype"
        )
    if dtype == here:
        return dtype, ""
    return dtype, f"model.dtype=auto stays {dtype}, as the run began; a run that begins here takes {here}"


def _of_a_new_run(config: Config) -> str:
    """Return the fastest dtype here. The embedded model is so small that float32 is as fast."""
    if not torch.cuda.is_available() and config.model.name_or_path != TINY and cpu_multiplies_bfloat16():
        return "bfloat16"
    return str(pick_dtype("auto")).removeprefix("torch.")


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 (AMX or AVX512_BF16) that torch may use."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if limit not in WITH_BFLOAT16 and "AMX" not in limit:
        return False
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
