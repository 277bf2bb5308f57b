"""The C kernels of csrc/, called through ctypes. Absent without a compiler at install time; then nothing is lost
but speed."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compress_peft.errors import ConfigError, Problem, did_you_mean
from compress_peft.tensors.nf4 import GRIDS, dynamic_map
from compress_peft.weights.parts import AffineParts, NF4Parts, Parts

ISA_VARIABLE = "COMPRESS_PEFT_CPU_ISA"
"""Environment variable that caps the instruction set: avx512, avx2, portable, or none (no C kernels at all)."""

_ISA = {"portable": 0, "avx2": 2, "avx512": 3}
_ZERO_KINDS = {torch.uint8: 1, torch.float16: 2, torch.float32: 3}
_CPU = torch.device("cpu")


@functools.cache
def _library() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("compress_peft._kernels")
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError:  # built for another machine or without its OpenMP runtime: plain torch, and `active` says so
        return None
    pointer, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    nf4 = [pointer] * 6 + [size]
    for grid in GRIDS:
        function(library, grid, "dequantize").argtypes = [*nf4, size, size, pointer, pointer, integer, integer]
        function(library, grid, "dequantize").restype = None
        function(library, grid, "matmul").argtypes = [*nf4, pointer, pointer, size, size, size, integer, integer]
    affine = [pointer] * 3 + [integer] * 3 + [size]
    library.affine_dequantize.argtypes = [*affine, size, size, size, pointer, pointer, integer, integer]
    library.affine_dequantize.restype = None
    library.affine_matmul.argtypes = [*affine, pointer, pointer, size, size, size, integer, integer]
    library.dense_matmul.argtypes = [pointer] * 4 + [size] * 3 + [integer, integer]
    library.rms_norm.argtypes = [pointer, pointer, ctypes.c_float, pointer, size, size]
    library.rms_norm.restype = None
    strides = ctypes.POINTER(size * 3)
    run: list[Any] = [ctypes.c_float, integer, integer]
    library.attention.argtypes = [*[pointer] * 5, *[size] * 5, strides, strides, size, *run]
    library.prefill.argtypes = [*[pointer] * 5, *[size] * 6, strides, strides, strides, size, size, integer, *run]
    library.decode_block.argtypes = [
        pointer, pointer, pointer, size, pointer, pointer, size, pointer, pointer, size, strides, strides, pointer,
        size, integer, integer,
    ]  # fmt: skip
    return library


def function(library: ctypes.CDLL, grid: str, name: str) -> Any:
    """ "dequantize" or "matmul" for a grid of GRIDS."""
    return getattr(library, f"{grid}_{name}")


@functools.cache
def available() -> str | None:
    """The instruction set in use ("avx512", "avx2", "portable"), None if there are no C kernels.

    Raises:
        ConfigError: the environment variable names no instruction set.
    """
    wish = os.environ.get(ISA_VARIABLE, "avx512").lower()
    if wish == "none":
        return None
    if wish not in _ISA:
        fix = did_you_mean(wish, [*_ISA, "none"])
        raise ConfigError(Problem(ISA_VARIABLE, f'unknown instruction set "{wish}"', fix))
    library = _library()
    if library is None:
        return None
    best = min(_ISA[wish], library.cpu_best_isa())
    return next(name for name, value in _ISA.items() if value == best)


def has_openmp() -> bool:
    library = _library()
    return library is not None and bool(library.cpu_has_openmp())


def on_amd() -> bool:
    """Whether this is a processor of AMD's. False where there is no library to tell."""
    library = _library()
    return library is not None and bool(library.cpu_is_amd())


def has_dense() -> bool:
    """Whether there is a kernel for dense weights: with plain C it would be slower than torch."""
    return available() not in (None, "portable")


def _nf4(parts: NF4Parts) -> tuple[int | None, ...]:
    if parts.absmax is not None:
        return parts.codes.data_ptr(), parts.absmax.data_ptr(), None, None, None, None, parts.block_size
    assert parts.absmax_codes is not None and parts.absmax_scales is not None and parts.absmax_offset is not None
    return (
        parts.codes.data_ptr(),
        None,
        parts.absmax_codes.data_ptr(),
        parts.absmax_scales.data_ptr(),
        dynamic_map(_CPU).data_ptr(),
        parts.absmax_offset.data_ptr(),
        parts.block_size,
    )


def _affine(parts: AffineParts) -> tuple[int | None, ...]:
    return (
        parts.codes.data_ptr(),
        parts.scales.data_ptr(),
        None if parts.zeros is None else parts.zeros.data_ptr(),
        parts.scales.dtype == torch.float16,
        0 if parts.zeros is None else _ZERO_KINDS[parts.zeros.dtype],
        parts.bits,
        parts.group_size or parts.shape[1],
    )


def dequantize(parts: Parts, dtype: torch.dtype, isa: str | None = None) -> Tensor:
    """(out, in) on the CPU, in float32 or bfloat16 straight, in other dtypes by way of float32."""
    direct = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
    out = torch.empty(parts.shape, dtype=direct)
    dequantize_into(out, parts, 0, isa)
    return out.to(dtype)


def dequantize_into(out: Tensor, parts: Parts, first_row: int = 0, isa: str | None = None) -> None:
    """Rows first_row ... of the weight into `out` (rows, in), contiguous, float32 or bfloat16.

    Of an NF4 weight, first_row * in is a multiple of the block size.
    """
    library = _library()
    assert library is not None and out.is_contiguous()
    target = (out.data_ptr(), None) if out.dtype == torch.float32 else (None, out.data_ptr())
    run = (*target, _ISA[isa or available() or "portable"], torch.get_num_threads())
    columns = parts.shape[1]
    if isinstance(parts, AffineParts):
        library.affine_dequantize(*_affine(parts), columns, first_row, len(out), *run)
        return
    begin = first_row * columns
    assert begin % parts.block_size == 0
    function(library, parts.grid, "dequantize")(*_nf4(parts), begin, out.numel(), *run)


def prepare(parts: Parts, isa: str | None = None) -> Callable[[Tensor, Tensor, int], None]:
    """A function of (x, out, rows): x (rows, in) @ (out, in)^T into out (rows, out), both float32 and contiguous.

    It points into the components of `parts`, which the caller keeps alive, and for which `parts.by_rows` holds.
    """
    library = _library()
    assert library is not None
    out_features, columns = parts.shape
    level = _ISA[isa or available() or "portable"]
    if isinstance(parts, AffineParts):
        product = functools.partial(library.affine_matmul, *_affine(parts))
    else:
        product = functools.partial(function(library, parts.grid, "matmul"), *_nf4(parts))

    def run(x: Tensor, out: Tensor, rows: int) -> None:
        threads = torch.get_num_threads()
        if product(x.data_ptr(), out.data_ptr(), rows, out_features, columns, level, threads):
            raise MemoryError(f"no memory for a copy of {rows} x {columns} activations")

    return run


def matmul(x: Tensor, parts: Parts, isa: str | None = None) -> Tensor:
    """(rows, in) float32 contiguous @ (out, in)^T -> (rows, out) float32; `parts.by_rows` holds."""
    assert x.dtype == torch.float32 and x.is_contiguous()
    out = torch.empty(len(x), parts.shape[0], dtype=torch.float32)
    prepare(parts, isa)(x, out, len(x))
    return out


def dense_matmul(weight: Tensor, bias: Tensor | None, x: Tensor, out: Tensor) -> None:
    """x (..., in) @ weight (out, in)^T + bias (out,) into out (..., out), all float32 and contiguous; `has_dense()`."""
    library = _library()
    assert library is not None
    n, k = weight.shape
    failed = library.dense_matmul(
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        out.data_ptr(),
        x.numel() // max(k, 1),
        n,
        k,
        _ISA["avx2"],
        torch.get_num_threads(),
    )
    assert not failed


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """weight (size,) * x (..., size) / sqrt(mean(x^2) + eps) into out, all float32 and contiguous; `has_dense()`."""
    library = _library()
    assert library is not None
    size = weight.numel()
    library.rms_norm(x.data_ptr(), weight.data_ptr(), eps, out.data_ptr(), x.numel() // max(size, 1), size)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, out: Tensor) -> None:
    """softmax(scale * q k^T) v into out (rows, 1, heads, dim), contiguous; `has_dense()`.

    q: (rows, heads, 1, dim), contiguous. k, v: (rows, kv_heads, tokens, dim), of which dim alone must be without gaps,
        a multiple of 8. All float32.
    mask: (rows, 1, 1, tokens), False where a token is not seen, its last dimension without gaps.
    """
    library = _library()
    assert library is not None
    rows, heads = q.shape[:2]
    failed = library.attention(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        None if mask is None else mask.data_ptr(),
        out.data_ptr(),
        rows,
        heads,
        *k.shape[1:],
        _strides(k),
        _strides(v),
        _row_stride(mask),
        scale,
        _ISA["avx2"],
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for the scores of {rows} x {heads} x {k.shape[2]} tokens")


def prefill(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, out: Tensor) -> None:
    """softmax(scale * q k^T) v into out (rows, queries, heads, dim), contiguous; `has_dense()`.

    q: (rows, heads, queries, dim). k, v: (rows, kv_heads, tokens, dim). All float32, of which dim alone must be without
        gaps, a multiple of 16 up to 256.
    mask: (rows or 1, 1, queries, tokens), False where a token is not seen, its last dimension without gaps.
    causal: query i sees the tokens up to i.
    """
    library = _library()
    assert library is not None
    rows, heads, queries, dim = q.shape
    failed = library.prefill(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        None if mask is None else mask.data_ptr(),
        out.data_ptr(),
        rows,
        heads,
        k.shape[1],
        queries,
        k.shape[2],
        dim,
        _strides(q),
        _strides(k),
        _strides(v),
        _row_stride(mask),
        0 if mask is None else mask.stride(2),
        causal,
        scale,
        _ISA[available() or "portable"],
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for a copy of {k.numel()} numbers of the keys")


def decode_block(
    block: ctypes.Structure,
    x: Tensor,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    out: Tensor,
) -> None:
    """A block of a decoder at one token of each row, see csrc/block.c, into out (rows, 1, hidden); `has_dense()`.

    block: blocks._Block. x, cosine, sine: as `blocks._Plan.run` takes them, contiguous. keys, values: (rows, kv_heads,
    tokens, dim), of which the last token is written here. mask: as in `attention`.
    """
    library = _library()
    assert library is not None
    failed = library.decode_block(
        ctypes.addressof(block),
        x.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        cosine.data_ptr(),
        sine.data_ptr(),
        cosine.shape[2] if cosine.shape[0] > 1 else 0,
        keys.data_ptr(),
        values.data_ptr(),
        keys.shape[2],
        _strides(keys),
        _strides(values),
        None if mask is None else mask.data_ptr(),
        _row_stride(mask),
        _ISA[available() or "portable"],
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for a block at {x.shape[0]} tokens, or for its scores of {keys.shape[2]} tokens")


def _row_stride(mask: Tensor | None) -> int:
    return 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)


def _strides(heads: Tensor) -> Any:
    return (ctypes.c_int64 * 3)(*heads.stride()[:3])
