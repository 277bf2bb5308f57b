"""RIA: relative importance and activations."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress_peft.models.walk import InputStatistics
from compress_peft.pruning.base import PRUNERS, Pruner, Sparsity
from compress_peft.tensors.masks import select


@PRUNERS.register
class RIA(Pruner):
    """Removes the weights that matter least to their row and column, weighted by their inputs.

    Without the paper's second part, channel permutation for n:m: it changes the order of the layer's inputs, which the
    saved model would have to carry.
    """

    paper: ClassVar[str] = "RIA, Zhang et al. 2024, Plug-and-Play (ICLR), openreview Tr0lPx9woF"
    needs: ClassVar[tuple[str, ...]] = ("norms",)

    method: Literal["ria"] = "ria"

    exponent: float = Field(default=0.5, ge=0)
    """The paper's a: how much the norm of the inputs counts."""

    compare: Literal["layer", "row"] = "layer"
    """Among which weights the smallest scores are looked for; the layer, as in the authors' code."""

    def prune(self, weight: Tensor, stats: InputStatistics | None, sparsity: Sparsity) -> tuple[Tensor, Tensor]:
        assert stats is not None
        mask = select(self.score(weight, stats), sparsity, self.compare == "row")
        return weight * mask, mask

    def score(self, weight: Tensor, stats: InputStatistics) -> Tensor:
        """Eq. 4: (|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) * ||X_j||_2 ** a, float32 (out, in)."""
        size = weight.float().abs()
        tiny = torch.finfo(torch.float32).tiny  # rows and columns of zeros have no importance
        rows = size / size.sum(dim=1, keepdim=True).clamp(min=tiny)
        columns = size / size.sum(dim=0, keepdim=True).clamp(min=tiny)
        return (rows + columns) * stats.square_sum.sqrt() ** self.exponent
