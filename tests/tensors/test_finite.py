from __future__ import annotations

import pytest
import torch

from compress_peft.tensors.finite import all_finite

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_of_many(dtype: torch.dtype, value: float) -> None:
    tensor = torch.randn(37, 113)
    assert all_finite(tensor.to(dtype))
    if dtype is torch.float8_e4m3fn and value == value:
        return  # it has no infinity
    tensor[11, 70] = value
    assert not all_finite(tensor.to(dtype))
    assert not all_finite(tensor.to(dtype).T[70:])
    assert all_finite(tensor.to(dtype)[:11].T)


def test_others_are_finite() -> None:
    assert all_finite(torch.empty(0, 3))
    assert all_finite(torch.arange(5))
