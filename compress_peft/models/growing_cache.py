"""Keys and values that grow in place.

transformers copies all of a layer's keys and values for every token that is added, and once more when beams change
their order. Here a layer keeps room behind its last token, and beams of one prompt, whose keys and values are the same
as far as the prompt goes, are reordered behind it alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens that fit in without a copy, and an eighth of what is there."""


def grow_in_place(cache: DynamicCache) -> DynamicCache:
    """The same cache, empty still, with layers that grow in place where they were transformers' plain ones."""
    assert not cache.get_seq_length()
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache


class GrowingLayer(DynamicLayer):
    """keys, values: (rows, heads, tokens, width), views of longer tensors. Whoever replaces them loses nothing but the
    room: the next token copies them once."""

    keys: Tensor
    values: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rooms = (_Room(), _Room())
        self._forget()

    def _forget(self) -> None:
        """Rows need not be beams any more."""
        self._beams = 1
        self._shared = 0
        """Of so many tokens the beams of a prompt have the same keys and values."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for_keys, for_values = self._rooms
        keys = self.keys = for_keys.append(self.keys, key_states)
        values = self.values = for_values.append(self.values, value_states)
        return keys, values

    def extend(self, rows: int, heads: int, width: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values with a place for one token more each, not written yet; None where the layer does not hold
        (rows, heads, tokens, width) in float32 on the CPU."""
        if not self.is_initialized:
            return None
        for held in (self.keys, self.values):
            given, _, there, wide = held.shape if held.dim() == 4 else (0, 0, 0, 0)
            fits = (given, held.shape[1], wide) == (rows, heads, width) and there > 0
            if not fits or held.dtype is not torch.float32 or not held.is_cpu:
                return None
        for_keys, for_values = self._rooms
        self.keys, self.values = for_keys.grow(self.keys, 1), for_values.grow(self.values, 1)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self._beams == 1:
            self._shared = self.get_seq_length()
        self._beams *= repeats

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._shared = min(self._shared, self.get_seq_length())

    def reset(self) -> None:
        super().reset()
        self._rooms = (_Room(), _Room())
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        order = beam_idx.tolist()
        apart = any(source // self._beams != row // self._beams for row, source in enumerate(order))
        if apart or not self._shared:
            super().reorder_cache(beam_idx)
            self._forget()
        elif order != list(range(len(order))):
            for held in (self.keys, self.values):
                own = held[:, :, self._shared :]
                own.copy_(own.index_select(0, beam_idx.to(own.device)))


class _Room:
    """A tensor (rows, heads, tokens, width) with free places for further tokens."""

    def __init__(self) -> None:
        self.whole: Tensor | None = None
        self.filled: Tensor | None = None
        """The view that was given out last."""

    def append(self, held: Tensor, new: Tensor) -> Tensor:
        """held followed by new, (rows, heads, tokens + new tokens, width)."""
        if not held.numel():
            held = new[:, :, :0]
        tokens = new.shape[-2]
        filled = self.grow(held, tokens)
        filled.narrow(2, filled.shape[2] - tokens, tokens).copy_(new)  # by index it would take twice as long to start
        return filled

    def grow(self, held: Tensor, tokens: int) -> Tensor:
        """held followed by places that are not written yet."""
        rows, heads, start, width = held.shape
        end = start + tokens
        if self.whole is None or held is not self.filled or end > self.whole.shape[-2]:
            self.whole = held.new_empty(rows, heads, end + ROOM + end // 8, width)
            if start:
                self.whole[:, :, :start] = held
        self.filled = self.whole.narrow(2, 0, end)
        return self.filled
