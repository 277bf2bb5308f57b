"""NF4 with double quantization, as QLoRA does it."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from torch import Tensor

from compress_peft.quantization.base import QUANTIZERS, Quantizer
from compress_peft.weights import NF4Weight
from compress_peft.weights.compressed import stored_bits


@QUANTIZERS.register
class NF4(Quantizer):
    """4-bit NormalFloat: round to nearest on the quantiles of a normal distribution, per block; needs no data."""

    paper: ClassVar[str] = "QLoRA, Dettmers et al. 2023, arXiv 2305.14314"
    keeps_zeros: ClassVar[bool] = True

    method: Literal["nf4"] = "nf4"

    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Consecutive weights that share one scale."""

    double_quant: bool = True
    """Quantize the scales too: 4.13 instead of 4.5 bits a weight at blocks of 64."""

    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the products. auto: that of the activations on a GPU; float32 on a CPU that does not multiply bfloat16
    in hardware."""

    def quantize(self, weight: Tensor, stats: Any = None) -> NF4Weight:
        return NF4Weight.quantize(weight, self.block_size, self.double_quant, self.compute_dtype)

    def estimate_bits(self, shape: tuple[int, int]) -> float:
        spec = {"kind": self.method, "shape": shape, "block_size": self.block_size, "double_quant": self.double_quant}
        return stored_bits(spec)

    def check(self, shape: tuple[int, int]) -> str | None:
        return None if math.prod(shape) else "the layer has no weights"
