"""Damage of a base or an adapter is refused before anything is read of it, by its file and with the cure."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qwenlora.configs.schema import Config, Data, Lora, Model
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.model import base as models
from qwenlora.trainer.model import damage, loading, pretrained
from qwenlora.trainer.model.files import check_init_from
from qwenlora.trainer.prepare import prepare

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456789\n"
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
EMBEDDINGS = "model.embed_tokens.weight"


def write_base(folder, *, sharded=False, embeddings=EMBEDDINGS, **config):
    """Write the files that the check looks at: embeddings of 10 x 4, a layer, config.json."""
    folder.mkdir()
    parts = {FIRST: {embeddings: torch.ones(10, 4)}, SECOND: {"model.layers.0.weight": torch.ones(4, 4)}}
    if sharded:
        for name, tensors in parts.items():
            save_file(tensors, folder / name)
        weight_map = {tensor: name for name, tensors in parts.items() for tensor in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(parts[FIRST] | parts[SECOND], folder / "model.safetensors")
    config = {"vocab_size": 10, "hidden_size": 4} | config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


DAMAGED = {
    "a shard cut": (
        lambda f: cut(f / SECOND),
        rf"{SECOND} is cut short: it has \d+ of \d+ bytes; .*download it",
    ),
    "a shard that is a pointer": (
        lambda f: (f / SECOND).write_text(POINTER),
        rf"{SECOND} is a Git LFS pointer, .*; run `git lfs pull` in its folder, or download it again$",
    ),
    "an empty shard": (lambda f: (f / FIRST).write_text(""), f"{FIRST} is empty; copy or download it again"),
    "a web page": (lambda f: (f / FIRST).write_text("<html>" * 9), f"{FIRST} is no safetensors file"),
    "a missing shard": (
        lambda f: (f / SECOND).unlink(),
        f"lacks {SECOND}, which its model.safetensors.index",
    ),
    "an index cut": (
        lambda f: cut(f / "model.safetensors.index.json"),
        r"index\.json cannot be read: .*; copy",
    ),
    "an index that is a pointer": (
        lambda f: (f / "model.safetensors.index.json").write_text(POINTER),
        r"index\.json is a Git LFS pointer",
    ),
    "a config.json cut": (
        lambda f: cut(f / "config.json"),
        r"config\.json cannot be read: .*; copy or download",
    ),
    "a generation_config.json that is a pointer": (
        lambda f: (f / "generation_config.json").write_text(POINTER),
        r"generation_config\.json is a Git LFS pointer",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_base_is_refused_by_its_file_and_the_cure(tmp_path, kind):
    spoil, message = DAMAGED[kind]
    base = write_base(tmp_path / "base", sharded=True)
    spoil(base)
    with pytest.raises(ValueError, match=message) as refused:
        models.resolve(str(base), "model.name_or_path")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_whole_base_passes(tmp_path, sharded):
    base = write_base(tmp_path / "base", sharded=sharded)
    assert models.resolve(str(base), "model.name_or_path") == str(base)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"vocab_size": 9},
            "says vocab_size=9, and .*embed_tokens.weight in model.safetensors is for 10: they",
        ),
        (
            {"text_config": {"hidden_size": 5}},
            "says hidden_size=5, and .* is for 4: they are of different models",
        ),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        damage.check_model(write_base(tmp_path / "base", **config))


def test_embeddings_of_other_parts_and_packed_ones_say_nothing_about_the_config(tmp_path):
    damage.check_model(
        write_base(tmp_path / "a", embeddings="model.visual.embed_tokens.weight", vocab_size=9)
    )
    packed = write_base(tmp_path / "b", vocab_size=9)
    save_file({EMBEDDINGS: torch.ones(10, 1, dtype=torch.uint8)}, packed / "model.safetensors")
    damage.check_model(packed)


@pytest.fixture(scope="module", params=["safetensors", "bin"])
def whole(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("whole") / f"adapter_model.{request.param}"
    tensors = {"a": torch.ones(3, 2), "b": torch.zeros(5)}
    save_file(tensors, file) if request.param == "safetensors" else torch.save(tensors, file)
    damage.check_file(file)
    return file, file.read_bytes()


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_that_lacks_any_of_its_last_bytes_is_told_from_a_whole_one(whole, share):
    file, content = whole
    part = file.with_stem("cut")
    part.write_bytes(content[: max(int(share * len(content)), 2)])
    with pytest.raises(ValueError, match=r"cut\..* is (cut short|no safetensors file, or cut short)"):
        damage.check_file(part)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_tokenizer_that_is_a_pointer_is_refused_where_it_is_used(tiny, tmp_path, name):
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / name).write_text(POINTER)
    config = Config(run_dir="unused", model=Model(name_or_path=str(base)), data=Data(train="unused"))
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer, .* `git lfs pull` in its folder"):
        pretrained.load_tokenizer(config, str(base))
    other = config.model_copy(update={"model": Model(name_or_path=str(base), tokenizer=str(tiny))})
    assert pretrained.load_tokenizer(other, str(base)).is_fast


def test_weights_that_are_of_another_shape_than_the_config_are_refused(tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"intermediate_size": 24}))
    config = Config(run_dir="unused", model=Model(name_or_path=str(base)), data=Data(train="unused"))
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.down_proj.weight is .* in its files, and .* x 24 by its config.json"
    ):
        loading.load_base(config, str(base))


def test_preparation_refuses_a_base_without_weights_and_a_damaged_adapter(tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    config = Config(run_dir="unused", model=Model(name_or_path=str(base)), data=Data(train="unused"))
    with pytest.raises(ValueError, match=r"holds no weights \(model\*\.safetensors\); copy or download"):
        prepare(config, RunFolder(tmp_path / "run"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    lora = Lora(r=4, lora_alpha=8, init_from=str(tmp_path / "adapter"))
    config = Config(
        run_dir="unused", model=Model(name_or_path=str(tiny)), data=Data(train="unused"), lora=lora
    )
    with pytest.raises(ValueError, match="has no adapter_model.safetensors; copy or download it again"):
        prepare(config, RunFolder(tmp_path / "run"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "adapter" / name).write_text(POINTER)
        with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer"):
            check_init_from(lora)
