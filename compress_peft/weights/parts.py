"""The plain tensors that an NF4 weight consists of, as the kernels take them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class NF4Parts(NamedTuple):
    """Shapes and dtypes as in compress_peft/tensors/nf4.py. Either `absmax` or the three double-quantized parts."""

    codes: Tensor
    shape: tuple[int, int]
    """(out, in)"""
    block_size: int
    absmax: Tensor | None = None
    absmax_codes: Tensor | None = None
    absmax_scales: Tensor | None = None
    absmax_offset: Tensor | None = None
