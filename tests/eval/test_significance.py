from __future__ import annotations

import math

import pytest
from scipy.stats import binomtest

from compress_peft.errors import DataError
from eval.records import Accuracy, Perplexity
from eval.significance import compare_accuracy, compare_perplexity


def accuracy(hits: list[int]) -> Accuracy:
    return Accuracy.from_answers("choice", ["right" if hit else "wrong" for hit in hits], ["right"] * len(hits))


def blocks(values: list[float], text: str = "t") -> Perplexity:
    return Perplexity(
        value=math.exp(sum(values) / len(values)),
        low=0,
        high=1,
        tokens=len(values) * 7,
        block_size=8,
        block_nll=tuple(values),
        protocol="",
        text_sha256=text,
    )


def test_mcnemar_counts_only_discordant_pairs() -> None:
    before = accuracy([1] * 40 + [0] * 12 + [1] * 3 + [0] * 5)
    after = accuracy([1] * 40 + [1] * 12 + [0] * 3 + [0] * 5)
    result = compare_accuracy(before, after)
    assert (result.gained, result.lost, result.changed, result.n) == (12, 3, 15, 60)
    assert result.difference == pytest.approx(9 / 60)
    assert result.p_value == pytest.approx(binomtest(3, 15).pvalue) == pytest.approx(0.03515625)
    assert result.low < result.difference < result.high


def test_equal_answers() -> None:
    result = compare_accuracy(accuracy([1, 0, 1]), accuracy([1, 0, 1]))
    assert (result.difference, result.low, result.high, result.p_value, result.changed) == (0, 0, 0, 1, 0)


def test_different_examples_do_not_pair() -> None:
    with pytest.raises(DataError, match="3 and 2 examples"):
        compare_accuracy(accuracy([1, 0, 1]), accuracy([1, 0]))
    with pytest.raises(DataError, match="different texts"):
        compare_perplexity(blocks([1.0, 2.0]), blocks([1.0, 2.0], "u"))


def test_perplexity_ratio() -> None:
    result = compare_perplexity(blocks([1.0, 2.0, 3.0]), blocks([1.1, 2.3, 3.2]))
    assert result.ratio == pytest.approx(math.exp(0.2))
    assert result.low < result.ratio < result.high and 0.05 < result.p_value < 0.1
    same = compare_perplexity(blocks([1.0, 2.0]), blocks([1.0, 2.0]))
    assert (same.ratio, same.low, same.high, same.p_value) == (1, 1, 1, 1)
    single = compare_perplexity(blocks([1.0]), blocks([1.5]))
    assert (single.low, single.high, single.p_value) == (0, math.inf, 1)
