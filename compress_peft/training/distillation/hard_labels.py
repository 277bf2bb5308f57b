"""The data's own tokens as targets."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from compress_peft.tensors.cross_entropy import cross_entropy
from compress_peft.training.distillation.base import LOSSES, Comparison, DistillationLoss


@LOSSES.register
class HardLabels(DistillationLoss):
    """Negative log-likelihood of the tokens. Beside another loss: the usual mixture; alone, on responses that the
    teacher has written: sequence-level distillation."""

    paper: ClassVar[str] = "Kim and Rush 2016, Sequence-Level Knowledge Distillation, arXiv 1606.07947, eq. 4 and 6"
    needs: ClassVar[str] = ""

    method: Literal["hard_labels"] = "hard_labels"

    def value(self, comparison: Comparison, learned: nn.Module | None) -> Tensor:
        return cross_entropy(comparison.student.logits, comparison.targets)
