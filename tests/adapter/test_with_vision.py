"""After training, over bases in the layout of a vision model: adapters of qwenlora and of plain peft on the
full class are verified, merged and talked with, and a merge keeps the vision part."""

import pytest
import torch
from made import WITH_VISION, make_with_vision
from peft import LoraConfig, PeftModel, get_peft_model
from run_facts import make_facts
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from qwenlora.adapter.loading import load
from qwenlora.adapter.merge.merge import MergeOptions, merge
from qwenlora.adapter.publish.export import export
from qwenlora.adapter.subject import find
from qwenlora.adapter.verify import check_adapter, notes_on
from qwenlora.configs.load import to_yaml
from qwenlora.configs.schema import Config, Data, Lora, Model
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.model.architecture import class_of
from qwenlora.trainer.model.lora import add_lora

IDS = torch.arange(300, 324).reshape(2, 12)
PROJECTIONS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "exclude_modules": r".*visual\..*"}


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    return {kind: make_with_vision(folder / kind, kind, tiny) for kind in WITH_VISION}


@pytest.fixture(params=WITH_VISION)
def base(request, folders):
    return folders[request.param]


def whole(folder):
    model, said = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(said[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def saved(model, folder):
    """Write the adapter of a model with random numbers in it; return the model."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def of_peft(base, folder, **how):
    """Return the full class with an adapter that plain peft made and saved."""
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **PROJECTIONS | how)
    return saved(get_peft_model(whole(base), settings), folder)


def of_qwenlora(base, folder, model=None, **how):
    config = AutoModelForImageTextToText.from_pretrained(base).config
    model = model or class_of(config).from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    return saved(add_lora(model, Lora(r=4, **how)), folder)


def test_adapters_are_verified_and_talked_with(base, tmp_path):
    for name, made in (("ours", of_qwenlora), ("theirs", of_peft)):
        expected = logits(made(base, tmp_path / name))
        subject = find(str(tmp_path / name))
        assert check_adapter(subject).architecture.endswith("ForConditionalGeneration")
        assert notes_on(subject) == []
        assert torch.allclose(logits(load(subject).model), expected, atol=1e-5)


def test_a_merge_keeps_the_vision_part_bit_for_bit_and_loads_in_the_full_class(base, tmp_path):
    (base / "preprocessor_config.json").write_text("{}")
    expected = logits(of_qwenlora(base, tmp_path / "a"))
    assert merge([find(str(tmp_path / "a"))], tmp_path / "out", MergeOptions()) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    of_vision = [name for name in before if "visual" in name]
    assert of_vision
    assert all(torch.equal(before[name], after[name]) for name in of_vision)
    assert (logits(whole(tmp_path / "out")) - expected).abs().max() < 1e-4
    assert (logits(whole(base)) - expected).abs().max() > 0.1
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == "{}"


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_lora_on_the_vision_part_is_merged_too(folders, tmp_path, kind):
    model = of_peft(folders[kind], tmp_path / "a", target_modules="all-linear", exclude_modules=None)
    assert "model.visual.blocks.0.attn.qkv" in check_adapter(find(str(tmp_path / "a"))).modules
    merge([find(str(tmp_path / "a"))], tmp_path / "out", MergeOptions())
    expected = model.merge_and_unload().state_dict()
    for name, values in whole(tmp_path / "out").state_dict().items():
        assert torch.allclose(values, expected[name], atol=1e-6), name


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_adapters_with_names_of_the_text_class_are_verified_merged_and_talked_with(folders, tmp_path, kind):
    base = folders[kind]
    text = AutoModelForCausalLM.from_pretrained(base)
    expected = logits(of_qwenlora(base, tmp_path / "a", text, layers_to_transform=[0]))
    subject = find(str(tmp_path / "a"))
    check_adapter(subject)
    (note,) = notes_on(subject)
    assert "lack language_model, without which vLLM leaves them out" in note
    assert torch.allclose(logits(load(subject).model), expected, atol=1e-5)
    merge([subject], tmp_path / "out", MergeOptions())
    assert (logits(whole(tmp_path / "out")) - expected).abs().max() < 1e-4


def test_adapters_of_both_names_are_combined(folders, tmp_path):
    base = folders["qwen3_5"]
    targets = ["q_proj", "v_proj"]
    text = AutoModelForCausalLM.from_pretrained(base)
    of_qwenlora(base, tmp_path / "old", text, target_modules=targets)
    of_qwenlora(base, tmp_path / "new", target_modules=targets)
    subjects = [find(str(tmp_path / name)) for name in ("new", "old")]
    merge(subjects, tmp_path / "out", MergeOptions(weights="0.5,0.5"))
    expected = PeftModel.from_pretrained(whole(base), tmp_path / "new")  # both have the same numbers
    assert (logits(whole(tmp_path / "out")) - logits(expected)).abs().max() < 1e-4


def test_an_adapter_for_another_base_is_refused(folders, tmp_path):
    of_qwenlora(folders["qwen3_vl"], tmp_path / "a")
    with pytest.raises(ValueError, match="linear_attn.* need|has no place for|to fit"):
        check_adapter(find(str(tmp_path / "a"), base=str(folders["qwen3_5"])))


@pytest.mark.parametrize("older", [True, False])
def test_an_export_has_the_names_of_the_full_class(folders, tmp_path, older):
    base = folders["qwen3_5"]
    run = RunFolder(tmp_path / "run")
    text = AutoModelForCausalLM.from_pretrained(base) if older else None
    expected = logits(of_qwenlora(base, run.adapter, text))
    AutoTokenizer.from_pretrained(base).save_pretrained(run.adapter)
    config = Config(run_dir=str(run.path), model=Model(name_or_path=str(base)), data=Data(train="example"))
    run.config.write_text(to_yaml(config))
    run.write_facts(make_facts(base=str(base)))
    export(run.path, tmp_path / "out", base="Qwen/Qwen3.5-tiny")
    exported = PeftModel.from_pretrained(whole(base), tmp_path / "out")
    assert torch.allclose(logits(exported), expected, atol=1e-5)
    assert "AutoModelForImageTextToText.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
