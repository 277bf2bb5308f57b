"""Inference in float32 on the CPU, for which linear layers call the fastest product themselves.

Few rows, which is decoding, and dense weights (csrc/dense.c): the C kernel reads the weight at the speed of the memory,
where torch's own product, on a processor that is not Intel's, takes longer (`benchmarks/decode_cpu.py` has both). Above
all it is for the output head, which stays dense in most compressed models, and for models that are pruned and not
quantized.

Many rows: where another library's product is faster than torch's own (products.py), dense layers call that one.

Compressed weights: the product is the same as without this; torch's dispatch to the tensor's class, which a small layer
feels, is left out.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from compress_peft.weights import native, products
from compress_peft.weights.compressed import CompressedWeight
from compress_peft.weights.kernels import FEW_ROWS


def use_kernels(model: nn.Module) -> None:
    """Lets the linear layers of `model` run the C kernels wherever these can take a product over, and torch everywhere
    else: in training, on other devices and dtypes, under `torch.compile`. Sums of dense layers differ in the last bits.

    Does nothing where the kernel for dense weights is not there. Only `nn.Linear` itself changes: subclasses, and
    layers whose `forward` somebody has replaced, have ways of their own.
    """
    if not native.has_dense():
        return
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            # a method, since copies of the module bind it anew
            module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def forward(self: nn.Linear, x: Tensor) -> Tensor:
    """In place of `nn.Linear.forward`. x (..., in) -> (..., out)."""
    weight, bias = self.weight, self.bias  # the weight may have been compressed since `use_kernels`
    if isinstance(weight, CompressedWeight):
        product = weight.product
        if product and _fits(x, product.columns) and product.takes(x) and _nobody_listens(x, bias):
            out = product(x)
            return out if bias is None else out + bias.to(out.dtype)
    elif type(weight) is nn.Parameter and _takes(x, weight, bias) and _nobody_listens(x, weight, bias):
        if x.numel() > FEW_ROWS * weight.shape[1]:
            return products.linear(x, weight, bias)
        out = x.new_empty((*x.shape[:-1], weight.shape[0]))
        native.dense_matmul(weight, bias, x, out)
        return out
    return functional.linear(x, weight, bias)


def _fits(x: Tensor, columns: int) -> bool:
    return type(x) is Tensor and x.shape[-1] == columns


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether this is a product in float32 on the CPU of tensors without gaps."""
    return _fits(x, weight.shape[1]) and _plain(x) and _plain(weight) and (bias is None or _plain(bias))


def _plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype is torch.float32 and tensor.is_contiguous()


def _nobody_listens(*tensors: Tensor | None) -> bool:
    """To what torch does: neither autograd nor a compiler, a transform or a dispatch mode."""
    return (
        not (torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors))
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled("cpu")
    )
