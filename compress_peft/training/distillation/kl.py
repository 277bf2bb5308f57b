"""Forward and reverse Kullback-Leibler divergence: the same formula with the models exchanged."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from compress_peft.training.distillation.base import LOSSES, DistributionLoss
from compress_peft.training.distillation.divergences import forward_kl, reverse_kl


@LOSSES.register
class ForwardKL(DistributionLoss):
    """KL(teacher || student), the usual distillation."""

    paper: ClassVar[str] = "Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv 1503.02531"

    method: Literal["forward_kl"] = "forward_kl"

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        return forward_kl(teacher, student)


@LOSSES.register
class ReverseKL(DistributionLoss):
    """KL(student || teacher), token by token: for students too small to cover all that the teacher would say.

    On the given responses; MiniLLM's policy gradient over sampled ones is not part of it.
    """

    paper: ClassVar[str] = "Gu et al. 2024, MiniLLM, arXiv 2306.08543 (its objective, eq. 1, a token at a time)"

    method: Literal["reverse_kl"] = "reverse_kl"

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        return reverse_kl(teacher, student)
