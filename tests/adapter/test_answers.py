"""What is asked of generate is what was said, and a template that refuses is a line."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qwenlora.adapter.answers import (
    Question,
    Sampling,
    generate_answers,
    generate_arguments,
    prompt_of,
    question_of,
)
from qwenlora.adapter.loading import load
from qwenlora.adapter.subject import find
from qwenlora.data.rows import Row

FIVE = [
    Question([{"role": "user", "content": text}]) for text in ("a", "几点开门？", "b c d e f g", "好", "why?")
]


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def loaded(tiny):
    return load(find(str(tiny)))


def test_every_option_reaches_generate(tokenizer):
    drawn = generate_arguments(tokenizer, Sampling(7, 0.5, 0.8, 20, 1.3))
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert drawn == {
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.3,
        "max_new_tokens": 7,
        "eos_token_id": ends,
        "pad_token_id": tokenizer.pad_token_id,
    }
    greedy = generate_arguments(tokenizer, Sampling(7, 0.0, 0.8, 20, 1.3))
    assert greedy == drawn | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def test_a_template_that_refuses_is_a_line(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system\nturns') }}"
    with pytest.raises(ValueError, match="the model's chat template refuses this: no system turns"):
        prompt_of(tokenizer, Question([{"role": "user", "content": "a"}]))


def test_what_a_models_own_generation_config_asks_for_changes_no_answer(tiny, tmp_path):
    asked = [Question([{"role": "user", "content": text}]) for text in ("a", "几点开门？")]

    def said(folder):
        return [one.text for one in generate_answers(*load(find(str(folder))), asked, Sampling(8), "")]

    plain = said(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    first = AutoTokenizer.from_pretrained(tiny)(plain[0], add_special_tokens=False)["input_ids"][0]
    model.generation_config = GenerationConfig(
        suppress_tokens=[first],
        bad_words_ids=[[first]],
        num_beams=2,
        no_repeat_ngram_size=1,
        min_new_tokens=8,
    )
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    assert said(tmp_path) == plain


def test_a_full_gpu_is_asked_fewer_questions_at_once(loaded, monkeypatch):
    sizes = []

    def full_above_two(input_ids, **options):
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError
        return generate(input_ids=input_ids, **options)

    alone = [next(generate_answers(*loaded, [one], Sampling(4), "")) for one in FIVE]
    generate = loaded.model.generate
    monkeypatch.setattr(loaded.model, "generate", full_above_two)
    assert list(generate_answers(*loaded, FIVE, Sampling(4), "", batch_size=5)) == alone
    assert sizes == [5, 2, 2, 1]


def test_a_gpu_that_is_full_with_one_question_is_a_line(loaded, monkeypatch):
    def full(**options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(loaded.model, "generate", full)
    with pytest.raises(ValueError, match="the GPU is full with one question; shorten it"):
        list(generate_answers(*loaded, FIVE, Sampling(4), ""))


def test_an_answer_ends_where_the_models_context_does(loaded, tokenizer, monkeypatch):
    lengths = [
        len(tokenizer(prompt_of(tokenizer, one), add_special_tokens=False)["input_ids"]) for one in FIVE
    ]
    monkeypatch.setattr(loaded.model.config, "max_position_embeddings", max(lengths) + 2)
    together = generate_answers(*loaded, FIVE, Sampling(64), "")
    for question, length, one in zip(FIVE, lengths, together, strict=True):
        alone = next(generate_answers(*loaded, [question], Sampling(max(lengths) + 2 - length), ""))
        assert (alone.text, one.cut) == (one.text, True)


def test_thoughts_are_told_from_answers_and_ends_from_cuts(loaded, tokenizer, monkeypatch):
    def said(*texts):
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        width = max(map(len, ids))
        rows = torch.tensor([[*row, *[tokenizer.pad_token_id] * (width - len(row))] for row in ids])
        monkeypatch.setattr(loaded.model, "generate", lambda input_ids, **_: torch.cat([input_ids, rows], 1))
        return list(generate_answers(*loaded, FIVE[: len(texts)], Sampling(64), ""))

    ended, cut = said(
        "<think>\nhm\n</think>\n\nyes<|im_end|>", "<think>\nhm, so and so and so and so, and so"
    )
    assert ended == ("<think>\nhm\n</think>\n\nyes", "hm", "yes", False)
    assert cut[1:] == ("hm, so and so and so and so, and so", "", True)


def test_a_reference_is_what_comes_after_the_thought():
    said = "<think>\nhm\n</think>\n\nyes, <b>\n"
    row = Row(0, [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}])
    assert question_of(row).reference == "yes, <b>"
    assert question_of(row._replace(messages=row.messages[1:])) is None
