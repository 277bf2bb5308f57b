"""Kernels on CUDA: bitsandbytes for NF4, Triton for affine grids, both on our bytes as they are and imported only when
a weight lies on such a device."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from compress_peft.errors import MissingRequirement, Problem
from compress_peft.tensors.nf4 import ABSMAX_GROUP, dynamic_map, grid_values
from compress_peft.weights.parts import NF4Parts


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingRequirement(
            Problem("bitsandbytes", f"NF4 on CUDA runs on its kernels: {error}", 'pip install "compress-peft[cuda]"')
        ) from error


def quant_state(parts: NF4Parts, dtype: torch.dtype) -> Any:
    """The bitsandbytes QuantState that describes the same tensors (no copies)."""
    functional = _module("bitsandbytes.functional")
    device = parts.codes.device
    common = {
        "shape": torch.Size(parts.shape),
        "code": grid_values(device, parts.grid),
        "blocksize": parts.block_size,
        "quant_type": parts.grid,
        "dtype": dtype,
    }
    if parts.absmax is not None:
        return functional.QuantState(absmax=parts.absmax, **common)
    nested = functional.QuantState(
        absmax=parts.absmax_scales, code=dynamic_map(device), blocksize=ABSMAX_GROUP, dtype=torch.float32
    )
    return functional.QuantState(absmax=parts.absmax_codes, offset=parts.absmax_offset, state2=nested, **common)


def dequantize(parts: NF4Parts, dtype: torch.dtype) -> Tensor:
    """(out, in) in dtype (float32, float16 or bfloat16)."""
    return _module("bitsandbytes.functional").dequantize_4bit(parts.codes, quant_state(parts, dtype))


def prepare(parts: NF4Parts, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A function of x (..., in) in this dtype -> (..., out): a fused product for one row, dequantizing and a dense one
    for more."""
    codes, state, product = parts.codes.t(), quant_state(parts, dtype), _module("bitsandbytes").matmul_4bit
    return lambda x: product(x, codes, quant_state=state)


def linear(x: Tensor, parts: NF4Parts) -> Tensor:
    """(rows, in) -> (rows, out), in x's dtype."""
    return prepare(parts, x.dtype)(x)


@functools.cache
def triton_affine(device: torch.device) -> tuple[ModuleType | None, str]:
    """(the module of Triton kernels, its version); or (None, why plain torch runs instead), found out once."""
    try:
        module = importlib.import_module("compress_peft.weights.triton_affine")
        module.check(device)
        return module, f"Triton {version('triton')}"
    except Exception as error:  # not installed, no compiler, a GPU it does not know: the reason is reported
        lines = str(error).splitlines()
        return None, f"plain torch (no Triton: {lines[0] if lines else type(error).__name__})"


def describe(device: torch.device) -> str:
    try:
        nf4 = f"bitsandbytes {version('bitsandbytes')}"
    except PackageNotFoundError:
        nf4 = "none: bitsandbytes is not installed"
    return f"NF4: {nf4}; affine grids: {triton_affine(device)[1]}"
