"""When a layer may call a C kernel behind torch's back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def plain(tensor: Tensor) -> bool:
    """Whether it is float32 on the CPU, without gaps."""
    return tensor.is_cpu and tensor.dtype is torch.float32 and tensor.is_contiguous()


def nobody_listens(*tensors: Tensor | None) -> bool:
    """To what torch does: neither autograd nor a compiler, a transform or a dispatch mode."""
    return (
        not (torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors))
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.cuda.is_initialized() and torch.is_autocast_enabled("cuda"))
    )
