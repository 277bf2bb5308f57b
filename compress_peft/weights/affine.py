"""The affine weight: integer codes of 2, 3, 4 or 8 bits with a scale and a zero per group."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress_peft.errors import ModelError, Problem, UserError
from compress_peft.tensors import affine
from compress_peft.tensors.finite import all_finite
from compress_peft.weights.compressed import CompressedWeight, Shapes, dtype_from_name, dtype_name
from compress_peft.weights.parts import AffineParts


class AffineWeight(CompressedWeight):
    """weight = (code - zero) * scale; grids, groups and packing as in compress_peft/tensors/affine.py.

    codes: uint8 (out, row_bytes), packed.
    scales: float16 or float32 (out, groups).
    zeros: (out, groups), uint8, float16 or float32; None on a symmetric grid.
    """

    kind: ClassVar[str] = "affine"
    component_names: ClassVar[tuple[str, ...]] = ("codes", "scales", "zeros")

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int | None

    @staticmethod
    def __new__(cls: type[AffineWeight], parts: AffineParts, dtype: torch.dtype) -> AffineWeight:
        self = Tensor._make_wrapper_subclass(
            cls, parts.shape, dtype=dtype, device=parts.codes.device, requires_grad=False
        )
        self.codes, self.scales, self.zeros = parts.codes, parts.scales, parts.zeros
        self.bits, self.group_size = parts.bits, parts.group_size
        self.spec_text = json.dumps(self.spec())
        return self

    def __init__(self, parts: AffineParts, dtype: torch.dtype):
        super().__init__()

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bits: int,
        group_size: int | None,
        dtype: torch.dtype,
        scale_dtype: torch.dtype = torch.float16,
    ) -> AffineWeight:
        """What every quantizer with an affine grid returns.

        codes: uint8 (out, in), unpacked. scales: (out, groups), with values that scale_dtype has (`find_grid` rounds
        them). zeros: (out, groups); of dtype uint8 stored so; of a floating dtype stored as scale_dtype; None on a
        symmetric grid. dtype: the logical one, that of the dense weight.
        """
        stored = scales.to(scale_dtype)
        assert torch.equal(stored.to(scales.dtype), scales), "scales must be rounded before codes are chosen"
        if zeros is not None and zeros.dtype != torch.uint8:
            zeros = zeros.to(scale_dtype)
        shape = (codes.shape[0], codes.shape[1])
        return cls(AffineParts(affine.pack(codes, bits), shape, bits, group_size, stored, zeros), dtype)

    @property
    def parts(self) -> AffineParts:
        """The plain tensors, for the kernels."""
        shape = (self.shape[0], self.shape[1])
        return AffineParts(self.codes, shape, self.bits, self.group_size, self.scales, self.zeros)

    def unpacked(self) -> Tensor:
        """The codes, uint8 (out, in)."""
        return affine.unpack(self.codes, self.bits, self.shape[1])

    def with_codes(self, codes: Tensor) -> AffineWeight:
        """See `GridWeight`."""
        return AffineWeight(self.parts._replace(codes=affine.pack(codes, self.bits)), self.dtype)

    def points(self) -> Tensor:
        """See `GridWeight`."""
        return torch.arange(2**self.bits, dtype=torch.float32, device=self.codes.device)

    def steps(self) -> Tensor:
        """See `GridWeight`."""
        return self.scales.float().repeat_interleave(self.shape[1] // self.scales.shape[1], dim=1)

    def refit(self, dense: Tensor) -> AffineWeight:
        """See `GridWeight`. Groups in which nothing changed keep their grid."""
        groups = (*self.scales.shape, -1)
        same = (dense == self.dequantize(torch.float32)).view(groups).all(dim=2)
        found, middles = affine.find_grid(dense, self.bits, self.group_size, self.zeros is None, self.scales.dtype)
        codes = affine.quantize_affine(dense, found, middles, self.bits, self.group_size)
        codes = torch.where(same[..., None], self.unpacked().view(groups), codes.view(groups)).view(self.shape)
        zeros = None if self.zeros is None else torch.where(same, self.zeros, middles.to(self.zeros.dtype))
        scales = torch.where(same, self.scales, found.to(self.scales.dtype))
        return AffineWeight(
            self.parts._replace(codes=affine.pack(codes, self.bits), scales=scales, zeros=zeros), self.dtype
        )

    def spec(self) -> dict[str, Any]:
        return affine_spec(
            (self.shape[0], self.shape[1]),
            self.bits,
            self.group_size,
            None if self.zeros is None else self.zeros.dtype,
            self.scales.dtype,
            self.dtype,
        )

    @classmethod
    def component_shapes(cls, spec: Mapping[str, Any]) -> Shapes:
        rows, columns = int(spec["shape"][0]), int(spec["shape"][1])
        bits, group_size = spec["bits"], spec["group_size"]
        if bits not in affine.BITS or (group_size is not None and (group_size < 1 or columns % group_size)):
            what = f"no grid has {bits} bits and groups of {group_size} in rows of {columns}"
            raise UserError(Problem("spec", what, "the description of the weight is damaged: get it again"))
        grid = (rows, affine.group_count(columns, group_size))
        shapes: Shapes = {
            "codes": (torch.uint8, (rows, affine.row_bytes(columns, bits))),
            "scales": (dtype_from_name(spec["scale_dtype"]), grid),
        }
        return shapes if spec["zero_dtype"] is None else shapes | {"zeros": (dtype_from_name(spec["zero_dtype"]), grid)}

    @classmethod
    def build(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AffineWeight:
        shape = (int(spec["shape"][0]), int(spec["shape"][1]))
        parts = AffineParts(
            tensors["codes"], shape, spec["bits"], spec["group_size"], tensors["scales"], tensors.get("zeros")
        )
        return cls(parts, dtype_from_name(spec["dtype"]))

    def take_rows(self, rows: Tensor) -> AffineWeight:
        zeros = None if self.zeros is None else self.zeros[rows]
        parts = self.parts._replace(
            codes=self.codes[rows], shape=(len(rows), self.shape[1]), scales=self.scales[rows], zeros=zeros
        )
        return AffineWeight(parts, self.dtype)

    def scale_rows(self, vector: Tensor) -> AffineWeight:
        """The factors go into the scales, which become float32. Exact up to one rounding of scale * factor."""
        if tuple(vector.shape) != (self.shape[0],):
            what = f"got factors of shape {tuple(vector.shape)}, expected ({self.shape[0]},)"
            raise ModelError(Problem("scale_rows", what))
        factors = vector.detach().to(device=self.scales.device, dtype=torch.float32)
        zeros = None if self.zeros is None else self.zeros.clone()
        parts = self.parts._replace(
            codes=self.codes.clone(), scales=self.scales.float() * factors[:, None], zeros=zeros
        )
        return AffineWeight(parts, self.dtype)

    def shift_groups(self, shift: Tensor, zero_dtype: torch.dtype = torch.float32) -> AffineWeight:
        """The weight with shift[i, g] added to all weights of group g of row i: zero - shift / scale.

        Codes and scales stay; the zeros become floating-point numbers, also on a grid that had none (symmetric).
        Exact up to one rounding of the zero to zero_dtype: 2 ** -24 of it in float32, 2 ** -11 in float16.

        Raises:
            ModelError: a group has the scale 0, or a zero is too large for zero_dtype.
        """
        if shift.shape != self.scales.shape:
            what = f"got shifts of shape {tuple(shift.shape)}, expected {tuple(self.scales.shape)}"
            raise ModelError(Problem("shift_groups", what))
        old = affine.symmetric_zero(self.bits) if self.zeros is None else self.zeros.double()
        shift = shift.detach().to(self.scales.device).double()
        zeros = torch.where(shift == 0, old, old - shift / self.scales.double()).to(zero_dtype)
        if not all_finite(zeros):
            what = f"a zero does not fit {dtype_name(zero_dtype)}, or a group has the scale 0"
            raise ModelError(Problem("shift_groups", what, "store the zeros as float32, or merge with another policy"))
        return AffineWeight(self.parts._replace(codes=self.codes.clone(), zeros=zeros), self.dtype)

    def add_on_grid(self, delta: Tensor, dither: Tensor | None = None, keep: Tensor | None = None) -> AffineWeight:
        """See `GridWeight`."""
        groups = (self.shape[0], self.scales.shape[1], -1)
        scales = self.scales.float()[..., None]
        codes = delta.detach().float().reshape(groups) / scales.where(scales != 0, 1.0)
        codes += self.unpacked().view(groups)
        if dither is not None:
            codes += dither.view(groups)
        codes.round_().clamp_(0, 2**self.bits - 1)
        if keep is not None:
            zeros = affine.symmetric_zero(self.bits) if self.zeros is None else self.zeros.float()[..., None]
            old = self.unpacked().view(groups).float()
            # A kept weight stays on its side of zero; the code next to zero there exists, since its own does.
            beside = zeros + (old - zeros).sign()
            kept = keep.view(groups)
            codes = torch.where(kept & (codes == zeros), beside, codes).where(kept, old)
        return self.with_codes(codes.to(torch.uint8).view(self.shape[0], self.shape[1]))


def affine_spec(
    shape: tuple[int, int],
    bits: int,
    group_size: int | None,
    zero_dtype: torch.dtype | None,
    scale_dtype: torch.dtype = torch.float16,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """`AffineWeight.spec()` of a weight with these settings; zero_dtype None: symmetric."""
    return {
        "kind": AffineWeight.kind,
        "shape": list(shape),
        "dtype": dtype_name(dtype),
        "bits": bits,
        "group_size": group_size,
        "scale_dtype": dtype_name(scale_dtype),
        "zero_dtype": None if zero_dtype is None else dtype_name(zero_dtype),
    }
