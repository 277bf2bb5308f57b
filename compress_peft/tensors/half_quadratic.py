"""The zeros of an affine grid that minimise a robust norm of the rounding error: the solver of HQQ (Badri & Shaji 2023,
https://mobiusml.github.io/hqq_blog).

    min over z of sum |W - D(z)| ** p,  D(z) = s (Q(z) - z),  Q(z) = clamp(round(W / s + z))

is split with an auxiliary error E into a norm and a quadratic term, min over z, E of
sum |E| ** p + beta / 2 * ||E - (W - D(z))||^2, which alternates between two steps in closed form:

    E <- shrink(W - D(z), beta)             the proximal operator of the norm ("sp1")
    z <- mean over the group of Q - (W - E) / s                              ("sp2")
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress_peft.tensors.affine import group_count


def shrink(error: Tensor, beta: float, p: float) -> Tensor:
    """sign(e) * max(|e| - |e| ** (p - 1) / beta, 0), the generalised soft threshold; 0 stays 0."""
    size = error.abs()
    return error.sign() * (size - size.pow(p - 1) / beta).clamp_(min=0)


def optimize_zeros(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int | None,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iters: int = 20,
    zero_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """The best zeros found, float32 (out, groups), of values that zero_dtype has.

    weight: float32 (out, in); scales, zeros: (out, groups), the grid to start from. beta grows by kappa after every
    step. Unlike the authors' code, which ends when the mean error over the whole matrix grows and keeps what came last,
    every group keeps the zero with the least sum |error| ** p; so no group ends worse than it started.
    """
    rows = weight.shape[0]
    groups = weight.view(rows, group_count(weight.shape[1], group_size), -1)
    scale = scales[..., None]
    scaled = groups / scale
    zero = zeros[..., None].float()
    best = zero.clone()
    least = torch.full_like(zero, torch.inf)
    for step in range(iters + 1):
        codes = (scaled + zero).round_().clamp_(0, 2**bits - 1)
        error = groups - (codes - zero) * scale
        total = error.abs().pow_(p).sum(dim=2, keepdim=True)
        better = total < least
        best, least = torch.where(better, zero, best), torch.where(better, total, least)
        if step < iters:
            kept = (groups - shrink(error, beta, p)) / scale
            zero = (codes - kept).mean(dim=2, keepdim=True).to(zero_dtype).float()
            beta *= kappa
    return best[..., 0]
