"""Attention in float32 on the CPU by C kernels: of one query a sequence, which is decoding (csrc/attention.c), and of
many (csrc/prefill.c).

It is an attention of transformers' registry under a name of its own, which models have whose attention was "sdpa";
whatever the kernels do not take goes there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compress_peft.weights import native
from compress_peft.weights.listeners import nobody_listens

NAME = "sdpa_or_kernel"
PLAIN = "sdpa"

FEWEST, WIDEST = 64, 256
"""Queries from which the kernel for many pays, and numbers a head that it has room for."""


def use_kernel(model: nn.Module) -> None:
    """Lets a model of transformers that computes its attention by "sdpa", by way of the registry, call the kernels."""
    config: Any = getattr(model, "config", None)
    through_registry = getattr(model, "_supports_attention_backend", False)
    if through_registry and getattr(config, "_attn_implementation", None) == PLAIN:
        config._attn_implementation = NAME


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (rows, heads, queries, dim), key and value (rows, kv_heads, tokens, dim) -> (rows, queries, heads, dim)."""
    rows, heads, queries, dim = query.shape
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(causal) and queries > 1 and attention_mask is None
    if (
        not dropout
        and not any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap"))
        and nobody_listens(query, key, value)
        and _takes(query, key, value)
        and (attention_mask is None or takes_mask(attention_mask, rows, queries, key.shape[2]))
        and (not causal or queries == key.shape[2])
    ):
        scale = dim**-0.5 if scaling is None else float(scaling)
        out = query.new_empty((rows, queries, heads, dim))
        if queries == 1:
            native.attention(query, key, value, attention_mask, scale, out)
        else:
            native.prefill(query, key, value, attention_mask, causal, scale, out)
        return out, None
    given: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **given)


def _takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    rows, heads, queries, dim = query.shape
    one = queries == 1 and dim % 8 == 0 and query.is_contiguous()
    return (
        (one or (queries >= FEWEST and dim % 16 == 0 and dim <= WIDEST))
        and key.shape == value.shape
        and (key.shape[0], key.shape[3]) == (rows, dim)
        and key.shape[2] > 0
        and heads % key.shape[1] == 0
        and all(x.dtype is torch.float32 and x.is_cpu and x.stride(3) == 1 for x in (query, key, value))
    )


def takes_mask(mask: Tensor, rows: int, queries: int, tokens: int) -> bool:
    shape = (mask.shape[0], 1, queries, tokens)
    dense = tokens == 1 or mask.stride(-1) == 1
    return mask.dtype is torch.bool and mask.is_cpu and mask.shape == shape and shape[0] in (1, rows) and dense


ALL_ATTENTION_FUNCTIONS.register(NAME, forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[PLAIN])
