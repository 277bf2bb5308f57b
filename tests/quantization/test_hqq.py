"""HQQ: equal to its two steps written out, and never worse than round to nearest in its own norm."""

from __future__ import annotations

import math

import pytest
import torch

from compress_peft.quantization import QUANTIZERS
from compress_peft.tensors import affine
from compress_peft.tensors.half_quadratic import shrink


def weight_with_outliers(rows: int = 6, columns: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight[:, 7] *= 6
    return weight


def naive(group: list[float], scale: float, zero: float, top: int, steps: int) -> float:
    """One group, number by number."""
    best, least, beta = zero, math.inf, 10.0
    for _ in range(steps + 1):
        codes = [min(max(round(w / scale + zero), 0), top) for w in group]
        errors = [w - (code - zero) * scale for w, code in zip(group, codes, strict=True)]
        total = sum(abs(e) ** 0.7 for e in errors)
        if total < least:
            best, least = zero, total
        kept = [math.copysign(max(abs(e) - abs(e) ** -0.3 / beta, 0), e) if e else 0.0 for e in errors]
        zero = sum(c - (w - k) / scale for c, w, k in zip(codes, group, kept, strict=True)) / len(group)
        beta *= 1.5
    return best


@pytest.mark.parametrize("bits", [2, 4])
def test_equals_the_steps_written_out(bits: int) -> None:
    dense = weight_with_outliers()
    found = QUANTIZERS.create("hqq", bits=bits, group_size=16, iters=5, kappa=1.5, scale_dtype="float32").quantize(
        dense
    )
    scales, zeros = affine.find_grid(dense, bits, 16, False, torch.float32)
    want = [
        [naive(dense[row, 16 * g : 16 * g + 16].tolist(), float(scales[row, g]), float(zeros[row, g]), 2**bits - 1, 5)]
        for row in range(6)
        for g in range(4)
    ]
    assert torch.allclose(found.zeros, torch.tensor(want).view(6, 4), atol=1e-4)
    assert torch.equal(found.scales, scales) and not torch.equal(found.zeros, zeros)


def test_shrink_is_the_proximal_step() -> None:
    """It moves towards 0 by the slope of the norm over beta, and small errors to 0 altogether."""
    error = torch.tensor([-2.0, -0.1, 0.0, 0.1, 2.0])
    step = 2.0**-0.3 / 10
    assert torch.allclose(shrink(error, 10, 0.7), torch.tensor([step - 2, 0, 0, 0, 2 - step]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [32, None])
def test_no_group_is_worse_than_rounding(bits: int, size: int | None) -> None:
    dense = weight_with_outliers(20, 96)
    settings = {"bits": bits, "group_size": size}
    errors = []
    for quantizer in (QUANTIZERS.create("hqq", **settings), QUANTIZERS.create("rtn", **settings)):
        error = (quantizer.quantize(dense).dequantize() - dense).abs() ** 0.7
        errors.append(error.view(20, -1, size or 96).sum(2))
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all() and errors[0].sum() < errors[1].sum()


def test_no_steps_is_rounding_to_nearest() -> None:
    dense = weight_with_outliers()
    found, want = (QUANTIZERS.create(m, **s).quantize(dense) for m, s in (("hqq", {"iters": 0}), ("rtn", {})))
    assert torch.equal(found.dequantize(), want.dequantize()) and found.zeros.dtype == torch.float16
