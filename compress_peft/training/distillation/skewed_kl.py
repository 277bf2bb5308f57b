"""Skewed Kullback-Leibler divergence."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from compress_peft.training.distillation.base import LOSSES, DistributionLoss
from compress_peft.training.distillation.divergences import skewed_kl, skewed_reverse_kl


@LOSSES.register
class SkewedKL(DistributionLoss):
    """KL against a mixture of both, whose gradient stays bounded where the student finds unlikely what the teacher
    says."""

    paper: ClassVar[str] = "Ko et al. 2024, DistiLLM, arXiv 2402.03898, section 3.1"

    method: Literal["skewed_kl"] = "skewed_kl"
    alpha: float = Field(default=0.1, ge=0, lt=1)
    """Share of the first distribution in the mixture; 0 is plain KL."""
    direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(P, alpha P + (1 - alpha) Q); reverse: KL(Q, (1 - alpha) P + alpha Q), with P the teacher."""

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        if self.direction == "forward":
            return skewed_kl(teacher, student, self.alpha)
        return skewed_reverse_kl(teacher, student, self.alpha)
