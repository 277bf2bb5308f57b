"""GPTAQ: GPTQ that aims at the outputs of the unchanged model."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from compress_peft.models.walk import InputStatistics
from compress_peft.quantization.base import QUANTIZERS
from compress_peft.quantization.gptq import GPTQ
from compress_peft.tensors.sweep import drift_carry


@QUANTIZERS.register
class GPTAQ(GPTQ):
    """GPTQ with asymmetric calibration: the codes also make up for what the layers before did to the inputs.

    With X the inputs from the quantized layers before and X + D those in the unchanged model, it minimises
    ||Q X - W (X + D)|| instead of ||Q X - W X||: on its way through the columns it adds to the later ones what
    brings each column's share of W D back (`drift_carry`).
    """

    paper: ClassVar[str] = "GPTAQ, Li et al. 2025, arXiv 2504.02692"
    needs: ClassVar[tuple[str, ...]] = ("hessian", "drift")

    method: Literal["gptaq"] = "gptaq"  # type: ignore[assignment]

    alpha: float = Field(default=0.25, ge=0, le=1)
    """How much of the drift is made up for. 1: all of it, as the paper derives; the authors' code takes a quarter,
    which follows the calibration text less closely. 0 is GPTQ."""

    def _prepare(self, stats: InputStatistics) -> tuple[Tensor | None, Tensor, Tensor | None]:
        order, factor, _ = super()._prepare(stats)
        if stats.drift is None or not self.alpha:
            return order, factor, None
        key = (self.method, self.act_order, self.damping, self.alpha)
        if key not in stats.memo:
            drift = stats.drift if order is None else stats.drift[order][:, order]
            stats.memo[key] = self.alpha * drift_carry(drift, factor)
        return order, factor, stats.memo[key]
