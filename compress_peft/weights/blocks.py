"""Blocks of a Llama-like decoder at one token a sequence, in float32 on the CPU, by one call of C (csrc/block.c).

Such a block is some forty operations, each of which takes longer to start from Python than to run where the model is
small or compressed. The C function runs the kernels that the parts of the block would call, in the same order. Whatever
it does not do goes the usual way: training, other devices and dtypes, layers that hooks or most adapters have changed,
caches that do not grow in place.
"""

from __future__ import annotations

import ctypes
import types
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from compress_peft.models.growing_cache import GrowingLayer
from compress_peft.tensors.nf4 import GRIDS
from compress_peft.weights import attention, dense, native, norms
from compress_peft.weights.compressed import CompressedWeight
from compress_peft.weights.kernels import FEW_ROWS, FewRows
from compress_peft.weights.listeners import nobody_listens, plain
from compress_peft.weights.parts import AffineParts

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
IN_ATTENTION, IN_MLP = {*LINEARS[:4]}, {*LINEARS[4:], "act_fn"}
HEAD_NORMS = {"q_norm", "k_norm"}
USED = attention.NAME


class _Linear(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("tensors", ctypes.c_void_p * 6),
        ("numbers", ctypes.c_int64 * 4),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("scale_step", ctypes.c_int64),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("eps", ctypes.c_float)]


class _Block(ctypes.Structure):
    _fields_ = [
        *((name.removesuffix("_proj"), _Linear) for name in LINEARS),
        *((name, _Norm) for name in ("before", "after", "of_q", "of_k")),
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads", "dim")),
        ("scaling", ctypes.c_float),
    ]


class OutputScaler:
    """An adapter of a block that replaces the `forward` of some of its linear layers by the former one times a vector
    for each row."""

    def former_forward(self, layer: nn.Module) -> Any:
        raise NotImplementedError

    def output_scale(self, layer: nn.Module) -> Tensor | None:
        """The vectors now, (rows, 1, out) in float32; None where the output is not scaled."""
        raise NotImplementedError


class _Unfit(Exception):
    """The block is, or has become, one that the C function does not compute."""


def use_kernel(model: nn.Module) -> None:
    """Lets the model's blocks that are built like Llama's call the C function where it can take over. That a block
    computes what it computes is found out by trying, at its first token."""
    for module in model.modules():
        if {name for name, _ in module.named_children()} == NAMES and "forward" not in vars(module):
            module.forward = types.MethodType(forward, module)  # a method, since copies of the module bind it anew


def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """In place of the block's own; (rows, tokens, hidden) -> (rows, tokens, hidden)."""
    if hidden_states.shape[1:2] == (1,) and not (args or self.training or torch.is_grad_enabled()):
        out = _decode(self, hidden_states, **kwargs)
        if out is not None:
            return out
    return type(self).forward(self, hidden_states, *args, **kwargs)


def _decode(
    block: Any,
    x: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """None where the C function does not do it; then nothing has changed."""
    rows = x.shape[0]
    if type(past_key_values) is not DynamicCache or past_key_values.offloading or not 0 < rows <= FEW_ROWS:
        return None
    if type(x) is not Tensor or not plain(x) or not nobody_listens(x) or not isinstance(position_embeddings, tuple):
        return None
    plan = _plan(block, rows)
    if plan is None or x.shape[2] != plan.hidden:
        return None
    index = block.self_attn.layer_idx
    layer = past_key_values.layers[index] if index < len(past_key_values.layers) else None
    return plan.run(x, position_embeddings, layer, attention_mask)


class _Part:
    """A module of the block, and what of it must not have changed. It holds nothing: what is taken out of the model is
    to be free."""

    def __init__(self, inside: int, name: str, module: nn.Module, function: Any):
        """inside: 0, the block; 1, its attention; 2, its MLP. Of the module, `forward` is its class's own or, where it
        was replaced, `function`."""
        replaced = vars(module).get("forward")
        scaler = getattr(replaced, "__self__", None)
        self.scaled = isinstance(scaler, OutputScaler)
        former = scaler.former_forward(module) if isinstance(scaler, OutputScaler) else replaced
        if former is not None and getattr(former, "__func__", None) is not function:
            raise _Unfit
        self.inside, self.name = inside, name
        self.biased = module._parameters.get("bias") is not None
        self.module = weakref.ref(module)
        self.forward = None if replaced is None else weakref.ref(replaced)
        self.plain: list[tuple[str, int, torch.Size]] = []
        """(name, address, shape) of parameters that the C function reads as they are. No references, not even weak
        ones, with which a model of compressed weights could not be moved (torch.utils.swap_tensors)."""
        self.product: weakref.ref[FewRows] | None = None

    def expect(self, name: str, tensor: Tensor) -> int:
        """Writes down that the parameter is this one; its address."""
        if not _is_plain(tensor):
            raise _Unfit
        self.plain.append((name, tensor.data_ptr(), tensor.shape))
        return tensor.data_ptr()

    def same(self, module: Any) -> bool:
        if module is None or module is not self.module():
            return False
        state = vars(module)
        replaced, forward = state.get("forward"), self.forward
        if (replaced is None) is not (forward is None) or (forward is not None and forward() is not replaced):
            return False
        if state["_forward_hooks"] or state["_forward_pre_hooks"]:
            return False
        parameters = state["_parameters"]
        for name, address, shape in self.plain:
            tensor = parameters.get(name)
            if tensor is None or tensor.data_ptr() != address or tensor.shape != shape or not _is_plain(tensor):
                return False
        if self.product is not None:
            product = self.product()
            if product is None or getattr(parameters.get("weight"), "product", None) is not product:
                return False
        return self.biased is (parameters.get("bias") is not None)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is nn.Parameter and plain(tensor)


class _Plan:
    """What the C function needs to know of a block."""

    def __init__(self, block: Any):
        at, mlp = block.self_attn, block.mlp
        of_heads = sorted(HEAD_NORMS & set(at._modules))
        if set(at._modules) != IN_ATTENTION.union(of_heads) or len(of_heads) == 1 or set(mlp._modules) != IN_MLP:
            raise _Unfit
        self.block = _Block()
        self.parts = [_Part(0, "self_attn", at, None), _Part(0, "mlp", mlp, None), _Part(2, "act_fn", mlp.act_fn, None)]
        self.scaled: list[tuple[_Part, _Linear]] = []
        for inside, parent, names in ((1, at, LINEARS[:4]), (2, mlp, LINEARS[4:])):
            for name in names:
                self._linear(inside, parent, name)
        self._norm(0, block, "input_layernorm", self.block.before)
        self._norm(0, block, "post_attention_layernorm", self.block.after)
        for name in of_heads:
            self._norm(1, at, name, getattr(self.block, f"of_{name[0]}"))
        self._sizes(at)

    def _linear(self, inside: int, parent: Any, name: str) -> None:
        layer = getattr(parent, name)
        weight = layer._parameters.get("weight")
        if type(layer) is not nn.Linear or weight is None:
            raise _Unfit
        part = _Part(inside, name, layer, dense.forward)
        self.parts.append(part)
        to = self._place(name)
        to.n, to.k = weight.shape
        to.bias = part.expect("bias", layer.bias) if part.biased else None
        if part.scaled:
            self.scaled.append((part, to))
        if not isinstance(weight, CompressedWeight):
            to.kind, to.tensors[0] = 0, part.expect("weight", weight)
            return
        if weight.product is None:  # not used yet
            weight.forward(torch.zeros(1, to.k))
        product = weight.product
        if not isinstance(product, FewRows):
            raise _Unfit
        part.product = weakref.ref(product)
        if isinstance(product.parts, AffineParts):
            *tensors, half, zeros, bits, group = native._affine(product.parts)
            to.kind, to.numbers[:] = 1, (half, zeros, bits, group)
        else:
            *tensors, size = native._nf4(product.parts)
            to.kind, to.numbers[0] = 2 + list(GRIDS).index(product.parts.grid), size
        to.tensors[: len(tensors)] = tensors

    def _norm(self, inside: int, parent: Any, name: str, to: _Norm) -> None:
        norm = getattr(parent, name)
        if "forward" not in vars(norm):  # not found to be one
            raise _Unfit
        part = _Part(inside, name, norm, norms.forward)
        self.parts.append(part)
        to.weight, to.eps = part.expect("weight", norm.weight), norm.variance_epsilon

    def _place(self, name: str) -> _Linear:
        place: _Linear = getattr(self.block, name.removesuffix("_proj"))
        return place

    def _sizes(self, at: Any) -> None:
        block = self.block
        block.hidden, block.dim, block.scaling = block.q.k, at.head_dim, at.scaling
        block.heads, block.kv_heads = block.q.n // block.dim, block.k.n // block.dim
        self.hidden, self.kv_heads, self.dim = block.hidden, block.kv_heads, block.dim
        heads, of_keys, wide = block.heads * self.dim, block.kv_heads * self.dim, block.gate.n
        shapes = [(heads, self.hidden), (of_keys, self.hidden), (of_keys, self.hidden), (self.hidden, heads)]
        shapes += [(wide, self.hidden), (wide, self.hidden), (self.hidden, wide)]
        if [(self._place(name).n, self._place(name).k) for name in LINEARS] != shapes:
            raise _Unfit
        if self.dim % 8 or not self.kv_heads or block.heads % self.kv_heads:
            raise _Unfit

    def holds(self, block: Any) -> bool:
        """Whether the block still is what was written down."""
        if torch.nn.modules.module._has_any_global_hook() or block.self_attn.config._attn_implementation != USED:
            return False
        modules = block._modules
        inside = (modules, modules["self_attn"]._modules, modules["mlp"]._modules)
        return all(part.same(inside[part.inside].get(part.name)) for part in self.parts)

    def run(self, x: Tensor, angles: tuple[Tensor, Tensor], layer: Any, mask: Tensor | None) -> Tensor | None:
        """x (rows, 1, hidden); angles: cosines and sines, (rows or 1, 1, dim); mask as `attention` takes it."""
        rows = x.shape[0]
        if type(layer) is not GrowingLayer or len(angles) != 2:
            return None
        for angle in angles:
            if angle.shape not in ((1, 1, self.dim), (rows, 1, self.dim)) or not plain(angle):
                return None
        if mask is not None and not attention.takes_mask(mask, rows, 1, layer.get_seq_length() + 1):
            return None
        scales = []  # held until they are used
        for part, to in self.scaled:
            linear: Any = part.module()
            scale = linear.forward.__self__.output_scale(linear)
            to.scale = None
            if scale is not None:
                if scale.shape != (rows, 1, to.n) or scale.dtype is not torch.float32 or scale.stride(2) != 1:
                    return None
                scales.append(scale)
                to.scale, to.scale_step = scale.data_ptr(), scale.stride(0)
        found = layer.extend(rows, self.kv_heads, self.dim)
        if found is None:
            return None
        out = torch.empty_like(x)
        native.decode_block(self.block, x, *angles, *found, mask, out)
        return out


_plans: weakref.WeakKeyDictionary[nn.Module, _Plan] = weakref.WeakKeyDictionary()
"""Not kept in the blocks: copies of these would point at the weights of others."""

_right: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
"""Whether the C function computes what the block does. Its class does not tell: factors may stand in its config."""


def _plan(block: Any, rows: int) -> _Plan | None:
    """That of the block as it is now, if it has one."""
    plan = _plans.get(block)
    if plan is not None and plan.holds(block):
        return plan
    _plans.pop(block, None)
    try:
        plan = _Plan(block)
    except (_Unfit, AttributeError):
        return None
    if not plan.holds(block):
        return None
    if block not in _right:
        _right[block] = _same(block, plan, rows)
    if not _right[block]:
        return None
    _plans[block] = plan
    return plan


class _Cache:
    """A cache with one layer, whatever number the block gives it."""

    def __init__(self, layer: GrowingLayer):
        self.layer = layer

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.layer.update(keys, values)


@torch.no_grad()
def _same(block: Any, plan: _Plan, rows: int, tokens: int = 3) -> bool:
    """Whether the block's own forward gives what the plan does, after a few tokens."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 1, plan.hidden, generator=draw)
    half = torch.rand(rows, 1, plan.dim // 2, generator=draw) * 6
    angles = (torch.cat([half, half], -1).cos(), torch.cat([half, half], -1).sin())
    held = torch.randn(2, rows, plan.kv_heads, tokens, plan.dim, generator=draw)
    layers = (GrowingLayer(), GrowingLayer())
    for layer in layers:
        layer.update(*held)
    try:
        want = type(block).forward(block, x, position_embeddings=angles, past_key_values=_Cache(layers[0]))
    except Exception:  # a block that is called in another way
        return False
    got = plan.run(x, angles, layers[1], None)
    pairs = [(got, want), (layers[1].keys, layers[0].keys), (layers[1].values, layers[0].values)]
    return all(
        isinstance(ours, Tensor) and isinstance(theirs, Tensor) and bool((ours - theirs).norm() <= 1e-5 * theirs.norm())
        for ours, theirs in pairs
    )
