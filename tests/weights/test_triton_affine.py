"""The Triton kernels of affine grids against plain dequantize-and-multiply, by Triton's interpreter on the CPU:

TRITON_INTERPRET=1 python -m pytest tests/weights/test_triton_affine.py
"""

from __future__ import annotations

import importlib.util
import os
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
    """A copy of the module of its own: which way kernels run is settled when they are defined. So it is for those that
    Triton brings along, and that is before any test."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 is not set")
    pytest.importorskip("triton")
    spec = importlib.util.find_spec("compress_peft.weights.triton_affine")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
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
    seen = set()
    for place, (shape, group_size) in enumerate(SHAPES):
        parts = make(shape, group_size, bits, zero_dtype).parts
        rows = (1, 3, 16)[place % 3]
        products = interpreted.products(parts)
        kinds = (
            list(products)[place % len(interpreted.TILES)],
            *list(products)[len(interpreted.TILES) + place % 3 :][:1],
        )
        for dtype, tolerance in DTYPES.items():
            x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(dtype)
            dense = parts.dequantize(dtype).double()
            for kind in kinds:
                seen.add(kind)
                got = products[kind](x, rows)
                assert got.dtype == dtype and got.shape == (rows, shape[0])
                # The weight is that of the reference to the bit; only the sum, in float32, and the result are rounded:
                # by half a unit in the last place, which is 2 ** -25 among float16's subnormal numbers.
                bound = 2**-25 + 4e-6 * (x.abs().double() @ dense.abs().t())
                bound += tolerance * (x.double() @ dense.t()).abs()
                assert ((got.double() - x.double() @ dense.t()).abs() <= bound).all(), (shape, dtype, kind)
    assert any("single" in kind for kind in seen) == (bits != 3)


def test_nothing_is_read_or_written_beyond_the_ends(interpreted):
    """Neighbours of the codes, and of the activations, do not count."""
    parts = make((5, 100), None, 3).parts
    memory = torch.full((3, *parts.codes.shape), 255, dtype=torch.uint8)
    memory[1] = parts.codes
    moved = parts._replace(codes=memory[1])
    assert torch.equal(interpreted.dequantize(moved, torch.float32), parts.dequantize(torch.float32))
    x = torch.full((2, 200), float("nan"))
    x[:, :100] = 1
    want = parts.dequantize(torch.float32).sum(1)
    rows = torch.cat([x[:1, :100], torch.full((1, 100), float("nan"))])
    for product in interpreted.products(moved).values():
        assert torch.allclose(product(rows[:1], 1)[0], want, atol=1e-3)


def test_the_check_passes_and_finds_a_wrong_kernel(interpreted, monkeypatch):
    interpreted.check(torch.device("cpu"), tuple(DTYPES))
    right = interpreted.products
    for wrong in ("fused", "single rows"):

        def a_little_off(name, run, wrong=wrong):
            return lambda x, count: run(x, count) * (1 + 1e-4 * name.startswith(wrong))

        def products(parts, change=a_little_off):
            return {name: change(name, run) for name, run in right(parts).items()}

        monkeypatch.setattr(interpreted, "products", products)
        with pytest.raises(RuntimeError, match=rf"product \({wrong}\) in torch\.float32 differs"):
            interpreted.check(torch.device("cpu"), tuple(DTYPES))


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_all_that_is_timed_computes_the_same(interpreted, rows, monkeypatch):
    parts = make((24, 192), 64, 4).parts
    x = torch.randn(rows, 192)
    want = x @ parts.dequantize(torch.float32).t()
    timed: dict = {}

    class TimeNone(dict):
        def __init__(self):
            self.chosen = {}

        def __call__(self, key, candidates, synchronize):
            timed.update({name: run() for name, run in candidates.items()})
            self.chosen[key] = "dense"
            return timed["dense"]

    fastest = TimeNone()
    monkeypatch.setattr(kernels, "_fastest", fastest)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # a build for CPUs has none
    product = kernels.FewRowsOnCuda(parts, interpreted)
    assert product(x) is timed["dense"]
    (key,) = fastest.chosen
    assert key[1:] == ({1: 1, 5: 8, 16: 16}[rows], torch.float32)
    assert len(timed) == 1 + len(interpreted.TILES) + len(interpreted.WORD_TILES)
    for name, result in timed.items():
        assert torch.allclose(result, want, atol=1e-4), name
    timed.clear()
    assert torch.allclose(product(x), want, atol=1e-4) and not timed
    other = kernels.FewRowsOnCuda(make((48, 192), 64, 4).parts, interpreted)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert other(x).shape == (rows, 48) and not timed and not other.chosen
    assert kernels.FewRowsOnCuda(parts, interpreted)(x.view(1, rows, 192)).shape == (1, rows, 24)


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
                for name, product in module.products(parts).items():
                    got = product(x, rows).double()
                    assert ((got - want).abs() <= bound).all(), (shape, dtype, rows, name)
