"""Keys and values that grow in place, against transformers' own layer, operation by operation."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from compress_peft.models import growing_cache
from compress_peft.models.growing_cache import GrowingLayer, grow_in_place
from tests.conftest import build_tiny_llama


def tokens(rows, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, count, width, generator=generator) for width in (4, 6)]


def both():
    return DynamicCache(), grow_in_place(DynamicCache())


def same(plain, growing):
    assert isinstance(growing.layers[0], GrowingLayer) and plain.get_seq_length() == growing.get_seq_length()
    for name in ("keys", "values"):
        assert torch.equal(getattr(plain.layers[0], name), getattr(growing.layers[0], name)), name


def add(caches, rows, count, seed):
    found = [cache.update(*tokens(rows, count, seed), 0) for cache in caches]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    same(*caches)


OPERATIONS = {
    "tokens": lambda cache, rows: rows,
    "crop": lambda cache, rows: cache.crop(-3) or rows,
    "crop into the prompt": lambda cache, rows: cache.crop(-9) or rows,
    "select": lambda cache, rows: cache.batch_select_indices(torch.tensor([2, 0])) or 2,
    "repeat": lambda cache, rows: cache.batch_repeat_interleave(2) or 2 * rows,
    "reorder within prompts": lambda cache, rows: cache.reorder_cache(torch.tensor([1, 1, 0, 5, 3, 4])) or rows,
    "leave the order": lambda cache, rows: cache.reorder_cache(torch.arange(6)) or rows,
    "reorder across prompts": lambda cache, rows: cache.reorder_cache(torch.tensor([4, 0, 0, 2, 3, 1])) or rows,
}


ANY_ROWS = ("tokens", "crop", "crop into the prompt", "repeat")
PAIRS = [(a, b) for a in OPERATIONS for b in OPERATIONS if a not in ("repeat", "select") or b in ANY_ROWS]


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("room", [0, 64], ids=["none", "some"])
def test_every_operation_gives_what_transformers_gives(first, second, room, monkeypatch):
    """Two prompts of eight tokens, three beams each, a few tokens between the operations."""
    monkeypatch.setattr(growing_cache, "ROOM", room)
    caches = both()
    add(caches, 2, 8, 0)
    for cache in caches:
        cache.batch_repeat_interleave(3)
    rows = 6
    for seed, name in enumerate((first, second), 1):
        add(caches, rows, 3, seed)
        for count in range(3):
            add(caches, rows, 1, 10 * seed + count)
        new = {OPERATIONS[name](cache, rows) for cache in caches}
        same(*caches)
        rows = new.pop()
    add(caches, rows, 1, 99)


def test_beams_of_beams_share_what_the_first_did():
    caches = both()
    add(caches, 1, 5, 0)
    for count, order in ((3, [0, 0, 2]), (2, [5, 4, 3, 2, 1, 0])):
        for cache in caches:
            cache.batch_repeat_interleave(count)
        add(caches, len(order), 2, count)
        for cache in caches:
            cache.reorder_cache(torch.tensor(order))
        same(*caches)


def test_tokens_are_written_into_the_room():
    cache = grow_in_place(DynamicCache())
    cache.update(*tokens(2, 100, 0), 0)
    place = cache.layers[0].keys.data_ptr()
    for step in range(growing_cache.ROOM):
        cache.update(*tokens(2, 1, step), 0)
        assert cache.layers[0].keys.data_ptr() == place
    cache.batch_repeat_interleave(2)
    cache.update(*tokens(4, 1, 0), 0)
    place, prompt = cache.layers[0].keys.data_ptr(), cache.layers[0].keys[:, :, :164].clone()
    cache.reorder_cache(torch.tensor([1, 0, 3, 3]))
    assert cache.layers[0].keys.data_ptr() == place and torch.equal(cache.layers[0].keys[:, :, :164], prompt)


def test_who_holds_a_view_sees_it_unchanged_by_further_tokens():
    cache = grow_in_place(DynamicCache())
    held = cache.update(*tokens(2, 8, 0), 0)
    before = [tensor.clone() for tensor in held]
    twin = copy.deepcopy(cache)
    for seed in range(4):
        cache.update(*tokens(2, 1, seed), 0)
    cache.crop(-6)
    cache.update(*tokens(2, 3, 7), 0)
    assert all(torch.equal(one, other) for one, other in zip(held, before, strict=True))
    assert torch.equal(twin.layers[0].keys, before[0]) and twin.get_seq_length() == 8
    twin.update(*tokens(2, 1, 1), 0)
    assert torch.equal(twin.layers[0].keys[:, :, :8], before[0])


def test_sliding_windows_keep_their_layers():
    config = build_tiny_llama(model_type="mistral", sliding_window=4).config
    cache = grow_in_place(DynamicCache(config=config))
    assert not any(isinstance(layer, GrowingLayer) for layer in cache.layers)
    plain = grow_in_place(DynamicCache(config=build_tiny_llama().config))
    assert all(isinstance(layer, GrowingLayer) for layer in plain.layers)
