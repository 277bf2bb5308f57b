"""Quantizing a pruned model: zeros stay zeros, or the quantizer is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress_peft.errors import ConfigError
from compress_peft.models.sparsity import layer_masks, record_pruning
from compress_peft.models.walk import InputStatistics
from compress_peft.pruning import PRUNERS, prune_model
from compress_peft.quantization import QUANTIZERS, quantize_model
from compress_peft.tensors.sweep import weighted_error
from pipelines.steps.prune import Prune
from pipelines.steps.quantize import Quantize
from tests.conftest import build_tiny_llama
from tests.pruning.test_apply import TEXT
from tests.pruning.test_methods import correlated, statistics


def small(method: str, **more: Any) -> Any:
    """The quantizer with groups that fit the tiny model."""
    fields = QUANTIZERS[method].model_fields
    settings = {"group_size": 32} if "group_size" in fields else {}
    return QUANTIZERS.create(method, **settings | {key: value for key, value in more.items() if key in fields})


@pytest.mark.parametrize("method", sorted(QUANTIZERS))
@pytest.mark.parametrize("symmetric", [False, True])
def test_zeros_stay_or_the_method_is_refused(method: str, symmetric: bool) -> None:
    model, quantizer = build_tiny_llama(), small(method, symmetric=symmetric)
    prune_model(model, PRUNERS.create("magnitude", pattern="2:4", skip=["*.k_proj"]), progress=False)
    before = layer_masks(model)
    earlier = [Prune.model_validate({"step": "prune", "method": "magnitude"})]
    step = Quantize.model_validate({"step": "quantize", "method": method})
    if not quantizer.keeps_zeros:
        assert "would fill the zeros" in step.check_against(earlier, "steps[1]")[0].what
        with pytest.raises(ConfigError, match="would fill its zeros"):
            quantize_model(model, quantizer, TEXT, progress=False)
        return
    assert step.check_against(earlier, "steps[1]") == []
    quantize_model(model, quantizer, TEXT, progress=False)
    after = layer_masks(model)
    assert len(after) == 12
    for name in before:
        assert not (after[name] & ~before[name]).any(), name
        assert (after[name] == before[name]).float().mean() > 0.9  # few kept weights are rounded to zero


@pytest.mark.parametrize("order", ["static", None])
def test_gptq_makes_up_for_errors_with_kept_weights_alone(order: str | None) -> None:
    weight, stats = torch.randn(24, 128, generator=torch.Generator().manual_seed(7)), statistics(correlated(128, 2000))
    pruned, mask = PRUNERS.create("sparsegpt").prune(weight, stats, 0.5)
    gptq, rtn = QUANTIZERS.create("gptq", group_size=32, act_order=order), QUANTIZERS.create("rtn", group_size=32)

    def error(quantized: Any) -> float:
        dense = quantized.dequantize()
        assert (dense[~mask] == 0).all()
        return weighted_error(dense - weight, stats.hessian)

    def fresh() -> InputStatistics:
        return InputStatistics(stats.hessian, tokens=stats.tokens)

    assert error(gptq.quantize_pruned(pruned, mask, fresh())) < error(rtn.quantize_pruned(pruned, mask))
    refilled = gptq.quantize(pruned, fresh()).dequantize()
    assert (refilled[~mask] != 0).float().mean() > 0.02  # what the mask is for
    everything = torch.ones_like(mask)
    same = gptq.quantize_pruned(weight, everything, fresh()).dequantize()
    assert torch.equal(same, gptq.quantize(weight, fresh()).dequantize())


def test_only_recorded_layers_are_held() -> None:
    """Zeros of a model that was not pruned are weights like others."""
    model = build_tiny_llama()
    layer = model.model.layers[0].mlp.down_proj
    layer.weight.data[:, ::2] = 0
    quantize_model(model, small("gptq", act_order=None), TEXT, progress=False)
    assert (layer.weight.dequantize()[:, ::2] != 0).any()
    pruned = build_tiny_llama()
    pruned.model.layers[0].mlp.down_proj.weight.data[:, ::2] = 0
    record_pruning(pruned, "unstructured", ["model.layers.0.mlp.down_proj"])
    quantize_model(pruned, small("gptq", act_order=None), TEXT, progress=False)
    assert (pruned.model.layers[0].mlp.down_proj.weight.dequantize()[:, ::2] == 0).all()
