"""A quantizer on a model: which layers, what is reported, and that a refusal changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress_peft.errors import ConfigError, ModelError
from compress_peft.quantization import QUANTIZERS, quantize_model
from compress_peft.weights import CompressedWeight


def compressed(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if isinstance(p, CompressedWeight)]


def test_all_linear_layers_of_the_blocks(tiny_llama):
    before = {name: p.detach().clone() for name, p in tiny_llama.named_parameters()}
    summary = quantize_model(tiny_llama, QUANTIZERS.create("nf4"), progress=False)
    assert len(summary.layers) == 14 == len(compressed(tiny_llama))
    assert summary.left_alone == (("lm_head", "outside the decoder blocks"),)
    assert torch.equal(tiny_llama.lm_head.weight, before["lm_head.weight"])
    assert 4.1 < summary.bits_per_weight < 4.2
    stored = sum(layer.storage_bytes for layer in summary.layers)
    assert summary.bits_per_weight == 8 * stored / sum(a * b for a, b in (layer.shape for layer in summary.layers))
    name = "model.layers.1.mlp.down_proj"
    (layer,) = [layer for layer in summary.layers if layer.name == name]
    dense = before[f"{name}.weight"]
    error = tiny_llama.get_parameter(f"{name}.weight").dequantize() - dense
    assert layer.relative_error == pytest.approx(float(error.norm() / dense.norm()), rel=1e-5)
    assert 0.05 < layer.relative_error < 0.15


def test_targets_and_skip(tiny_llama):
    quantizer = QUANTIZERS.create("nf4", targets=("*.mlp.*", "*.q_proj"), skip=("*layers.1.mlp.down_proj",))
    summary = quantize_model(tiny_llama, quantizer, progress=False)
    assert len(summary.layers) == 7
    reasons = dict(summary.left_alone)
    assert reasons["model.layers.1.mlp.down_proj"] == 'skip: "*layers.1.mlp.down_proj"'
    assert reasons["model.layers.0.self_attn.k_proj"] == "matches no pattern of targets"
    assert len(summary.layers) + len(reasons) == 15


def test_patterns_that_match_nothing_are_all_named(tiny_llama):
    quantizer = QUANTIZERS.create("nf4", targets=("*.qproj",), skip=("lm_head", "*.mlp.*"))
    with pytest.raises(ModelError) as error:
        quantize_model(tiny_llama, quantizer, progress=False)
    assert [problem.where for problem in error.value.problems] == ["targets", "skip"]
    assert "never quantized" in str(error.value)
    assert not compressed(tiny_llama)


def test_unfit_layers_are_all_named_before_any_is_changed(tiny_llama):
    layers = tiny_llama.model.layers
    layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    layers[1].self_attn.q_proj.weight.data[3, 3] = float("inf")
    with pytest.raises(ModelError) as error:
        quantize_model(tiny_llama, QUANTIZERS.create("nf4"), progress=False)
    (problem,) = error.value.problems
    assert problem.where == "model.layers.0.mlp.up_proj, model.layers.1.self_attn.q_proj"
    assert not compressed(tiny_llama)


def test_twice_is_refused(tiny_llama):
    quantize_model(tiny_llama, QUANTIZERS.create("nf4"), progress=False)
    with pytest.raises(ModelError, match="compressed already"):
        quantize_model(tiny_llama, QUANTIZERS.create("nf4"), progress=False)


def test_layers_that_share_a_weight_go_on_sharing_it(tiny_llama):
    first, second = (block.mlp.up_proj for block in tiny_llama.model.layers)
    second.weight = first.weight
    quantize_model(tiny_llama, QUANTIZERS.create("nf4"), progress=False)
    assert first.weight is second.weight and isinstance(first.weight, CompressedWeight)


@pytest.mark.parametrize("settings", [{}, {"double_quant": False}, {"block_size": 128}, {"block_size": 4096}])
@pytest.mark.parametrize("shape", [(64, 64), (96, 100), (3, 5)])
def test_estimate_is_what_it_takes(shape, settings):
    quantizer = QUANTIZERS.create("nf4", **settings)
    assert quantizer.estimate_bits(shape) == quantizer.quantize(torch.randn(shape)).bits_per_weight


def test_unknown_names():
    with pytest.raises(ConfigError, match="nf4"):
        QUANTIZERS.create("nf5")
    with pytest.raises(ValueError, match="block_size"):
        QUANTIZERS.create("nf4", block_size=60)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16", "float16"])
def test_compute_dtype(compute_dtype):
    weight = QUANTIZERS.create("nf4", compute_dtype=compute_dtype).quantize(torch.randn(40, 64))
    x = torch.randn(3, 64)
    dtype = getattr(torch, compute_dtype)
    want = torch.nn.functional.linear(x.to(dtype), weight.dequantize(dtype)).float()
    assert torch.allclose(torch.nn.functional.linear(x, weight), want, atol=1e-5)
