"""SmoothQuant: outliers of the activations move into the weights behind the norms, before anything is rounded.

    s_j = max|X_j| ** alpha / max|W_j| ** (1 - alpha)        norm.weight / s,        weight[:, j] * s_j

Xiao et al. 2022, arXiv 2211.10438, equation 4. The model stays the same function. Meant for methods that round
activations too (`llm_int8`); as there, only what follows a norm is smoothed.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from compress_peft.data.blocks import CalibrationSettings
from compress_peft.models.walk import BlockTurn, InputStatistics
from compress_peft.quantization.groupings import Grouping, find_groupings

SMALLEST = 1e-5
"""Of a scale, and of the magnitudes that it is made of."""


class Smoothing(BaseModel):
    """How activations are smoothed before the weights are quantized."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    alpha: float = Field(default=0.5, ge=0, le=1)
    """How much of the activations' range the weights take over: 0 would even out the weights, 1 the activations."""

    calibration: CalibrationSettings = CalibrationSettings()
    """The calibration text, for methods that have none of their own."""

    @classmethod
    def read(cls, value: Any) -> Any:
        """What a recipe may say instead: true, false, or alpha."""
        if isinstance(value, bool):
            return cls() if value else None
        return {"alpha": value} if isinstance(value, int | float) else value


def with_smoothing(needs: tuple[str, ...], smooth: bool) -> tuple[str, ...]:
    """What a walk has to see for a quantizer that needs this, smoothed first or not."""
    return (*needs, "largest") if smooth else needs


@torch.no_grad()
def smooth_block(turn: BlockTurn, shared: Container[str], alpha: float) -> list[tuple[str, str]]:
    """Scale the layers of the block that follow a norm, and their statistics, which must have "largest". Returns notes.

    shared: full names of parameters that stand at several places of the model, which are not touched.
    """
    groupings = [grouping for grouping in find_groupings(turn, shared)[0] if not isinstance(grouping.module, nn.Linear)]
    for grouping in groupings:
        stats = next(turn.statistics[name] for name in grouping.targets if name in turn.layers)
        scales = smoothing_scales(grouping, stats, alpha)
        grouping.apply(scales)
        stats.divide(scales)
    return [] if groupings else [(turn.name, "not smoothed: no norm whose weight scales the inputs of linear layers")]


def smoothing_scales(grouping: Grouping, stats: InputStatistics, alpha: float) -> Tensor:
    """float32 (in,); 1 for channels without any input or weight."""
    assert stats.largest is not None, "the walk was not asked for the largest inputs"
    columns = [layer.weight.detach().abs().amax(0).float() for layer in grouping.targets.values()]
    weights = torch.stack(columns).amax(0)
    scales = stats.largest.clamp(min=SMALLEST) ** alpha / weights.clamp(min=SMALLEST) ** (1 - alpha)
    return torch.where((stats.largest > 0) & (weights > 0), scales.clamp(min=SMALLEST), 1.0)
