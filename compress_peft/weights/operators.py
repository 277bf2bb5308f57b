"""The operators of compressed weights under torch.compile, where a product is one opaque node of the graph.

In eager mode their dispatch would cost more than it gives, so they are not used there.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor

from compress_peft.weights.compressed import CompressedWeight, dtype_from_name


@torch.library.custom_op("compress_peft::linear", mutates_args=())
def compressed_linear(x: Tensor, components: list[Tensor], spec: str) -> Tensor:
    """x (rows, in) -> (rows, out); spec: JSON."""
    return _rebuild(components, spec).forward(x)


@compressed_linear.register_fake
def _(x: Tensor, components: list[Tensor], spec: str) -> Tensor:
    return x.new_empty(x.shape[0], _parse(spec)["shape"][0])


@torch.library.custom_op("compress_peft::linear_backward", mutates_args=())
def compressed_linear_backward(grad: Tensor, components: list[Tensor], spec: str) -> Tensor:
    """grad (rows, out) -> (rows, in)."""
    return _rebuild(components, spec).backward_input(grad)


@compressed_linear_backward.register_fake
def _(grad: Tensor, components: list[Tensor], spec: str) -> Tensor:
    return grad.new_empty(grad.shape[0], _parse(spec)["shape"][1])


@torch.library.custom_op("compress_peft::embedding", mutates_args=())
def compressed_embedding(ids: Tensor, components: list[Tensor], spec: str) -> Tensor:
    """ids (n,) -> (n, in)."""
    return _rebuild(components, spec).embedding(ids)


@compressed_embedding.register_fake
def _(ids: Tensor, components: list[Tensor], spec: str) -> Tensor:
    parsed = _parse(spec)
    return components[0].new_empty(len(ids), parsed["shape"][1], dtype=dtype_from_name(parsed["dtype"]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, components, ctx.spec = inputs
    ctx.save_for_backward(*components)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None], None]:
    components = list(ctx.saved_tensors)
    out = compressed_linear_backward(grad.contiguous(), components, ctx.spec)
    return out, [None] * len(components), None


compressed_linear.register_autograd(_backward, setup_context=_setup_context)


@functools.lru_cache(maxsize=1024)
def _parse(spec: str) -> dict[str, Any]:
    return json.loads(spec)


def _rebuild(components: list[Tensor], text: str) -> CompressedWeight:
    spec = _parse(text)
    grid = CompressedWeight._kinds[spec["kind"]]
    return grid.build(spec, dict(zip(grid.component_shapes(spec), components, strict=True)))
