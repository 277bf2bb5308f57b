"""The plain tensors that a compressed weight consists of, as the kernels take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compress_peft.tensors import affine, nf4

Pointers = tuple[int | None, ...]


class NF4Parts(NamedTuple):
    """Shapes and dtypes as in compress_peft/tensors/nf4.py. Either `absmax` or the three double-quantized parts."""

    codes: Tensor
    shape: tuple[int, int]
    """(out, in)"""
    block_size: int
    absmax: Tensor | None = None
    absmax_codes: Tensor | None = None
    absmax_scales: Tensor | None = None
    absmax_offset: Tensor | None = None
    grid: str = "nf4"
    """of `nf4.GRIDS`"""

    @property
    def by_rows(self) -> bool:
        """Whether each row can be decoded on its own."""
        return self.shape[1] % self.block_size == 0

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dense weight (out, in) in plain torch: what every kernel is tested against."""
        absmax = self.absmax
        if absmax is None:
            assert self.absmax_codes is not None and self.absmax_scales is not None and self.absmax_offset is not None
            absmax = nf4.dequantize_absmax(self.absmax_codes, self.absmax_scales, self.absmax_offset)
        return nf4.dequantize_nf4(self.codes, absmax, self.shape, self.block_size, dtype, self.grid)


class AffineParts(NamedTuple):
    """codes: packed, uint8 (out, row_bytes); scales, zeros: (out, groups); see compress_peft/tensors/affine.py."""

    codes: Tensor
    shape: tuple[int, int]
    """(out, in)"""
    bits: int
    group_size: int | None
    """None: one group per row"""
    scales: Tensor
    zeros: Tensor | None = None
    """None: symmetric"""

    @property
    def by_rows(self) -> bool:
        """Whether each row can be decoded on its own."""
        return True

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dense weight (out, in) in plain torch: what every kernel is tested against."""
        codes = affine.unpack(self.codes, self.bits, self.shape[1])
        zeros = affine.symmetric_zero(self.bits) if self.zeros is None else self.zeros
        return affine.dequantize_affine(codes, self.scales, zeros, self.group_size, dtype)


Parts = NF4Parts | AffineParts
