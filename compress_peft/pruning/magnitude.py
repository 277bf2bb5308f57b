"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from compress_peft.models.walk import InputStatistics
from compress_peft.pruning.base import PRUNERS, Pruner, Sparsity
from compress_peft.tensors.masks import select


@PRUNERS.register
class Magnitude(Pruner):
    """Removes the weights with the smallest |W|: needs no text, and is far behind the others from 50% on."""

    paper: ClassVar[str] = "Han et al. 2015, arXiv 1506.02626"

    method: Literal["magnitude"] = "magnitude"

    compare: Literal["layer", "row"] = "layer"
    """Among which weights the smallest are looked for."""

    def prune(self, weight: Tensor, stats: InputStatistics | None, sparsity: Sparsity) -> tuple[Tensor, Tensor]:
        mask = select(weight.abs(), sparsity, self.compare == "row")
        return weight * mask, mask
