"""What is particular to the affine weight; what all have in common is in tests/quantization/test_contract.py."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from compress_peft.errors import UserError
from compress_peft.quantization import QUANTIZERS, quantize_model
from compress_peft.tensors import affine
from compress_peft.weights import AffineWeight, CompressedWeight
from eval.storage import measure_storage
from tests.conftest import build_tiny_llama


def make(zeros: torch.Tensor | None, bits: int = 4, group_size: int | None = 32) -> tuple[torch.Tensor, AffineWeight]:
    codes = torch.randint(0, 2**bits, (6, 64), dtype=torch.uint8)
    scales = torch.rand(6, affine.group_count(64, group_size)).half().float()
    return codes, AffineWeight.from_codes(codes, scales, zeros, bits, group_size, torch.float32)


@pytest.mark.parametrize(
    "zeros",
    [None, torch.randint(0, 16, (6, 2), dtype=torch.uint8), torch.rand(6, 2) * 20 - 2],
    ids=["no", "int", "float"],
)
def test_codes_are_kept(zeros):
    codes, weight = make(zeros)
    assert torch.equal(weight.unpacked(), codes)
    stored = {None: None, torch.uint8: torch.uint8, torch.float32: torch.float16}[
        None if zeros is None else zeros.dtype
    ]
    assert (None if weight.zeros is None else weight.zeros.dtype) == stored
    used = 8 if zeros is None else weight.zeros.double()[:, :, None]
    want = (codes.double().view(6, 2, 32) - used) * weight.scales.double()[:, :, None]
    torch.testing.assert_close(weight.dequantize().double().view(6, 2, 32), want, rtol=1e-6, atol=1e-7)
    again = CompressedWeight.from_components(json.loads(json.dumps(weight.spec())), weight.components())
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_scales_that_would_change_when_stored_are_a_mistake():
    with pytest.raises(AssertionError, match="rounded"):
        AffineWeight.from_codes(
            torch.zeros(1, 8, dtype=torch.uint8), torch.full((1, 1), 0.1), None, 4, None, torch.float32
        )


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({}, 4 + 24 / 64),
        ({"symmetric": True}, 4 + 16 / 64),
        ({"symmetric": True, "scale_dtype": "float32"}, 4.5),
        ({"bits": 3}, 3 + 24 / 64),
        ({"bits": 2, "group_size": 32}, 2 + 24 / 32),
        ({"bits": 8, "group_size": None}, 8 + 24 / 576),
    ],
)
def test_bits_a_weight(settings, bits):
    weight = QUANTIZERS.create("rtn", **settings).quantize(torch.randn(4, 576))
    assert weight.bits_per_weight == pytest.approx(bits, abs=1e-12)


def test_scaled_rows_keep_their_zeros_and_get_float32_scales():
    weight = QUANTIZERS.create("rtn").quantize(torch.randn(5, 64))
    factors = torch.tensor([1.0, -2.5, 0.0, 1e-6, 3e7])
    scaled = weight.scale_rows(factors)
    torch.testing.assert_close(scaled.dequantize(), weight.dequantize() * factors[:, None], rtol=3e-7, atol=0)
    assert scaled.scales.dtype == torch.float32 and torch.equal(scaled.zeros, weight.zeros)
    twice = scaled.scale_rows(factors)
    assert twice.bits_per_weight == 4 + 40 / 64 and scaled.codes.data_ptr() != weight.codes.data_ptr()
    with pytest.raises(UserError, match=r"expected \(5,\)"):
        weight.scale_rows(torch.ones(4))


def test_damaged_parts_are_named():
    weight = QUANTIZERS.create("rtn").quantize(torch.randn(5, 64))
    parts = weight.components()
    with pytest.raises(UserError, match=r"zeros: expected uint8 \(5, 1\), got nothing"):
        CompressedWeight.from_components(weight.spec(), {k: v for k, v in parts.items() if k != "zeros"})
    with pytest.raises(UserError, match=r"codes: expected uint8 \(5, 32\)"):
        CompressedWeight.from_components(weight.spec(), parts | {"codes": parts["codes"][:4]})
    with pytest.raises(UserError, match="zeros: not a part"):
        CompressedWeight.from_components(weight.spec() | {"zero_dtype": None}, parts)
    for damage in ({"bits": 5}, {"group_size": 48}, {"group_size": 0}):
        with pytest.raises(UserError, match="no grid has"):
            CompressedWeight.from_components(weight.spec() | damage, parts)


def test_a_weight_of_another_grid_is_not_loaded():
    layers = []
    for settings in ({"bits": 4}, {"bits": 3}):
        layer = nn.Linear(64, 6)
        layer.weight = nn.Parameter(
            QUANTIZERS.create("rtn", **settings).quantize(torch.randn(6, 64)), requires_grad=False
        )
        layers.append(layer)
    with pytest.raises(RuntimeError, match="bits"):
        layers[0].load_state_dict(layers[1].state_dict())


def test_the_report_counts_codes_scales_and_zeros():
    model = build_tiny_llama()
    weights = measure_storage(model).dense_linear // 4
    quantize_model(model, QUANTIZERS.create("rtn", bits=3, group_size=32), progress=False)
    storage = measure_storage(model)
    assert storage.codes == weights * 3 // 8
    assert storage.scales == weights // 32 * 3  # two bytes of scale and one of zero
    assert storage.dense_linear == 0 and storage.bits_per_weight == 3 + 24 / 32
