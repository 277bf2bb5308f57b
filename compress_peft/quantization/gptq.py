"""GPTQ: integer codes chosen column by column, each making up for the errors of those before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress_peft.data.blocks import CalibrationSettings
from compress_peft.models.walk import InputStatistics
from compress_peft.quantization.base import QUANTIZERS, Bits, GroupSize, Quantizer, affine_bits, affine_problem
from compress_peft.tensors import affine
from compress_peft.tensors.grid_search import search_grid
from compress_peft.tensors.sweep import BLOCK_COLUMNS, INNER_COLUMNS, fitting_block, inverse_factor, sweep
from compress_peft.weights import AffineWeight
from compress_peft.weights.compressed import dtype_from_name


@QUANTIZERS.register
class GPTQ(Quantizer):
    """Minimises the change of each layer's outputs on calibration text, with second-order information."""

    paper: ClassVar[str] = "GPTQ, Frantar et al. 2022, arXiv 2210.17323"
    needs: ClassVar[tuple[str, ...]] = ("hessian",)
    keeps_zeros: ClassVar[bool] = True

    method: Literal["gptq"] = "gptq"

    bits: Bits = 4
    """Bits of a code."""

    group_size: GroupSize = 64
    """Consecutive weights of a row that share a scale and a zero: a multiple of 8 that divides the layer's inputs.
    null: the whole row (per channel)."""

    symmetric: bool = False
    """Fix the zero in the middle of the codes: 0.125 bits a weight less at groups of 64, and a larger error."""

    act_order: Literal["static"] | None = "static"
    """static: columns with the largest inputs first, with grids found before that on the groups as they are stored, so
    that any kernel runs the result. null: from left to right, each grid found when its group's turn comes."""

    damping: float = Field(default=0.01, gt=0, le=1)
    """Added to the Hessian's diagonal, times its mean; raised tenfold where the Hessian needs more."""

    grid: Literal["weighted", "minmax"] = "weighted"
    """Where a group's grid ends. weighted: where rounding costs least on the calibration inputs (`search_grid`), the
    more of a gain the fewer bits; minmax: at its largest weights, as in the paper."""

    scale_dtype: Literal["float16", "float32"] = "float16"
    """How scales are stored. Codes are chosen with the scales as they are stored."""

    calibration: CalibrationSettings = CalibrationSettings()
    """The calibration text."""

    def quantize(self, weight: Tensor, stats: Any = None) -> AffineWeight:
        """stats: InputStatistics of the layer; notes on its Hessian are left in `stats.notes`. None: all inputs count
        alike (the Hessian is the identity), which makes it rounding to nearest on its grid.

        Raises:
            ModelError: the Hessian has NaN, or cannot be made positive definite.
        """
        return self._quantize(weight, None, stats)

    def quantize_pruned(self, weight: Tensor, mask: Tensor, stats: Any = None) -> AffineWeight:
        """The errors of the columns before are made up for by kept weights alone."""
        return self._quantize(weight, mask, stats)

    def _quantize(self, weight: Tensor, mask: Tensor | None, stats: Any) -> AffineWeight:
        if stats is None:
            stats = InputStatistics(torch.eye(weight.shape[1], device=weight.device))
        assert isinstance(stats, InputStatistics)
        order, factor, carry = self._prepare(stats)
        rows, columns = weight.shape
        size = self.group_size or columns
        top = 2**self.bits - 1
        dense = weight.detach().float()
        # Held as (in, out) and (groups, out), so that a column lies in one piece.
        codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
        scales = torch.empty(columns // size, rows, device=weight.device)
        zeros = torch.empty_like(scales)
        places: Sequence[int] = range(columns)
        if order is not None:
            found = self.find_grid(dense, self.group_size, stats.square_sum)
            scales.copy_(found[0].T)
            zeros.copy_(found[1].T)
            dense, places = dense[:, order], order.tolist()

        def compress(index: int, current: Tensor) -> Tensor:
            place = places[index]
            group = place // size
            if order is None and place % size == 0:
                inputs = stats.square_sum[index : index + size]
                grid = self.find_grid(current[:, :size].contiguous(), None, inputs)
                scales[group], zeros[group] = grid[0][:, 0], grid[1][:, 0]
            scale, zero = scales[group], zeros[group]
            column = current[:, 0] if mask is None else current[:, 0] * mask[:, place]
            code = torch.div(column, scale).add_(zero).round_().clamp_(0, top)
            codes[place] = code
            return code.sub_(zero).mul_(scale)[:, None]

        limits = (BLOCK_COLUMNS, INNER_COLUMNS)
        outer, inner = (fitting_block(self.group_size, limit) if self.group_size else limit for limit in limits)
        sweep(dense, factor, compress, outer, inner, carry)
        stored = None if self.symmetric else zeros.T.to(torch.uint8).contiguous()
        return AffineWeight.from_codes(
            codes.T.contiguous(),
            scales.T.contiguous(),
            stored,
            self.bits,
            self.group_size,
            weight.dtype,
            dtype_from_name(self.scale_dtype),
        )

    def find_grid(self, weight: Tensor, group_size: int | None, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Scales (rounded as they are stored) and zeros, float32 (out, groups), for weight (out, in).

        inputs: (in,), the sums of their squares.
        """
        dtype = dtype_from_name(self.scale_dtype)
        if self.grid == "minmax":
            return affine.find_grid(weight, self.bits, group_size, self.symmetric, dtype)
        return search_grid(weight, inputs, self.bits, group_size, self.symmetric, dtype)

    def _prepare(self, stats: InputStatistics) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """The order of the columns, and in this order the factor and the carry (None) of the sweep; worked out once for
        layers that share an input."""
        key = (self.act_order, self.damping)
        if key not in stats.memo:
            hessian = stats.hessian
            assert hessian is not None, "the walk was not asked for the Hessian"
            order = None
            if self.act_order == "static":
                order = hessian.diagonal().argsort(descending=True, stable=True)
                hessian = hessian[order][:, order]
            factor, notes = inverse_factor(hessian, self.damping)
            stats.notes += notes
            stats.memo[key] = (order, factor)
        order, factor = stats.memo[key]
        return order, factor, None

    def estimate_bits(self, shape: tuple[int, int]) -> float:
        return affine_bits(shape, self.bits, self.group_size, self.symmetric, dtype_from_name(self.scale_dtype))

    def check(self, shape: tuple[int, int]) -> str | None:
        return affine_problem(shape, self.group_size)
