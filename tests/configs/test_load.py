"""A config that is right is resolved; one that is wrong is refused in words that say what to write."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qwenlora.configs import Config, load_config
from qwenlora.configs.combinations import RULES
from qwenlora.configs.keys import FIELDS, SECTIONS, differences
from qwenlora.configs.load import to_yaml
from qwenlora.configs.reference import as_markdown, kind_of, rules_of, since
from qwenlora.configs.schema import FIRST
from qwenlora.configs.yaml_file import parse_yaml

ROOT = Path(__file__).parents[2]
MINIMAL = "model: {name_or_path: tiny}\ndata: {train: example}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "my.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path, overrides=()) -> list[str]:
    with pytest.raises(ValueError, match=".") as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def test_defaults_yield_to_the_file_and_the_file_to_overrides(write):
    path = write(MINIMAL + "lora: {r: 8, lora_alpha: 8}\n")
    config = load_config(path, ["lora.r=32", "train.learning_rate=1e-4"])
    assert (config.lora.r, config.lora.lora_alpha, config.train.learning_rate) == (32, 8, 1e-4)
    assert config.train.seed == 42


def test_overrides_may_be_a_mapping(write):
    assert load_config(write(MINIMAL), {"lora.target_modules": ["q_proj"]}).lora.target_modules == ["q_proj"]


def test_run_dir_defaults_to_the_files_name(write):
    assert load_config(write(MINIMAL, "our run.yaml")).run_dir == "runs/our run"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("lora: {rank: 3}", "{path}:3: lora.rank=3: no such key; did you mean lora.r?"),
        ("lora:\n  lora_alhpa: 3", "{path}:4: lora.lora_alhpa=3: no such key; did you mean lora.lora_alpha?"),
        (
            "lora: {learning_rate: 1}",
            "{path}:3: lora.learning_rate=1: no such key; did you mean train.learning_rate?",
        ),
        ("learning_rate: 1", "{path}:3: learning_rate=1: no such key; did you mean train.learning_rate?"),
        ("cutoff_len: 1", "{path}:3: cutoff_len=1: no such key; did you mean data.max_length?"),
        (
            "micro_batch_size: 1",
            "{path}:3: micro_batch_size=1: no such key; did you mean train.per_device_train_batch_size?",
        ),
        (
            "train: {num_epochs: 1}",
            "{path}:3: train.num_epochs=1: no such key; did you mean train.num_train_epochs?",
        ),
        (
            "train: {stage: sft}",
            "{path}:3: train.stage=sft: no such key; LLaMA-Factory's stage has no counterpart here (qwenlora"
            " learns replies and plain text; it has no preference or reward training); remove it",
        ),
        (
            "train: {group_by_length: true}",
            "{path}:3: train.group_by_length=true: no such key; LLaMA-Factory's group_by_length is not needed"
            " here; remove it",
        ),
        ("tarin: {seed: 1}", '{path}:3: tarin={{"seed": 1}}: no such key; did you mean train?'),
        ("lora: {r: true}", "{path}:3: lora.r=true: expected an integer"),
        ('lora: {r: "8"}', '{path}:3: lora.r="8": expected an integer'),
        ("lora: {r: 0}", "{path}:3: lora.r=0: expected greater than 0"),
        ("lora: 8", "{path}:3: lora=8: expected a section with lora.r, "),
        ("train: {weight_decay: .inf}", "{path}:3: train.weight_decay=Infinity: expected a finite number"),
        (
            "train: {lr_scheduler_type: cosin}",
            "{path}:3: train.lr_scheduler_type=\"cosin\": expected 'linear', ",
        ),
        (
            "train: {eval_strategy: steps}",
            "{path}:3: train: eval_strategy=steps needs eval_steps; add eval_steps: 100",
        ),
        ("train: {save_steps: 9}", "{path}:3: train: save_steps=9 has no effect with save_strategy=epoch; "),
        (
            "log: {profile_steps: [13, 10]}",
            "{path}:3: log: profile_steps=[13, 10] has the last step before the first; ",
        ),
        ("seed: 1\nseed: 2", "{path}:4: seed stands twice (first at {path}:3); keep one"),
        ("lora: &a [*a]", "{path}:3: lora contains itself; write the value out"),
        ("lora: [", "{path}:3: not valid YAML: "),
        ("x: \x00", "{path}: not valid YAML: unacceptable character #x0000"),
        ("? [1]\n: 2", "{path}:3: a key must be a word"),
    ],
)
def test_refusals_name_place_key_value_and_cure(write, text, line):
    path = write(MINIMAL + text)
    expected = line.format(path=path)
    assert refusal(path)[0].startswith(expected)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("lora.rnak=3", "command line: lora.rnak=3: no such key; lora has: r, lora_alpha, "),
        ("lora", "command line: 'lora' is no key=value; write it like lora.r=32"),
        ("lora=3", "command line: lora is a section; set one of its keys: lora.r, "),
        ("lora.r=x", 'command line: lora.r="x": expected an integer'),
        ("data.train=3.5", None),
    ],
)
def test_refused_overrides_name_the_command_line(write, override, line):
    path = write(MINIMAL)
    if line is None:  # text is wanted: what looks like a number is a file's name
        assert load_config(path, [override]).data.train == "3.5"
    else:
        assert refusal(path, [override])[0].startswith(line)


def test_every_problem_of_a_file_is_named_at_once(write):
    assert len(refusal(write("lora: {rank: 1, r: x}\ncolour: red\n"))) == 5  # and model and data are missing


def test_a_config_that_is_not_there_or_not_a_file_is_refused_in_one_line(tmp_path):
    assert refusal(tmp_path / "no.yaml")[0].startswith(f"no config file {tmp_path / 'no.yaml'} (looked in ")
    (tmp_path / "my.yaml").touch()
    assert refusal(tmp_path / "my")[0].endswith(f"; did you mean {tmp_path / 'my.yaml'}?")
    assert refusal(tmp_path) == [f"cannot read config {tmp_path}: Is a directory"]
    (tmp_path / "gbk.yaml").write_bytes("run_dir: 运行".encode("gb18030"))
    assert refusal(tmp_path / "gbk.yaml") == [
        f"{tmp_path / 'gbk.yaml'}: not UTF-8 text at byte 9; save the file as UTF-8"
    ]
    (tmp_path / "list.yaml").write_text("- 1")
    assert refusal(tmp_path / "list.yaml") == [
        f"{tmp_path / 'list.yaml'}: expected `key: value` lines, found [1]"
    ]


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_numbers_are_read_as_people_write_them(write, text):
    assert load_config(write(MINIMAL + f"train: {{learning_rate: {text}}}")).train.learning_rate == 1e-4


def test_text_that_yaml_1_1_would_change_stays_text(write):
    config = load_config(write("model: {name_or_path: on}\ndata: {train: 2026-01-01}\nrun_dir: no\n"))
    assert (config.model.name_or_path, config.data.train, config.run_dir) == ("on", "2026-01-01", "no")


@pytest.mark.parametrize(
    ("raw", "value"),
    [("null", None), ("~", None), ("#1", "#1"), ("a #1", "a #1"), ("'a b '", "a b "), ("7", "7")],
)
def test_a_name_on_the_command_line_means_what_it_says(write, raw, value):
    assert load_config(write(MINIMAL), [f"log.wandb_name={raw}"]).log.wandb_name == value


@given(
    st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40).filter(
        lambda t: t[0] not in "\"'"
    )
)
def test_any_text_survives_an_override(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("c") / "my.yaml"
    path.write_text(MINIMAL)
    assert load_config(path, [f"log.wandb_project={text}"]).log.wandb_project == text


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads_and_survives_a_round_trip(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config))
    assert load_config(copy) == config
    text = path.read_text()
    assert text.startswith("# ")
    assert text.count("#") >= 3, "a shipped config explains itself"


def test_differences_are_named_by_key(write):
    path = write(MINIMAL)
    changed = load_config(path, ["lora.r=8", "data.max_length=512"])
    assert differences(load_config(path), changed) == {"lora.r": (16, 8), "data.max_length": (2048, 512)}


def test_a_config_cannot_be_changed(write):
    with pytest.raises(ValueError, match="frozen"):
        load_config(write(MINIMAL)).lora.r = 3


def test_the_json_schema_for_editors_is_current():
    assert json.loads((ROOT / "configs" / "schema.json").read_text()) == Config.model_json_schema(), (
        "run `make schema`"
    )


def test_the_page_of_keys_is_current_and_every_key_has_a_kind():
    assert (ROOT / "docs" / "config.md").read_text() == as_markdown(), "run `make schema`"
    assert [key for key, field in FIELDS.items() if kind_of(field) == "anything"] == []


def test_keys_say_since_when_they_are_there():
    """What a run of 0.1 wrote down has all keys of 0.1."""
    old = yaml.safe_load((ROOT / "tests/end_to_end/of_0.1/old/config.yaml").read_text())
    first = {f"{section}.{key}" for section in SECTIONS for key in old[section]} | {"run_dir"}
    found = {key for key, field in FIELDS.items() if since(field) == FIRST}
    assert found == first, "mark a new key in configs/schema.py: json_schema_extra=SINCE_0_2"


def test_keys_name_what_they_are_refused_with(qwenlora):
    said = qwenlora("config", "keys", "use_dora").stdout
    assert said.splitlines()[1:] == [
        "    Weight-decomposed LoRA. (since 0.1)",
        "    Refused: `zero3`, `fsdp` with `lora.use_dora`.",
    ]
    named = {rule.name for key in FIELDS for rule in rules_of(key)}
    assert named == {rule.name for rule in RULES}


def test_keys_are_listed_by_a_part_of_their_name(qwenlora):
    said = qwenlora("config", "keys", "checkpointing").stdout
    assert said.startswith("train.gradient_checkpointing: a whole number or true, false or auto = auto\n")
    assert said.count("\n") < 8
    refused = qwenlora("config", "keys", "max_lenght")
    assert refused.returncode == 2
    assert refused.stderr == "error: no key has max_lenght in its name; did you mean max_length?\n"


def test_every_key_is_described():
    for name, section in Config.model_json_schema()["$defs"].items():
        for key, value in section["properties"].items():
            assert value.get("description"), f"{name}.{key}"


def test_loading_a_config_imports_no_torch(tmp_path):
    code = (
        "import sys; from qwenlora.configs import load_config; load_config(sys.argv[1]); print('torch' in"
        " sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "configs/tiny.yaml")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == "False\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train: {path: a, wieght: 2}", "my.yaml:3: data.train.wieght=2: no such key; did you mean weight?"),
        ("train: [x, {path: a, weight: 0}]", "my.yaml:3: data.train[1].weight=0: expected greater than 0"),
        (
            "train: [{weight: 2}]",
            "my.yaml:3: data.train[0]: path is missing: a file, a folder, a glob, a hub name",
        ),
        (
            "train: [{path: a, split_of: b}]",
            "my.yaml:3: data.train[0].split_of=b: no such key; did you mean split?",
        ),
        (
            "train: 5",
            "my.yaml:3: data.train=5: expected a name, {path: ..., weight: ...}, or a list of these",
        ),
        ("train: []", "my.yaml:3: data.train=[]: expected at least 1 item after validation"),
        (
            "train: {path: a, roles: {bot: x}}",
            "my.yaml:3: data.train.roles.bot=x: expected 'system', 'user', ",
        ),
    ],
)
def test_a_mistake_in_a_source_of_rows_is_named_with_its_place(tmp_path, line, message):
    (tmp_path / "my.yaml").write_text(f"model: {{name_or_path: tiny}}\ndata:\n  {line}\n")
    with pytest.raises(ValueError, match=".") as caught:
        load_config(tmp_path / "my.yaml")
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


def test_a_list_with_a_mistake_on_the_command_line_is_no_text(tmp_path):
    (tmp_path / "my.yaml").write_text("model: {name_or_path: tiny}\ndata: {train: x}\n")
    with pytest.raises(
        ValueError, match=r"command line: data\.train\.wieght=2: no such key; did you mean weight\?"
    ):
        load_config(tmp_path / "my.yaml", ["data.train={path: a, wieght: 2}"])
    assert load_config(tmp_path / "my.yaml", ["log.wandb_name={x}"]).log.wandb_name == "{x}"


def test_sources_of_rows_are_written_out_and_read_back(tmp_path):
    (tmp_path / "my.yaml").write_text(
        "model: {name_or_path: tiny}\ndata: {train: [a.jsonl, {path: b.csv, weight: 2}]}\n"
    )
    config = load_config(tmp_path / "my.yaml")
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert config.data.train[1].weight == 2.0


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (
            "a:\n  b: 1\n   c: 2\n",
            3,
            "indented further than the line above it, which is no section; indent the",
        ),
        (
            "a: 1\n  b: 2\n",
            2,
            "indented further than the line above it, which is no section; indent them alike: b",
        ),
        (
            "a:\n  b: 1\n c: 2\n",
            3,
            "indented unlike the lines of its section, which begins in line 1; indent th",
        ),
        (" a: 1\nb: 2\n", 2, "indented unlike the first line; indent them alike: b: 2"),
        ("a:\n\tb: 1\n", 2, "a tab; indent with spaces: b: 1"),
        ("a:\n  - x\n  b: 1\n", 3, "a key among the items of a list; indent it as its section: b: 1"),
        ("a: b: c\n", 1, "a value with a colon and a space; put it in quotes: a: b: c"),
        ("a\nb: 1\n", 2, "the line above it has no colon and space after its key: b: 1"),
        ("a：1\nb: 2\n", 2, "the line above it has no colon and space after its key: b: 2"),
        ("a: 1\n\nb\n", 3, "a key without a colon: b"),
        ("a: [1, 2\nb: 3\n", 2, "a comma, or the ] of what begins in line 1, is missing before it: b: 3"),
        (
            "a: {b: 1 c: 2}\n",
            1,
            "a comma, or the } of what begins in line 1, is missing before it: a: {b: 1 c: 2}",
        ),
        ("a: [\n", 1, "a [ or { that is not closed: a: ["),
        ("b: 1\na: 'x\nc: 1\n", 2, "a quote that is not closed: a: 'x"),
        ("a: 'it's'\n", 1, "text after the end of a value; put it all in quotes: a: 'it's'"),
        ('a: "x\\q"\n', 1, 'a \\q in double quotes; use single ones, or \\\\q: a: "x\\q"'),
        ("a: @x\n", 1, "a value that begins with @; put it in quotes: a: @x"),
        ("a: *x\n", 1, "*x names nothing; put it in quotes: a: *x"),
        ("a: !foo 1\n", 1, "!foo is not known; put the value in quotes: a: !foo 1"),
        ("a: 1\n}\n", 2, "a } that closes nothing; remove it: }"),
        ("a: {b: 1,, c: 2}\n", 1, "no value before the ,: a: {b: 1,, c: 2}"),
        ("a: 1\n---\nb: 2\n", 2, "a second document begins; keep one: ---"),
    ],
)
def test_what_is_no_yaml_is_told_in_words_of_a_config(write, text, line, words):
    path = write(text)
    (found,) = refusal(path)
    assert found.startswith(f"{path}:{line}: not valid YAML: {words}")


@given(st.text(alphabet="ab:-[]{}'\"\n\t #*&!%@,|>1", max_size=30))
def test_yaml_of_any_kind_is_read_or_refused_with_a_line_of_it(text):
    try:
        parse_yaml(text, "my.yaml")
        return
    except ValueError as error:
        said = str(error)
    assert "\n" not in said
    if place := re.match(r"my\.yaml:(\d+): ", said):
        assert 1 <= int(place[1]) <= max(1, text.count("\n") + 1)
