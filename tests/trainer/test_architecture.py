"""Bases in the layout of a vision model: their text part is trained, and an adapter has the names that peft
on transformers' full class and vLLM look for."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from made import (
    WITH_VISION,
    config_of,
    make_with_vision,
    plain_loss_and_gradients,
    side_of,
    trainer_of,
)
from parts import read_in_two
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from qwenlora.configs.schema import Config, Data, Lora, Model
from qwenlora.trainer.loop.state import restore_adapter, state_by_parameter
from qwenlora.trainer.model import loading, pretrained
from qwenlora.trainer.model.base_files import BaseFiles
from qwenlora.trainer.model.checks import check_isolation
from qwenlora.trainer.model.fused import fuse
from qwenlora.trainer.model.lora import add_lora, count_parameters
from qwenlora.trainer.model.row_attention import attend_row_by_row
from qwenlora.trainer.model.row_states import keep_states_apart
from qwenlora.trainer.spread.sharded_loading import skeleton, weights_of

IDS = torch.arange(300, 324).reshape(2, 12)
OF_EACH = torch.arange(12).expand(2, -1)
TEXT_CLASSES = ("qwen3_5", "qwen3_5_moe")  # that transformers has a text class of, too
# {beginning of a name: what vLLM has in its place}, for Qwen3-VL and Qwen3.5; it passes over names that are
# no modules of its model then. Source: hf_to_vllm_mapper in model_executor/models/qwen3_vl.py
VLLM_S = {
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",
    "model.language_model.": "language_model.model.",
}


@pytest.fixture(scope="module", params=WITH_VISION)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    return {kind: make_with_vision(folder / kind, kind) for kind in WITH_VISION}


@pytest.fixture
def base(folders, kind):
    return folders[kind]


def text_part(base):
    config = Config(run_dir="x", model=Model(name_or_path=str(base), dtype="float32"), data=Data(train="x"))
    return loading.load_base(config, str(base))


def whole(base):
    return AutoModelForImageTextToText.from_pretrained(base).eval()


def learnt(model, seed=1):
    """Return the model with an adapter that changes something."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return model.eval()


def logits(model, **how):
    with torch.no_grad():
        return model(input_ids=IDS, **how).logits


def saved(model, folder):
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def names_of(adapter):
    return set(load_file(adapter / "adapter_model.safetensors"))


def as_vllm_knows(name):
    name = name.removeprefix("base_model.model.")
    prefix = next((prefix for prefix in VLLM_S if name.startswith(prefix)), "")
    return VLLM_S.get(prefix, "") + name.removeprefix(prefix)


def ignored_by_vllm(adapter):
    return {name for name in names_of(adapter) if not as_vllm_knows(name).startswith("language_model.")}


def test_an_adapter_changes_transformers_full_class_as_it_was_trained(base, tmp_path):
    model = learnt(add_lora(text_part(base), Lora(r=4)))
    adapter = saved(model, tmp_path / "a")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        full = PeftModel.from_pretrained(whole(base), adapter)
    assert not [str(one.message) for one in said if "adapter" in str(one.message)]
    ours, theirs = logits(model), logits(full)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (theirs - logits(whole(base))).abs().max() > 0.1
    assert not ignored_by_vllm(adapter)
    assert not any("visual" in name for name, p in full.named_parameters() if "lora_" in name)


def test_the_vision_part_is_not_loaded_and_not_counted(base):
    model = text_part(base)
    assert not hasattr(model.model, "visual")
    counted = count_parameters(
        Config(run_dir="x", model=Model(name_or_path=str(base)), data=Data(train="x"), lora=Lora(r=4)),
        str(base),
    )
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.total < sum(p.numel() for p in whole(base).parameters())
    trained = sum(p.numel() for p in add_lora(model, Lora(r=4)).parameters() if p.requires_grad)
    assert counted.trainable == trained


def test_losses_and_gradients_are_those_of_rows_in_peft_on_the_full_class(base, tmp_path):
    """Packed and not: positions of text are one number for time, height and width."""
    adapter = saved(learnt(add_lora(text_part(base), Lora(r=4))), tmp_path / "a")
    full = PeftModel.from_pretrained(whole(base), adapter, is_trainable=True)
    ours = text_part(base)
    attend_row_by_row(ours, states_apart=keep_states_apart(ours))
    ours = add_lora(ours, Lora(r=4, init_from=str(adapter))).eval()
    fuse(ours)
    check_isolation(ours)
    losses = torch.stack([full(input_ids=ids[None], labels=ids[None]).loss for ids in IDS])
    losses.sum().backward()
    packed = {"input_ids": IDS.reshape(1, -1), "position_ids": OF_EACH.reshape(1, -1)}
    for batch in ({"input_ids": IDS, "position_ids": OF_EACH}, packed):
        of_tokens = torch.nn.functional.cross_entropy(
            ours(**batch, use_cache=False).logits.reshape(2, 12, -1)[:, :-1].flatten(0, 1),
            IDS[:, 1:].flatten(),
            reduction="none",
        )
        mine = of_tokens.reshape(2, -1).mean(1)
        assert torch.allclose(mine, losses, atol=1e-5)
        ours.zero_grad()
        mine.sum().backward()
        gradients = {name: p.grad for name, p in full.named_parameters() if p.grad is not None}
        assert len(gradients) == sum(p.requires_grad for p in ours.parameters())
        for name, p in ours.named_parameters():
            if p.requires_grad:
                assert torch.allclose(p.grad, gradients[name], atol=1e-5), name


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl_moe"])
def test_a_steps_loss_is_that_of_its_rows_in_the_full_class_however_it_is_cut(tiny, tmp_path, kind):
    base, side = make_with_vision(tmp_path / "base", kind, tiny), side_of(8)
    config = config_of(per_device_train_batch_size=2, max_steps=1)
    made = trainer_of(base, tmp_path / "run", side, config)
    made.train()
    loss, _ = plain_loss_and_gradients(whole(base), side, range(8))
    assert made.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-5)


def test_rows_would_see_each_other_without_four_positions(folders):
    model = text_part(folders["qwen2_5_vl"])
    check_isolation(model)
    model.model.language_model._forward_pre_hooks.clear()
    with pytest.raises(ValueError, match="packed rows would see each other"):
        check_isolation(model)


def test_an_adapter_of_the_full_class_is_gone_on_from(base, tmp_path):
    lora = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    theirs = learnt(get_peft_model(whole(base), lora))
    adapter = saved(theirs, tmp_path / "a")
    ours = add_lora(
        text_part(base), Lora(r=4, target_modules=["q_proj", "v_proj"], init_from=str(adapter))
    ).eval()
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)


@pytest.mark.parametrize("all_zero", [True, False])
def test_lora_on_the_vision_part_is_left_out_where_it_changes_nothing_and_refused_elsewhere(
    folders, tmp_path, all_zero
):
    base, modules = folders["qwen3_vl"], ["q_proj", "qkv"]  # qkv is the vision part's
    theirs = get_peft_model(whole(base), LoraConfig(r=4, lora_alpha=32, target_modules=modules))
    learnt(theirs.model.model.language_model if all_zero else theirs)
    adapter = saved(theirs, tmp_path / "a")
    lora = Lora(r=4, target_modules=["q_proj"], init_from=str(adapter))
    if all_zero:
        assert torch.allclose(logits(add_lora(text_part(base), lora).eval()), logits(theirs), atol=1e-5)
        return
    with pytest.raises(
        ValueError, match=r"changes the vision part \(.*visual.*\), which is not trained here"
    ):
        add_lora(text_part(base), lora)


@pytest.mark.parametrize(
    "how", [{}, {"layers_to_transform": [0]}, {"modules_to_save": ["embed_tokens"]}], ids=str
)
@pytest.mark.parametrize("kind", TEXT_CLASSES)
def test_adapters_with_names_of_the_text_class_are_gone_on_from(folders, tmp_path, kind, how):
    base = folders[kind]
    older = learnt(add_lora(AutoModelForCausalLM.from_pretrained(base), Lora(r=4, **how)))
    adapter = saved(older, tmp_path / "a")
    assert ignored_by_vllm(adapter) == names_of(adapter)
    lora = Lora(r=4, init_from=str(adapter), **how)
    assert torch.allclose(logits(add_lora(text_part(base), lora).eval()), logits(older), atol=1e-5)
    resumed = add_lora(text_part(base), Lora(r=4, **how), saved=adapter)
    restore_adapter(resumed, (adapter / "adapter_model.safetensors").read_bytes(), adapter)
    assert torch.allclose(logits(resumed.eval()), logits(older), atol=1e-5)
    states = {f"{name}/exp_avg": p for name, p in older.named_parameters() if p.requires_grad}
    save_file(states, tmp_path / "optimizer.safetensors")
    names = set(state_by_parameter(resumed, (tmp_path / "optimizer.safetensors").read_bytes()))
    assert names == {name for name, p in resumed.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", TEXT_CLASSES)
def test_peft_on_the_text_class_reads_an_adapter_by_the_mapping_of_the_docs(folders, tmp_path, kind):
    adapter = saved(model := learnt(add_lora(text_part(folders[kind]), Lora(r=4))), tmp_path / "a")
    text = AutoModelForCausalLM.from_pretrained(folders[kind])
    mapping = {r"^model\.language_model\.": "model."}
    assert json.dumps(mapping) in (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    in_text = PeftModel.from_pretrained(text, adapter, key_mapping=mapping)
    assert torch.allclose(logits(in_text), logits(model), atol=1e-5)


@pytest.mark.parametrize("excluded", [["o_proj"], ".*o_proj"])
def test_what_a_config_leaves_out_stays_left_out_for_plain_peft(folders, tmp_path, excluded):
    base = folders["qwen2_5_vl"]  # whose vision part has layers of the same names
    model = learnt(add_lora(text_part(base), Lora(r=4, exclude_modules=excluded)))
    full = PeftModel.from_pretrained(whole(base), saved(model, tmp_path / "a"))
    adapted = {name for name, _ in full.named_parameters() if "lora_A" in name}
    assert adapted == {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert torch.allclose(logits(full), logits(model), atol=1e-5)


def test_other_models_with_vision_are_refused_by_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(AutoConfig.for_model("qwen2_vl").to_dict(), default=str))
    config = Config(run_dir="x", model=Model(name_or_path=str(tmp_path)), data=Data(train="x"))
    with pytest.raises(ValueError, match=r"is of type qwen2_vl, which .*qwen3_vl, qwen3_vl_moe"):
        pretrained.read_config_of(config, str(tmp_path))


def test_the_text_part_is_read_by_ranges(base):
    """Qwen2.5-VL's files have older names, and experts of Qwen3-VL's lie the other way round in them."""
    expected = dict(whole(base).named_parameters())
    config = Config(run_dir="x", model=Model(name_or_path=str(base), dtype="float32"), data=Data(train="x"))
    with BaseFiles(str(base)) as files:
        weights = weights_of(skeleton(config, str(base)))
        for weight in weights:
            assert torch.equal(read_in_two(files, weight), expected[weight.names[0]].flatten()), weight.names
    assert {name for name in expected if "visual" not in name} == {name for w in weights for name in w.names}
