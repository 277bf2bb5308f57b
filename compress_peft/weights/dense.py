"""Decoding with the layers that are not compressed: few rows of activations times a dense float32 weight, on the CPU.

The C kernel (csrc/dense.c) reads the weight at the speed of the memory, where torch's own product, on a processor that
is not Intel's, takes longer (`benchmarks/decode_cpu.py` has both). Above all it is for the output head, which stays
dense in most compressed models, and for models that are pruned and not quantized.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from compress_peft.weights import native
from compress_peft.weights.kernels import FEW_ROWS


def use_kernels(model: nn.Module) -> None:
    """Lets the linear layers of `model` run the C kernel wherever it can take a product over, and torch everywhere
    else: in training, on other devices and dtypes, under `torch.compile`. Sums differ in the last bits.

    Does nothing where the kernel is not there. Only `nn.Linear` itself with a plain weight changes: compressed weights,
    subclasses, and layers whose `forward` somebody has replaced, have ways of their own.
    """
    if not native.has_dense():
        return
    for module in model.modules():
        if type(module) is nn.Linear and type(module.weight) is nn.Parameter and "forward" not in vars(module):
            # a method, since copies of the module bind it anew
            module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def forward(self: nn.Linear, x: Tensor) -> Tensor:
    """In place of `nn.Linear.forward`. x (..., in) -> (..., out)."""
    weight, bias = self.weight, self.bias
    if type(weight) is nn.Parameter and _takes(x, weight, bias):  # the weight may have been compressed meanwhile
        out = x.new_empty((*x.shape[:-1], weight.shape[0]))
        native.dense_matmul(weight, bias, x, out)
        return out
    return functional.linear(x, weight, bias)


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel can run this product, and nobody listens to torch's: autograd, a compiler, a dispatch mode."""
    parameters = (weight,) if bias is None else (weight, bias)
    return (
        x.shape[-1] == weight.shape[1]
        and x.numel() <= FEW_ROWS * weight.shape[1]
        and type(x) is Tensor
        and _plain(x)
        and all(_plain(p) for p in parameters)
        and not (torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters)))
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled("cpu")
    )


def _plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype is torch.float32 and tensor.is_contiguous()
