from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress_peft.adapters import Lora, Para, Vera
from compress_peft.models.save import save_model
from compress_peft.quantization.apply import quantize_model
from compress_peft.quantization.nf4 import NF4
from eval.storage import folder_bytes, measure_storage
from tests.conftest import build_tiny_llama


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_counts_once(tied: bool) -> None:
    model = build_tiny_llama(tie_word_embeddings=tied)
    storage = measure_storage(model)
    assert storage.embeddings == 128 * 64 * 4 * (1 if tied else 2)
    assert storage.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (storage.codes, storage.scales, storage.adapter, storage.bits_per_weight) == (0, 0, 0, None)
    buffers = {id(buffer): buffer.numel() * 4 for buffer in model.buffers()}
    assert storage.memory_bytes == storage.parameters * 4 + sum(buffers.values())


def test_codes_and_scales_of_nf4() -> None:
    model = build_tiny_llama()
    before = measure_storage(model)
    quantize_model(model, NF4(), progress=False)
    after = measure_storage(model)
    weights = before.dense_linear // 4
    assert after.codes == weights // 2  # four bits each
    assert after.dense_linear == 0 and after.quantized_layers == 2 * 7
    assert after.parameters == before.parameters and after.embeddings == before.embeddings
    assert after.bits_per_weight == pytest.approx(8 * (after.codes + after.scales) / weights)
    assert 4.1 < after.bits_per_weight < 4.6


def test_frozen_matrices_of_an_adapter_are_its_own() -> None:
    model = build_tiny_llama()
    before = measure_storage(model)
    after = measure_storage(Vera(r=16).attach(model))
    layers = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64) + 14 * 16
    assert after.adapter_parameters == layers
    assert after.adapter == 4 * (layers + 16 * (128 + 128))  # A and B, once
    assert after.other == before.other


@pytest.mark.parametrize("method", [Para(r=4), Lora(r=4)])
def test_an_adapter_is_told_from_its_backbone(method: Para | Lora) -> None:
    model = build_tiny_llama()
    before = measure_storage(model)
    adapted = method.attach(model)
    after = measure_storage(adapted)
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert after.adapter_parameters == trainable > 0
    assert after.adapter == trainable * 4
    assert after.parameters == before.parameters and after.dense_linear == before.dense_linear


def test_half_the_bytes_in_half_precision() -> None:
    model = build_tiny_llama()
    assert measure_storage(model.to(torch.bfloat16)).embeddings == 128 * 64 * 2 * 2


def test_bytes_on_disk(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(build_tiny_llama(), folder)
    total = sum(file.stat().st_size for file in folder.iterdir())
    assert measure_storage(build_tiny_llama(), folder).disk_bytes == folder_bytes(folder) == total
    assert folder_bytes(folder / "config.json") == (folder / "config.json").stat().st_size
