"""Wanda: magnitude times the norm of the input that the weight meets."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from compress_peft.models.walk import InputStatistics
from compress_peft.pruning.base import PRUNERS, Pruner, Sparsity
from compress_peft.tensors.masks import select


def wanda_score(weight: Tensor, stats: InputStatistics) -> Tensor:
    """Eq. 1: |W_ij| * ||X_j||_2 over all calibration tokens, float32 (out, in)."""
    return weight.float().abs() * stats.square_sum.sqrt()


@PRUNERS.register
class Wanda(Pruner):
    """Removes, in every row, the weights with the smallest |W_ij| * ||X_j||; the others stay as they are."""

    paper: ClassVar[str] = "Wanda, Sun et al. 2023, arXiv 2306.11695"
    needs: ClassVar[tuple[str, ...]] = ("norms",)

    method: Literal["wanda"] = "wanda"

    compare: Literal["row", "layer"] = "row"
    """Among which weights the smallest scores are looked for; per row (output) is the paper's finding."""

    def prune(self, weight: Tensor, stats: InputStatistics | None, sparsity: Sparsity) -> tuple[Tensor, Tensor]:
        assert stats is not None
        mask = select(wanda_score(weight, stats), sparsity, self.compare == "row")
        return weight * mask, mask
