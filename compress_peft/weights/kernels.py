"""Which code runs for a compressed weight: the fastest that there is for the device, the shape and the dtype.

CPU: the C kernels (native.py) where they were built, else plain torch. CUDA: bitsandbytes (cuda.py) for NF4; Triton
(triton_affine.py) for affine grids where it runs, else plain torch. All of them are tested against `Parts.dequantize`
followed by a dense product.

Few rows of activations on CUDA: the fused product, in several tiles, and dequantizing with a dense product are timed
at the first call (`Fastest`). Which one wins may differ from run to run, and with it the last bits of a sum. torch's
own int4 product (`aten._weight_int4pack_mm`) is not among them: it needs the codes in a layout of its own, which
would be a lasting second copy of the weight.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from compress_peft.weights import cuda, native, products
from compress_peft.weights.parts import AffineParts, NF4Parts, Parts

FEW_ROWS = 16
"""Up to so many rows of activations the C product beats dequantizing and a dense product (measured on Zen 4)."""

SCRATCH = 1 << 22
"""Weights dequantized at a time for a dense product; the buffer is kept per thread (16 MB in float32)."""

DTYPES_OF_BITSANDBYTES = (torch.float16, torch.bfloat16, torch.float32)

_local = threading.local()


class Fastest:
    """Of several ways to compute the same the fastest, by timing them at the first call of each key."""

    REPEATS = 5
    """timings, of which the fastest counts, after one untimed call that may compile"""

    CALLS = 8
    """in a timing, one after the other without waiting, as in a model: the device's work and Python's overlap"""

    def __init__(self) -> None:
        self.chosen: dict[Hashable, str] = {}

    def __call__(
        self, key: Hashable, candidates: Mapping[str, Callable[[], Tensor]], synchronize: Callable[[], None]
    ) -> Tensor:
        """The result of one of the candidates. synchronize: waits until the device has done what was asked of it."""
        if key not in self.chosen:
            seconds = {name: self._seconds(run, synchronize) for name, run in candidates.items()}
            self.chosen[key] = min(seconds, key=seconds.__getitem__)
        return candidates[self.chosen[key]]()

    def _seconds(self, run: Callable[[], Tensor], synchronize: Callable[[], None]) -> float:
        best = math.inf
        for repeat in range(1 + self.REPEATS):
            synchronize()
            start = time.perf_counter()
            for _ in range(self.CALLS if repeat else 1):
                run()
            synchronize()
            if repeat:
                best = min(best, time.perf_counter() - start)
        return best


_fastest = Fastest()


def dequantize(parts: Parts, dtype: torch.dtype) -> Tensor:
    """The dense weight (out, in)."""
    kind = parts.codes.device.type
    if kind == "cuda" and isinstance(parts, NF4Parts):
        return cuda.dequantize(parts, dtype)
    if kind == "cuda" and isinstance(parts, AffineParts):
        module, _ = cuda.triton_affine(parts.codes.device)
        if module is not None and dtype in module.DTYPES:
            return module.dequantize(parts, dtype)
    if kind == "cpu" and native.available():
        return native.dequantize(parts, dtype)
    return parts.dequantize(dtype)


class FewRows:
    """x (..., in) float32 on the CPU, of few rows in all, times one weight: the case of decoding, called once a layer
    and token, so that everything about the weight is worked out beforehand."""

    def __init__(self, parts: Parts):
        self.parts = parts  # what the kernel's pointers point at
        self.out_features, self.columns = parts.shape
        self.most = FEW_ROWS * self.columns
        self.run = native.prepare(parts)

    def takes(self, x: Tensor) -> bool:
        return x.dtype is torch.float32 and x.numel() <= self.most and x.is_cpu and x.is_contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        out = x.new_empty((*x.shape[:-1], self.out_features))
        self.run(x, out, x.numel() // self.columns)
        return out


class FewRowsOnCuda:
    """The same for activations on CUDA, by the fastest of Triton's products and of dequantizing with a dense one."""

    def __init__(self, parts: AffineParts, module: ModuleType):
        self.columns = parts.shape[1]
        self.most = module.MOST_ROWS * self.columns
        self.dtypes = module.DTYPES
        self.device = parts.codes.device
        self.products: dict[str, Callable[[Tensor, int], Tensor]] = module.products(parts)
        self.weight = (parts.shape, parts.bits, parts.scales.shape[1], len(self.products), self.device)
        self.undecided = next(iter(self.products))
        self.products["dense"] = lambda x, count: functional.linear(x, module.dequantize(parts, x.dtype))
        self.chosen: dict[Hashable, Callable[[Tensor, int], Tensor]] = {}

    def takes(self, x: Tensor) -> bool:
        return x.is_cuda and 0 < x.numel() <= self.most and x.dtype in self.dtypes and x.is_contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        count = x.numel() // self.columns
        run = self.chosen.get((count, x.dtype))
        return self._choose(x, count) if run is None else run(x, count)

    def _choose(self, x: Tensor, count: int) -> Tensor:
        key = (self.weight, 1 << (count - 1).bit_length(), x.dtype)  # 1, 2, 4, 8 or 16 rows
        if key not in _fastest.chosen and torch.cuda.is_current_stream_capturing():
            return self.products[self.undecided](x, count)  # nothing can be timed while a CUDA graph is recorded
        candidates = {name: functools.partial(run, x, count) for name, run in self.products.items()}
        out = _fastest(key, candidates, functools.partial(torch.cuda.synchronize, self.device))
        self.chosen[count, x.dtype] = self.products[_fastest.chosen[key]]
        return out


class TableOnCuda:
    """The same for NF4 and FP4 by bitsandbytes, which takes any number of rows."""

    def __init__(self, parts: NF4Parts):
        self.parts = parts
        self.columns = parts.shape[1]
        self.ready: dict[torch.dtype, Callable[[Tensor], Tensor]] = {}

    def takes(self, x: Tensor) -> bool:
        return x.is_cuda and x.numel() > 0 and x.dtype in DTYPES_OF_BITSANDBYTES and x.is_contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        run = self.ready.get(x.dtype)
        if run is None:
            run = self.ready[x.dtype] = cuda.prepare(self.parts, x.dtype)
        return run(x)


Product = FewRows | FewRowsOnCuda | TableOnCuda


def few_rows(parts: Parts, compute_dtype: torch.dtype | None) -> Product | Literal[False]:
    """Nothing where no such kernel runs this weight, or another dtype of the product is asked for."""
    if parts.codes.is_cuda and isinstance(parts, NF4Parts) and compute_dtype is None:
        return TableOnCuda(parts)
    if parts.codes.is_cuda and isinstance(parts, AffineParts) and compute_dtype is None:
        module, _ = cuda.triton_affine(parts.codes.device)
        return FewRowsOnCuda(parts, module) if module is not None else False
    ready = parts.codes.is_cpu and parts.by_rows and native.available() and compute_dtype in (None, torch.float32)
    return FewRows(parts) if ready else False


def linear(x: Tensor, parts: Parts, compute_dtype: torch.dtype | None = None) -> Tensor:
    """(rows, in) @ weight^T -> (rows, out), in x's dtype; no gradient is recorded.

    compute_dtype: dtype of the product; None chooses (see `product_dtype`).
    """
    dtype = compute_dtype or product_dtype(x.dtype, x.device)
    if x.device.type == "cuda" and isinstance(parts, NF4Parts):
        return cuda.linear(x.to(dtype), parts).to(x.dtype)
    if x.device.type == "cpu" and parts.by_rows and native.available():
        if len(x) <= FEW_ROWS and compute_dtype in (None, torch.float32):
            return native.matmul(x.float().contiguous(), parts).to(x.dtype)
        if dtype in (torch.float32, torch.bfloat16):
            return _linear_by_parts(x.to(dtype), parts).to(x.dtype)
    return functional.linear(x.to(dtype), dequantize(parts, dtype)).to(x.dtype)


def linear_backward(grad: Tensor, parts: Parts, compute_dtype: torch.dtype | None = None) -> Tensor:
    """(rows, out) @ weight -> (rows, in): the gradient to the input, in grad's dtype. Dequantizes again."""
    dtype = compute_dtype or product_dtype(grad.dtype, grad.device)
    on_cpu = grad.device.type == "cpu" and dtype == torch.float32
    if on_cpu and parts.by_rows and native.available():
        return _backward_by_parts(grad.to(dtype), parts).to(grad.dtype)
    return (grad.to(dtype) @ dequantize(parts, dtype)).to(grad.dtype)


def _linear_by_parts(x: Tensor, parts: Parts) -> Tensor:
    if parts.shape[0] * parts.shape[1] <= SCRATCH:
        ((_, dense),) = _dense_parts(parts, x.dtype)
        return products.linear(x, dense)
    out = x.new_empty(len(x), parts.shape[0])
    for start, dense in _dense_parts(parts, x.dtype):
        out[:, start : start + len(dense)] = products.linear(x, dense)
    return out


def _backward_by_parts(grad: Tensor, parts: Parts) -> Tensor:
    out: Tensor | None = None
    for start, dense in _dense_parts(parts, grad.dtype):
        part = products.linear(grad[:, start : start + len(dense)], dense.t())
        out = part if out is None else out.add_(part)
    return grad.new_zeros(len(grad), parts.shape[1]) if out is None else out


def _dense_parts(parts: Parts, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first row, dense rows) in order. The rows lie in a buffer that the next ones overwrite."""
    out_features, columns = parts.shape
    step = max(SCRATCH // columns, 1)
    key = str(dtype)
    size = min(step, out_features) * columns
    buffer: Tensor | None = getattr(_local, key, None)
    if buffer is None or buffer.numel() < size:
        buffer = torch.empty(size, dtype=dtype)
        setattr(_local, key, buffer)
    for start in range(0, out_features, step):
        rows = min(step, out_features - start)
        dense = buffer[: rows * columns].view(rows, columns)
        native.dequantize_into(dense, parts, start)
        yield start, dense


def product_dtype(activations: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which products run fastest: that of the activations on an accelerator.

    On a CPU float32, except for bfloat16 activations where the processor multiplies bfloat16 in hardware: without
    it such products are several times slower than float32 ones.
    """
    if device.type != "cpu":
        return activations
    return torch.bfloat16 if activations == torch.bfloat16 and _bf16_hardware() else torch.float32


@functools.cache
def _bf16_hardware() -> bool:
    capabilities = torch.backends.cpu.get_cpu_capability()
    return "AVX512" in capabilities and torch.cpu._is_avx512_bf16_supported()


def active(device: torch.device | str) -> str:
    """What runs on this device, in words, for the report."""
    device = torch.device(device)
    kind = device.type
    if kind == "cuda":
        return cuda.describe(device)
    isa = native.available() if kind == "cpu" else None
    if isa is None:
        return "plain torch (no compiled kernel)"
    threads = f"OpenMP, {torch.get_num_threads()} threads" if native.has_openmp() else "one thread"
    library = "; many rows: oneDNN" if products.onednn() is not None else ""
    return f"compiled C kernel ({isa}, {threads}){library}"
