"""Generalized Jensen-Shannon divergence."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from compress_peft.training.distillation.base import LOSSES, DistributionLoss
from compress_peft.training.distillation.divergences import jensen_shannon


@LOSSES.register
class JensenShannon(DistributionLoss):
    """Between forward KL (small beta) and reverse KL (beta near 1); bounded."""

    paper: ClassVar[str] = "Agarwal et al. 2024, On-Policy Distillation of Language Models, arXiv 2306.13649, eq. 1"

    method: Literal["js"] = "js"
    beta: float = Field(default=0.5, gt=0, lt=1)
    """The teacher's share in the mixture that both are compared with."""

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        return jensen_shannon(teacher, student, self.beta)
