from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from compress_peft.adapters import Lora
from compress_peft.weights.kernels import SCRATCH
from eval.memory import (
    estimate_inference,
    estimate_training,
    kv_cache_bytes,
    process_baseline,
    saved_bytes,
    scratch_bytes,
)
from tests.conftest import build_tiny_llama


def saved_by_autograd(model: Any, ids: torch.Tensor) -> int:
    """Bytes that a forward pass through the blocks keeps, each storage once, parameters and buffers not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    decoder = (model.get_base_model() if hasattr(model, "peft_config") else model).get_decoder()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = decoder(input_ids=ids, use_cache=False).last_hidden_state
    assert out.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("everything", [True, False])
def test_saved_activations_are_those_that_autograd_keeps(everything: bool) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "vocab_size": 64}
    model: Any = build_tiny_llama(**sizes)
    ids = torch.randint(64, (2, 96))
    expected = saved_bytes(model, 2 * 96, 4, checkpointing=False, everything=everything)
    adapted = model.train() if everything else Lora(r=2).attach(model).train()
    assert expected == pytest.approx(saved_by_autograd(adapted, ids), rel=0.15)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_cache_is_as_large_as_transformers_makes_it(heads: int) -> None:
    model: Any = build_tiny_llama(num_key_value_heads=heads)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.zeros(3, 17, dtype=torch.long), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_bytes(model.config, 3, 17, 4) == held


def test_a_sliding_window_bounds_the_cache() -> None:
    config: Any = build_tiny_llama(num_hidden_layers=3).config
    full = kv_cache_bytes(config, 1, 40, 4)
    config.layer_types, config.sliding_window = ["sliding_attention", "full_attention", "full_attention"], 11
    assert kv_cache_bytes(config, 1, 40, 4) == full // 3 * 2 + full // 3 * 10 // 40


def test_the_parts_of_training_add_up() -> None:
    with torch.device("meta"):
        model = build_tiny_llama(vocab_size=4096)
    kwargs: dict[str, Any] = {"batch": 2, "length": 64, "response": 8, "bytes_each": 4}
    lora = estimate_training(model, 10_000, 500, **kwargs, baseline=7)
    assert (lora.gradient_bytes, lora.optimizer_bytes, lora.weights_bytes) == (2000, 4000, 12_000)
    assert lora.peak_bytes == 7 + 12_000 + 4000 + 2000 + lora.activation_bytes  # 2000: the best weights so far
    checkpointed = estimate_training(model, 10_000, 500, **kwargs, baseline=7, checkpointing=True)
    assert checkpointed.activation_bytes < lora.activation_bytes
    long = estimate_training(model, 10_000, 500, **kwargs | {"response": 64})
    assert long.activation_bytes - lora.activation_bytes == 2 * 4 * 2 * 56 * 4096
    full = estimate_training(model, 4_000_000, 1_000_000, **kwargs | {"length": 1}, added=False)
    assert full.weights_bytes == 4_000_000 and full.peak_bytes == 4_000_000 * (1 + 2 + 1 + 2)


def test_inference_adds_weights_cache_and_what_passes() -> None:
    model = build_tiny_llama()
    short, long = (
        estimate_inference(model, 1000, batch=2, prompt=prompt, new=5, bytes_each=4, baseline=9) for prompt in (8, 64)
    )
    assert short.peak_bytes == 9 + 1000 + short.kv_cache_bytes + short.activation_bytes
    assert short.kv_cache_bytes == kv_cache_bytes(model.config, 2, 12, 4) and long.peak_bytes > short.peak_bytes
    converted = estimate_inference(model, 500, batch=1, prompt=8, new=2, bytes_each=2, stored=1000)
    assert (short.load_peak_bytes, converted.load_peak_bytes) == (1009, 1500)


def test_only_compressed_weights_need_a_buffer() -> None:
    model = build_tiny_llama()
    assert scratch_bytes(model, False, 4) == 0
    assert scratch_bytes(model, True, 4) == 4 * 64 * 128 < 4 * SCRATCH


def test_the_process_is_measured_once_and_leaves_the_seed_alone() -> None:
    process_baseline.cache_clear()
    state = torch.get_rng_state()
    first = process_baseline()
    assert 1e8 < first < 1e11 and process_baseline() == first
    assert torch.equal(torch.get_rng_state(), state)
