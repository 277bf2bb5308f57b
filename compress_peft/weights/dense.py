"""Inference, for which linear layers call the fastest product themselves.

Few rows in float32 on the CPU, which is decoding, and dense weights (csrc/dense.c): the C kernel reads the weight at
the speed of the memory, where torch's own product, on a processor that is not Intel's, takes longer
(`benchmarks/decode_cpu.py` has both). Above all it is for the output head, which stays dense in most compressed models,
and for models that are pruned and not quantized.

Many rows: where another library's product is faster than torch's own (products.py), dense layers call that one.

Compressed weights: the product is the same as without this; torch's dispatch to the tensor's class, which a small layer
feels, is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress_peft.weights import native, products
from compress_peft.weights.compressed import CompressedWeight
from compress_peft.weights.kernels import FEW_ROWS
from compress_peft.weights.listeners import nobody_listens, plain


def forward(self: nn.Linear, input: Tensor) -> Tensor:
    """In place of `nn.Linear.forward`, the argument's name included. (..., in) -> (..., out)."""
    x, weight, bias = input, self.weight, self.bias  # the weight may have been compressed since `use_kernels`
    if isinstance(weight, CompressedWeight):
        product = weight.product
        if product and _fits(x, product.columns) and product.takes(x) and nobody_listens(x, bias):
            out = product(x)
            return out if bias is None else out + bias.to(out.dtype)
    elif (
        type(weight) is nn.Parameter
        and _takes(x, weight, bias)
        and nobody_listens(x, weight, bias)
        and native.has_dense()
    ):
        if x.numel() > FEW_ROWS * weight.shape[1]:
            return products.linear(x, weight, bias)
        out = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)
        native.dense_matmul(weight, bias, x, out)
        return out
    return functional.linear(x, weight, bias)


def _fits(x: Tensor, columns: int) -> bool:
    return type(x) is Tensor and x.shape[-1] == columns


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether this is a product in float32 on the CPU of tensors without gaps."""
    return _fits(x, weight.shape[1]) and plain(x) and plain(weight) and (bias is None or plain(bias))
