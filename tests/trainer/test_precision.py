"""The dtype of a run is the fastest where it begins, and stays what it was where it goes on."""

import pytest
import torch

from qwenlora.configs.schema import Config, Data, Model
from qwenlora.trainer.model import precision
from qwenlora.trainer.model.precision import cpu_multiplies_bfloat16, resolve_dtype

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")


def config_of(dtype="auto", name="some/base") -> Config:
    return Config(run_dir="unused", model=Model(name_or_path=name, dtype=dtype), data=Data(train="unused"))


@pytest.fixture
def amx(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "ALL")


def test_a_cpu_that_multiplies_bfloat16_begins_with_it(amx):
    assert resolve_dtype(config_of(), None) == ("bfloat16", "")
    assert resolve_dtype(config_of(name="tiny"), None) == ("float32", "")


@pytest.mark.parametrize("limit", ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI"])
def test_it_does_not_where_onednn_may_not_use_it(amx, monkeypatch, limit):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert not cpu_multiplies_bfloat16()
    assert resolve_dtype(config_of(), None) == ("float32", "")


@pytest.mark.parametrize("limit", ["AVX512_CORE_AMX", "avx512_core_bf16", "AVX10_1_512_AMX"])
def test_it_does_where_onednn_may(amx, monkeypatch, limit):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert cpu_multiplies_bfloat16()


def test_other_cpus_begin_with_float32(monkeypatch):
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: False)
    assert resolve_dtype(config_of(), None) == ("float32", "")


def test_a_run_stays_what_it_was():
    told = "model.dtype=auto stays bfloat16, as the run began; a run that begins here takes float32"
    assert resolve_dtype(config_of(), "bfloat16") == ("bfloat16", told)
    assert resolve_dtype(config_of(), "float32") == ("float32", "")


def test_a_run_of_a_version_that_kept_no_dtype_stays_in_float32(amx):
    told = "model.dtype=auto stays float32, as the run began; a run that begins here takes bfloat16"
    assert resolve_dtype(config_of(), "") == ("float32", told)


def test_a_dtype_that_is_named_is_taken():
    assert resolve_dtype(config_of("bfloat16"), "float32") == ("bfloat16", "")


def test_float16_needs_a_gpu():
    with pytest.raises(ValueError, match="began in float16, on a GPU, and there is none here; resume it on"):
        resolve_dtype(config_of(), "float16")
