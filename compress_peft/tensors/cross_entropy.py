"""Cross-entropy over a large vocabulary without float32 copies of the logits.

With N positions and V tokens `functional.cross_entropy` holds the logits in float32, their log-probabilities and the
gradients of both: at 4 x 2048 positions and 128,000 tokens 4 GB each. Here positions are worked on a few at a time:
forward keeps one number a position, its log sum of exponentials, and backward makes the gradient of the logits,
softmax minus one at the target, straight in their own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""As a target: the position has no loss."""

AT_A_TIME = {"cpu": 1 << 22}
"""Logits worked on at once, in float32, by kind of device: on a CPU about what its caches hold."""
ON_ACCELERATORS = 1 << 26


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of each position, in nats: (...) float32, 0 where the target is IGNORED.

    logits: (..., vocabulary), of any float dtype. targets: (...) int64.
    """
    losses: Tensor = _CrossEntropy.apply(logits.flatten(0, -2), targets.flatten())
    return losses.view(targets.shape)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        sums = logits.new_zeros(len(targets), dtype=torch.float32)
        losses = torch.zeros_like(sums)
        for rows in _parts(logits, targets):
            part = logits[rows].float()
            sums[rows] = part.logsumexp(-1)
            losses[rows] = sums[rows] - part.gather(-1, targets[rows, None])[:, 0]
        ctx.save_for_backward(logits, targets, sums)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets, sums = ctx.saved_tensors
        out = torch.zeros_like(logits)
        for rows in _parts(logits, targets):
            part = logits[rows].float().sub_(sums[rows, None]).exp_()
            part[torch.arange(len(rows), device=rows.device), targets[rows]] -= 1
            out[rows] = part.mul_(grad[rows, None]).to(out.dtype)
        return out, None


def _parts(logits: Tensor, targets: Tensor) -> Iterator[Tensor]:
    """Numbers of the positions that count, some at a time."""
    size = AT_A_TIME.get(logits.device.type, ON_ACCELERATORS)
    chosen = (targets != IGNORED).nonzero()[:, 0]
    yield from chosen.split(max(size // logits.shape[-1], 1)) if len(chosen) else ()
