"""AWQ folders in AutoAWQ's GEMM layout.

qweight  int32   (in, out / 8)    4-bit codes, packed along the outputs in the order 0 2 4 6 1 3 5 7
qzeros   int32   (G, out / 8)     zeros, packed the same way
scales   float16 (G, out)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress_peft.errors import ModelError, Problem
from compress_peft.models.foreign.base import (
    ForeignFormat,
    Refusal,
    Tensors,
    affine_refusal,
    affine_weight,
    group_of,
    group_size_from,
    half_scale_refusal,
    integer_zeros,
)
from compress_peft.tensors.int32 import deinterleave, interleave, pack_words, unpack_words
from compress_peft.weights import AffineWeight, CompressedWeight
from compress_peft.weights.storage import Spec


class AWQFormat(ForeignFormat):
    """4 bits; a symmetric grid is stored with all its zeros 8."""

    quant_method: ClassVar[str] = "awq"
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    def refusal(self, spec: Spec) -> Refusal | None:
        found = super().refusal(spec) or affine_refusal(spec, (4,))
        if found is None and spec["shape"][0] % 8:
            what = f"it holds layers whose outputs are a multiple of 8, and these are {spec['shape'][0]}"
            found = Refusal(what, "skip these layers when quantizing, or use format: compressed-tensors")
        return found

    def data_refusal(self, weight: CompressedWeight) -> Refusal | None:
        assert isinstance(weight, AffineWeight)
        return half_scale_refusal(weight)

    def write(self, weight: CompressedWeight) -> dict[str, Tensor]:
        assert isinstance(weight, AffineWeight)
        return {
            "qweight": pack_words(interleave(weight.unpacked().t().contiguous()), 4),
            "qzeros": pack_words(interleave(integer_zeros(weight).t().contiguous()), 4),
            "scales": weight.scales.to(torch.float16).t().contiguous(),
        }

    def read(self, tensors: Tensors, settings: Mapping[str, Any]) -> CompressedWeight:
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm" or settings.get("bits", settings.get("w_bit", 4)) != 4:
            what = f"its version is {version}, only gemm with 4 bits is read"
            raise ModelError(Problem("quantization_config", what, "use the gemm version of the model"))
        columns, rows = tensors["qweight"].shape[0], 8 * tensors["qweight"].shape[1]
        codes = deinterleave(unpack_words(tensors["qweight"], 4, rows)).t()
        zeros = deinterleave(unpack_words(tensors["qzeros"], 4, rows)).t()
        size = group_size_from(columns, tensors["scales"].shape[0])
        return affine_weight(codes, tensors["scales"].t(), zeros, 4, size)

    def settings(self, specs: Mapping[str, Spec], dense: Sequence[str]) -> dict[str, Any]:
        sizes = {group_of(spec) for spec in specs.values()}
        if len(sizes) > 1:
            what = f"AWQ folders have one group size, and these layers have {sorted(sizes)}"
            raise ModelError(Problem("group_size", what, "use format: gptq or compressed-tensors"))
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": sizes.pop(),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(dense) or None,
        }
