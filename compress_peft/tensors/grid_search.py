"""Where an affine grid should end: clipping a group's largest weights makes the steps of all others smaller."""

from __future__ import annotations

import torch
from torch import Tensor

from compress_peft.tensors import affine

SHARES = tuple(1 - step / 40 for step in range(21))
"""Of the whole range, tried from 1 down to 0.5."""

SLICE = 1 << 18
"""Weights searched at a time, so that what is compared stays in the processor's cache."""


def search_grid(
    weight: Tensor, importance: Tensor, bits: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Per group, the grid over the share of its range that `search_shares` finds.

    weight: (out, in). importance: (in,), >= 0. The rest, and what is returned, as `affine.find_grid`.
    """
    shares = search_shares(weight, importance, bits, group_size, symmetric, scale_dtype)
    groups = weight.detach().float().view(*shares.shape, -1)
    ends = torch.stack(groups.aminmax(dim=2), dim=2).mul_(shares[..., None])
    return affine.find_grid(ends.flatten(1), bits, 2, symmetric, scale_dtype)


def search_shares(
    weight: Tensor, importance: Tensor, bits: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype
) -> Tensor:
    """Per group, of SHARES of its range the one on whose grid rounding to nearest costs least: the sum of
    importance * error^2, where the importance of a column is the sum of the squares of its inputs (the diagonal of the
    Hessian). Shrinking all ranges to the least plain error is an option of the authors of GPTQ; weighing the errors is
    AWQ's (Lin et al. 2023, arXiv 2306.00978, section 3.2) without the rest of the Hessian.

    The arguments are those of `search_grid`. Returns float32 (out, groups).
    """
    rows, columns = weight.shape
    groups = affine.group_count(columns, group_size)
    shares = torch.empty(rows, groups, device=weight.device)
    weights = importance.to(weight.device, torch.float32).view(1, groups, -1)
    step = max(SLICE // columns, 1)
    for start in range(0, rows, step):
        part = weight.detach()[start : start + step].float().view(-1, groups, columns // groups)
        least = torch.full(part.shape[:2], torch.inf, device=weight.device)
        ends = torch.stack(part.aminmax(dim=2), dim=2)
        best = torch.ones_like(least)
        for share in SHARES:
            tried = affine.find_grid((ends * share).flatten(1), bits, 2, symmetric, scale_dtype)
            step_size, zero = (value[..., None] for value in tried)
            error = part.div(step_size).add_(zero).round_().clamp_(0, 2**bits - 1)
            cost = error.sub_(zero).mul_(step_size).sub_(part).square_().mul_(weights).sum(dim=2)
            best.masked_fill_(cost < least, share)
            least = torch.minimum(cost, least)
        shares[start : start + step] = best
    return shares
