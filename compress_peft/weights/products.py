"""Products of many rows with a dense float32 matrix on the CPU, by the library that is faster on this processor.

torch has two: it gives float32 products to MKL, and those of compiled and of bfloat16 models to oneDNN. On AMD's
processors oneDNN is the faster one in float32 too (`benchmarks/decode_cpu.py` has both). The choice depends on the
processor alone and not on a timing, so that two runs on one machine add up the same sums in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from compress_peft.weights import native


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ weight (out, in)^T + bias (out,) -> (..., out), all dense, on the CPU; no gradient is recorded."""
    product = onednn()
    if product is None or x.dtype is not torch.float32 or weight.dtype is not torch.float32 or not x.numel():
        return functional.linear(x, weight, bias)
    return product(x, weight, bias)


@functools.cache
def onednn() -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """The operator that torch's compiled models use. None where MKL is as fast or faster, or where torch was built
    without oneDNN or calls it in another way."""
    if not native.on_amd() or not torch.backends.mkldnn.is_available():
        return None

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    x, weight, bias = torch.ones(2, 3), torch.arange(12.0).view(4, 3), torch.ones(4)
    try:
        right = torch.equal(run(x, weight, bias), functional.linear(x, weight, bias))
    except (AttributeError, RuntimeError):  # an operator of torch's own, which another version may not have
        return None
    return run if right else None
