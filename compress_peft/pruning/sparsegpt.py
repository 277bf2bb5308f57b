"""SparseGPT: weights are removed column by column, and later columns make up for it; with GPTQ in the same sweep."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress_peft.models.walk import InputStatistics
from compress_peft.pruning.base import PRUNERS, Pruner, Sparsity
from compress_peft.tensors.grid_search import search_grid
from compress_peft.tensors.masks import Pattern, parse_pattern, select
from compress_peft.tensors.sweep import BLOCK_COLUMNS, INNER_COLUMNS, inverse_factor, sweep
from compress_peft.weights import AffineWeight
from compress_peft.weights.affine import affine_spec
from compress_peft.weights.compressed import dtype_from_name, stored_bits


class JointQuantization(BaseModel):
    """The integer grid of weights that are quantized in the sweep that prunes them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    bits: Literal[2, 3, 4, 8] = 4
    """Bits of a code."""

    group_size: int | None = Field(default=64, gt=0, multiple_of=8)
    """Consecutive weights of a row that share a scale and a zero; null: the whole row."""

    symmetric: bool = False
    """Fix the zero in the middle of the codes."""

    scale_dtype: Literal["float16", "float32"] = "float16"
    """How scales are stored."""


@PRUNERS.register
class SparseGPT(Pruner):
    """Removes the weights whose loss the others can best make up for, and has them make up for it."""

    paper: ClassVar[str] = "SparseGPT, Frantar and Alistarh 2023, arXiv 2301.00774"
    needs: ClassVar[tuple[str, ...]] = ("hessian",)

    method: Literal["sparsegpt"] = "sparsegpt"

    mask_block: int = Field(default=BLOCK_COLUMNS, gt=0, multiple_of=INNER_COLUMNS)
    """Columns among which the weights to remove are chosen at once (the paper's B_s); not used with `pattern`."""

    damping: float = Field(default=0.01, gt=0, le=1)
    """Added to the Hessian's diagonal, times its mean; raised tenfold where the Hessian needs more."""

    quantize: JointQuantization | None = None
    """Quantize the remaining weights in the same sweep (section 3.5), e.g. {bits: 4, group_size: 64}."""

    def prune(self, weight: Tensor, stats: InputStatistics | None, sparsity: Sparsity) -> tuple[Tensor, Tensor]:
        """Algorithm 1. With inputs X, H = X^T X and H^-1 = U^T U: removing w_ij costs (w_ij / U_jj)^2 if the weights to
        its right, and they alone, make up for it (eq. 3 and 4). The mask is chosen per block of columns when its turn
        comes, across all rows for a share, per row and m columns for n:m.

        Raises:
            ModelError: the Hessian has NaN, or cannot be made positive definite.
        """
        assert stats is not None and stats.hessian is not None
        factor = self._factor(stats)
        group = sparsity.m if isinstance(sparsity, Pattern) else 1
        size = (self.quantize.group_size if self.quantize is not None else None) or 1
        block, inner = _span(group, size, self.mask_block), _span(group, size, INNER_COLUMNS)
        step = group if isinstance(sparsity, Pattern) else block
        # Removing a weight that no input ever meets costs nothing.
        cost = torch.where(stats.square_sum > 0, factor.diagonal().square(), torch.inf)
        gone = weight == 0
        mask = torch.empty_like(gone)
        grid = _Grid(self.quantize, weight, stats.square_sum) if self.quantize is not None else None

        def compress(index: int, current: Tensor) -> Tensor:
            if index % step == 0:
                score = current[:, :step].square() / cost[index : index + step]
                score = torch.where(gone[:, index : index + step], -1.0, score)
                mask[:, index : index + step] = select(score, sparsity, by_rows=False) & (score >= 0)
            kept = mask[:, index]
            column = current[:, 0] * kept
            return column[:, None] if grid is None else grid.round(index, column, current, mask)[:, None]

        swept = sweep(weight.detach().float(), factor, compress, block, inner)
        return (swept.to(weight.dtype) if grid is None else grid.weight(weight.dtype)), mask

    def check(self, shape: tuple[int, int]) -> str | None:
        size = self.quantize.group_size if self.quantize is not None else None
        if size is not None and shape[1] % size:
            return f"quantize.group_size {size} does not divide its {shape[1]} inputs"
        if size is not None and self.pattern is not None:
            m = parse_pattern(self.pattern).m
            if size % m and m % size:
                return f"quantize.group_size {size} and pattern {self.pattern} do not fit: let one divide the other"
        return super().check(shape)

    def estimate_bits(self, shape: tuple[int, int]) -> float | None:
        if self.quantize is None:
            return None
        zeros = None if self.quantize.symmetric else torch.uint8
        dtype = dtype_from_name(self.quantize.scale_dtype)
        return stored_bits(affine_spec(shape, self.quantize.bits, self.quantize.group_size, zeros, dtype))

    @classmethod
    def quantizes(cls, settings: dict[str, Any]) -> bool:
        return settings.get("quantize") is not None

    def _factor(self, stats: InputStatistics) -> Tensor:
        """U; layers that share their inputs share it."""
        key = ("inverse factor", self.damping)
        if key not in stats.memo:
            assert stats.hessian is not None
            factor, notes = inverse_factor(stats.hessian, self.damping)
            stats.memo[key] = factor
            stats.notes += [note for note in notes if note not in stats.notes]
        factor = stats.memo[key]
        assert isinstance(factor, Tensor)
        return factor


class _Grid:
    """The codes and grids of a weight that is quantized column by column; each group's grid is found at its turn."""

    def __init__(self, settings: JointQuantization, weight: Tensor, inputs: Tensor):
        rows, columns = weight.shape
        self.settings, self.inputs = settings, inputs
        self.size = settings.group_size or columns
        self.codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
        self.scales = torch.empty(columns // self.size, rows, device=weight.device)
        self.zeros = torch.empty_like(self.scales)

    def round(self, index: int, column: Tensor, current: Tensor, mask: Tensor) -> Tensor:
        """The column (out,), zero where it is pruned, on its grid: zero is a point of every grid and stays zero."""
        group, place = divmod(index, self.size)
        dtype = dtype_from_name(self.settings.scale_dtype)
        if place == 0:
            part, inputs = current[:, : self.size].contiguous(), self.inputs[index : index + self.size]
            found = search_grid(part, inputs, self.settings.bits, None, self.settings.symmetric, dtype)
            self.scales[group], self.zeros[group] = found[0][:, 0], found[1][:, 0]
        scale, zero = self.scales[group], self.zeros[group]
        code = torch.div(column, scale).add_(zero).round_().clamp_(0, 2**self.settings.bits - 1)
        self.codes[index] = code
        return code.sub_(zero).mul_(scale)

    def weight(self, dtype: torch.dtype) -> AffineWeight:
        zeros = None if self.settings.symmetric else self.zeros.T.to(torch.uint8).contiguous()
        return AffineWeight.from_codes(
            self.codes.T.contiguous(),
            self.scales.T.contiguous(),
            zeros,
            self.settings.bits,
            self.settings.group_size,
            dtype,
            dtype_from_name(self.settings.scale_dtype),
        )


def _span(group: int, size: int, limit: int) -> int:
    """Columns up to `limit`: whole groups of the pattern, and whole groups of the grid or an even part of one."""
    fitting = [span for span in range(group, limit + 1, group) if size % span == 0 or span % size == 0]
    return max(fitting, default=group)
