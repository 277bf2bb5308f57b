"""Working inside transformers' attention, between the queries, keys and values and the last projection.

An attention module asks its configuration for the name of the function to call. While parts work in it, that name is
ours, and the configuration (a copy) carries the parts; they call the function that it had before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compress_peft.errors import ModelError, Problem
from compress_peft.weights.attention import NAME

INSIDE = "compress_peft_inside"
"""Our name in transformers' table of attention functions."""

KNOWN = ("eager", "sdpa", NAME)
"""The functions that take keys with more entries than the mask was made for, given a longer mask."""


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention function.

    query: (batch, heads, T, head_dim), rotated. key, value: (batch, key heads, S, head_dim), with those of the cache.
    mask: None (causal), boolean with True to keep, or additive; (batch or 1, heads or 1, T, S). hidden: (batch, T, d),
    what the attention module was given. module: it. others: further arguments, among them scaling and dropout.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    hidden: Tensor
    module: Any
    others: dict[str, Any]

    def heads_of(self, tensor: Tensor) -> Tensor:
        """Keys or values (batch, key heads, S, head_dim), repeated for the heads that share them."""
        return tensor.repeat_interleave(self.query.shape[1] // tensor.shape[1], dim=1)

    def scores(self, key: Tensor) -> Tensor:
        """(batch, heads, T, S) scaled products with keys (batch or 1, key heads, S, head_dim), no bias of positions."""
        return self.query @ self.heads_of(key).to(self.query.dtype).transpose(-1, -2) * float(self.others["scaling"])

    def explicit_mask(self) -> Tensor:
        """The mask as a boolean or additive tensor whose last dimension is S."""
        if self.mask is not None:
            return self.mask[..., : self.key.shape[2]]
        length, total = self.query.shape[2], self.key.shape[2]
        ones = torch.ones(length, total, dtype=torch.bool, device=self.query.device)
        if not getattr(self.module, "is_causal", True):
            return ones[None, None]
        # a causal mask that transformers leaves out aligns with the first key; one row sees everything
        return (ones if length == 1 else ones.tril())[None, None]

    def with_prefix(self, key: Tensor, value: Tensor) -> AttentionCall:
        """The call with further keys and values (1, key heads, P, head_dim) at the start, which every row sees."""
        mask = self.explicit_mask()
        see = torch.full((), mask.dtype == torch.bool, dtype=mask.dtype, device=mask.device)  # True, or + 0
        batch, others = self.key.shape[0], self.others
        if (bias := others.get("position_bias")) is not None:  # of T5; the prefix has no position
            others = {**others, "position_bias": functional.pad(bias, (key.shape[2], 0))}
        return replace(
            self,
            others=others,
            key=torch.cat([key.to(self.key.dtype).expand(batch, -1, -1, -1), self.key], dim=2),
            value=torch.cat([value.to(self.value.dtype).expand(batch, -1, -1, -1), self.value], dim=2),
            mask=torch.cat([see.expand(*mask.shape[:-1], key.shape[2]), mask], dim=-1),
        )


Attend = Callable[[AttentionCall], Tensor]


class Inside(Protocol):
    def attend(self, call: AttentionCall, attend: Attend) -> Tensor: ...


@dataclass(frozen=True)
class InsideAttention:
    """What works in one attention module during one forward pass; see `AttentionCall` for hidden."""

    parts: Sequence[Inside]
    hidden: Tensor
    implementation: str

    def run(self, call: AttentionCall) -> Tensor:
        eager = getattr(inspect.getmodule(type(call.module)), "eager_attention_forward", None)
        function: Any = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, eager)

        def backbone(call: AttentionCall) -> Tensor:
            return function(call.module, call.query, call.key, call.value, call.mask, **call.others)[0]

        attend: Attend = backbone
        for part in self.parts:
            attend = _around(part, attend)
        return attend(call)


def _around(part: Inside, attend: Attend) -> Attend:
    return lambda call: part.attend(call, attend)


def attention_inside(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    """The function under our name; `others` is what transformers passes on."""
    inside: InsideAttention = module.config.inside
    call = AttentionCall(query, key, value, attention_mask, inside.hidden, module, others)
    return inside.run(call), None


AttentionInterface.register(INSIDE, attention_inside)


@dataclass(frozen=True)
class AttentionShape:
    """key_heads, heads, head_dim of one attention; hidden_size: d."""

    key_heads: int
    heads: int
    head_dim: int
    hidden_size: int


@functools.cache
def _asks_its_configuration(attention: type) -> bool:
    """Whether the class looks its function up; reading its source takes a tenth of a second."""
    return "get_interface" in inspect.getsource(attention)


def attention_shape(model: nn.Module, last_projection: str, where: str) -> AttentionShape:
    """Shapes of the attention whose last projection has this name.

    Raises:
        ModelError: its function cannot be replaced, because the class does not ask its configuration for it.
    """
    config: Any = getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    attention: Any = model.get_submodule(last_projection.rpartition(".")[0])
    problem, kind = "", cast(Any, type(attention))
    if not hasattr(attention, "config") or not _asks_its_configuration(kind):
        problem = f"{type(attention).__name__} computes its attention by itself, so that no prefix can be put in"
    elif implementation not in KNOWN:
        problem = f'the attention implementation is "{implementation}", expected one of {", ".join(KNOWN)}'
    if problem:
        fix = "use an adapter without prefixes, or load the model with attn_implementation sdpa"
        raise ModelError(Problem(f"adapter ({where})", problem, fix))
    config = config.get_text_config()
    heads = int(config.num_attention_heads)
    key_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return AttentionShape(key_heads, heads, head_dim, int(config.hidden_size))
