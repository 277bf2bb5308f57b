"""Every kernel against plain dequantize-and-multiply."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn import functional

from compress_peft.errors import ConfigError, MissingRequirement
from compress_peft.tensors import nf4
from compress_peft.weights import NF4Weight, cuda, kernels, native

LEVELS = ["portable", "avx2", "avx512"]
ISAS = LEVELS[: LEVELS.index(native.available()) + 1] if native.available() else []
needs_native = pytest.mark.skipif(not ISAS, reason="the C kernels are not built here")


def make(shape: tuple[int, int], double_quant: bool = True, block_size: int = 64, seed: int = 0) -> NF4Weight:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return NF4Weight.quantize(weight, block_size, double_quant)


def reference(weight: NF4Weight) -> torch.Tensor:
    absmax = weight.absmax
    if absmax is None:
        absmax = nf4.dequantize_absmax(weight.absmax_codes, weight.absmax_scales, weight.absmax_offset)
    return nf4.dequantize_nf4(weight.codes, absmax, weight.shape, weight.block_size)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(96, 576), (33, 100), (1, 1), (5, 33), (300, 512)])
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_dequantization_is_exact(shape, double_quant, block_size, isa):
    weight = make(shape, double_quant, block_size)
    want = reference(weight)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(native.dequantize(weight.parts, dtype, isa), want.to(dtype))


@needs_native
@pytest.mark.parametrize("isa", ISAS)
def test_dequantization_of_some_rows(isa):
    weight = make((40, 192))
    out = torch.empty(7, 192)
    native.dequantize_into(out, weight.parts, 11, isa)
    assert torch.equal(out, reference(weight)[11:18])


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15])
@pytest.mark.parametrize(("shape", "block_size"), [((96, 576), 64), ((65, 1024), 64), ((7, 96), 32), ((64, 512), 256)])
def test_product_of_few_rows(shape, block_size, rows, double_quant, isa):
    weight = make(shape, double_quant, block_size)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows))
    want = x.double() @ reference(weight).double().t()
    got = native.matmul(x, weight.parts, isa)
    assert (got - want).abs().max() < 2e-6 * want.abs().max()


@pytest.mark.parametrize("cap", [*ISAS, "none"])
@pytest.mark.parametrize("rows", [1, kernels.FEW_ROWS, kernels.FEW_ROWS + 1, 40])
@pytest.mark.parametrize("columns", [576, 100])
def test_linear_and_its_gradient(cap, rows, columns, monkeypatch):
    monkeypatch.setenv(native.ISA_VARIABLE, cap)
    native.available.cache_clear()
    monkeypatch.setattr(kernels, "SCRATCH", 64 * columns)  # several parts
    weight = make((200, columns))
    dense = reference(weight)
    x = torch.randn(rows, columns)
    try:
        assert ("torch" in kernels.active("cpu")) == (cap == "none")
        for dtype, tolerance in ((torch.float32, 3e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
            want = functional.linear(x.to(dtype).float(), dense)
            got = kernels.linear(x.to(dtype), weight.parts)
            assert got.dtype == dtype
            assert (got.float() - want).abs().max() < tolerance * want.abs().max()
            grad = torch.randn(rows, 200)
            want = grad.to(dtype).float() @ dense
            got = kernels.linear_backward(grad.to(dtype), weight.parts)
            assert got.dtype == dtype
            assert (got.float() - want).abs().max() < tolerance * want.abs().max()
    finally:
        monkeypatch.undo()
        native.available.cache_clear()


def test_negative_scales():
    weight = make((16, 64), double_quant=False)
    negative = weight.scale_rows(-torch.ones(16))
    x = torch.randn(3, 64)
    assert torch.allclose(kernels.linear(x, negative.parts), -kernels.linear(x, weight.parts))


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv(native.ISA_VARIABLE, "avx51")
    native.available.cache_clear()
    try:
        with pytest.raises(ConfigError, match="avx512"):
            native.available()
    finally:
        native.available.cache_clear()


@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_runs_on_our_bytes(double_quant):
    """The path for CUDA, here on the operators that bitsandbytes has for the CPU."""
    weight = make((96, 128), double_quant)
    assert torch.equal(cuda.dequantize(weight.parts, torch.float32), reference(weight))
    x = torch.randn(5, 128)
    assert torch.allclose(cuda.linear(x, weight.parts), x @ reference(weight).t(), atol=1e-4)
    product = kernels.TableOnCuda(weight.parts)
    assert not product.takes(x)  # it lies on the CPU
    for rows in (x, x[:1], x.view(5, 1, 128)):
        for _ in range(2):
            assert torch.allclose(product(rows), rows @ reference(weight).t(), atol=1e-4)
    assert list(product.ready) == [torch.float32]


def test_missing_bitsandbytes_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.functional", None)
    with pytest.raises(MissingRequirement, match=r"compress-peft\[cuda\]"):
        cuda.quant_state(make((2, 64)).parts, torch.float32)


def test_the_fastest_way_is_found_once_a_key():
    """On a clock that only the candidates move."""
    fastest, calls, clock = kernels.Fastest(), [], [0.0]

    def candidate(name: str, first: float, later: float):
        def run() -> torch.Tensor:
            clock[0] += later if name in calls else first
            calls.append(name)
            return torch.tensor(later)

        return run

    waits: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.time, "perf_counter", lambda: clock[0])
        # "compiled" is slow only once, when it is compiled; "slow" would win if that call counted.
        candidates = {"slow": candidate("slow", 3.0, 3.0), "compiled": candidate("compiled", 99.0, 1.0)}
        assert fastest("a", candidates, lambda: waits.append(clock[0])) == 1
        assert fastest.chosen == {"a": "compiled"}
        each = 1 + fastest.REPEATS * fastest.CALLS
        waited = 2 * 2 * (1 + fastest.REPEATS)
        assert calls == ["slow"] * each + ["compiled"] * (each + 1) and len(waits) == waited
        calls.clear()
        assert fastest("a", candidates, lambda: waits.append(0)) == 1
        assert calls == ["compiled"] and len(waits) == waited
        other = {"slow": candidate("slow", 1.0, 1.0), "compiled": candidate("compiled", 2.0, 2.0)}
        assert fastest("b", other, lambda: None) == 1 and fastest.chosen["b"] == "slow"


def test_without_triton_plain_torch_runs_and_the_report_says_why(monkeypatch):
    monkeypatch.delitem(__import__("sys").modules, "compress_peft.weights.triton_affine", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    cuda.triton_affine.cache_clear()
    try:
        assert cuda.triton_affine(torch.device("cuda"))[0] is None
        assert re.search("affine grids: plain torch .no Triton: .*triton", kernels.active("cuda"))
    finally:
        cuda.triton_affine.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_equals_cpu(rows, dtype):
    weight = make((256, 512))
    moved = weight.to("cuda")
    assert torch.equal(moved.dequantize(dtype).cpu(), weight.dequantize(dtype))
    x = torch.randn(rows, 512)
    got = functional.linear(x.to("cuda", dtype), moved).float().cpu()
    want = functional.linear(x, weight)
    assert (got - want).abs().max() < 2e-2 * want.abs().max()
