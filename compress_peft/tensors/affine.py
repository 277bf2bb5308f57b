"""Affine grids: integer codes with one scale and one zero per group of consecutive weights of a row.

    weight = (code - zero) * scale        code = 0 .. 2 ** bits - 1, bits = 2, 3, 4 or 8

The zero is in units of the code. A symmetric grid has the fixed zero 2 ** (bits - 1). A group is `group_size` weights
of one row, or the whole row where it is None ("per channel"); groups never straddle rows.

Packing: every row on its own, code j in the bits [j * bits, (j + 1) * bits) of the row, counted from the lowest bit of
its first byte: 8 codes take exactly `bits` bytes, whatever the bits. The last byte of a row is filled with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compress_peft.errors import ModelError, Problem
from compress_peft.tensors.finite import all_finite

BITS = (2, 3, 4, 8)


def group_count(columns: int, group_size: int | None) -> int:
    """Groups per row of `columns` weights; group_size divides columns."""
    assert group_size is None or columns % group_size == 0
    return 1 if group_size is None else columns // group_size


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a packed row."""
    return -(-columns * bits // 8)


def symmetric_zero(bits: int) -> int:
    """The zero of a symmetric grid."""
    return 1 << (bits - 1)


def find_grid(
    weight: Tensor, bits: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor]:
    """The grid between the smallest and the largest weight of each group, zero always being a grid point.

    weight: (out, in), finite. Symmetric: scale = 2 * largest magnitude / (2 ** bits - 1), so that the largest weight
    may be cut by half a step. A group of zeros has scale 1.
    Returns (scales, zeros), both float32 (out, groups). The scales are rounded to scale_dtype already: codes found with
    them lose nothing when they are stored. The zeros are integers within 0 .. 2 ** bits - 1.

    Raises:
        ModelError: a scale is too large for scale_dtype.
    """
    rows, columns = weight.shape
    groups = weight.detach().float().view(rows, group_count(columns, group_size), -1)
    low, high = groups.aminmax(dim=2)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    top = 2**bits - 1
    # Divided before subtracting: the range itself may exceed float32.
    scales = round_scales(high / top - low / top, scale_dtype)
    if symmetric:
        return scales, torch.full_like(scales, symmetric_zero(bits))
    return scales, (-low / scales).round().clamp(0, top)


def round_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive scales to the values that dtype has, as float32; 0 becomes 1.

    Raises:
        ModelError: a scale is too large for dtype.
    """
    rounded = scales.to(dtype)
    if not all_finite(rounded):
        what = f"a scale of {float(scales.max()):.3g} is too large for {str(dtype).removeprefix('torch.')}"
        raise ModelError(Problem("scale_dtype", what, 'use scale_dtype "float32"'))
    # Subnormal numbers are coarse: rounding one down would cut the largest weights by several steps.
    smallest = torch.finfo(dtype).smallest_normal
    coarse = (rounded.float() < scales) & (scales < smallest)
    if coarse.any():
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        rounded = torch.where(coarse, (rounded.float() + step).to(dtype), rounded)
    return torch.where(scales > 0, rounded.float(), 1.0)


def quantize_affine(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int | None) -> Tensor:
    """The nearest codes, uint8 (out, in).

    weight: (out, in); scales, zeros: (out, groups), as from `find_grid`; zeros need not be integers.
    """
    rows, columns = weight.shape
    groups = weight.detach().float().view(rows, group_count(columns, group_size), -1)
    codes = (groups / scales.float()[..., None] + zeros.float()[..., None]).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8).view(rows, columns)


def dequantize_affine(
    codes: Tensor, scales: Tensor, zeros: Tensor | float, group_size: int | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(codes - zeros) * scales in float32, rounded to dtype; (out, in).

    codes: uint8 (out, in); scales, zeros: (out, groups) of any dtype; or one number for all zeros.
    """
    rows, columns = codes.shape
    groups = codes.view(rows, group_count(columns, group_size), -1).float()
    centred = groups.sub_(zeros.float()[..., None] if isinstance(zeros, Tensor) else zeros)
    return centred.mul_(scales.float()[..., None]).view(rows, columns).to(dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 (out, in), each below 2 ** bits -> uint8 (out, row_bytes)."""
    rows, columns = codes.shape
    if bits == 8:
        return codes.clone()
    if bits in (2, 4):
        padded = functional.pad(codes, (0, -columns % (8 // bits))).view(rows, -1, 8 // bits)
        packed = padded[..., 0].clone()
        for place in range(1, 8 // bits):  # several times as fast as a sum over so short a dimension
            packed |= padded[..., place] << (place * bits)
        return packed
    padded = functional.pad(codes, (0, -columns % 8)).view(rows, -1, 8).int()
    shifts = torch.arange(0, 8 * bits, bits, dtype=torch.int32, device=codes.device)
    words = (padded << shifts).sum(dim=2)
    bytes_ = (words[..., None] >> torch.arange(0, 8 * bits, 8, device=codes.device)) & 255
    packed = bytes_.to(torch.uint8).view(rows, -1)
    return packed[:, : row_bytes(columns, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: uint8 (out, row_bytes) -> uint8 (out, columns)."""
    rows = packed.shape[0]
    if bits == 8:
        return packed.clone()
    if bits in (2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        codes = (packed[..., None] >> shifts) & (2**bits - 1)
        return codes.view(rows, -1)[:, :columns].contiguous()
    padded = functional.pad(packed, (0, -packed.shape[1] % bits)).view(rows, -1, bits).int()
    words = (padded << torch.arange(0, 8 * bits, 8, dtype=torch.int32, device=packed.device)).sum(dim=2)
    shifts = torch.arange(0, 8 * bits, bits, device=packed.device)
    codes = (words[..., None] >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).view(rows, -1)[:, :columns].contiguous()
