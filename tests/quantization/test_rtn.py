"""Round to nearest: what is its own; the rest is in test_contract.py."""

from __future__ import annotations

import pytest
import torch

from compress_peft.errors import ModelError
from compress_peft.quantization import QUANTIZERS, quantize_model
from compress_peft.quantization import rtn as module
from tests.conftest import build_tiny_llama


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_are_quantized_on_their_own_however_many_at_a_time(symmetric, monkeypatch):
    dense = torch.randn(7, 64)
    quantizer = QUANTIZERS.create("rtn", group_size=32, symmetric=symmetric)
    whole = quantizer.quantize(dense).dequantize()
    monkeypatch.setattr(module, "AT_A_TIME", 130)
    assert torch.equal(quantizer.quantize(dense).dequantize(), whole)
    rows = [quantizer.quantize(row[None]).dequantize() for row in dense]
    assert torch.equal(torch.cat(rows), whole)


def test_codes_of_a_known_weight():
    weight = QUANTIZERS.create("rtn", bits=2, group_size=8).quantize(
        torch.tensor([[-1.0, 2.0, 0.0, 0.4, 0.6, 1.4, 1.6, -0.6]])
    )
    assert weight.scales.item() == 1 and weight.zeros.item() == 1
    assert weight.unpacked().tolist() == [[0, 3, 1, 1, 2, 2, 3, 0]]
    weight = QUANTIZERS.create("rtn", bits=2, group_size=8, symmetric=True).quantize(
        torch.tensor([[-1.5, 1.5, 0.4, -0.4, 0.6, -0.6, 0.0, 1.0]])
    )
    assert weight.scales.item() == 1 and weight.zeros is None
    assert weight.dequantize().tolist() == [[-2.0, 1.0, 0.0, 0.0, 1.0, -1.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("group_size", "columns", "sizes"),
    [
        (128, 576, "64 or 96 or 192 or 288 or null"),
        (64, 72, "24 or 8 or null"),
        (64, 100, "null"),
        (24, 64, "32 or null"),
    ],
)
def test_the_refusal_names_the_sizes_that_would_do(group_size, columns, sizes):
    reason = QUANTIZERS.create("rtn", group_size=group_size).check((4, columns))
    assert f"does not divide its {columns} inputs" in reason
    named = reason.partition("use ")[2].replace(" (per channel)", "").split(" or ")
    assert set(sizes.split(" or ")) <= set(named), reason
    for size in named[:-1]:
        assert QUANTIZERS.create("rtn", group_size=int(size)).check((4, columns)) is None


def test_all_layers_that_do_not_fit_are_named_before_any_is_changed():
    model = build_tiny_llama(hidden_size=72, intermediate_size=144)
    with pytest.raises(ModelError, match="72 inputs") as error:
        quantize_model(model, QUANTIZERS.create("rtn", group_size=64), progress=False)
    inner, wide = error.value.problems  # one for each reason
    assert "k_proj and" in inner.where.replace(",", " and") and "9 more (12 layers)" in inner.where
    assert wide.where == "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj" and "144 inputs" in wide.what
    assert quantize_model(model, QUANTIZERS.create("rtn", group_size=72), progress=False).bits_per_weight < 4.4


@pytest.mark.parametrize("settings", [{"bits": 5}, {"group_size": 0}, {"group_size": 20}, {"group_size": -8}])
def test_settings_that_no_grid_has(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        QUANTIZERS.create("rtn", **settings)
