"""What is said of a base whose files are quantised."""

import json
import shutil
from contextlib import nullcontext

import pytest

from qwenlora.configs.schema import Config, Data, Model, Strategy
from qwenlora.trainer.model import pretrained
from qwenlora.trainer.model.quantised import check, kind_of


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (None, ""),
        ({}, ""),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"quant_method": "bitsandbytes", "_load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"quant_method": "awq", "w_bit": 4}, "awq, 4 bits"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"bits": 3}, "quantised, 3 bits"),
    ],
)
def test_how_files_are_quantised_is_said_as_their_config_has_it(settings, kind):
    assert kind_of(settings) == kind


@pytest.mark.parametrize(
    ("kind", "asked", "fits"),
    [
        ("", "int8", True),
        ("gptq, 4 bits", "none", True),
        ("bitsandbytes, 4 bits", "nf4", True),
        ("bitsandbytes, 8 bits", "int8", True),
        ("bitsandbytes, 4 bits", "int8", False),
        ("gptq, 4 bits", "nf4", False),
    ],
)
def test_nothing_is_quantised_twice(kind, asked, fits):
    strategy = Strategy(quantization=asked)
    config = Config(run_dir="r", model=Model(name_or_path="q"), data=Data(train="unused"), strategy=strategy)
    with nullcontext() if fits else pytest.raises(ValueError, match=rf"={asked}: .* set strategy\.quant"):
        check(config, kind)


def test_the_user_is_told_at_once_what_an_adapter_can_be_merged_into(tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base")
    config = Config(run_dir="unused", model=Model(name_or_path=str(base)), data=Data(train="unused"))
    assert pretrained.notes_on(config, str(base)) == []
    settings = json.loads((base / "config.json").read_text())
    how = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(settings | how))
    assert pretrained.notes_on(config, str(base)) == [
        "the base is quantised in its files (bitsandbytes, 4 bits), into which no adapter can be merged;"
        " merge into the model in full precision that they were made from: --base FOLDER_OR_HUB_NAME"
    ]
