"""Which weights to keep: exact counts, given a score for each weight.

A mask is bool (out, in), True = kept. "n:m" keeps n of every m consecutive weights of a row (2:4: half of them).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pattern(NamedTuple):
    """n of every m consecutive weights of a row are kept."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m


def parse_pattern(given: Any) -> Pattern:
    """ "2:4" -> Pattern(2, 4). YAML 1.1 reads an unquoted 2:4 as a number to the base 60, 124: that is taken back.

    Raises:
        ValueError: it is not a pattern that keeps 0 < n < m weights.
    """
    text = f"{given // 60}:{given % 60}" if isinstance(given, int) and not isinstance(given, bool) else str(given)
    found = re.fullmatch(r"(\d+):(\d+)", text)
    pattern = Pattern(int(found[1]), int(found[2])) if found else None
    if pattern is None or not 0 < pattern.n < pattern.m:
        raise ValueError(f'"{text}" is not a pattern n:m with 0 < n < m, such as "2:4" (2 of every 4 weights are kept)')
    return pattern


def keep_share(score: Tensor, sparsity: float, by_rows: bool) -> Tensor:
    """The mask without the given share of the lowest scores, exactly round(sparsity * count) of them.

    score: (out, in), finite. by_rows: in every row by itself; otherwise over the whole matrix. Of equal scores, those
    further to the left (and above) go first.
    """
    flat = score if by_rows else score.reshape(1, -1)
    kept = torch.ones_like(flat, dtype=torch.bool)
    count = round(sparsity * flat.shape[1])
    # Sorted, not torch.topk: which of several equal scores topk takes is not defined.
    lowest = flat.sort(dim=1, stable=True).indices[:, :count]
    return kept.scatter_(1, lowest, False).view(score.shape)


def keep_pattern(score: Tensor, pattern: Pattern) -> Tensor:
    """The mask with the n highest scores of every m consecutive ones.

    score: (out, in), finite; m divides in.
    """
    rows, columns = score.shape
    assert columns % pattern.m == 0
    groups = score.reshape(-1, pattern.m)
    lowest = groups.sort(dim=1, stable=True).indices[:, : pattern.m - pattern.n]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(1, lowest, False).view(rows, columns)


def select(score: Tensor, sparsity: float | Pattern, by_rows: bool = True) -> Tensor:
    """`keep_pattern` or `keep_share`, as the sparsity says."""
    if isinstance(sparsity, Pattern):
        return keep_pattern(score, sparsity)
    return keep_share(score, sparsity, by_rows)
