from __future__ import annotations

import pytest
import torch

from compress_peft.data.examples import Example
from compress_peft.errors import DataError
from compress_peft.models.random_model import byte_tokenizer
from eval.generation import exact_match, generate_answers, gsm8k_accuracy, gsm8k_number, normalize_answer
from tests.conftest import build_tiny_llama

EXAMPLES = [Example(prompt, "x") for prompt in ("a", "a much longer prompt", "middle one")]


def test_batched_answers_equal_single_ones_in_order() -> None:
    model, tokenizer = build_tiny_llama(vocab_size=259), byte_tokenizer()
    answers = generate_answers(model, tokenizer, EXAMPLES, max_new_tokens=6, batch_size=3, progress=False)
    for example, answer in zip(EXAMPLES, answers, strict=True):
        ids = tokenizer(example.prompt, return_tensors="pt").input_ids
        alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert answer == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)


def test_stop_strings_are_cut_off() -> None:
    model, tokenizer = build_tiny_llama(vocab_size=259), byte_tokenizer()
    free = generate_answers(model, tokenizer, EXAMPLES[:1], max_new_tokens=8, progress=False)[0]
    mark = free[2:4]
    stopped = generate_answers(model, tokenizer, EXAMPLES[:1], max_new_tokens=8, stop=(mark,), progress=False)[0]
    assert stopped == free.split(mark)[0]


def test_beam_search_runs() -> None:
    model, tokenizer = build_tiny_llama(vocab_size=259), byte_tokenizer()
    answers = generate_answers(model, tokenizer, EXAMPLES, max_new_tokens=4, num_beams=3, progress=False)
    assert len(answers) == 3


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("5 + 7 = 12\n#### 12", "12", "12"),
        ("so it costs $1,234.50 in all", None, "1234.5"),
        ("#### -3 (not 4)", "-3", "4"),
        ("#### $1,000", "1000", "1000"),
        ("100", None, "100"),
        ("no idea", None, None),
    ],
)
def test_gsm8k_numbers(text: str, strict: str | None, flexible: str | None) -> None:
    assert gsm8k_number(text, "strict") == strict
    assert gsm8k_number(text, "flexible") == flexible


def test_gsm8k_accuracy() -> None:
    examples = [Example("q", "work\n#### 7"), Example("q", "#### 1,200")]
    assert gsm8k_accuracy(["it is 7", "1200."], examples, "strict").correct == 0
    assert gsm8k_accuracy(["it is 7", "1200."], examples, "flexible").correct == 2
    with pytest.raises(DataError, match="####"):
        gsm8k_accuracy(["1"], [Example("q", "1")], "flexible")


def test_exact_match_normalizes_as_squad_does() -> None:
    assert normalize_answer(" The  Cat, sat! ") == "cat sat"
    assert exact_match(["the Cat.", "dog"], [Example("", " cat"), Example("", "cow")]).hits == (True, False)
