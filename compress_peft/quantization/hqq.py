"""HQQ: round to nearest with the zero of each group chosen so that most weights, not the outliers, come out right."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress_peft.quantization.base import QUANTIZERS, Bits, GroupSize, Quantizer, affine_problem
from compress_peft.quantization.rtn import AT_A_TIME
from compress_peft.tensors import affine
from compress_peft.tensors.half_quadratic import optimize_zeros
from compress_peft.weights import AffineWeight
from compress_peft.weights.affine import affine_spec
from compress_peft.weights.compressed import dtype_from_name, stored_bits


@QUANTIZERS.register
class HQQ(Quantizer):
    """Half-quadratic quantization: the zeros minimise a robust norm of the error; needs no data."""

    paper: ClassVar[str] = "HQQ, Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog"

    method: Literal["hqq"] = "hqq"

    bits: Bits = 4
    """Bits of a code."""

    group_size: GroupSize = 64
    """Consecutive weights of a row that share a scale and a zero: a multiple of 8 that divides the layer's inputs.
    null: the whole row (per channel)."""

    p: float = Field(default=0.7, gt=0, lt=1)
    """The norm is the sum of |error| ** p: below 1, few large errors count less than many small ones."""

    beta: float = Field(default=10.0, gt=0)
    """Weight of the quadratic term at the first step."""

    kappa: float = Field(default=1.01, ge=1)
    """Its growth from step to step."""

    iters: int = Field(default=20, ge=0)
    """Steps; every group keeps the best of its zeros. 0 is round to nearest."""

    scale_dtype: Literal["float16", "float32"] = "float16"
    """How scales and zeros are stored. Codes are chosen with them as they are stored."""

    def quantize(self, weight: Tensor, stats: Any = None) -> AffineWeight:
        dtype = dtype_from_name(self.scale_dtype)
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        grids = []
        step = max(AT_A_TIME // weight.shape[1], 1)
        for start in range(0, weight.shape[0], step):
            part = weight.detach()[start : start + step].float()
            scales, zeros = affine.find_grid(part, self.bits, self.group_size, symmetric=False, scale_dtype=dtype)
            settings = (self.bits, self.group_size, self.p, self.beta, self.kappa, self.iters)
            zeros = optimize_zeros(part, scales, zeros, *settings, zero_dtype=dtype)
            codes[start : start + step] = affine.quantize_affine(part, scales, zeros, self.bits, self.group_size)
            grids.append((scales, zeros))
        scales, zeros = (torch.cat(parts) for parts in zip(*grids, strict=True))
        return AffineWeight.from_codes(codes, scales, zeros, self.bits, self.group_size, weight.dtype, dtype)

    def estimate_bits(self, shape: tuple[int, int]) -> float:
        dtype = dtype_from_name(self.scale_dtype)
        return stored_bits(affine_spec(shape, self.bits, self.group_size, dtype, dtype))

    def check(self, shape: tuple[int, int]) -> str | None:
        return affine_problem(shape, self.group_size)
