"""The Triton kernels of affine grids against plain dequantize-and-multiply, by Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch

from compress_peft.tensors import affine
from compress_peft.weights import cuda, kernels
from tests.weights.test_affine_kernels import ZEROS, make

DTYPES = {torch.float32: 1e-6, torch.float16: 1e-3}
"""With the rounding of a result. bfloat16 is for the GPU: the interpreter cuts it off and multiplies it wrongly."""
SHAPES = [((24, 192), 64), ((5, 100), None), ((1, 1), None), ((67, 72), 24), ((3, 8), 8), ((2, 2304), 32)]
"""With columns and rows that tiles divide and that they do not, and rows that end within a byte."""


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    """A copy of the module of its own: which way kernels run is settled when they are defined."""
    pytest.importorskip("triton")
    spec = importlib.util.find_spec("compress_peft.weights.triton_affine")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bits", affine.BITS)
@pytest.mark.parametrize("zero_dtype", ZEROS)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_dequantization_is_exact(interpreted, bits, zero_dtype, scale_dtype):
    for shape, group_size in SHAPES:
        parts = make(shape, group_size, bits, zero_dtype, scale_dtype).parts
        for dtype in DTYPES:
            assert torch.equal(interpreted.dequantize(parts, dtype), parts.dequantize(dtype)), (shape, dtype)
        got, want = interpreted.dequantize(parts, torch.bfloat16), parts.dequantize(torch.bfloat16)
        assert ((got - want).abs() <= 2**-7 * want.abs()).all(), shape  # cut off instead of rounded


@pytest.mark.parametrize("bits", affine.BITS)
@pytest.mark.parametrize("zero_dtype", ZEROS)
def test_product_of_few_rows(interpreted, bits, zero_dtype):
    for place, (shape, group_size) in enumerate(SHAPES):
        parts = make(shape, group_size, bits, zero_dtype).parts
        rows, tile = (1, 3, 16)[place % 3], interpreted.TILES[place % len(interpreted.TILES)]
        for dtype, tolerance in DTYPES.items():
            x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(dtype)
            dense = parts.dequantize(dtype).double()
            got = interpreted.linear(x, parts, tile)
            assert got.dtype == dtype and got.shape == (rows, shape[0])
            # The weight is that of the reference to the bit; only the sum, in float32, and the result are rounded:
            # by half a unit in the last place, which is 2 ** -25 among float16's subnormal numbers.
            bound = 2**-25 + 4e-6 * (x.abs().double() @ dense.abs().t()) + tolerance * (x.double() @ dense.t()).abs()
            assert ((got.double() - x.double() @ dense.t()).abs() <= bound).all(), (shape, dtype)


def test_nothing_is_read_or_written_beyond_the_ends(interpreted):
    """Neighbours of the codes, and of the activations, do not count; the product reads a strided view of x."""
    parts = make((5, 100), None, 3).parts
    memory = torch.full((3, *parts.codes.shape), 255, dtype=torch.uint8)
    memory[1] = parts.codes
    moved = parts._replace(codes=memory[1])
    assert torch.equal(interpreted.dequantize(moved, torch.float32), parts.dequantize(torch.float32))
    x = torch.full((2, 200), float("nan"))
    x[:, :100] = 1
    assert torch.allclose(interpreted.linear(x[:, :100], moved)[0], parts.dequantize(torch.float32).sum(1), atol=1e-3)


def test_the_check_passes_and_finds_a_wrong_kernel(interpreted, monkeypatch):
    interpreted.check(torch.device("cpu"), tuple(DTYPES))
    right = interpreted.linear
    monkeypatch.setattr(interpreted, "linear", lambda x, parts: right(x, parts) * 1.0001)
    with pytest.raises(RuntimeError, match=r"product in torch\.float32 differs"):
        interpreted.check(torch.device("cpu"), tuple(DTYPES))


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_all_that_is_timed_computes_the_same(interpreted, rows, monkeypatch):
    parts = make((24, 192), 64, 4).parts
    x = torch.randn(rows, 192)
    want = x @ parts.dequantize(torch.float32).t()
    timed: dict = {}

    def time_none(key, candidates, synchronize):
        timed.update({name: run() for name, run in candidates.items()})
        timed["key"] = key
        return timed["dense"]

    time_none.chosen = {}
    monkeypatch.setattr(kernels, "_fastest", time_none)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # a build for CPUs has none
    got = kernels._few_rows_on_cuda(x, parts, interpreted)
    assert got is timed["dense"]
    assert timed.pop("key") == ({1: 1, 5: 8, 16: 16}[rows], (24, 192), 4, 64, torch.float32, torch.device("cpu"))
    assert len(timed) == 1 + len(interpreted.TILES)
    for name, result in timed.items():
        assert torch.allclose(result, want, atol=1e-4), name
    timed.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert torch.allclose(kernels._few_rows_on_cuda(x, parts, interpreted), want, atol=1e-4) and not timed


@pytest.mark.gpu
@pytest.mark.parametrize("bits", affine.BITS)
@pytest.mark.parametrize("zero_dtype", ZEROS)
def test_on_the_gpu(bits, zero_dtype):
    module, why = cuda.triton_affine(torch.device("cuda", torch.cuda.current_device()))
    assert module is not None, why
    for shape, group_size in [*SHAPES, ((300, 4096), 128), ((1000, 576), 64)]:
        parts = make(shape, group_size, bits, zero_dtype).to("cuda").parts
        for dtype in module.DTYPES:
            dense = parts.dequantize(dtype)
            assert torch.equal(module.dequantize(parts, dtype), dense)
            for rows in (1, 3, 16):
                x = torch.randn(rows, shape[1], device="cuda", dtype=dtype)
                want = x.double() @ dense.double().t()
                bound = (
                    2**-25 + 1e-5 * (x.abs().double() @ dense.abs().double().t()) + torch.finfo(dtype).eps * want.abs()
                )
                for tile in module.TILES:
                    assert ((module.linear(x, parts, tile).double() - want).abs() <= bound).all(), (shape, dtype, rows)
