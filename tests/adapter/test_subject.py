"""What a user names after training is found, or refused in a line that says what to name instead."""

import json
import shutil

import pytest
import yaml

from qwenlora.adapter.loading import load_tokenizer
from qwenlora.adapter.subject import find


def name_base(adapter, base):
    """Write another base into an adapter's config."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))


@pytest.fixture(scope="module")
def held(tiny_run, tmp_path_factory):
    """Return a copy of a real run."""
    folder = tmp_path_factory.mktemp("held") / "my run"
    shutil.copytree(tiny_run[0], folder)
    return folder


def test_a_run_is_its_last_adapter(held):
    found = find(str(held))
    assert (found.label, found.adapter, found.base) == ("my run", held / "adapter", str(held / "base_model"))
    assert found.config.lora.r == 32


def test_a_checkpoint_and_an_adapter_know_their_run(held):
    assert find(str(held / "checkpoint-40")).label == "my run/checkpoint-40"
    assert find(str(held / "checkpoint-40")).run.path == held
    assert find(str(held / "adapter")).label == "my run"


def test_an_adapter_by_itself_names_its_base(held, tmp_path):
    alone = shutil.copytree(held / "adapter", tmp_path / "alone")
    config = json.loads((alone / "adapter_config.json").read_text())
    (alone / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(held / "base_model")})
    )
    found = find(str(alone))
    assert (found.label, found.base, found.run) == ("alone", str(held / "base_model"), None)
    (alone / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "/models/gone"})
    )
    with pytest.raises(
        ValueError, match="alone needs the base model /models/gone, and there is no model at /models/gone;"
    ):
        find(str(alone))
    assert find(str(alone), base=str(held / "base_model")).base == str(held / "base_model")
    name_base(alone, None)
    with pytest.raises(ValueError, match="does not say which base it needs; name it with --base"):
        find(str(alone))


def test_a_base_is_of_the_revision_that_was_trained_on(held, tmp_path):
    alone = shutil.copytree(held / "adapter", tmp_path / "alone")
    config = json.loads((alone / "adapter_config.json").read_text())
    said = {"base_model_name_or_path": "Qwen/Qwen3-0.6B", "revision": "e6de91484c29"}
    (alone / "adapter_config.json").write_text(json.dumps(config | said))
    assert find(str(alone)).config.model.revision == "e6de91484c29"
    assert find(str(alone), base="Qwen/Qwen3-0.6B").config.model.revision == "e6de91484c29"
    assert find(str(alone), base=str(held / "base_model")).config.model.revision is None
    run = shutil.copytree(held, tmp_path / "run")
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["model"] |= {"name_or_path": "Qwen/Qwen3-0.6B", "revision": "e6de91484c29"}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert find(str(run)).config.model.revision == "e6de91484c29"
    assert find(str(run), base=str(held / "base_model")).config.model.revision is None
    assert find(str(run), trust_remote_code=True).config.model.trust_remote_code


def test_a_base_whose_name_is_relative_is_found_from_any_folder(held, tmp_path, monkeypatch):
    project = tmp_path / "project"
    shutil.copytree(held, project / "runs" / "my", ignore=shutil.ignore_patterns("checkpoint-*"))
    (project / "runs" / "my" / "base_model").rename(project / "qwen")
    values = yaml.safe_load((project / "runs" / "my" / "config.yaml").read_text())
    facts = json.loads((project / "runs" / "my" / "facts.json").read_text())

    def write(folder, run_dir, base, recorded):
        model = values["model"] | {"name_or_path": base}
        (folder / "config.yaml").write_text(yaml.safe_dump(values | {"run_dir": run_dir, "model": model}))
        (folder / "facts.json").write_text(json.dumps(facts | {"base": str(recorded)}))

    write(project / "runs" / "my", "runs/my", "./qwen", project / "qwen")
    monkeypatch.chdir(tmp_path)
    for named in ("project/runs/my", "project/runs/my/adapter"):
        assert find(named).base == str(project / "qwen")
    alone = shutil.copytree(project / "runs" / "my", tmp_path / "alone")  # where it was started is unknown
    write(alone, "/gone/my", "models/qwen", project / "qwen")
    assert find("alone").base == str(project / "qwen")
    write(alone, "/gone/my", "models/qwen", "/gone/models/qwen")
    with pytest.raises(
        ValueError,
        match="alone needs the base model models/qwen, and there is no model at /gone/models/qwen; name its"
        " folder with --base",
    ):
        find("alone")
    assert find("alone", base="project/qwen").base == str(project / "qwen")


def test_a_run_is_asked_in_the_words_it_was_trained_with(held, tmp_path):
    run = shutil.copytree(held, tmp_path / "run")
    (run / "base_model" / "chat_template.jinja").write_text("{{ 'changed since' }}")
    trained_with = (run / "adapter" / "chat_template.jinja").read_text()
    for named in (run, run / "checkpoint-40"):
        assert load_tokenizer(find(str(named))).chat_template == trained_with
    assert load_tokenizer(find(str(run / "base_model"))).chat_template == "{{ 'changed since' }}"


def test_a_model_is_a_model(held):
    found = find(str(held / "base_model"))
    assert (found.label, found.adapter, found.run) == ("base_model", None, None)
    with pytest.raises(ValueError, match="is a model by itself"):
        find(str(held / "base_model"), base="x")


def test_a_folder_that_is_not_there_is_no_hub_name_where_its_parent_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("Qwen/Qwen2.5-7B-Instruct").adapter is None
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="runs/tinny: no such folder; name a run"):
        find("runs/tinny")


def test_what_is_none_of_these_is_refused(held, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such folder; name a run.*hub name$"):
        find("nothing")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(held, tmp_path / "runs" / "tiny")
    with pytest.raises(ValueError, match=r"; did you mean runs/tiny\?$"):
        find("tiny")
    with pytest.raises(ValueError, match="is no run"):
        find(str(tmp_path))
    half = shutil.copytree(held, tmp_path / "half", ignore=shutil.ignore_patterns("adapter"))
    with pytest.raises(ValueError, match=r"holds no finished run: .*name a checkpoint \(.*checkpoint-120, "):
        find(str(half))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match="says peft_type=IA3; qwenlora knows LORA"):
        find(str(tmp_path / "odd"))
    (tmp_path / "odd" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        find(str(tmp_path / "odd"))
