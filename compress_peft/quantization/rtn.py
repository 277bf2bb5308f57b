"""Round to nearest on an affine grid between the smallest and the largest weight of each group."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from compress_peft.quantization.base import QUANTIZERS, Bits, GroupSize, Quantizer, affine_bits, affine_problem
from compress_peft.tensors import affine
from compress_peft.weights import AffineWeight
from compress_peft.weights.compressed import dtype_from_name

AT_A_TIME = 1 << 22
"""Weights rounded at a time: the temporaries stay small beside the weight."""


@QUANTIZERS.register
class RTN(Quantizer):
    """Round to nearest: integer codes with a scale and a zero per group; needs no data."""

    paper: ClassVar[str] = "the baseline of GPTQ, Frantar et al. 2022, arXiv 2210.17323"
    keeps_zeros: ClassVar[bool] = True

    method: Literal["rtn"] = "rtn"

    bits: Bits = 4
    """Bits of a code."""

    group_size: GroupSize = 64
    """Consecutive weights of a row that share a scale and a zero: a multiple of 8 that divides the layer's inputs.
    null: the whole row (per channel)."""

    symmetric: bool = False
    """Fix the zero in the middle of the codes: 0.125 bits a weight less at groups of 64, and a larger error."""

    scale_dtype: Literal["float16", "float32"] = "float16"
    """How scales are stored. Codes are chosen with the scales as they are stored."""

    def quantize(self, weight: Tensor, stats: Any = None) -> AffineWeight:
        dtype = dtype_from_name(self.scale_dtype)
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        grids = []
        step = max(AT_A_TIME // weight.shape[1], 1)
        for start in range(0, weight.shape[0], step):
            part = weight.detach()[start : start + step]
            grid = affine.find_grid(part, self.bits, self.group_size, self.symmetric, dtype)
            codes[start : start + step] = affine.quantize_affine(part, *grid, self.bits, self.group_size)
            grids.append(grid)
        scales, zeros = (torch.cat(parts) for parts in zip(*grids, strict=True))
        stored = None if self.symmetric else zeros.to(torch.uint8)
        return AffineWeight.from_codes(codes, scales, stored, self.bits, self.group_size, weight.dtype, dtype)

    def estimate_bits(self, shape: tuple[int, int]) -> float:
        return affine_bits(shape, self.bits, self.group_size, self.symmetric, dtype_from_name(self.scale_dtype))

    def check(self, shape: tuple[int, int]) -> str | None:
        return affine_problem(shape, self.group_size)
