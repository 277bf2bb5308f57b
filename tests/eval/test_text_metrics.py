from __future__ import annotations

import math

import pytest

from compress_peft.data.examples import Example
from compress_peft.errors import DataError
from eval.columns import text_score
from eval.significance import compare_text
from eval.text_metrics import bleu, f1, rouge_l, score_answers, token_f1

ANSWERS = ["the cat sat on the mat", "a dog barks loudly at night", "no"]
REFERENCES = [["the cat is on the mat", "there is a cat on the mat"], ["a dog barks at night"], ["yes"]]


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("The Denver Broncos!", ["Denver Broncos"], 1.0),
        ("in Paris, France", ["Paris"], 0.5),
        ("Santa Clara", ["Paris", "Santa Clara, California"], 0.8),
        ("the", [""], 1.0),
        ("word", ["the"], 0.0),
        ("cat cat", ["cat dog"], 0.5),
    ],
)
def test_token_f1(answer: str, references: list[str], score: float) -> None:
    assert token_f1(answer, references) == pytest.approx(score)


def test_f1_interval_holds_the_mean() -> None:
    score = f1(ANSWERS, REFERENCES)
    assert score.value == pytest.approx(sum(score.scores) / 3)
    assert 0 <= score.low < score.value < score.high <= 1


def test_bleu_is_the_formula_with_clipping_and_closest_length() -> None:
    pytest.importorskip("sacrebleu")
    # clipped unigrams 5/6 (cat, on, the, mat, the), bigrams 3/5 (the cat, on the, the mat); no brevity penalty
    assert bleu(ANSWERS[:1], REFERENCES[:1], order=1).value == pytest.approx(5 / 6)
    assert bleu(ANSWERS[:1], REFERENCES[:1], order=2).value == pytest.approx(math.sqrt(5 / 6 * 3 / 5))
    short = bleu(["the cat"], [["the cat sat on"]], order=2)
    assert short.value == pytest.approx(math.exp(1 - 4 / 2))


def test_bleu_of_examples_with_unequal_numbers_of_references() -> None:
    pytest.importorskip("sacrebleu")
    score = bleu(ANSWERS, REFERENCES, order=1)
    assert score.value == pytest.approx((5 + 5 + 0) / 13)
    assert score.low < score.value < score.high


def test_rouge_l_takes_the_best_reference() -> None:
    pytest.importorskip("rouge_score")
    score = rouge_l(ANSWERS, REFERENCES)
    # longest common subsequences 5 of 6 and 6; 5 of 6 and 5; none
    assert score.scores == pytest.approx((5 / 6, 10 / 11, 0.0))


def test_bad_input() -> None:
    with pytest.raises(DataError, match="2 references"):
        f1(["a"], [["a"], ["b"]])
    with pytest.raises(DataError, match="no reference"):
        f1(["a"], [[]])


def test_paired_comparison() -> None:
    references = [["a b c d"]] * 8
    before = f1(["a x y z", "b"] * 4, references)
    after = f1(["b c d", "b c"] * 4, references)
    comparison = compare_text(before, after)
    mean = sum(b - a for a, b in zip(before.scores, after.scores, strict=True)) / 8
    assert comparison.difference == pytest.approx(mean)
    assert 0 < comparison.low <= mean <= comparison.high
    assert comparison.p_value < 0.05
    assert compare_text(before, before).p_value == 1.0
    with pytest.raises(DataError, match="cannot be paired"):
        compare_text(before, f1(["a"] * 8, [["z"]] * 8))


def test_metrics_of_a_recipe_keep_their_order_and_kind() -> None:
    pytest.importorskip("sacrebleu")
    examples = [Example("q", " the red fox"), Example("q", " a dog")]
    accuracies, texts = score_answers(["Red fox.", "cat"], examples, ("f1", "bleu", "exact_match"), "t")
    assert [score.metric for score in texts] == ["F1", "BLEU-1", "BLEU-2", "BLEU-4"]
    assert [(score.metric, score.correct) for score in accuracies] == [("exact match", 1)]
    assert texts[0].scores == (1.0, 0.0)
    label, figure = text_score(texts[0])
    assert label == "F1, t" and figure.startswith("50.0%")
