"""The NF4 weight: 4-bit codes and one absmax per block, double quantized or not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress_peft.errors import ModelError, Problem
from compress_peft.tensors import nf4
from compress_peft.weights.compressed import CompressedWeight, Shapes, dtype_from_name, dtype_name
from compress_peft.weights.parts import NF4Parts

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What the kernels (ours and bitsandbytes') take."""


class NF4Weight(CompressedWeight):
    """Components as in compress_peft/tensors/nf4.py.

    codes: uint8 (ceil(out * in / 2), 1).
    absmax: float32 (blocks,), or None and instead
    absmax_codes: uint8 (blocks,), absmax_scales: float32 (ceil(blocks / 256),), absmax_offset: float32 ().
    """

    kind: ClassVar[str] = "nf4"
    component_names: ClassVar[tuple[str, ...]] = (
        "codes",
        "absmax",
        "absmax_codes",
        "absmax_scales",
        "absmax_offset",
    )

    codes: Tensor
    absmax: Tensor | None
    absmax_codes: Tensor | None
    absmax_scales: Tensor | None
    absmax_offset: Tensor | None
    block_size: int
    compute_dtype: str

    @staticmethod
    def __new__(cls: type[NF4Weight], parts: NF4Parts, dtype: torch.dtype, compute_dtype: str = "auto") -> NF4Weight:
        self = Tensor._make_wrapper_subclass(
            cls, parts.shape, dtype=dtype, device=parts.codes.device, requires_grad=False
        )
        for name in cls.component_names:
            setattr(self, name, getattr(parts, name))
        self.block_size = parts.block_size
        self.compute_dtype = compute_dtype
        self.spec_text = json.dumps(self.spec())
        return self

    def __init__(self, parts: NF4Parts, dtype: torch.dtype, compute_dtype: str = "auto"):
        super().__init__()

    @classmethod
    def quantize(
        cls, weight: Tensor, block_size: int = 64, double_quant: bool = True, compute_dtype: str = "auto"
    ) -> NF4Weight:
        """weight: (out, in), finite. See `tensors.nf4` for the rounding."""
        codes, absmax = nf4.quantize_nf4(weight, block_size)
        shape = (weight.shape[0], weight.shape[1])
        if double_quant:
            parts = NF4Parts(codes, shape, block_size, None, *nf4.quantize_absmax(absmax))
        else:
            parts = NF4Parts(codes, shape, block_size, absmax)
        return cls(parts, weight.dtype, compute_dtype)

    @property
    def parts(self) -> NF4Parts:
        """The plain tensors, for the kernels."""
        return NF4Parts(
            self.codes,
            (self.shape[0], self.shape[1]),
            self.block_size,
            self.absmax,
            self.absmax_codes,
            self.absmax_scales,
            self.absmax_offset,
        )

    @property
    def double_quant(self) -> bool:
        return self.absmax is None

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": [self.shape[0], self.shape[1]],
            "dtype": dtype_name(self.dtype),
            "block_size": self.block_size,
            "double_quant": self.double_quant,
            "compute_dtype": self.compute_dtype,
        }

    @classmethod
    def component_shapes(cls, spec: Mapping[str, Any]) -> Shapes:
        count = math.prod(spec["shape"])
        blocks = -(-count // spec["block_size"])
        shapes: Shapes = {"codes": (torch.uint8, (-(-count // 2), 1))}
        if not spec["double_quant"]:
            return shapes | {"absmax": (torch.float32, (blocks,))}
        return shapes | {
            "absmax_codes": (torch.uint8, (blocks,)),
            "absmax_scales": (torch.float32, (-(-blocks // nf4.ABSMAX_GROUP),)),
            "absmax_offset": (torch.float32, ()),
        }

    @classmethod
    def build(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> NF4Weight:
        shape = (int(spec["shape"][0]), int(spec["shape"][1]))
        parts = NF4Parts(shape=shape, block_size=spec["block_size"], **tensors)
        return cls(parts, dtype_from_name(spec["dtype"]), spec.get("compute_dtype", "auto"))

    def scale_rows(self, vector: Tensor) -> NF4Weight:
        """The factors go into absmax, which leaves double quantization (4.5 bits a weight at blocks of 64).

        Exact up to one rounding of absmax * factor. Negative factors are fine: absmax may be negative.
        """
        out_features, in_features = self.shape
        if tuple(vector.shape) != (out_features,):
            raise ModelError(
                Problem("scale_rows", f"got factors of shape {tuple(vector.shape)}, expected ({out_features},)")
            )
        if in_features % self.block_size:
            raise ModelError(
                Problem(
                    "scale_rows",
                    f"blocks of {self.block_size} straddle the rows of {in_features}: one scale serves two outputs",
                    "merge with another policy, or quantize with a block size that divides the row",
                )
            )
        absmax = self.absmax
        if absmax is None:
            assert self.absmax_codes is not None and self.absmax_scales is not None and self.absmax_offset is not None
            absmax = nf4.dequantize_absmax(self.absmax_codes, self.absmax_scales, self.absmax_offset)
        factors = vector.detach().to(device=absmax.device, dtype=torch.float32)
        scaled = (absmax.view(out_features, -1) * factors.view(-1, 1)).reshape(-1)
        parts = NF4Parts(self.codes.clone(), (out_features, in_features), self.block_size, scaled)
        return NF4Weight(parts, self.dtype, self.compute_dtype)
