"""Attention of one query a sequence in float32 on the CPU, which is decoding, by the C kernel (csrc/attention.c).

It is an attention of transformers' registry under a name of its own, which models have whose attention was "sdpa";
whatever the kernel does not take goes there.
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


def use_kernel(model: nn.Module) -> None:
    """Lets a model of transformers that computes its attention by "sdpa", by way of the registry, call the kernel."""
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (rows, heads, queries, dim), key and value (rows, kv_heads, tokens, dim) -> (rows, queries, heads, dim)."""
    rows, heads, queries, dim = query.shape
    if (
        queries == 1
        and not dropout
        and _takes(query, key, value, attention_mask)
        and nobody_listens(query, key, value)
        and not any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    ):
        out = query.new_empty((rows, 1, heads, dim))
        native.attention(query, key, value, attention_mask, dim**-0.5 if scaling is None else scaling, out)
        return out, None
    given: dict[str, Any] = {"dropout": dropout, "scaling": scaling, **kwargs}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **given)


def _takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    rows, heads, _, dim = query.shape
    return (
        query.is_contiguous()
        and dim % 8 == 0
        and key.shape == value.shape
        and (key.shape[0], key.shape[3]) == (rows, dim)
        and key.shape[2] > 0
        and heads % key.shape[1] == 0
        and all(x.dtype is torch.float32 and x.is_cpu and x.stride(3) == 1 for x in (query, key, value))
        and (mask is None or _takes_mask(mask, rows, key.shape[2]))
    )


def _takes_mask(mask: Tensor, rows: int, tokens: int) -> bool:
    shape = (mask.shape[0], 1, 1, tokens)
    return mask.dtype is torch.bool and mask.shape == shape and shape[0] in (1, rows) and mask[0].is_contiguous()


ALL_ATTENTION_FUNCTIONS.register(NAME, forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[PLAIN])
