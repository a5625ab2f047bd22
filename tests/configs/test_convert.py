"""Configs of other tools become ones of ours, which load; what has no counterpart is listed; no token is
copied."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from qwenlora.cli.config_commands import from_
from qwenlora.configs import foreign_data, load_config
from qwenlora.configs.convert import convert
from qwenlora.configs.foreign import foreign, tools
from qwenlora.configs.keys import FIELDS
from qwenlora.configs.load import takes
from qwenlora.configs.schema import SourceEntry
from qwenlora.data.shapes import KEYS, TURN_LISTS

INFO = {
    "faq": {"file_name": "faq.json", "columns": {"prompt": "frage", "response": "antwort"}},
    "liked": {"file_name": "liked.json", "ranking": True},
}
LLAMA_FACTORY = """\
model_name_or_path: Qwen/Qwen3-4B
stage: sft
do_train: true
finetuning_type: lora
lora_target: q_proj,v_proj
dataset: faq, liked, other
template: qwen3
cutoff_len: 1024
val_size: 0.1
output_dir: saves/x
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
warmup_ratio: 0.1
bf16: true
deepspeed: examples/deepspeed/ds_z3_offload_config.json
hf_hub_token: hf_abcdefghijklmnop
use_liger_kernel: true
"""
OF_LLAMA_FACTORY = """\
# from lf.yaml, a config of LLaMA-Factory
# differs here:
#   dataset liked is preference data (ranking), which qwenlora does not train: left out
#   dataset other: not in data/dataset_info.json; data/other.json is a guess, name its file
#   train.global_batch_size=16 is 2 a GPU x 8 accumulated x 1 GPU; multiply it when you train on more
#   deepspeed=examples/deepspeed/ds_z3_offload_config.json: qwenlora's own config of that stage is used
#   output_dir=saves/x: run_dir is runs/ and the config's name
# no counterpart here:
#   template=qwen3: the model's own chat template is used
# no counterpart is known of: hf_hub_token (not shown), use_liger_kernel=true
# not needed here: do_train
model:
  name_or_path: Qwen/Qwen3-4B
  dtype: auto
data:
  train:
  - path: data/faq.json
    columns:
      input: null
      frage: instruction
      antwort: output
  - data/other.json
  eval_fraction: 0.1
  max_length: 1024
  overlength: truncate
  packing: 'off'
lora:
  r: 8
  lora_alpha: 16
  target_modules:
  - q_proj
  - v_proj
train:
  global_batch_size: 16
  per_device_train_batch_size: 2
  learning_rate: 5.0e-05
  lr_scheduler_type: linear
  warmup_steps: 0.1
  gradient_checkpointing: true
  eval_strategy: 'no'
  save_strategy: steps
  save_steps: 500
  save_total_limit: null
strategy:
  name: zero3
  offload: params
"""
MS_SWIFT = """\
#!/bin/bash
nproc=2  # GPUs
NPROC_PER_NODE=$nproc HF_TOKEN=hf_abcdefghijklmnop \\
swift sft \\
    --model Qwen/Qwen2.5-7B --tuner_type lora \\
    --dataset 'AI-ModelScope/alpaca#500' \\
              own.jsonl \\
    --gradient_accumulation_steps $(expr 16 / $nproc) \\
    --split_dataset_ratio 0.01 --eval_steps 50 --save_steps=100 \\
    --lora_rank ${RANK} --quant_bits 4 --loss_scale last_round --report_to tensorboard wandb
"""
AXOLOTL = """\
base_model: Qwen/Qwen3-8B
chat_template: tokenizer_default
datasets:
  - path: own.jsonl
    type: chat_template
    field_messages: talk
    message_property_mappings: {role: who, content: said}
    roles: {assistant: [gpt, bot], ipython: [x]}
    message_field_training: learn
    roles_to_train: [assistant, user]
  - {path: json, data_files: [a.json, b.json], type: alpaca}
  - {path: org/books, type: completion, field: body, split: "train[:20%]"}
test_datasets: [{path: held.jsonl, type: {field_instruction: q, field_output: a}}]
val_set_size: 0.05
adapter: qlora
load_in_4bit: true
load_in_8bit: false
micro_batch_size: 2
gradient_accumulation_steps: 4
optimizer: adamw_bnb_8bit
learning_rate: 0.0002
evals_per_epoch: 4
fsdp_config: {offload_params: false}
wandb_project:
vllm: {api_key: abcdefgh}
"""

AXOLOTL_HEAD = "base_model: Qwen/Qwen3-8B\nadapter: lora\nmicro_batch_size: 2\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(INFO))
    return tmp_path


def converted(text: str, name: str) -> tuple[str, dict]:
    """Return what is written for a file, and the config that it loads as."""
    Path(name).write_text(text)
    result = convert(Path(name))
    Path("ours.yaml").write_text(result)
    return result, load_config("ours.yaml").model_dump(exclude_unset=True)


def test_llama_factory():
    assert converted(LLAMA_FACTORY, "lf.yaml")[0] == OF_LLAMA_FACTORY


def test_a_dataset_that_the_info_does_not_know_is_looked_for_beside_it():
    Path("lf").mkdir()
    Path("data").rename("lf/data")
    text, values = converted("model_name_or_path: a/b\nstage: sft\ndataset: faq, other\n", "lf/lf.yaml")
    listed, guessed = values["data"]["train"]
    assert (listed["path"], guessed) == ("lf/data/faq.json", "lf/data/other.json")
    assert "lf/data/other.json is a guess" in text


def test_llama_factory_pre_training_is_packed():
    text = "stage: pt\ndataset: a\ncutoff_len: 64\n"
    assert converted(text, "lf.yaml")[1]["data"]["packing"] == "on"


def test_ms_swift_in_a_script():
    text, values = converted(MS_SWIFT, "train.sh")
    assert values["data"]["train"] == ["AI-ModelScope/alpaca", "own.jsonl"]
    assert "AI-ModelScope/alpaca#500 is a name on ModelScope; here it is looked for" in text
    assert (values["launch"]["nproc_per_node"], values["strategy"]["quantization"]) == (2, "nf4")
    assert values["data"]["train_on"] == "last_assistant"
    assert (values["lora"]["r"], values["lora"]["lora_dropout"]) == (8, 0.05)
    assert "#   lora_rank=${RANK}: the shell works this out; write lora.r\n" in text
    assert values["train"]["global_batch_size"] == 16  # 1 a GPU x 8 x 2, as ms-swift does by itself
    assert (values["train"]["eval_steps"], values["train"]["save_steps"]) == (50, 100)
    assert values["log"]["to"] == ["tensorboard", "wandb"]
    assert "# no counterpart is known of: HF_TOKEN (not shown)\n" in text
    assert "hf_abc" not in text


def test_what_the_shell_does_with_a_command_is_no_argument_of_it():
    script = """GPUS=8
torchrun --nproc_per_node $GPUS src/train.py --stage sft --finetuning_type lora --dataset 'a|b' \\
    --model_name_or_path Qwen/Qwen3-4B --per_device_train_batch_size 2 --gradient_accumulation_steps 4%s
"""
    for rest in (" 2>&1 | tee log.txt", " > log 2>&1 &", "; echo --seed 1", "&& shutdown"):
        _, values = converted(script % rest, "run.sh")
        assert values["train"]["global_batch_size"] == 2 * 4 * 8
        assert values["launch"]["nproc_per_node"] == 8
        assert values["data"]["train"] == "data/a|b.json"
        assert "seed" not in values["train"]


def test_what_a_script_exports_and_what_stands_before_its_command_is_read():
    command = "swift sft --model Qwen/Qwen3-4B --dataset a.jsonl --gradient_accumulation_steps 1\n"
    for script, processes in (
        ("export NPROC_PER_NODE=8\n", 8),
        ("export NPROC_PER_NODE=8\nNPROC_PER_NODE=2 ", 2),
        ("n=4\nexport NPROC_PER_NODE=$n\nexport HF_TOKEN=geheim\n", 4),
    ):
        text, values = converted(script + command, "run.sh")
        assert values["train"]["global_batch_size"] == values["launch"]["nproc_per_node"] == processes
        assert "geheim" not in text


def test_of_several_trainings_in_a_script_the_first_is_read_and_it_is_said():
    command = "swift sft --model Qwen/Qwen3-4B --dataset a.jsonl --max_length $LENGTH\n"
    text, values = converted(f"LENGTH=128\n{command}LENGTH=256\n{command}", "run.sh")
    assert values["data"]["max_length"] == 128
    assert "#   run.sh starts 2 trainings, of which this is the first\n" in text


def test_ms_swift_evaluates_when_it_saves():
    text = "model: Qwen/Qwen3-4B\ndataset: [a.jsonl]\nsplit_dataset_ratio: 0.1\nsave_steps: 20\n"
    assert converted(text, "swift.yaml")[1]["train"]["eval_steps"] == 20


def test_args_json_of_ms_swift():
    args = {
        **{
            "model": "Qwen/Qwen3-4B",
            "tuner_type": "lora",
            "dataset": ["a.jsonl"],
            "val_dataset": ["b.jsonl"],
        },
        **{"split_dataset_ratio": 0.0, "gradient_accumulation_steps": 2, "global_world_size": 4},
        **{"deepspeed": {"zero_optimization": {"stage": 2}}, "adapters": [], "max_steps": -1, "seed": 1},
        **{"target_modules": ["all-linear"], "columns": {"q": "query"}, "hub_token": "abc"},
    }
    text, values = converted(json.dumps(args), "args.json")
    assert (values["data"]["train"], values["data"]["eval"]) == ("a.jsonl", "b.jsonl")
    assert values["data"]["columns"] == {"q": "query"}
    assert (values["train"]["global_batch_size"], values["strategy"]["name"]) == (8, "zero2")
    assert values["lora"]["target_modules"] == "all-linear"
    assert "max_steps" not in values["train"]
    assert "hub_token (not shown)" in text


def test_axolotl():
    text, values = converted(AXOLOTL, "ax.yaml")
    chat, *alpaca, books = values["data"]["train"]
    columns = {"talk": "messages", "who": "role", "said": "content", "learn": "weight"}
    assert chat == {"path": "own.jsonl", "columns": columns, "roles": {"bot": "assistant"}}
    assert alpaca == ["a.json", "b.json"]
    assert books == {
        **{"path": "org/books", "format": "text", "columns": {"body": "text"}, "split": "train[:20%]"}
    }
    assert values["data"]["eval"] == {"path": "held.jsonl", "columns": {"q": "instruction", "a": "output"}}
    assert "eval_fraction" not in values["data"]
    assert values["data"]["max_length"] == 512
    assert values["strategy"] == {"name": "fsdp", "quantization": "nf4"}
    assert (values["train"]["global_batch_size"], values["train"]["eval_strategy"]) == (8, "epoch")
    assert 'roles_to_train=["assistant", "user"] of own.jsonl: data.train_on: ' in text
    assert "evals_per_epoch=4: here once, or every train.eval_steps" in text
    assert "# no counterpart is known of: vllm (not shown)\n" in text


@pytest.mark.parametrize(("ends", "differs"), [("turn", False), ("all", True)])
def test_axolotls_ends_of_turns(ends, differs):
    text, _ = converted(f"{AXOLOTL_HEAD}datasets: [{{path: a.jsonl}}]\ntrain_on_eos: {ends}", "ax.yaml")
    assert ("train_on_eos" in text) is differs


def test_axolotls_trained_tokens():
    _, values = converted(
        f"{AXOLOTL_HEAD}peft_trainable_token_indices: [7]\nneftune_noise_alpha: 5", "ax.yaml"
    )
    assert (values["lora"]["trainable_token_indices"], values["train"]["neftune_noise_alpha"]) == ([7], 5)


def test_an_entry_of_axolotl_keeps_its_split_and_its_folder():
    rows = "{path: ./rows, split: validation, type: chat_template, roles_to_train: [], shards: 4}"
    files = "{path: ./more, data_files: '*.jsonl', type: alpaca}"
    text, values = converted(f"{AXOLOTL_HEAD}datasets: [{rows}, {files}]", "ax.yaml")
    assert values["data"]["train"] == [{"path": "./rows", "split": "validation"}, "more/*.jsonl"]
    assert "roles_to_train=[] of ./rows: data.train_on" in text
    assert "datasets: ./rows: shards: no counterpart here" in text


@pytest.mark.parametrize(
    ("zero", "strategy"),
    [
        ({"stage": 3, "offload_param": {"device": "cpu"}}, {"name": "zero3", "offload": "params"}),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, {"name": "zero3", "offload": "optimizer"}),
        ({"stage": 2, "offload_optimizer": {"device": "none"}}, {"name": "zero2"}),
    ],
)
def test_deepspeed_within_the_config_says_what_is_offloaded(zero, strategy):
    deepspeed = json.dumps({"zero_optimization": zero})
    assert converted(f"{AXOLOTL_HEAD}deepspeed: {deepspeed}", "ax.yaml")[1]["strategy"] == strategy


def test_merged_keys_are_theirs_and_no_secret_is_shown():
    secrets = "AWS_ACCESS_KEY_ID: geheim\nprivate_key: geheim\nmlflow_uri: 'https://me:geheim@host/'\n"
    base = "base: &base\n  learning_rate: 2e-5\n  seed: 1\n<<: *base\nseed: 2\n"
    text, values = converted(f"{base}{AXOLOTL_HEAD}{secrets}", "ax.yaml")
    assert (values["train"]["learning_rate"], values["train"]["seed"]) == (2e-5, 2)
    assert "geheim" not in text


@pytest.mark.parametrize(
    ("info", "source"),
    [
        ({"file_name": "a.json"}, "d/a.json"),
        (
            {"file_name": "a.json", "columns": {"prompt": "input", "response": "target"}},
            {"path": "d/a.json", "columns": {"input": "instruction", "target": "output"}},
        ),
        (
            {
                "file_name": "a.json",
                "columns": {
                    **{"prompt": "instruction", "query": "more", "response": "output", "system": "s"},
                    **{"history": "h"},
                },
            },
            {"path": "d/a.json", "columns": {"s": "system", "h": "history", "more": "input"}},
        ),
        (
            {"hf_hub_url": "org/q", "subset": "en", "split": "full", "columns": {"prompt": "content"}},
            {
                "path": "org/q",
                "columns": {"content": "text"},
                "format": "text",
                "split": "full",
                "name": "en",
            },
        ),
        ({"hf_hub_url": "org/chat", "formatting": "sharegpt", "split": "train"}, "org/chat"),
        (
            {
                "file_name": "a.json",
                "formatting": "sharegpt",
                "columns": {"messages": "talk", "tools": "functions_text"},
                "tags": {"role_tag": "who", "content_tag": "said", "user_tag": "q", "assistant_tag": "gpt"},
            },
            {
                "path": "d/a.json",
                "columns": {
                    **{"functions_text": "tools", "talk": "messages", "who": "role", "said": "content"}
                },
                "roles": {"q": "user"},
            },
        ),
    ],
)
def test_a_data_set_of_llama_factory_is_a_source_of_ours(info, source):
    notes: list[str] = []
    assert foreign_data.of_info("x", info, Path("d"), notes.append) == [source]
    assert notes == []
    SourceEntry.model_validate({"path": source} if isinstance(source, str) else source)


@pytest.mark.parametrize(
    ("info", "why"),
    [
        ({"file_name": "a.json", "columns": {"messages": "m", "images": "i"}}, "has images, which"),
        ({"file_name": "a.json", "columns": {"kto_tag": "label"}}, "is preference data (kto_tag), which"),
        ({"file_name": "a.json", "ranking": True}, "is preference data (ranking), which"),
        ({"ms_hub_url": "org/a"}, "is not on the Hugging Face hub; download it"),
    ],
)
def test_a_data_set_that_cannot_be_trained_is_left_out_with_the_reason(info, why):
    notes: list[str] = []
    assert foreign_data.of_info("x", info, Path("d"), notes.append) == []
    assert notes[0].startswith(f"dataset x {why}")
    assert notes[0].endswith(": left out")


def test_a_dataset_info_becomes_its_sources():
    _, values = converted(json.dumps(INFO), "dataset_info.json")
    columns = {"input": None, "frage": "instruction", "antwort": "output"}
    assert values["data"]["train"] == {"path": "faq.json", "columns": columns}


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("a.yaml", LLAMA_FACTORY, "a config of LLaMA-Factory"),
        ("a.sh", MS_SWIFT, "a config of ms-swift"),
        ("a.yaml", AXOLOTL, "a config of Axolotl"),
        ("a.json", json.dumps(INFO), "LLaMA-Factory's dataset_info.json"),
    ],
)
def test_where_one_of_ours_is_expected_it_is_said_what_it_is(name, text, what):
    Path(name).write_text(text)
    with pytest.raises(ValueError, match=r".") as caught:
        load_config(name)
    assert str(caught.value) == (
        f"{name} is {what}; write one for qwenlora, and look at it: qwenlora config from {name} > my.yaml"
    )


@pytest.mark.parametrize(
    "text",
    [
        "model: {name_or_path: tiny}\ndata: {trian: x}\nstage: sft\ncutoff_len: 8\n",  # ours, with mistakes
        "learning_rate: 1\nnum_train_epochs: 2\n",  # anybody's
        "a: 'not closed",
    ],
)
def test_nothing_else_is_taken_for_one(text):
    Path("a.yaml").write_text(text)
    assert foreign(Path("a.yaml")) is None
    with pytest.raises(ValueError, match=r"a\.yaml is not known as a config of LLaMA-Factory, ms-swift, Ax"):
        convert(Path("a.yaml"))


def test_the_command_prints_yaml_and_says_on_stderr_what_differs(capsys):
    Path("lf.yaml").write_text(LLAMA_FACTORY)
    assert from_(Path("lf.yaml")) == 0
    printed = capsys.readouterr()
    assert printed.out == OF_LLAMA_FACTORY
    assert printed.err == OF_LLAMA_FACTORY[: OF_LLAMA_FACTORY.index("model:\n")]


def test_the_tables_name_keys_and_values_of_ours():
    for tool in tools():
        copied = ((one.key, value) for one in tool.keys.values() for value in one.values.values() if one.key)
        named = [*tool.defaults.items(), *(pair for pair in copied if pair[1] is not None)]
        wrong = [
            pair for pair in named if not takes(TypeAdapter(FIELDS[pair[0]].rebuild_annotation()), pair[1])
        ]
        assert (tool.name, wrong) == (tool.name, [])
        assert all(one.key in FIELDS for one in tool.keys.values() if one.key)
        assert tool.not_needed.isdisjoint(tool.keys)
    assert foreign_data.TURN_LISTS == TURN_LISTS
    assert set(foreign_data.AXOLOTL_FIELDS.values()) <= set(KEYS)


VALUES = st.one_of(
    st.sampled_from([None, True, False, 0, 1, 4, -1, 0.1, 16, "lora", "auto", "steps", "a,b", "x/y", "2"]),
    st.lists(st.sampled_from(["a.jsonl", "wandb", "all"]), max_size=2),
    st.dictionaries(st.sampled_from(["path", "type", "columns", "stage"]), st.text(max_size=3), max_size=2),
    st.text(max_size=5),
)


@pytest.mark.parametrize("steps", [True, -5, 0.1])
def test_what_is_no_number_of_steps_is_an_epoch(tmp_path, steps):
    file = tmp_path / "theirs.json"
    theirs = {"finetuning_type": "lora", "stage": "sft", "eval_strategy": "steps", "eval_steps": steps}
    file.write_text(json.dumps({**theirs, "per_device_train_batch_size": "auto"}))
    (tmp_path / "ours.yaml").write_text(text := convert(file))
    assert f"eval_steps={json.dumps(steps)}: not a number of steps; here after each epoch" in text
    train = load_config(tmp_path / "ours.yaml").train
    assert (train.eval_strategy, train.per_device_train_batch_size) == ("epoch", 1)


@given(st.data())
def test_any_config_of_theirs_becomes_one_that_loads(tmp_path_factory, data):
    tool = tools()[data.draw(st.integers(0, 2))]
    sign = data.draw(st.sampled_from(sorted(tool.signs & tool.keys.keys() | {"base_model", "model"})))
    chosen = data.draw(st.dictionaries(st.sampled_from(sorted(tool.keys)), VALUES, max_size=8))
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps({**chosen, sign: "a", "learning_rate": 1e-4, "hub_token": "Geheim"}))
    if foreign(path) is None:
        return
    text = convert(path)
    ours = path.with_suffix(".yaml")
    ours.write_text(text)
    load_config(ours)
    assert "Geheim" not in text
