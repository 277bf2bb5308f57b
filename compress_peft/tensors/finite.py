"""Whether a tensor has NaN or infinite values."""

from __future__ import annotations

from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """No value is NaN or infinite. One pass, without the tensors that isfinite().all() makes."""
    if not tensor.numel():
        return True
    if tensor.is_floating_point() and tensor.element_size() == 1:  # float8, which has no such operations
        tensor = tensor.half()
    if tensor.dim() == 2 and tensor.stride(0) == 1:  # else it would be copied first
        tensor = tensor.T
    low, high = tensor.aminmax()  # both are NaN if one value is
    return bool(low.isfinite() & high.isfinite())
