"""AWQ: round to nearest after scaling up the weights that meet large activations, and cutting the largest weights."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress_peft.data.blocks import CalibrationSettings
from compress_peft.models.walk import BlockTurn, InputStatistics
from compress_peft.quantization.base import (
    QUANTIZERS,
    Bits,
    GroupSize,
    Prepared,
    Quantizer,
    affine_bits,
    affine_problem,
)
from compress_peft.quantization.groupings import Grouping, find_groupings
from compress_peft.tensors import affine
from compress_peft.tensors.sweep import weighted_error
from compress_peft.weights import AffineWeight
from compress_peft.weights.compressed import dtype_from_name

CLIP_STEPS = 20
CLIP_TRIED = 10
"""Largest magnitudes of 1, 0.95, ... 0.55 times a group's own are tried, as in the authors' code."""


@QUANTIZERS.register
class AWQ(Quantizer):
    """Activation-aware quantization: scales per input channel, folded into what comes before, and clipped groups.

    The scales are s = (size of the activations) ** alpha; alpha minimises ||Q(W s) (X / s) - W X||, summed over the
    layers that share the input (eq. 4 and 5). The error is measured on all calibration tokens by way of the Hessian,
    not by running the layers on a sample; for the same reason the size is the root mean square, not the mean magnitude.
    The clipping threshold of each group minimises the error of its own share of the output. All layers are clipped; the
    authors' code leaves out those in front of the attention scores.
    """

    paper: ClassVar[str] = "AWQ, Lin et al. 2023, arXiv 2306.00978"
    needs: ClassVar[tuple[str, ...]] = ("hessian",)
    keeps_activations: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = True

    method: Literal["awq"] = "awq"

    bits: Bits = 4
    """Bits of a code."""

    group_size: GroupSize = 64
    """Consecutive weights of a row that share a scale and a zero: a multiple of 8 that divides the layer's inputs.
    null: the whole row (per channel)."""

    symmetric: bool = False
    """Fix the zero in the middle of the codes: 0.125 bits a weight less at groups of 64, and a larger error."""

    grid: int = Field(default=20, ge=2)
    """Values of alpha tried, from 0 (no scaling) to 1."""

    clip: bool = True
    """Search for the largest magnitude that each group keeps."""

    scale_dtype: Literal["float16", "float32"] = "float16"
    """How scales are stored. Codes are chosen with the scales as they are stored."""

    calibration: CalibrationSettings = CalibrationSettings()
    """The calibration text."""

    def prepare_block(self, turn: BlockTurn, shared: Container[str]) -> Prepared:
        """Scale what can be scaled, the statistics too. Layers without a grouping are only clipped, which is noted."""
        groupings, reasons = find_groupings(turn, shared)
        for grouping in groupings:
            stats = next(turn.statistics[name] for name in grouping.targets if name in turn.layers)
            if stats.tokens:
                scales = self.search_scales(grouping, turn, stats)
                grouping.apply(scales)
                stats.divide(scales[grouping.index])
        return Prepared(notes=tuple((name, f"not scaled: {reason}") for name, reason in reasons.items()))

    def search_scales(self, grouping: Grouping, turn: BlockTurn, stats: InputStatistics) -> Tensor:
        """The best scales of the source's channels, float32; geometric middle 1, and 1 where no input ever is."""
        hessian = stats.hessian
        assert hessian is not None, "the walk was not asked for the Hessian"
        weights = [layer.weight.detach().float() for name, layer in grouping.targets.items() if name in turn.layers]
        size = int(grouping.index.max()) + 1
        power = torch.zeros(size, device=hessian.device).index_add_(0, grouping.index, stats.square_sum)
        live = power > 0
        best, least = torch.ones(size, device=hessian.device), float("inf")
        if not live.any():
            return best
        magnitude = (power / stats.tokens).sqrt()
        magnitude /= (magnitude[live].max() * magnitude[live].min()).sqrt()
        for step in range(self.grid):
            scales = torch.where(live, magnitude.clamp(min=1e-4) ** (step / (self.grid - 1)), 1.0)
            columns = scales[grouping.index]
            loss = sum(weighted_error(self._rounded(w * columns).div_(columns).sub_(w), hessian) for w in weights)
            if loss < least:
                best, least = scales, loss
        return best

    def quantize(self, weight: Tensor, stats: Any = None) -> AffineWeight:
        """stats: InputStatistics of the layer, for the clipping; without them it is rounding to nearest."""
        dtype = dtype_from_name(self.scale_dtype)
        dense = weight.detach().float()
        if self.clip and isinstance(stats, InputStatistics) and stats.hessian is not None:
            dense = self.clip_groups(dense, stats.hessian)
        scales, zeros = self._grid(dense)
        codes = affine.quantize_affine(dense, scales, zeros, self.bits, self.group_size)
        stored = None if self.symmetric else zeros.to(torch.uint8)
        return AffineWeight.from_codes(codes, scales, stored, self.bits, self.group_size, weight.dtype, dtype)

    def clip_groups(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """The weight, float32 (out, in), with every group cut at the magnitude with the least error of its outputs."""
        rows, columns = weight.shape
        count = affine.group_count(columns, self.group_size)
        groups = weight.view(rows, count, -1)
        width = groups.shape[2]
        blocks = torch.stack([hessian[i : i + width, i : i + width] for i in range(0, columns, width)])
        largest = groups.abs().amax(dim=2, keepdim=True)
        best, least = largest, torch.full_like(largest, torch.inf)
        for step in range(CLIP_TRIED):
            limit = largest * (1 - step / CLIP_STEPS)
            cut = groups.clamp(-limit, limit).view(rows, columns)
            error = (self._rounded(cut) - weight).view(rows, count, -1).transpose(0, 1)
            total = (error @ blocks).mul_(error).sum(dim=2).T[..., None]
            better = total < least
            best, least = torch.where(better, limit, best), torch.where(better, total, least)
        return groups.clamp(-best, best).view(rows, columns)

    def _grid(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        dtype = dtype_from_name(self.scale_dtype)
        return affine.find_grid(weight, self.bits, self.group_size, self.symmetric, dtype)

    def _rounded(self, weight: Tensor) -> Tensor:
        """Rounded to nearest, float32 (out, in)."""
        scales, zeros = self._grid(weight)
        codes = affine.quantize_affine(weight, scales, zeros, self.bits, self.group_size)
        return affine.dequantize_affine(codes, scales, zeros, self.group_size)

    def estimate_bits(self, shape: tuple[int, int]) -> float:
        return affine_bits(shape, self.bits, self.group_size, self.symmetric, dtype_from_name(self.scale_dtype))

    def check(self, shape: tuple[int, int]) -> str | None:
        return affine_problem(shape, self.group_size)
