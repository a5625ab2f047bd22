"""`qwenlora compare`: the same questions to a base and to what was made of it."""

import io
import json
import random
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from run_facts import make_facts
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from qwenlora.adapter.answers import Question
from qwenlora.adapter.compare import losses, side_by_side
from qwenlora.adapter.compare.compare import columns_of, compare
from qwenlora.adapter.compare.questions import CompareOptions, choose_questions
from qwenlora.adapter.subject import find
from qwenlora.configs.load import to_yaml
from qwenlora.configs.schema import Config, Data, Lora, Model
from qwenlora.data import sources
from qwenlora.data.prepared import files_key
from qwenlora.data.rows import Row
from qwenlora.run.comparison import AnsweredQuestion, ComparedModel, Comparison, Measure
from qwenlora.run.folder import RunFolder
from qwenlora.trainer.loop import chunked_loss

PAIRS = {
    "早上几点开门？": "上午九点。",
    "几天能退货？": "签收后15天内。",
    "Do you ship abroad?": "Not yet.",
    "一天刷几次牙？": "早晚各一次。",
    "Is it free?": "Yes, always.",
    "牙刷多久换？": "三个月换一把。",
}
OTHERS = {"什么时候开始营业？": "上午九点。", "Does it cost anything?": "Yes, always."}
QUICK = {"limit": 6, "max_new_tokens": 12, "samples": 4, "show": 0}


def write_rows(file, pairs):
    file.write_text("".join(json.dumps({"query": q, "response": a}) + "\n" for q, a in pairs.items()))
    return str(file)


def random_adapter(folder, base, **settings):
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", **({"r": 4, "target_modules": ["q_proj", "down_proj"]} | settings)
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for values in model.parameters():
        if values.requires_grad:
            values.data += 0.05 * torch.randn_like(values)
    model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


def small_qwen2(folder, tiny):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=2048, num_hidden_layers=2, max_position_embeddings=512, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Return the folder of a run that knows PAIRS by heart, and OTHERS is what it was evaluated on."""
    folder = tmp_path_factory.mktemp("compared") / "mine"
    folder.mkdir()
    data = Data(
        train=write_rows(folder.parent / "rows.jsonl", PAIRS),
        eval=write_rows(folder.parent / "others.jsonl", OTHERS),
    )
    lora = Lora(r=32, lora_alpha=64)
    config = Config(run_dir=str(folder), model=Model(name_or_path=str(tiny)), data=data, lora=lora)
    (folder / "config.yaml").write_text(to_yaml(config))
    torch.manual_seed(0)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny),
        LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64, target_modules=modules),
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = [Row(0, list(said(q, a))) for q, a in PAIRS.items()]
    batch = losses.collate(losses.trained_tokens(tokenizer, rows, data), tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0)
    for _ in range(40):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    model.save_pretrained(folder / "adapter")
    return folder


def said(question, answer):
    yield {"role": "user", "content": question}
    yield {"role": "assistant", "content": answer}


@pytest.fixture(scope="module")
def compared(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("output") / "c.json"
    assert compare([find(str(run))], CompareOptions(output=output, **QUICK)) == 0
    return Comparison.read(output)


def value(compared, name, measure, subject):
    (found,) = (one for one in compared.measures if (one.set, one.measure) == (name, measure))
    return found.values[[one.label for one in compared.subjects].index(subject)]


def test_what_was_learnt_is_told_from_what_was_not(compared):
    assert [(one.label, one.adapter) for one in compared.subjects] == [("base", None), ("mine", "adapter")]
    assert value(compared, "training", "exact", "base") == 0
    assert value(compared, "training", "exact", "mine") == 1
    assert value(compared, "training", "similarity", "base") < 0.3
    assert value(compared, "training", "similarity", "mine") == 1
    assert value(compared, "training", "loss", "mine") < 0.1 < 5 < value(compared, "training", "loss", "base")
    assert value(compared, "evaluation", "exact", "mine") < 1
    assert value(compared, "general", "right", "base") == 0
    assert value(compared, "general", "perplexity", "base") > 1
    assert value(compared, "repeated", "different", "base") == 4
    assert value(compared, "repeated", "holds", "mine") == 1


def test_every_answer_is_kept_beside_its_reference(compared):
    rows = [one for one in compared.answers if one.set == "training"]
    assert {row.question: row.reference for row in rows} == PAIRS
    for row in rows:
        assert row.answers[1] == row.reference
        assert row.right == [False, True]
    assert next(one.kind for one in compared.answers if one.set == "general") == "greeting"
    assert len([one for one in compared.answers if one.set == "repeated"]) == 4


def test_the_last_line_is_for_scripts_and_nothing_is_coloured_in_a_file(run, capsys):
    compare([find(str(run))], CompareOptions(**QUICK | {"samples": 0, "show": 2}))
    shown = capsys.readouterr()
    assert shown.out.endswith(
        "base itself passes none of the general questions: they tell nothing here\n"
        "exact answers to training questions: base 0 of 6 (0.0%), mine 6 of 6 (100.0%)\n"
    )
    assert "\x1b" not in shown.out
    assert shown.err == ""
    (run / "comparison.json").unlink()


def test_two_calls_differ_in_nothing_but_the_time(run, compared, tmp_path):
    compare([find(str(run))], CompareOptions(output=tmp_path / "c.json", **QUICK))
    assert Comparison.read(tmp_path / "c.json").model_copy(update={"made": compared.made}) == compared
    assert json.loads((tmp_path / "c.json").read_text())["format"] == 1


def test_another_seed_draws_other_answers_and_changes_nothing_else(run, compared, tmp_path):
    compare([find(str(run))], CompareOptions(output=tmp_path / "c.json", seed=1, **QUICK))
    other = Comparison.read(tmp_path / "c.json")
    assert other.seed == 1
    for one, another in zip(compared.answers, other.answers, strict=True):
        assert (one == another) == (one.set != "repeated")


def test_the_batch_size_changes_nothing(run, tmp_path):
    """Questions of different lengths are padded together, or not at all."""
    found = []
    for size in (1, 7):
        compare(
            [find(str(run))],
            CompareOptions(output=tmp_path / f"{size}.json", batch_size=size, **QUICK | {"samples": 0}),
        )
        found.append(Comparison.read(tmp_path / f"{size}.json"))
    assert found[0].answers == found[1].answers
    for one, another in zip(found[0].measures, found[1].measures, strict=True):
        assert one.values == pytest.approx(another.values, rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [5, 300, 301, 302]},
    ],
    ids=["lora", "embeddings trained", "lora on embeddings", "dora", "bias", "pissa", "some tokens"],
)
def test_the_base_is_asked_as_if_there_were_no_adapter(tiny, tmp_path, settings):
    if "bias" in settings:  # which Qwen3 has not
        tiny = small_qwen2(tmp_path / "qwen2", tiny)
    adapter = random_adapter(tmp_path / "adapter", tiny, **settings)
    question = {"question": "几点开门？", **QUICK}
    compare([find(adapter)], CompareOptions(output=tmp_path / "with.json", **question))
    compare([find(str(tiny))], CompareOptions(output=tmp_path / "alone.json", **question))
    both, alone = (Comparison.read(tmp_path / f"{name}.json") for name in ("with", "alone"))
    assert [one.answers[0] for one in both.answers] == [one.answers[0] for one in alone.answers]
    assert [one.values[0] for one in both.measures] == [one.values[0] for one in alone.measures]
    assert any(one.answers[0] != one.answers[1] for one in both.answers)


@pytest.mark.parametrize(
    "settings",
    [{}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}],
    ids=["lora", "embeddings"],
)
def test_the_loss_is_that_of_the_model_itself(tiny, tmp_path, settings, monkeypatch):
    """Logits made of trained tokens alone, three at a time, against the model's own over the whole."""
    adapter = random_adapter(tmp_path / "adapter", tiny, **settings)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), adapter).eval()
    monkeypatch.setattr(chunked_loss, "LOGITS_AT_ONCE", 3 * 4 * model.config.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = [Row(0, [*said(q, a), *said("还有吗？", a)]) for q, a in PAIRS.items()]
    tokens = losses.trained_tokens(tokenizer, rows, Data(train="example"))
    batch = losses.collate(tokens, tokenizer.pad_token_id)
    with torch.no_grad():
        own = model(**batch).loss.item()
    for size in (1, 4, 40):
        found = losses.mean_loss(model, tokens, tokenizer.pad_token_id, "", batch_size=size)
        assert found == pytest.approx(own, rel=1e-5)
    assert losses.mean_loss(model, [], tokenizer.pad_token_id, "", batch_size=4) is None


def test_perplexity_is_of_the_answer_alone(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    asked_ = [Question([{"role": "user", "content": text}]) for text in ("你好", "Hello!", "再见")]
    first, second = losses.answer_tokens(tokenizer, asked_, ["上午九点。", "Not yet.", ""])
    assert tokenizer.decode(first.ids[first.trained]) == "上午九点。"
    assert tokenizer.decode(second.ids[second.trained]) == "Not yet."
    assert tokenizer.decode(second.ids).endswith("<|im_start|>assistant\nNot yet.")
    assert losses.perplexity(None) is None
    assert losses.perplexity(0.0) == 1
    assert losses.perplexity(1e6) < float("inf")


def test_rows_count_as_training_saw_them(tiny):
    """One that was cut is cut; one that was left out is left out."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = [
        Row(0, list(said("几点？", "九点。"))),
        Row(0, list(said("几点？", "上午九点开门，晚上九点关门。" * 9))),
    ]
    data = Data(train="example", max_length=32, overlength="truncate")
    assert [len(one.ids) for one in losses.trained_tokens(tokenizer, rows, data)][1] == 32
    data = data.model_copy(update={"overlength": "drop"})
    assert len(losses.trained_tokens(tokenizer, rows, data)) == 1


def test_runs_on_one_base_share_its_column_and_are_told_apart(run, tiny, tmp_path):
    shutil.copytree(run, tmp_path / "mine")
    shutil.copytree(run / "adapter", tmp_path / "mine" / "checkpoint-3")
    shutil.copytree(tiny, tmp_path / "moved base")
    random_adapter(tmp_path / "adapter", tmp_path / "moved base")
    named = [run, tmp_path / "mine", tmp_path / "mine" / "checkpoint-3", tmp_path / "adapter", tiny]
    columns = columns_of([find(str(path)) for path in named])
    assert [(one.label, one.tuned) for one in columns] == [
        ("base", False),
        ("mine", True),
        ("mine (2)", True),
        ("mine/checkpoint-3", True),
        ("adapter", True),
    ]


def test_each_base_has_a_column(run, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    adapter = random_adapter(tmp_path / "adapter", tmp_path / "other")
    columns = columns_of([find(str(run)), find(adapter), find(str(tmp_path / "other"))])
    assert [one.label for one in columns] == ["base of mine", "mine", "base of adapter", "adapter"]
    assert [one.label for one in columns_of([find(str(tmp_path / "other"))])] == ["other"]


def test_several_subjects_are_asked_the_first_runs_questions(run, tiny, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "second")
    adapter = random_adapter(tmp_path / "adapter", tiny)
    compare(
        [find(adapter), find(str(run)), find(str(tmp_path / "second"))],
        CompareOptions(**QUICK | {"samples": 0, "limit": 2}),
    )
    out = capsys.readouterr().out
    assert "the training questions are those of mine: data.train=" in out
    assert "base 0 of 2 (0.0%), adapter 0 of 2 (0.0%), mine 2 of 2 (100.0%), second 2 of 2 (100.0%)\n" in out
    assert (tmp_path / "second" / "comparison.json").is_file(), "of the last run"
    assert not (run / "comparison.json").exists()
    kept = Comparison.read(tmp_path / "second" / "comparison.json")
    assert [one.label for one in kept.subjects if one.own] == ["second"]
    assert str(tmp_path) not in (tmp_path / "second" / "comparison.json").read_text()


def choose(subjects, **options):
    options = {"limit": 500, "rephrased": None, "general": None, "question": None, "samples": 3} | options
    return choose_questions([find(str(path)) for path in subjects], CompareOptions(**options))


def sizes(found):
    return {one.name: len(one.questions) for one in found.sets}


def test_evaluation_questions_are_those_that_were_not_trained(run, tmp_path):
    def asked_of(folder):
        sets = {one.name: {q.messages[-1]["content"] for q in one.questions} for one in choose([folder]).sets}
        return sets["training"], sets["evaluation"]

    assert asked_of(run) == (set(PAIRS), set(OTHERS))
    shutil.copytree(run, tmp_path / "parted")
    data = Data(train=find(str(run)).config.data.train, eval_fraction=0.4)
    config = find(str(run)).config.model_copy(update={"data": data})
    (tmp_path / "parted" / "config.yaml").write_text(to_yaml(config))
    trained, evaluated = asked_of(tmp_path / "parted")
    assert evaluated
    assert not trained & evaluated
    assert trained | evaluated == set(PAIRS)


def test_perplexity_is_of_the_first_ones_answers_under_each(run, tmp_path, monkeypatch):
    seen = []
    made = losses.answer_tokens

    def recorded(tokenizer, questions, answers):
        seen.append(list(answers))
        return made(tokenizer, questions, answers)

    monkeypatch.setattr(losses, "answer_tokens", recorded)
    compare([find(str(run))], CompareOptions(output=tmp_path / "c.json", **QUICK))
    found = Comparison.read(tmp_path / "c.json")
    firsts = [row.answers[0] for row in found.answers if row.set == "general"]
    assert seen == [firsts, firsts]
    assert firsts != [row.answers[1] for row in found.answers if row.set == "general"]


def test_what_is_asked_follows_from_the_runs_data(run, tiny, tmp_path):
    assert sizes(choose([run])) == {"training": 6, "evaluation": 2, "general": 60, "repeated": 3}
    file = tmp_path / "rephrased.jsonl"
    write_rows(file, OTHERS)
    assert sizes(choose([run], rephrased=file, samples=0)) == {"training": 6, "rephrased": 2, "general": 60}
    assert sizes(choose([tiny])) == {"general": 60}
    assert "no training questions: name a run" in choose([tiny]).notes[0]
    assert sizes(choose([tiny], rephrased=file)) == {"rephrased": 2, "general": 60, "repeated": 3}
    shutil.copytree(run, tmp_path / "example")
    config = Config(run_dir=".", model=Model(name_or_path=str(tiny)), data=Data(train="example"))
    (tmp_path / "example" / "config.yaml").write_text(to_yaml(config))
    found = choose([tmp_path / "example"], limit=30)
    assert sizes(found) == {"training": 30, "rephrased": 20, "general": 30, "repeated": 3}
    kinds = {check.kind for one in found.sets for check in one.checks}
    assert len(kinds) == 8, "a limit leaves some of each kind"


def test_a_run_whose_data_changed_since_is_warned_of(run, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(run, folder)
    rows = write_rows(tmp_path / "rows.jsonl", PAIRS)
    config = find(str(run)).config.model_copy(update={"run_dir": str(folder), "data": Data(train=rows)})
    (folder / "config.yaml").write_text(to_yaml(config))
    key = files_key(sources.find(config.data), tmp_path / ".prepared")
    RunFolder(folder).write_facts(make_facts(files_key=key))
    assert not any("changed" in note for note in choose([folder]).notes)
    write_rows(tmp_path / "rows.jsonl", PAIRS | {"Is it free?": "No."})
    assert choose([folder]).notes[0] == (
        "warning: mine's data files changed since it was trained; the questions may not be those that it"
        " learnt"
    )


def test_a_run_whose_rows_are_gone_is_asked_the_other_questions(run, tmp_path):
    shutil.copytree(run, tmp_path / "moved")
    config = find(str(run)).config.model_copy(update={"data": Data(train="gone.jsonl")})
    (tmp_path / "moved" / "config.yaml").write_text(to_yaml(config))
    found = choose([tmp_path / "moved"])
    assert sizes(found) == {"general": 60}
    (note,) = found.notes
    assert "no training questions: data.train=gone.jsonl: no such file (looked for " in note
    assert note.endswith("; --rephrased FILE asks some")


def test_a_run_on_text_without_questions_is_asked_the_general_ones(run, tmp_path):
    shutil.copytree(run, tmp_path / "text")
    rows = tmp_path / "text.jsonl"
    rows.write_text('{"text": "春眠不觉晓"}\n')
    config = find(str(run)).config.model_copy(update={"data": Data(train=str(rows))})
    (tmp_path / "text" / "config.yaml").write_text(to_yaml(config))
    found = choose([tmp_path / "text"])
    assert sizes(found) == {"general": 60}
    assert "begins with a question" in found.notes[0]
    assert "--rephrased FILE" in found.notes[1]


def test_a_question_that_is_known_brings_its_reference(run):
    one = choose([run], question=" Is it free?").sets[-1].questions[0]
    assert one.reference == "Yes, always."
    one = choose([run], question="Is it blue?").sets[-1].questions[0]
    assert (one.messages, one.reference) == ([{"role": "user", "content": "Is it blue?"}], "")
    with pytest.raises(ValueError, match=r"--question contains <\|im_end\|>, which would forge a turn"):
        choose([run], question="a<|im_end|>")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"output": "there.json"}, "--output .*there.json is there already"),
        ({"output": "no/c.json"}, "there is no folder .*no; make it first"),
        ({"rephrased": "no.jsonl"}, "--rephrased .*no.jsonl: no such file"),
        ({"rephrased": "there.json"}, "unknown shape with keys a"),
        ({"rephrased": "text.jsonl"}, "no row begins with a question"),
        ({"general": "there.json"}, "there.json:1: id is missing"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(run, tmp_path, option, said, monkeypatch):
    monkeypatch.setattr("qwenlora.adapter.compare.compare.load", None)
    (tmp_path / "there.json").write_text('{"a": 1}\n')
    (tmp_path / "text.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=said):
        compare([find(str(run))], CompareOptions(**{key: tmp_path / name for key, name in option.items()}))


def test_a_broken_second_adapter_is_refused_before_the_first_is_asked(run, tmp_path, monkeypatch):
    monkeypatch.setattr("qwenlora.adapter.compare.compare.load", None)
    shutil.copytree(run / "adapter", tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="broken"):
        compare([find(str(run)), find(str(tmp_path / "broken"))])


def test_a_run_that_cannot_be_written_to_is_compared_all_the_same(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "full")
    (tmp_path / "full" / "comparison.json").mkdir()
    assert compare([find(str(tmp_path / "full"))], CompareOptions(**QUICK | {"samples": 0, "limit": 1})) == 0
    shown = capsys.readouterr()
    assert "warning: " in shown.err
    assert "--output FILE names another" in shown.err
    assert shown.out.endswith("full 1 of 1 (100.0%)\n")


def test_references_longer_than_answers_may_be_are_spoken_of(run, capsys):
    compare([find(str(run))], CompareOptions(**QUICK | {"samples": 0, "max_new_tokens": 3}))
    (run / "comparison.json").unlink()
    assert (
        "have references longer than --max-new-tokens 3: answers to them are cut" in capsys.readouterr().out
    )


def made_up(answers, labels=("base", "tuned")):
    return Comparison(
        subjects=[ComparedModel(label=label) for label in labels],
        measures=[
            Measure(
                set="training",
                measure="exact",
                kind="share",
                better="higher",
                count=1,
                values=[0.5] * len(labels),
            )
        ],
        answers=[
            AnsweredQuestion(
                set="training",
                question="几点？",
                reference="九点",
                answers=list(answers),
                right=[True] * len(answers),
            )
        ],
    )


def shown(compared, width, **settings):
    console = Console(file=io.StringIO(), width=width, highlight=False, **settings)
    side_by_side.print_comparison(compared, 3, console)
    return console.file.getvalue()


def test_what_a_model_says_does_not_reach_the_terminal_as_commands():
    out = shown(
        made_up(["\x1b]0;title\x07\x1b[2J[bold]a[/]\r\x9b5mb", "\u202ecba[/red]"]), 160, force_terminal=True
    )
    for forbidden in ("\x1b]", "\x1b[2J", "\x07", "\r", "\x9b", "\u202e"):
        assert forbidden not in out
    assert "[bold]a[/]" in out
    assert "cba[/red]" in out


def test_answers_are_beside_each_other_where_there_is_room_and_below_where_not():
    compared = made_up(["甲" * 30, "word " * 12])
    wide, narrow = shown(compared, 160), shown(compared, 80)
    assert any("question" in line and "tuned" in line for line in wide.splitlines())
    first = [line.split()[0] for line in narrow.partition("\n\n")[2].splitlines() if line.strip()]
    assert [word for word in first if word in ("question", "expected", "base", "tuned")] == [
        "question",
        "expected",
        "base",
        "tuned",
    ]
    for width, text in ((160, wide), (80, narrow)):
        assert all(Console().measure(line).maximum <= width for line in text.splitlines())
        assert text.count("甲") == 30, "folded, not cut"


def test_many_subjects_have_their_measures_below_each_other():
    labels = [f"my-run/checkpoint-{number}" for number in range(12)]
    out = shown(made_up(["x"] * 12, labels), 80)
    assert out.count("training questions: 1") > 1
    assert out.count("50.0%") == 12
    for label in labels:
        assert label in out


def test_any_text_can_be_cleaned():
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(
            chr(draw.choice([draw.randrange(0x20), draw.randrange(0x300), 0x4E00])) for _ in range(20)
        )
        cleaned = side_by_side.clean(text)
        assert all(one.isprintable() or one in "\n\u00a0\u00ad" for one in cleaned), repr(cleaned)
