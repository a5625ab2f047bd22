"""Where config.json has embeddings and head tied, and files hold a head of their own, the files decide."""

import pytest
import torch
from parts import config_of, make_base, tensors_in, untie
from safetensors.torch import save_file

from qwenlora.trainer.model import head, loading, pretrained
from qwenlora.trainer.model.lora import add_lora, count_parameters
from qwenlora.trainer.spread.sharded_loading import skeleton

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def tied(tmp_path):
    return make_base(tmp_path / "base", "qwen2")


def test_every_strategy_and_command_takes_the_files_word(tied):
    untie(tied)
    config, base = config_of(tied), str(tied)
    assert not pretrained.load_config_of(config, base).tie_word_embeddings
    (note,) = pretrained.notes_on(config, base)
    assert "a head of their own, which is used" in note
    empty = skeleton(config, base)  # fsdp, zero3
    assert empty.lm_head.weight is not empty.model.embed_tokens.weight
    model = add_lora(loading.load_base(config, base), config.lora)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.get_output_embeddings().weight, tensors_in(tied)[HEAD])
    model.get_base_model().tie_weights()  # as other code may do
    assert torch.equal(model.get_output_embeddings().weight, tensors_in(tied)[HEAD])
    assert count_parameters(config, base).total == sum(
        values.numel() for name, values in model.named_parameters() if "lora_" not in name
    )


@pytest.mark.parametrize("place", [0, -1])
def test_a_single_number_makes_a_head_of_its_own(tied, place):
    held = tensors_in(tied)
    for changed in (False, True):
        other = held[EMBEDDINGS].clone()
        other.view(-1)[place] += changed
        for file in tied.glob("*.safetensors*"):
            file.unlink()
        save_file(held | {HEAD: other}, tied / "model.safetensors", {"format": "pt"})
        head.has_own_head.cache_clear()
        assert head.has_own_head(str(tied)) is changed
        assert pretrained.load_config_of(config_of(tied), str(tied)).tie_word_embeddings is not changed


def test_files_without_a_head_are_tied(tied):
    assert not head.has_own_head(str(tied))
    assert pretrained.notes_on(config_of(tied), str(tied)) == []
