"""Paired comparison of two stages measured on the same data."""

from __future__ import annotations

import math

from compress_peft.errors import DataError, Problem
from eval.record import Record
from eval.records import Accuracy, Perplexity, TextScore


class AccuracyComparison(Record):
    """`after` against `before`, on the same examples."""

    difference: float
    """Accuracy after minus before, between -1 and 1."""
    low: float
    """95% interval of the mean paired difference (Student's t)."""
    high: float
    gained: int
    """Examples wrong before and right after."""
    lost: int
    changed: int
    """Examples whose answer differs, right or wrong."""
    n: int
    p_value: float
    """McNemar's exact test, two-sided: gained against lost."""


class PerplexityComparison(Record):
    ratio: float
    """Perplexity after over before."""
    low: float
    high: float
    p_value: float
    """Paired t-test over blocks."""


def compare_accuracy(before: Accuracy, after: Accuracy) -> AccuracyComparison:
    """McNemar's exact test and the difference with its interval.

    Raises:
        DataError: the two were not measured on the same examples by the same metric.
    """
    from scipy.stats import binomtest, ttest_1samp

    if (before.metric, before.references) != (after.metric, after.references):
        raise DataError(
            Problem(
                f"{before.metric} and {after.metric}",
                f"cannot be paired: {before.n} and {after.n} examples, or different ones",
                "compare runs on the same test split and metric",
            )
        )
    differences = [float(a) - float(b) for a, b in zip(after.hits, before.hits, strict=True)]
    gained, lost = differences.count(1.0), differences.count(-1.0)
    mean = sum(differences) / len(differences)
    low = high = mean
    if len(set(differences)) > 1:
        interval = ttest_1samp(differences, 0.0).confidence_interval(0.95)
        low, high = max(-1.0, float(interval.low)), min(1.0, float(interval.high))
    p_value = float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0
    changed = sum(a != b for a, b in zip(after.predictions, before.predictions, strict=True))
    return AccuracyComparison(
        difference=mean,
        low=low,
        high=high,
        gained=gained,
        lost=lost,
        changed=changed,
        n=before.n,
        p_value=p_value,
    )


def compare_perplexity(before: Perplexity, after: Perplexity) -> PerplexityComparison:
    """Ratio with its paired interval over the blocks.

    Raises:
        DataError: the two were not measured on the same token blocks.
    """
    from scipy.stats import ttest_1samp

    if (before.text_sha256, before.block_size) != (after.text_sha256, after.block_size):
        raise DataError(
            Problem("perplexity", "the two were measured on different texts", "compare runs on the same text")
        )
    differences = [a - b for a, b in zip(after.block_nll, before.block_nll, strict=True)]
    mean = math.fsum(differences) / len(differences)
    if len(set(differences)) == 1:
        only = len(differences) == 1 and mean != 0.0  # one block says nothing about the spread
        low, high, p_value = (-math.inf, math.inf, 1.0) if only else (mean, mean, float(mean == 0.0))
    else:
        test = ttest_1samp(differences, 0.0)
        interval = test.confidence_interval(0.95)
        low, high, p_value = float(interval.low), float(interval.high), float(test.pvalue)
    return PerplexityComparison(ratio=_exp(mean), low=_exp(low), high=_exp(high), p_value=p_value)


class TextComparison(Record):
    """Graded scores `after` against `before`, on the same examples."""

    difference: float
    """Mean of the per-example differences (for BLEU: of sentence scores)."""
    low: float
    """95% bootstrap interval of the mean difference."""
    high: float
    n: int
    p_value: float
    """Sign-flip permutation test of the mean difference, two-sided."""


def compare_text(before: TextScore, after: TextScore, resamples: int = 2000) -> TextComparison:
    """Paired bootstrap interval and permutation test over the examples.

    Raises:
        DataError: the two were not measured on the same references by the same metric.
    """
    import numpy as np
    from scipy.stats import bootstrap, permutation_test

    keys = [(score.metric, score.protocol, score.references_sha256, score.n) for score in (before, after)]
    if keys[0] != keys[1]:
        what = f"cannot be paired: {before.n} and {after.n} examples, or different references or protocols"
        raise DataError(
            Problem(f"{before.metric} and {after.metric}", what, "compare runs on the same test split and metric")
        )
    differences = np.array(after.scores) - np.array(before.scores)
    mean = low = high = float(differences.mean())
    p_value = 1.0
    if differences.any():
        test = permutation_test(
            (differences,),
            np.mean,
            permutation_type="samples",
            n_resamples=resamples,
            rng=np.random.default_rng(0),
        )
        p_value = float(test.pvalue)
    if len(set(differences.tolist())) > 1:
        interval = bootstrap(
            (differences,), np.mean, n_resamples=resamples, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return TextComparison(difference=mean, low=low, high=high, n=before.n, p_value=p_value)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
