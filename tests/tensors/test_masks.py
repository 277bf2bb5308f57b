"""Masks with exact counts."""

from __future__ import annotations

import pytest
import torch

from compress_peft.tensors.masks import Pattern, keep_pattern, keep_share, parse_pattern, select


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.97])
def test_shares_are_exact_and_the_lowest_go(sparsity: float) -> None:
    score = torch.rand(7, 30)
    rows, whole = keep_share(score, sparsity, by_rows=True), keep_share(score, sparsity, by_rows=False)
    assert ((~rows).sum(1) == round(30 * sparsity)).all() and (~whole).sum() == round(210 * sparsity)
    for kept, given in (*zip(rows, score, strict=True), (whole, score)):
        if (~kept).any():
            assert given[~kept].max() < given[kept].min()


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:5"])
def test_patterns_are_exact_and_the_lowest_go(pattern: str) -> None:
    n, m = parsed = parse_pattern(pattern)
    score = torch.rand(6, 40)
    kept = keep_pattern(score, parsed).view(-1, m)
    assert (kept.sum(1) == n).all()
    lowest_kept = score.view(-1, m).masked_fill(~kept, 2).amin(1)
    assert (score.view(-1, m).masked_fill(kept, -1).amax(1) < lowest_kept).all()
    assert parsed.sparsity == 1 - n / m and str(parsed) == pattern


def test_equal_scores_still_give_exact_counts() -> None:
    score = torch.zeros(4, 16)
    assert (select(score, 0.5).sum(1) == 8).all() and select(score, 0.5, by_rows=False).sum() == 32
    assert (select(score, Pattern(2, 4)).view(-1, 4).sum(1) == 2).all()


def test_reading_patterns() -> None:
    assert parse_pattern("2:4") == (2, 4)
    assert parse_pattern(124) == (2, 4) and parse_pattern(248) == (4, 8)  # YAML's numbers to the base 60
    for wrong in ("4:4", "0:4", "5:4", "2-4", "half", 2, True, 0.5):
        with pytest.raises(ValueError, match="not a pattern n:m"):
            parse_pattern(wrong)
