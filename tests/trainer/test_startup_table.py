"""The start-up table and its warnings say what follows from a config."""

import json
from types import SimpleNamespace

import pytest
from made import parameters_of

from qwenlora.configs.schema import Config, Data, Lora, Model, Train
from qwenlora.data.counts import Overlap
from qwenlora.run.folder import RunFolder
from qwenlora.run.records import Facts, SideCounts
from qwenlora.trainer import prepare
from qwenlora.trainer.loop.arguments import training_arguments
from qwenlora.trainer.record import startup_table
from qwenlora.trainer.spread.strategy import Spread

COUNTS = SideCounts(rows=20, read_rows=20, tokens=1000, trained_tokens=400, longest=90, packs=4, sha256="")


def facts_of(
    train: str = "t",
    *,
    evaluation: str = "",
    packing: bool = False,
    packs: str = "",
    notes: tuple[str, ...] = (),
) -> Facts:
    """Return facts of the same counts. train, evaluation, packs: hashes of what is trained on."""
    sides = {"train": COUNTS.model_copy(update={"sha256": train, "packs_sha256": packs})}
    if evaluation:
        sides["eval"] = COUNTS.model_copy(update={"sha256": evaluation})
    return Facts(
        base="base",
        base_fingerprint="f",
        data_folder="d",
        files_key="k",
        data=sides,
        packing=packing,
        bad_rows=0,
        notes=list(notes),
        parameters=parameters_of(990, 10, 900, 90, 2, 8, 16, 4, 16, 0, 0),
        checkpoint_bytes=3_000_000,
    )


@pytest.fixture
def known(tmp_path):
    def known(lora=None, data=None, packing=False, notes=(), **train):
        config = Config(
            run_dir="unused",
            model=Model(name_or_path="some/base"),
            data=data or Data(train="my.jsonl"),
            lora=lora or Lora(),
            train=Train(**{"global_batch_size": 16, "per_device_train_batch_size": 2} | train),
        )
        facts = facts_of(packing=packing, notes=notes)
        arguments = training_arguments(config, RunFolder(tmp_path), facts.units, 2, evaluates=False)
        return config, facts, arguments

    return known


def test_the_table_counts_what_the_run_will_do(known):
    table = startup_table.rows(*known(num_train_epochs=3.0), world_size=2, spread=Spread("fsdp", (2, 8)))
    assert table["processes"] == "2 x CPU, fsdp in 2 groups of 8"
    assert table["trainable"].startswith("10 parameters = 1.00% (r 16, alpha 32, all-linear)")
    assert table["data"] == "my.jsonl: 20 rows, 1,000 tokens, 40% of them trained, the longest row 90"
    assert table["global batch"] == "16 rows = 2 processes x 2 x 4 accumulated, about 800 tokens a step"
    assert table["steps"].startswith("6 (3.00 epochs), warm-up 1, cosine from 0.0002")
    assert table["checkpoints"] == "about 3 MB every epoch, 3 kept"


def test_with_packing_the_table_counts_packs_and_says_how_many_rows_that_is(known):
    data = Data(train="my.jsonl", max_length=256)
    table = startup_table.rows(
        *known(data=data, packing=True, global_batch_size=2, per_device_train_batch_size=1),
        world_size=2,
        spread=Spread(why="strategy.name=auto: ddp, no GPU: the whole model in each process"),
    )
    assert table["processes"] == "2 x CPU, ddp, no GPU: the whole model in each process"
    assert (
        table["global batch"]
        == "2 packs = 2 processes x 1 x 1 accumulated, about 500 tokens in 10 rows a step"
    )
    assert table["packing"] == "4 packs of at most 256 tokens, 97.66% full"
    assert table["steps"].startswith("6 (3.00 epochs)")


def test_nothing_to_warn_of_is_no_warning(known):
    assert startup_table.warnings(*known(), {}, tied=True) == []


@pytest.mark.parametrize(
    ("how", "untrained", "tied", "line"),
    [
        ({"notes": ["3 of 20 train rows truncated"]}, {}, True, "3 of 20 train rows truncated"),
        (
            {"packing": True},
            {},
            True,
            "all rows make 4 packs, fewer than train.global_batch_size=16: every step is a whole",
        ),
        ({"warmup_steps": 50.0}, {}, True, "still warming up (50 steps) when training ends after 6"),
        (
            {"data": Data(train="my.jsonl", eval="example")},
            {},
            True,
            "data.eval is still the example's; set data.eval",
        ),
        (
            {},
            {9: "<|im_end|>"},
            True,
            "this base model never learnt <|im_end|>, which LoRA alone can hardly teach it:",
        ),
        (
            {},
            {9: "<|im_end|>"},
            True,
            "set lora.trainable_token_indices: [9], or start from the -Instruct model",
        ),
        (
            {},
            {7: "<|act_0|>"},
            True,
            "never learnt <|act_0|>, which LoRA alone can hardly teach it: set lora.trainable_token_indices:"
            " [7], or write words that it knows",
        ),
        ({}, dict(enumerate("abcdefg")), True, "never learnt a, b, c, d, e and 2 more, which"),
        (
            {},
            dict(enumerate("abcdefghijklmnopq")),
            True,
            "set lora.modules_to_save: [embed_tokens], or write",
        ),
        ({}, {9: "<|im_end|>"}, False, "indices: {embed_tokens: [9], lm_head: [9]}, or start from"),
        ({"lora": Lora(trainable_token_indices=[9])}, {9: "x", 8: "y"}, True, "never learnt y, which"),
    ],
)
def test_what_deserves_a_warning_gets_one(known, how, untrained, tied, line):
    (warning,) = startup_table.warnings(*known(**how), untrained, tied=tied)
    assert line in warning


@pytest.mark.parametrize("lora", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [9]}])
def test_a_base_whose_embeddings_are_trained_needs_no_warning(known, lora):
    assert startup_table.warnings(*known(lora=Lora(**lora)), {9: "<|im_end|>"}, tied=True) == []


def test_what_is_trained_on_is_both_sides_and_with_packing_the_packs():
    plain = facts_of("t", evaluation="e", packs="p")
    others = [
        facts_of("x", evaluation="e", packs="p"),
        facts_of("t", evaluation="x", packs="p"),
        facts_of("t", evaluation="e", packs="p", packing=True),
        facts_of("t", evaluation="e", packs="x", packing=True),
    ]
    assert len({facts.data_identity for facts in (plain, *others)}) == 5
    assert facts_of("t", evaluation="e", packs="x").data_identity == plain.data_identity
    assert (plain.units, others[2].units) == (20, 4)


@pytest.mark.parametrize(
    ("packing", "gpu", "expected"),
    [("auto", False, False), ("auto", True, True), ("on", False, True), ("off", True, False)],
)
def test_auto_packs_on_a_gpu(monkeypatch, packing, gpu, expected):
    monkeypatch.setattr(prepare.torch.cuda, "is_available", lambda: gpu)
    config = Config(run_dir="x", model=Model(name_or_path="x"), data=Data(train="x", packing=packing))
    assert prepare.packs_rows(config) is expected


def test_a_run_that_was_packed_elsewhere_is_refused_here(tmp_path):
    with pytest.raises(
        ValueError, match=r"with packing on, here it would be off \(data\.packing: auto is on"
    ):
        prepare._refuse_other_data(RunFolder(tmp_path), facts_of(packing=True), facts_of(packing=False))


def test_facts_of_an_older_version_are_read(tmp_path):
    run = RunFolder(tmp_path)
    facts = facts_of()
    older = facts.model_dump(mode="json", exclude={"format"})
    for new in ("hidden_size", "intermediate_size", "kv_width"):
        del older["parameters"][new]
    run.facts.write_text(json.dumps(older))
    then = run.read_facts()
    assert then.parameters.total == facts.parameters.total
    prepare._refuse_other_data(run, then, facts)


def test_what_was_done_to_rows_is_noted():
    cut = {
        "train": {"read_rows": 30, "truncated": 3, "lost_replies": 2},
        "eval": {"read_rows": 30, "dropped": 1},
    }
    rows = SimpleNamespace(
        index=SimpleNamespace(notes=["read as GB18030"], overlap=Overlap(rows=4, first=[7])),
        counts={side: COUNTS.model_copy(update=counts) for side, counts in cut.items()},
        place=lambda side, row: f"{side}.jsonl:{row}",
    )
    config = Config(run_dir="x", model=Model(name_or_path="x"), data=Data(train="x", max_length=99))
    assert prepare.notes_of(config, rows) == [
        "read as GB18030",
        "3 of 30 train rows truncated at data.max_length=99 tokens",
        "2 replies of train rows are not trained: with their question they are longer than"
        " data.max_length=99 tokens; data.split_replies: true trains them without",
        "1 of 30 eval rows dropped at data.max_length=99 tokens",
        "4 of 30 eval rows are trained on, too (first: eval.jsonl:7)",
    ]
