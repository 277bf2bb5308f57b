"""The C kernels of affine grids against plain dequantize-and-multiply, at every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from compress_peft.tensors import affine
from compress_peft.weights import AffineWeight, kernels, native
from tests.weights.test_kernels import ISAS, needs_native

ZEROS = [None, torch.uint8, torch.float16, torch.float32]
SHAPES = [
    ((24, 576), 64),
    ((5, 100), None),
    ((1, 1), None),
    ((3, 8), 8),
    ((7, 144), 72),
    ((6, 96), 24),
    ((2, 4224), 32),
]
"""With groups that are multiples of a vector and that are not, rows that end within a byte, and over 64 groups."""


def make(
    shape: tuple[int, int],
    group_size: int | None,
    bits: int,
    zero_dtype: torch.dtype | None = torch.uint8,
    scale_dtype: torch.dtype = torch.float16,
) -> AffineWeight:
    """Codes, scales and zeros at random: everything that a grid can hold."""
    generator = torch.Generator().manual_seed(bits)
    groups = affine.group_count(shape[1], group_size)
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
    scales = torch.randn(shape[0], groups, generator=generator).to(scale_dtype)
    scales.view(-1)[0] = 3e-7  # subnormal in half precision
    zeros = None
    if zero_dtype is not None:
        zeros = torch.rand(shape[0], groups, generator=generator) * (2**bits - 1)
        zeros = zeros.to(torch.uint8) if zero_dtype == torch.uint8 else zeros.to(scale_dtype)
    weight = AffineWeight.from_codes(codes, scales.float(), zeros, bits, group_size, torch.float32, scale_dtype)
    assert torch.equal(weight.unpacked(), codes)
    return weight


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", affine.BITS)
@pytest.mark.parametrize("zero_dtype", ZEROS)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_dequantization_is_exact(isa, bits, zero_dtype, scale_dtype):
    for shape, group_size in SHAPES:
        weight = make(shape, group_size, bits, zero_dtype, scale_dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            got, want = native.dequantize(weight.parts, dtype, isa), weight.parts.dequantize(dtype)
            assert torch.equal(got, want), (shape, dtype)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", affine.BITS)
@pytest.mark.parametrize("zero_dtype", ZEROS)
def test_product_of_few_rows(isa, bits, zero_dtype):
    for shape, group_size in SHAPES:
        weight = make(shape, group_size, bits, zero_dtype)
        dense = weight.parts.dequantize(torch.float32).double()
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 15):
            x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows))
            bound = x.abs().double() @ dense.abs().t()
            error = (native.matmul(x, weight.parts, isa) - x.double() @ dense.t()).abs()
            assert (error <= 4e-6 * bound).all(), (shape, rows)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", affine.BITS)
def test_a_large_mean_of_the_activations_does_not_hurt(isa, bits):
    """The zero is taken out of the product by the sums of x: they must not swamp what is left."""
    weight = make((8, 512), 64, bits)
    x = torch.randn(2, 512) + 100
    dense = weight.parts.dequantize(torch.float32).double()
    error = (native.matmul(x, weight.parts, isa) - x.double() @ dense.t()).abs()
    assert (error <= 4e-6 * (x.abs().double() @ dense.abs().t())).all()


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", affine.BITS)
def test_dequantization_of_some_rows(isa, bits):
    weight = make((40, 100), None, bits)
    out = torch.full((9, 100), 7.0)
    native.dequantize_into(out[:8], weight.parts, 11, isa)
    assert torch.equal(out[:8], weight.parts.dequantize(torch.float32)[11:19])
    assert (out[8] == 7).all()


@needs_native
@pytest.mark.parametrize("bits", affine.BITS)
def test_nothing_is_read_or_written_beyond_the_ends(bits):
    """The last row lies at the end of a page that the next one, unreadable, follows."""
    import ctypes
    import mmap

    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address + mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0):
        pytest.skip("no mprotect here")
    for columns, group_size in ((64, 32), (72, 24), (100, None), (40, 8)):
        weight = make((3, columns), group_size, bits)
        parts = weight.parts
        memory = (ctypes.c_uint8 * mmap.PAGESIZE).from_address(address)
        page = torch.frombuffer(memory, dtype=torch.uint8)
        at_end = page[len(page) - parts.codes.numel() :].view(parts.codes.shape)
        at_end.copy_(parts.codes)
        moved = parts._replace(codes=at_end)
        for isa in ISAS:
            assert torch.equal(native.dequantize(moved, torch.float32, isa), parts.dequantize(torch.float32))
            assert torch.isfinite(native.matmul(torch.ones(2, columns), moved, isa)).all()


@pytest.mark.parametrize("cap", [*ISAS, "none"])
@pytest.mark.parametrize("bits", affine.BITS)
@pytest.mark.parametrize(("columns", "group_size"), [(576, 64), (100, None)])
def test_linear_and_its_gradient(cap, bits, columns, group_size, monkeypatch):
    monkeypatch.setenv(native.ISA_VARIABLE, cap)
    native.available.cache_clear()
    monkeypatch.setattr(kernels, "SCRATCH", 64 * columns)  # several parts
    parts = make((200, columns), group_size, bits).parts
    dense = parts.dequantize(torch.float32)
    try:
        for rows in (1, kernels.FEW_ROWS, kernels.FEW_ROWS + 1, 40):
            x, grad = torch.randn(rows, columns), torch.randn(rows, 200)
            for dtype, tolerance in ((torch.float32, 3e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
                got, want = kernels.linear(x.to(dtype), parts), x.to(dtype).float() @ dense.t()
                assert got.dtype == dtype and (got.float() - want).abs().max() < tolerance * want.abs().max()
                got, want = kernels.linear_backward(grad.to(dtype), parts), grad.to(dtype).float() @ dense
                assert got.dtype == dtype and (got.float() - want).abs().max() < tolerance * want.abs().max()
    finally:
        monkeypatch.undo()
        native.available.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("bits", affine.BITS)
@pytest.mark.parametrize("zero_dtype", ZEROS)
def test_cuda_equals_cpu(bits, zero_dtype):
    weight = make((256, 512), 64, bits, zero_dtype)
    moved = weight.to("cuda")
    assert torch.equal(moved.dequantize().cpu(), weight.dequantize())
    for rows in (1, 40):
        x = torch.randn(rows, 512)
        got, want = functional.linear(x.to("cuda"), moved).cpu(), functional.linear(x, weight)
        assert (got - want).abs().max() < 1e-2 * want.abs().max()
