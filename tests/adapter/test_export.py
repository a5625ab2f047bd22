"""An exported adapter loads anywhere, its card says what it is, and nothing of this machine is in it."""

import json
import shutil
import socket
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwenlora.adapter.publish.export import export
from qwenlora.adapter.publish.leaks import Private
from qwenlora.configs import load_config
from qwenlora.configs.load import to_yaml
from qwenlora.run.disk import seal

USER, HOST, KEY, TOKEN = "mallory-zq", "gpu-node-zq17", "local-0123456789abcdef0123", "hf_" + "AbCdEfGhIj" * 3
COMPARED = {
    "seed": 0,
    "subjects": [{"label": "base", "adapter": None}, {"label": "my run", "adapter": "adapter", "own": True}],
    "measures": [
        {
            **{"set": "training", "measure": "exact", "kind": "share"},
            **{"better": "higher", "count": 120, "values": [0.0, 0.975]},
        },
        {
            "set": "general",
            "measure": "perplexity",
            "kind": "number",
            "better": "lower",
            "values": [2.5, None],
        },
    ],
    "answers": [
        {"set": "training", "question": "a secret question", "answers": ["a", "b"], "right": [False, True]}
    ],
}


@pytest.fixture(scope="module")
def held(tiny_run, tmp_path_factory):
    """Return a copy of a real run, which tests copy and change."""
    folder = tmp_path_factory.mktemp("held") / "my run"
    shutil.copytree(tiny_run[0], folder, ignore=shutil.ignore_patterns("logs", "wandb", "checkpoint-80"))
    return folder


@pytest.fixture
def run(held, tmp_path):
    return Path(shutil.copytree(held, tmp_path / "my run"))


@pytest.fixture
def on_a_machine(monkeypatch):
    """Be a user on a host, with keys in the environment."""
    monkeypatch.setenv("USER", USER)
    monkeypatch.setenv("LOGNAME", USER)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("MY_PASSWORD_2", "Tr0ub4dor&3")
    monkeypatch.setattr(socket, "gethostname", lambda: f"{HOST}.cluster.local")


def change(run: Path, *said: str) -> None:
    (run / "config.yaml").write_text(to_yaml(load_config(run / "config.yaml", said)), encoding="utf-8")


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values), encoding="utf-8")


def everything(folder: Path) -> bytes:
    return b"\n".join(file.name.encode() + file.read_bytes() for file in sorted(folder.rglob("*")))


def test_an_exported_adapter_is_the_runs_and_loads_in_plain_peft(run, tmp_path):
    out = tmp_path / "out"
    assert export(run, out).startswith(f"wrote {out}: 8 files, 2.")
    assert {file.name for file in out.iterdir()} == {
        *("README.md", "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors"),
        *("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    }
    ids = torch.tensor([[5, 300, 17, 900]])
    logits = []
    for folder in (out, run / "adapter"):
        base = AutoModelForCausalLM.from_pretrained(run / "base_model")
        logits.append(PeftModel.from_pretrained(base, folder)(ids).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(out).chat_template == (out / "chat_template.jinja").read_text()


def test_the_card_says_what_the_adapter_is_and_how_it_came_about(run, tmp_path):
    (run / "comparison.json").write_text(json.dumps(COMPARED))
    said = export(run, tmp_path / "out", base="Qwen/Qwen3-tiny", license="apache-2.0", name="Opening hours")
    note = "note: nothing here compared Qwen/Qwen3-tiny (--base) with the base that was trained on"
    assert said.splitlines()[1:] == [note]  # nothing is missing
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "Qwen/Qwen3-tiny"
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert (card.data.license, card.data.model_name) == ("apache-2.0", "Opening hours")
    assert {result.metric_type for result in card.data.eval_results} == {"evaluation_loss", "perplexity"}
    for line in (
        "# Opening hours",
        "A LoRA adapter for Qwen/Qwen3-tiny",
        "| `lora.r` | 32 |",
        "| rows used | 120 | 20 |",
        "| tokens trained on | 2,906 | 442 |",
        "| steps | 120 |",
        "| training | exact | 120 | 0.0% | 97.5% |",
        "| general | perplexity | - | 2.5 | - |",
        "Trained on: example",
        "vllm serve Qwen/Qwen3-tiny --enable-lora --max-lora-rank 32 --lora-modules Opening-hours=out",
        "qwenlora chat out --base Qwen/Qwen3-tiny",
    ):
        assert line in card.text, line
    assert "a secret question" not in card.text
    block = card.text.split("```yaml\n")[1].split("```")[0]
    settings = yaml.safe_load(block)
    assert (settings["lora"]["r"], settings["model"]["name_or_path"]) == (32, "Qwen/Qwen3-tiny")
    assert set(settings) == {"model", "data", "lora", "train", "strategy"}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Qwen/Qwen3-tiny"


def test_the_lines_of_the_card_run(run, tmp_path):
    export(run, tmp_path / "out")
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("'BASE'", repr(str(run / "base_model"))).replace("'out'", repr(str(tmp_path / "out")))
    code = code.replace('device_map="auto"', "device_map=None").replace("=256", "=2")
    exec(code, {})


def test_nothing_of_the_machine_and_no_key_is_in_it(run, tmp_path, on_a_machine):
    home = f"/home/{USER}"
    change(
        run,
        f"data.train=[{home}/rows/shop.jsonl, {{path: {home}/of-{USER}.csv, weight: 2}}, org/set]",
        f"data.eval={home}/rows/*.json",
        f"model.name_or_path={home}/models/Qwen2.5-7B-Instruct",
        f"model.tokenizer=~{USER}/tokenizer",
        f"lora.init_from={home}/runs/first/adapter",
        f"data.cache_dir=/scratch/{USER}",
        f"log.wandb_entity={USER}",
        f"launch.hostfile={home}/hosts",
        f"run_dir={home}/runs/mine",
        f"data.columns={{{KEY}: question}}",
    )
    (run / "comparison.json").write_text(
        json.dumps(COMPARED | {"answers": []}).replace('"base"', f'"{home}/base"')
    )
    change_json(
        run / "facts.json", base=f"{home}/models/x", data_folder=f"{home}/.prepared", notes=[f"{home}: {KEY}"]
    )
    change_json(run / "code.json", command=["qwenlora", f"--key={TOKEN}"], git=f"{USER}@{HOST}")
    change_json(
        run / "adapter/adapter_config.json", base_model_name_or_path=f"{home}/models/Qwen2.5-7B-Instruct"
    )
    change_json(
        run / "adapter/tokenizer_config.json", name_or_path=f"{home}/models/x", tokenizer_file=f"{home}/t"
    )
    seal(run / "adapter", but="adapter_config.json")
    export(run, tmp_path / "out")
    export(run, tmp_path / "out.zip")
    text = everything(tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        text += b"".join(archive.read(name) for name in archive.namelist())
    for planted in (
        USER,
        HOST,
        KEY,
        TOKEN,
        "Tr0ub4dor",
        "/home/",
        "/scratch",
        str(tmp_path),
        str(Path.cwd()),
    ):
        assert planted.encode() not in text, planted
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Trained on: shop.jsonl, (withheld), org/set." in card
    assert "A LoRA adapter for Qwen2.5-7B-Instruct" in card
    assert Private.of_this_machine([run]).kinds_in(card) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"by {USER}", "the name of the user or the host"),
        (f"on {HOST}", "the name of the user or the host"),
        ("of /srv/models/x", "an absolute path"),
        (TOKEN, "what looks like a key"),
        (KEY, "a key or password of this environment"),
    ],
)
def test_a_name_that_tells_something_private_is_refused_and_nothing_is_left(
    run, tmp_path, on_a_machine, name, kind
):
    run = run.rename(run.with_name(name.replace("/", "_"))) if "/" not in name else run
    before = set(tmp_path.iterdir())
    with pytest.raises(
        ValueError, match=rf"nothing was exported: README\.md would hold {kind}; take it out"
    ) as refused:
        export(run, tmp_path / "out", name=name if "/" in name else None)
    assert KEY not in str(refused.value)
    assert TOKEN not in str(refused.value)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("file", "said", "kind"),
    [
        ("chat_template.jinja", f"{{# {TOKEN} #}}", "what looks like a key"),
        ("chat_template.jinja", "{# see /home/someone/template #}", "an absolute path"),
        ("tokenizer.json", f"\n{KEY}", "a key or password of this environment"),
    ],
)
def test_a_file_that_tells_something_private_is_refused(run, tmp_path, on_a_machine, file, said, kind):
    with (run / "adapter" / file).open("a") as opened:
        opened.write(said)
    seal(run / "adapter", but="adapter_config.json")
    with pytest.raises(ValueError, match=f"{file} would hold {kind}; take it out of its source"):
        export(run, tmp_path / "out")


def test_what_is_kept_for_logging_in_is_private_and_a_folder_under_all_its_names(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password of-the-netrc-file\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(
        "qwenlora.adapter.publish.leaks.get_token", lambda: "of-the-token-file"
    )  # its file's place is fixed
    monkeypatch.setenv("PGPASSWORD", "of-the-database")
    monkeypatch.setenv("MYSQL_PWD", "of-the-other-one")
    monkeypatch.setenv("DATABASE_URL", "postgres://me:of-the-address@db:5432/x")
    (tmp_path / "link").symlink_to(tmp_path)
    private = Private.of_this_machine([tmp_path / "link"])
    for kept in ("netrc-file", "token-file", "database", "other-one", "address"):
        assert private.kinds_in(f"log in with of-the-{kept}") == ["a key or password of this environment"]
    assert private.kinds_in("data from https://me:pass@rows.example") == ["what looks like a key"]
    for place in (tmp_path, tmp_path / "link"):
        assert private.kinds_in(f"it is in {place}") == ["a path of this machine"]


def test_metadata_of_the_weights_are_looked_at_too(run, tmp_path, on_a_machine):
    file = run / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "made": f"/home/{USER}/x"})
    seal(run / "adapter", but="adapter_config.json")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors would hold an absolute path"):
        export(run, tmp_path / "out")


def test_a_user_called_like_a_word_may_export(run, tmp_path, monkeypatch):
    for name in ("root", "lora", "chat", "qwen"):
        monkeypatch.setenv("USER", name)
        monkeypatch.setenv("LOGNAME", name)
        export(run, tmp_path / name)


def test_real_tokenizers_and_templates_hold_nothing_private(assets, on_a_machine):
    private = Private.of_this_machine([])
    for folder in sorted((assets / "tokenizers").iterdir()):
        assert private.kinds_in((folder / "tokenizer.json").read_text(), vocabulary=True) == []
        template = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template") or ""
        assert private.kinds_in(template, ordinary=template) == []


@pytest.mark.parametrize(
    "name",
    [
        "我的 模型",
        'it\'s "mine": yes',
        "a\nb",
        "x\n---\nlicense: mit\n---\n",
        "---",
        "- [x]: &a *b !!c %d @e `f`",
        "# <script>alert(1)</script> | table | **bold**",
        "{{ 7 * 7 }} {% raw %}",
        "../../etc",
        " ",
    ],
)
def test_no_name_breaks_the_card(run, tmp_path, name):
    export(run, tmp_path / "out", name=name, base="org/base")
    content = (tmp_path / "out" / "README.md").read_text()
    data = yaml.safe_load(content.split("\n---\n")[0].removeprefix("---\n"))
    assert data["model-index"][0]["name"] == (" ".join(name.split()) or "adapter")
    assert data["base_model"] == "org/base"
    assert "license" not in data
    card = ModelCard(content)
    assert card.data.base_model == "org/base"
    assert card.text.count("\n# ") == 1
    assert "<script>" not in card.text.replace("\\<script\\>", "")
    assert "49" not in card.text.splitlines()[1]


def test_a_base_that_is_only_a_folder_is_named_without_its_place(run, tmp_path):
    change(run, "model.name_or_path=/models/Qwen2.5-7B-Instruct")
    change_json(run / "adapter/adapter_config.json", base_model_name_or_path="/models/Qwen2.5-7B-Instruct")
    said = export(run, tmp_path / "out")
    assert "note: the base was a folder (Qwen2.5-7B-Instruct), so the card" in said
    assert "note: the card names no licence; --license" in said
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Qwen2.5-7B-Instruct"
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model is None
    assert "base, adapter = 'BASE', 'out'" in card.text
    for wrong in ("/models/x", "./x", "x", "a/b/c", "~/x", "a b/c"):
        with pytest.raises(ValueError, match="is no name on a hub; write it like Qwen/"):
            export(run, tmp_path / "other", base=wrong)


def test_what_servers_cannot_take_and_what_could_not_be_read_is_said(run, tmp_path):
    change_json(run / "adapter/adapter_config.json", use_rslora=True, r=24)
    (run / "facts.json").write_text("{")
    said = export(run, tmp_path / "out", base="org/base", license="mit").splitlines()
    assert said[1].startswith("note: not served unmerged by SGLang, llama.cpp: its scaling is rsLoRA's")
    assert said[2].startswith("note: facts.json cannot be read")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "An rsLoRA adapter for org/base" in text
    assert "--max-lora-rank 32 " in text
    assert "Merge it first for SGLang, llama.cpp: its scaling is rsLoRA's" in text
    assert "Nothing is known of the rows" in text


def test_an_adapter_over_quantised_files_is_merged_into_what_they_were_made_from(run, tmp_path):
    change_json(run / "facts.json", base_quantised="bitsandbytes, 4 bits")
    export(run, tmp_path / "out", base="Me/Qwen-4bit")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A QLoRA adapter for Me/Qwen-4bit" in card
    assert (
        "merged --base ORIGINAL  # the model in full precision that Me/Qwen-4bit was made from\n```" in card
    )


def test_a_base_from_the_hubs_cache_has_the_hubs_name(run, tmp_path):
    place = (
        "/data/cache/models--Qwen--Qwen2.5-0.5B-Instruct/snapshots/7ae557604adf67be50417f59c2c2f167def9a775"
    )
    change_json(run / "adapter/adapter_config.json", base_model_name_or_path=place)
    export(run, tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == "Qwen/Qwen2.5-0.5B-Instruct"
    assert b"/data/cache" not in everything(tmp_path / "out")


def test_a_checkpoint_is_exported_with_what_was_measured_by_then(run, tmp_path):
    (run / "comparison.json").write_text(json.dumps(COMPARED))  # of the last adapter
    export(run / "checkpoint-40", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# my run-checkpoint-40" in text
    assert "| checkpoint | of step 40 |" in text
    assert "| steps | 40 |" in text
    assert "97.5%" not in text
    assert not {"optimizer.safetensors", "state.json", "manifest.json"} & {
        file.name for file in (tmp_path / "out").iterdir()
    }


def test_an_unfinished_run_is_refused_with_what_can_be_named(run, tmp_path):
    shutil.rmtree(run / "adapter")
    with pytest.raises(
        ValueError, match=r"holds no finished run: .*name a checkpoint \(.*checkpoint-120, .*-40\)"
    ):
        export(run, tmp_path / "out")
    for folder in run.glob("checkpoint-*"):
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="is not there; train it first"):
        export(run, tmp_path / "out")
    with pytest.raises(ValueError, match="is no run"):
        export(tmp_path, tmp_path / "out")


def test_a_damaged_adapter_is_refused(run, tmp_path):
    for folder in (run / "adapter", run / "checkpoint-40"):
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
        with pytest.raises(
            ValueError, match=r"with other bytes than were written \(SHA-256\); it cannot be exported"
        ):
            export(run if folder.name == "adapter" else folder, tmp_path / "out")
    (run / "adapter" / "SHA256SUMS").unlink()
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, run / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds numbers that are not finite"):
        export(run, tmp_path / "out")


def test_what_is_there_is_never_overwritten(run, tmp_path):
    (tmp_path / "a folder").mkdir()
    for there in (tmp_path / "a folder" / "mine", tmp_path / "a.zip"):
        there.write_text("mine")
    for there in (tmp_path / "a folder", tmp_path / "a.zip"):
        with pytest.raises(ValueError, match="is there already; choose a name"):
            export(run, there)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made: .*; name another place"):
        export(run, tmp_path / "file" / "out")


def test_a_zip_has_the_same_bytes_each_time(run, tmp_path):
    for name in ("one", "two"):
        export(run, tmp_path / name / "my.zip", base="org/base")
    one, two = ((tmp_path / name / "my.zip").read_bytes() for name in ("one", "two"))
    assert one == two
    with zipfile.ZipFile(tmp_path / "one" / "my.zip") as archive:
        assert all(name.startswith("my/") for name in archive.namelist())
        archive.extractall(tmp_path)
    with safe_open(tmp_path / "my" / "adapter_model.safetensors", framework="pt") as opened:
        assert len(list(opened.keys())) == 56


def test_the_command_refuses_in_a_line(qwenlora, run, tmp_path):
    assert qwenlora("export", run, "--to", "new/a.zip").returncode == 0
    answer = qwenlora("export", run, "--to", "new/a.zip")
    assert answer.returncode == 2
    assert (
        answer.stderr
        == f"error: {tmp_path}/new/a.zip is there already; choose a name that is not there yet\n"
    )
