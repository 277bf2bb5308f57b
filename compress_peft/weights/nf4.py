"""The NF4 weight: 4-bit codes and one absmax per block, double quantized or not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compress_peft.errors import ModelError, Problem, UserError
from compress_peft.tensors import nf4
from compress_peft.weights import kernels
from compress_peft.weights.compressed import CompressedWeight, dtype_from_name, dtype_name
from compress_peft.weights.parts import NF4Parts

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What the kernels (ours and bitsandbytes') take."""


class NF4Weight(CompressedWeight):
    """Components as in compress_peft/tensors/nf4.py.

    codes: uint8 (ceil(out * in / 2), 1).
    absmax: float32 (blocks,), or None and instead
    absmax_codes: uint8 (blocks,), absmax_scales: float32 (ceil(blocks / 256),), absmax_offset: float32 ().
    """

    kind: ClassVar[str] = "nf4"
    component_names: ClassVar[tuple[str, ...]] = (
        "codes",
        "absmax",
        "absmax_codes",
        "absmax_scales",
        "absmax_offset",
    )

    codes: Tensor
    absmax: Tensor | None
    absmax_codes: Tensor | None
    absmax_scales: Tensor | None
    absmax_offset: Tensor | None
    block_size: int
    compute_dtype: str

    @staticmethod
    def __new__(cls: type[NF4Weight], parts: NF4Parts, dtype: torch.dtype, compute_dtype: str = "auto") -> NF4Weight:
        self = Tensor._make_wrapper_subclass(
            cls, parts.shape, dtype=dtype, device=parts.codes.device, requires_grad=False
        )
        for name in cls.component_names:
            setattr(self, name, getattr(parts, name))
        self.block_size = parts.block_size
        self.compute_dtype = compute_dtype
        return self

    def __init__(self, parts: NF4Parts, dtype: torch.dtype, compute_dtype: str = "auto"):
        super().__init__()

    @classmethod
    def quantize(
        cls, weight: Tensor, block_size: int = 64, double_quant: bool = True, compute_dtype: str = "auto"
    ) -> NF4Weight:
        """weight: (out, in), finite. See `tensors.nf4` for the rounding."""
        codes, absmax = nf4.quantize_nf4(weight, block_size)
        shape = (weight.shape[0], weight.shape[1])
        if double_quant:
            parts = NF4Parts(codes, shape, block_size, None, *nf4.quantize_absmax(absmax))
        else:
            parts = NF4Parts(codes, shape, block_size, absmax)
        return cls(parts, weight.dtype, compute_dtype)

    @property
    def parts(self) -> NF4Parts:
        """The plain tensors, for the kernels."""
        return NF4Parts(
            self.codes,
            (self.shape[0], self.shape[1]),
            self.block_size,
            self.absmax,
            self.absmax_codes,
            self.absmax_scales,
            self.absmax_offset,
        )

    @property
    def double_quant(self) -> bool:
        return self.absmax is None

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return kernels.dequantize(self.parts, dtype or self.dtype)

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": [self.shape[0], self.shape[1]],
            "dtype": dtype_name(self.dtype),
            "block_size": self.block_size,
            "double_quant": self.double_quant,
            "compute_dtype": self.compute_dtype,
        }

    @classmethod
    def from_components(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> NF4Weight:
        expected = component_shapes(spec)
        problems = [
            Problem(name, f"expected {dtype_name(dtype)} {shape}, got {_describe(tensors.get(name))}")
            for name, (dtype, shape) in expected.items()
            if name not in tensors or tensors[name].dtype != dtype or tuple(tensors[name].shape) != shape
        ]
        problems += [Problem(name, "not a part of this weight") for name in tensors if name not in expected]
        if problems:
            raise UserError(problems)
        shape = (int(spec["shape"][0]), int(spec["shape"][1]))
        parts = NF4Parts(shape=shape, block_size=spec["block_size"], **tensors)
        return cls(parts, dtype_from_name(spec["dtype"]), spec.get("compute_dtype", "auto"))

    def scale_rows(self, vector: Tensor) -> NF4Weight:
        """The factors go into absmax, which leaves double quantization (4.5 bits a weight at blocks of 64).

        Exact up to one rounding of absmax * factor. Negative factors are fine: absmax may be negative.
        """
        out_features, in_features = self.shape
        if tuple(vector.shape) != (out_features,):
            raise ModelError(
                Problem("scale_rows", f"got factors of shape {tuple(vector.shape)}, expected ({out_features},)")
            )
        if in_features % self.block_size:
            raise ModelError(
                Problem(
                    "scale_rows",
                    f"blocks of {self.block_size} straddle the rows of {in_features}: one scale serves two outputs",
                    "merge with another policy, or quantize with a block size that divides the row",
                )
            )
        absmax = self.absmax
        if absmax is None:
            assert self.absmax_codes is not None and self.absmax_scales is not None and self.absmax_offset is not None
            absmax = nf4.dequantize_absmax(self.absmax_codes, self.absmax_scales, self.absmax_offset)
        factors = vector.detach().to(device=absmax.device, dtype=torch.float32)
        scaled = (absmax.view(out_features, -1) * factors.view(-1, 1)).reshape(-1)
        parts = NF4Parts(self.codes.clone(), (out_features, in_features), self.block_size, scaled)
        return NF4Weight(parts, self.dtype, self.compute_dtype)

    def linear(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            out = nf4_linear(x.reshape(-1, x.shape[-1]), *self.parts, self.compute_dtype)
            return out.view(*x.shape[:-1], self.shape[0])
        if torch.is_grad_enabled() and x.requires_grad:
            return _Linear.apply(x, self)
        return _forward(x, self)


def component_shapes(spec: Mapping[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every component of a weight with this spec."""
    count = math.prod(spec["shape"])
    blocks = -(-count // spec["block_size"])
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"codes": (torch.uint8, (-(-count // 2), 1))}
    if not spec["double_quant"]:
        return shapes | {"absmax": (torch.float32, (blocks,))}
    return shapes | {
        "absmax_codes": (torch.uint8, (blocks,)),
        "absmax_scales": (torch.float32, (-(-blocks // nf4.ABSMAX_GROUP),)),
        "absmax_offset": (torch.float32, ()),
    }


def _describe(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"


def _compute(name: str) -> torch.dtype | None:
    return None if name == "auto" else dtype_from_name(name)


def _forward(x: Tensor, weight: NF4Weight) -> Tensor:
    out = kernels.linear(x.reshape(-1, x.shape[-1]), weight.parts, _compute(weight.compute_dtype))
    return out.view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    """x @ W^T; the backward pass dequantizes W again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight) -> Tensor:
        ctx.weight = weight
        return _forward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight = ctx.weight
        flat = kernels.linear_backward(grad.reshape(-1, grad.shape[-1]), weight.parts, _compute(weight.compute_dtype))
        return flat.view(*grad.shape[:-1], weight.shape[1]), None


# Under torch.compile the product is one opaque operator; in eager mode its dispatch would cost more than it gives.


@torch.library.custom_op("compress_peft::nf4_linear", mutates_args=())
def nf4_linear(
    x: Tensor,
    codes: Tensor,
    shape: list[int],
    block_size: int,
    absmax: Tensor | None,
    absmax_codes: Tensor | None,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    compute_dtype: str,
) -> Tensor:
    """x (rows, in) -> (rows, out)."""
    parts = NF4Parts(codes, (shape[0], shape[1]), block_size, absmax, absmax_codes, absmax_scales, absmax_offset)
    return kernels.linear(x, parts, _compute(compute_dtype))


@nf4_linear.register_fake
def _(x: Tensor, codes: Tensor, shape: list[int], *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], shape[0])


@torch.library.custom_op("compress_peft::nf4_linear_backward", mutates_args=())
def nf4_linear_backward(
    grad: Tensor,
    codes: Tensor,
    shape: list[int],
    block_size: int,
    absmax: Tensor | None,
    absmax_codes: Tensor | None,
    absmax_scales: Tensor | None,
    absmax_offset: Tensor | None,
    compute_dtype: str,
) -> Tensor:
    """grad (rows, out) -> (rows, in)."""
    parts = NF4Parts(codes, (shape[0], shape[1]), block_size, absmax, absmax_codes, absmax_scales, absmax_offset)
    return kernels.linear_backward(grad, parts, _compute(compute_dtype))


@nf4_linear_backward.register_fake
def _(grad: Tensor, codes: Tensor, shape: list[int], *rest: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, shape, block_size, *scales, compute_dtype = inputs
    ctx.save_for_backward(codes, *scales)
    ctx.settings = (shape, block_size, compute_dtype)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, *scales = ctx.saved_tensors
    shape, block_size, compute_dtype = ctx.settings
    out = nf4_linear_backward(grad.contiguous(), codes, shape, block_size, *scales, compute_dtype)
    return (out, *[None] * 8)


nf4_linear.register_autograd(_backward, setup_context=_setup_context)
