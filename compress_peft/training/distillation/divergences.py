"""Divergences between two distributions over the same events, in nats.

teacher, student: log-probabilities (..., events); the result is (...). The teacher is P and the student is Q below.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(P || Q) = sum P log(P / Q): the student covers all that the teacher would say (Hinton et al. 2015)."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(Q || P): the student keeps to what the teacher finds likely (Gu et al. 2024, MiniLLM, eq. 1)."""
    return forward_kl(student, teacher)


def mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Log-probabilities of share * first + (1 - share) * second; 0 < share < 1."""
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def jensen_shannon(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q (Agarwal et al. 2024, GKD, eq. 1).

    For small beta it is beta KL(P || Q), for beta near 1 it is (1 - beta) KL(Q || P), to first order.
    """
    middle = mixture(teacher, student, beta)
    return beta * forward_kl(teacher, middle) + (1 - beta) * forward_kl(student, middle)


def skewed_kl(teacher: Tensor, student: Tensor, alpha: float) -> Tensor:
    """KL(P || alpha P + (1 - alpha) Q) (Ko et al. 2024, DistiLLM, section 3.1); alpha 0 is forward KL."""
    return forward_kl(teacher, mixture(teacher, student, alpha)) if alpha else forward_kl(teacher, student)


def skewed_reverse_kl(teacher: Tensor, student: Tensor, alpha: float) -> Tensor:
    """KL(Q || (1 - alpha) P + alpha Q) (Ko et al. 2024, DistiLLM, section 3.1); alpha 0 is reverse KL."""
    return skewed_kl(student, teacher, alpha)
