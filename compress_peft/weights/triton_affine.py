"""Affine weights on CUDA by Triton, on the packed codes as they are. Imported only for a weight on such a device.

One helper decodes a tile; two kernels use it: one writes the dense weight, one multiplies few rows of activations by
it without ever writing it. A third multiplies by one row at a time, for decoding: it reads whole words of codes.
Packing as in compress_peft/tensors/affine.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from compress_peft.tensors import affine
from compress_peft.weights.parts import AffineParts

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""of the dense weight and of the activations"""

MOST_ROWS = 16
"""Rows of activations of the fused product: the smallest tile that tensor cores multiply."""

TILES = ((16, 256), (32, 128), (64, 64))
"""(outputs, columns) of the weight that a program of the fused product decodes at a time."""

WORD_TILES = ((2, 128), (4, 128), (8, 64))
"""(outputs, words of codes) that a program of the product with single rows decodes at a time."""

DENSE_TILE = 2048
"""Weights that a program of `dequantize` decodes."""


@triton.jit
def _decode(  # type: ignore[no-untyped-def]
    codes,
    scales,
    zeros,
    row,  # (R, 1) int64
    column,  # (1, C) int32
    inside,  # (R, C) bool: outside of it the result is 0
    row_bytes,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
):
    """(code - zero) * scale, float32 (R, C)."""
    bit = column * BITS
    byte = codes + row * row_bytes + bit // 8
    shift = bit % 8
    code = tl.load(byte, mask=inside, other=0).to(tl.int32)
    if BITS == 3:  # the only codes that may lie in two bytes
        code = code | (tl.load(byte + 1, mask=inside & (shift > 5), other=0).to(tl.int32) << 8)
    code = (code >> shift) & ((1 << BITS) - 1)
    grid = row * groups + column // GROUP
    scale = tl.load(scales + grid, mask=inside, other=0).to(tl.float32)
    if HAS_ZEROS:
        centred = code.to(tl.float32) - tl.load(zeros + grid, mask=inside, other=0).to(tl.float32)
    else:
        centred = code.to(tl.float32) - (1 << (BITS - 1))
    return centred * scale


@triton.jit
def _dequantize(  # type: ignore[no-untyped-def]
    out,
    codes,
    scales,
    zeros,
    rows,
    columns,
    row_bytes,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS))[:, None]
    column = (tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS))[None, :]
    inside = (row < rows) & (column < columns)
    weight = _decode(codes, scales, zeros, row, column, inside, row_bytes, groups, BITS, GROUP, HAS_ZEROS)
    tl.store(out + row * columns + column, weight.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _linear(  # type: ignore[no-untyped-def]
    out,
    x,
    count,
    codes,
    scales,
    zeros,
    rows,
    columns,
    row_bytes,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    MOST: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    line = tl.arange(0, MOST)[:, None]
    total = tl.full((MOST, TILE_ROWS), 0, tl.float32)
    for start in range(0, columns, TILE_COLUMNS):
        column = (start + tl.arange(0, TILE_COLUMNS))[None, :]
        inside = (row[:, None] < rows) & (column < columns)
        weight = _decode(codes, scales, zeros, row[:, None], column, inside, row_bytes, groups, BITS, GROUP, HAS_ZEROS)
        some = tl.load(x + line * columns + column, mask=(line < count) & (column < columns), other=0)
        # "ieee": float32 activations are not cut to TF32. Others are multiplied as they are, summed in float32.
        total = tl.dot(some, tl.trans(weight.to(x.dtype.element_ty)), total, input_precision="ieee")
    place = out + line * rows + row[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(line < count) & (row[None, :] < rows))


@triton.jit
def _single_rows(  # type: ignore[no-untyped-def]
    out,
    x,
    codes,  # int32
    scales,
    zeros,
    rows,
    words,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
):
    HELD: tl.constexpr = 32 // BITS
    row = (tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS))[:, None]
    place = tl.arange(0, HELD)
    line = tl.program_id(1).to(tl.int64)
    total = tl.full((TILE_ROWS, TILE_WORDS, HELD), 0, tl.float32)
    for start in range(0, words, TILE_WORDS):
        word = start + tl.arange(0, TILE_WORDS)
        inside = (row < rows) & (word < words)[None, :]
        held = tl.load(codes + row.to(tl.int64) * words + word[None, :], mask=inside, other=0)
        grid = row.to(tl.int64) * groups + (word * HELD // GROUP)[None, :]
        scale = tl.load(scales + grid, mask=inside, other=0).to(tl.float32)
        code = ((held[:, :, None] >> (place * BITS)[None, None, :]) & ((1 << BITS) - 1)).to(tl.float32)
        if HAS_ZEROS:
            code = code - tl.load(zeros + grid, mask=inside, other=0).to(tl.float32)[:, :, None]
        else:
            code = code - (1 << (BITS - 1))
        weight = (code * scale[:, :, None]).to(x.dtype.element_ty).to(tl.float32)
        column = word[:, None] * HELD + place[None, :]
        some = tl.load(x + line * words * HELD + column, mask=(word < words)[:, None], other=0).to(tl.float32)
        total += weight * some[None, :, :]
    sums = tl.sum(tl.sum(total, axis=2), axis=1)
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    tl.store(out + line * rows + row, sums.to(out.dtype.element_ty), mask=row < rows)


def _device_of(out: Tensor) -> Any:
    """The context in which kernels start on the device of `out`."""
    return torch.cuda.device_of(out) if torch.cuda.device_count() > 1 else contextlib.nullcontext()


def _arguments(parts: AffineParts) -> dict[str, Any]:
    rows, columns = parts.shape
    scales = parts.scales.contiguous()
    return {
        "codes": parts.codes.contiguous(),
        "scales": scales,
        "zeros": scales if parts.zeros is None else parts.zeros.contiguous(),
        "rows": rows,
        "columns": columns,
        "row_bytes": parts.codes.shape[1],
        "groups": scales.shape[1],
        "BITS": parts.bits,
        "GROUP": columns // scales.shape[1],
        "HAS_ZEROS": parts.zeros is not None,
    }


def dequantize(parts: AffineParts, dtype: torch.dtype) -> Tensor:
    """The dense weight (out, in) in a dtype of `DTYPES`; the same numbers as `parts.dequantize`."""
    rows, columns = parts.shape
    out = torch.empty(rows, columns, dtype=dtype, device=parts.codes.device)
    wide = min(triton.next_power_of_2(columns), DENSE_TILE)
    high = DENSE_TILE // wide
    with _device_of(out):
        _dequantize[(math.ceil(rows / high), math.ceil(columns / wide))](
            out, **_arguments(parts), TILE_ROWS=high, TILE_COLUMNS=wide
        )
    return out


def in_words(parts: AffineParts) -> bool:
    """Whether `products` has the product with single rows: no word of codes goes over the end of a row or a group."""
    columns, groups = parts.shape[1], parts.scales.shape[1]
    held = 32 // parts.bits
    whole = parts.bits != 3 and columns % held == 0 and (columns // groups) % held == 0
    return whole and parts.codes.is_contiguous() and parts.codes.data_ptr() % 4 == 0


def products(parts: AffineParts) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Ways to multiply x (..., in), without gaps and of so many rows (at most MOST_ROWS), by this weight: (..., out).
    All that can be worked out before the call is."""
    ready = _arguments(parts)
    columns = parts.shape[1]

    def fused(tile: tuple[int, int]) -> Callable[[Tensor, int], Tensor]:
        programs = (math.ceil(parts.shape[0] / tile[0]),)
        kernel = _linear[programs]

        def run(x: Tensor, count: int) -> Tensor:
            out = x.new_empty((*x.shape[:-1], parts.shape[0]))
            with _device_of(out):
                kernel(out, x, count, **ready, MOST=MOST_ROWS, TILE_ROWS=tile[0], TILE_COLUMNS=tile[1])
            return out

        return run

    def single(tile: tuple[int, int]) -> Callable[[Tensor, int], Tensor]:
        programs = math.ceil(parts.shape[0] / tile[0])
        words = columns * parts.bits // 32
        own = {name: ready[name] for name in ("scales", "zeros", "rows", "groups", "BITS", "GROUP", "HAS_ZEROS")}
        codes = parts.codes.view(torch.int32)

        def run(x: Tensor, count: int) -> Tensor:
            out = x.new_empty((*x.shape[:-1], parts.shape[0]))
            with _device_of(out):
                _single_rows[(programs, count)](
                    out, x, codes, words=words, **own, TILE_ROWS=tile[0], TILE_WORDS=tile[1]
                )
            return out

        return run

    found = {f"fused {tile}": fused(tile) for tile in TILES}
    if in_words(parts):
        found |= {f"single rows {tile}": single(tile) for tile in WORD_TILES}
    return found


def check(device: torch.device, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Small weights through all kernels against plain torch, in each dtype.

    Raises:
        RuntimeError: the numbers differ. Whatever Triton raises where it cannot compile.
    """
    for bits, group_size, kind in ((3, 24, "fused"), (4, 24, "single rows")):
        codes = torch.arange(40 * 72, device=device).remainder(5).to(torch.uint8).view(40, 72)
        scales = torch.linspace(0.5, 1.5, 40 * 3, device=device).view(40, 3)
        parts = AffineParts(affine.pack(codes, bits), (40, 72), bits, group_size, scales)
        product = next(product for name, product in products(parts).items() if name.startswith(kind))
        for dtype in dtypes:
            dense = parts.dequantize(dtype)
            if not torch.equal(dequantize(parts, dtype), dense):
                raise RuntimeError(f"a weight dequantized to {dtype} differs from plain torch's")
            x = torch.linspace(-1, 1, 2 * 72, device=device).view(2, 72).to(dtype)
            want = x.double() @ dense.double().t()
            bound = 1e-5 * (x.abs().double() @ dense.abs().double().t()) + torch.finfo(dtype).eps * want.abs()
            if not ((product(x, len(x)).double() - want).abs() <= bound).all():
                raise RuntimeError(f"a product ({kind}) in {dtype} differs from plain torch's")
