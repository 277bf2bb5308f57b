"""The compressed weight: a tensor that sits in `nn.Linear.weight` and keeps its codes.

`isinstance(layer, nn.Linear)` holds, so tuners attach unmodified. `F.linear` runs on the codes; moving, copying and
loading work; every other operation raises and names `.dequantize()`, so nothing turns dense behind the user's back.
Gradients flow to the input of the layer, never to the codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils._python_dispatch import return_and_correct_aliasing

from compress_peft.errors import Problem, UserError, did_you_mean
from compress_peft.weights import kernels
from compress_peft.weights.parts import Parts

aten = torch.ops.aten

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape by component."""


class UnsupportedOperation(UserError):
    """An operation that would need the dense weight."""

    summary = "the weight is compressed"


class CompressedWeight(Tensor):
    """Base of all grids. A subclass names its component tensors and defines the product.

    The dtype is the logical one: what `dequantize()` returns by default and what `.to(dtype)` changes. The components
    keep theirs.
    """

    kind: ClassVar[str]
    """The grid's name in `spec()` and in saved files."""

    component_names: ClassVar[tuple[str, ...]]
    """Attributes that hold the component tensors (or None); the first holds the codes."""

    _kinds: ClassVar[dict[str, type[CompressedWeight]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        CompressedWeight._kinds[cls.kind] = cls

    # What a grid defines.

    @property
    def parts(self) -> Parts:
        """The plain tensors, for the kernels."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """JSON-able: everything but the tensors. `from_components` is its inverse."""
        raise NotImplementedError

    @classmethod
    def component_shapes(cls, spec: Mapping[str, Any]) -> Shapes:
        """The components of a weight with this spec, in the order of `component_names`."""
        raise NotImplementedError

    @classmethod
    def build(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CompressedWeight:
        """The weight from a spec and the tensors that `component_shapes` asks for."""
        raise NotImplementedError

    def scale_rows(self, vector: Tensor) -> CompressedWeight:
        """diag(vector) @ weight, exact; vector: (out,).

        Raises:
            UserError: this grid and shape cannot hold the result exactly.
        """
        raise NotImplementedError

    def take_rows(self, rows: Tensor) -> CompressedWeight:
        """The weight that consists of these rows; rows: int64 (n,). For a compressed embedding.

        Raises:
            UnsupportedOperation: rows of this grid cannot be decoded one by one.
        """
        raise UnsupportedOperation(
            Problem("embedding", f"a {type(self).__name__} cannot be an embedding", "compress it to an affine grid")
        )

    # What holds for all of them.

    spec_text: str
    """`spec()` as JSON: text that an operator of a compiled model can take."""

    product: kernels.Product | Literal[False] | None = None
    """The product with few rows of activations, made ready at its first use; False where there is no such kernel."""

    compute_dtype: str = "auto"
    """Dtype of the products; "auto" is chosen by device and activations."""

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, (out, in), in the logical dtype unless another is given."""
        return kernels.dequantize(self.parts, dtype or self.dtype)

    def linear(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), with a gradient to x."""
        if torch.compiler.is_compiling():
            parts = list(self.components().values())
            out = torch.ops.compress_peft.linear(x.reshape(-1, x.shape[-1]), parts, self.spec_text)
            return out.view(*x.shape[:-1], self.shape[0])
        if torch.is_grad_enabled() and x.requires_grad:
            return _Linear.apply(x, self)
        return self.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """`linear` without a record for gradients."""
        product = self.product
        if product is None:
            product = self.product = kernels.few_rows(self.parts, _compute(self.compute_dtype))
        if product and product.takes(x):
            return product(x)
        out = kernels.linear(x.reshape(-1, x.shape[-1]), self.parts, _compute(self.compute_dtype))
        # A view that does not say so: callers may add to the result in place, which autograd refuses on a view.
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], self.shape[0]))

    def backward_input(self, grad: Tensor) -> Tensor:
        """grad (..., out) @ weight -> (..., in). Dequantizes again instead of keeping the dense weight."""
        out = kernels.linear_backward(grad.reshape(-1, grad.shape[-1]), self.parts, _compute(self.compute_dtype))
        return out.view(*grad.shape[:-1], self.shape[1])

    def embedding(self, ids: Tensor) -> Tensor:
        """ids (...) -> their rows (..., in), dense; no gradient."""
        if torch.compiler.is_compiling():
            parts = list(self.components().values())
            out = torch.ops.compress_peft.embedding(ids.reshape(-1), parts, self.spec_text)
        else:
            out = self.take_rows(ids.reshape(-1)).dequantize()
        return out.view(*ids.shape, self.shape[1])

    @classmethod
    def from_components(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CompressedWeight:
        """The weight that `spec()` and `components()` describe, of whatever grid.

        Raises:
            UserError: the grid is unknown, or tensors are missing or of the wrong shape or dtype.
        """
        kind = spec.get("kind", "")
        if kind not in CompressedWeight._kinds:
            fix = did_you_mean(kind, CompressedWeight._kinds)
            raise UserError(Problem("kind", f'unknown kind of compressed weight "{kind}"', fix))
        grid = CompressedWeight._kinds[kind]
        expected = grid.component_shapes(spec)
        problems = [
            Problem(name, f"expected {dtype_name(dtype)} {shape}, got {_describe(tensors.get(name))}")
            for name, (dtype, shape) in expected.items()
            if name not in tensors or tensors[name].dtype != dtype or tuple(tensors[name].shape) != shape
        ]
        problems += [Problem(name, "not a part of this weight") for name in tensors if name not in expected]
        if problems:
            raise UserError(problems)
        return grid.build(spec, tensors)

    def components(self) -> dict[str, Tensor]:
        """The tensors that are stored, by name."""
        found = {name: getattr(self, name) for name in self.component_names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def storage_bytes(self) -> int:
        """Bytes of all components."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.components().values())

    @property
    def bits_per_weight(self) -> float:
        """All storage counted."""
        return 8 * self.storage_bytes / max(self.numel(), 1)

    def with_components(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> CompressedWeight:
        """The same weight with every component changed (moved, copied), and another logical dtype if given."""
        changed = {name: change(tensor) for name, tensor in self.components().items()}
        spec = self.spec()
        if dtype is not None:
            spec["dtype"] = dtype_name(dtype)
        return type(self).from_components(spec, changed)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"bits_per_weight={self.bits_per_weight:.2f})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedWeight:
        if id(self) in memo:
            return memo[id(self)]
        copy: Any = self.with_components(Tensor.clone)
        if isinstance(self, nn.Parameter):
            copy = nn.Parameter(copy, requires_grad=False)
        memo[id(self)] = copy
        return copy

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return list(self.components()), self.spec()

    @classmethod
    def __tensor_unflatten__(
        cls, tensors: Mapping[str, Tensor], spec: Mapping[str, Any], outer_size: Any, outer_stride: Any
    ) -> CompressedWeight:
        return cls.from_components(spec, tensors)

    def _stable_hash_for_caching(self) -> str:
        """For the compile cache: what a graph may depend on."""
        return repr((self.spec(), str(self.device)))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            return _linear(*args, **kwargs)
        if func is functional.embedding:
            return _embedding(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func is aten.equal.default:
            return _equal(*args)
        if isinstance(first, CompressedWeight):
            if func in (aten.detach.default, aten.alias.default, aten.lift_fresh.default):
                return return_and_correct_aliasing(func, args, kwargs, first.with_components(Tensor.detach))
            if func is aten.clone.default:
                return first.with_components(Tensor.clone)
            if func is aten._to_copy.default:
                return _to_copy(first, **kwargs)
            if func is aten.copy_.default:
                return _copy_into(first, args[1])
        raise UnsupportedOperation(
            Problem(
                str(func),
                f"not defined on a {cls.__name__}; it would need the dense weight",
                "call .dequantize() where that is meant, or keep this layer out of what you are doing",
            )
        )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` where the weight, and nothing else, is compressed."""
    if isinstance(input, CompressedWeight) or isinstance(bias, CompressedWeight):
        raise UnsupportedOperation(Problem("linear", "a compressed weight was given as activations or bias"))
    assert isinstance(weight, CompressedWeight)
    if input.shape[-1] != weight.shape[1]:
        # The words of torch, since callers may match them.
        raise RuntimeError(f"linear: input {tuple(input.shape)} does not fit weight {tuple(weight.shape)}")
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        input = input.to(torch.get_autocast_dtype(kind))
    out = weight.linear(input)
    return out if bias is None else out + bias.to(out.dtype)


def _embedding(input: Tensor, weight: Tensor, *options: Any, **named: Any) -> Tensor:
    """`F.embedding` with a compressed table. What the options change (gradients, norms) has no place here."""
    bound = dict(zip(("padding_idx", "max_norm"), options, strict=False)) | named
    if bound.get("max_norm") is not None:
        raise UnsupportedOperation(Problem("embedding", "max_norm would change a compressed table", "leave it out"))
    assert isinstance(weight, CompressedWeight)
    return weight.embedding(input)


def _equal(one: Any, other: Any) -> bool:
    """Whether both hold the same codes; a dense tensor equals no compressed weight. transformers asks when it loads
    weights that the model's class ties."""
    if type(one) is not type(other) or one.spec() != other.spec():
        return False
    left, right = one.components(), other.components()
    return all(torch.equal(left[name], right[name]) for name in left)


class _Linear(torch.autograd.Function):
    """x @ W^T; the backward pass decodes W again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: CompressedWeight) -> Tensor:
        ctx.weight = weight
        return weight.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.weight.backward_input(grad), None


def _to_copy(weight: CompressedWeight, **kwargs: Any) -> CompressedWeight:
    """`.to(device, dtype)`: the components move, only the logical dtype changes."""
    device, non_blocking = kwargs.get("device"), kwargs.get("non_blocking", False)
    dtype = kwargs.get("dtype")
    if dtype is not None and not dtype.is_floating_point:
        raise UnsupportedOperation(
            Problem(f"to({dtype})", "a compressed weight stands for floating-point numbers", "use .components()")
        )
    if device is None:
        return weight.with_components(Tensor.clone, dtype)
    return weight.with_components(lambda t: t.to(device, non_blocking=non_blocking, copy=True), dtype)


def _copy_into(target: CompressedWeight, source: Tensor) -> CompressedWeight:
    """In-place copy, as `load_state_dict` does: only from the same grid."""
    if not isinstance(source, CompressedWeight):
        raise UnsupportedOperation(
            Problem("copy_", "a dense tensor cannot be copied into a compressed weight", "quantize it first")
        )
    ours, theirs = dict(target.spec(), dtype=""), dict(source.spec(), dtype="")
    if ours != theirs:
        what = f"cannot copy {theirs} into {ours}"
        raise UnsupportedOperation(Problem("copy_", what, "quantize with equal settings"))
    for name, tensor in target.components().items():
        tensor.copy_(source.components()[name])
    return target


def stored_bits(spec: Mapping[str, Any]) -> float:
    """Bits per weight of a weight with this spec, all components counted."""
    stored = CompressedWeight._kinds[spec["kind"]].component_shapes(spec).values()
    return 8 * sum(dtype.itemsize * math.prod(shape) for dtype, shape in stored) / math.prod(spec["shape"])


def _describe(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"


def _compute(name: str) -> torch.dtype | None:
    return None if name == "auto" else dtype_from_name(name)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(Problem("dtype", f'"{name}" is not a dtype of torch', 'use for example "float32"'))
    return dtype
