"""The kernels that a model runs on by itself: of linear layers, norms, attention and whole blocks."""

from __future__ import annotations

import types

import torch
from torch import nn

from compress_peft.weights import attention, blocks, dense, native, norms


def use_kernels(model: nn.Module) -> None:
    """Lets the linear layers, RMS norms, attention and blocks of `model` run our kernels wherever these can take over,
    and torch everywhere else: in training, on other devices and dtypes, under `torch.compile`. Sums differ in the last
    bits where a layer is dense, and those of norms and attention.

    Does nothing where there is neither a kernel for dense weights nor a CUDA device. Of linear layers only `nn.Linear`
    itself changes: subclasses, and layers whose `forward` somebody has replaced, have ways of their own.
    """
    if not native.has_dense() and not torch.cuda.is_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            # a method, since copies of the module bind it anew
            module.forward = types.MethodType(dense.forward, module)  # type: ignore[method-assign]
    if native.has_dense():
        norms.use_kernel(model)
        attention.use_kernel(model)
        blocks.use_kernel(model)
