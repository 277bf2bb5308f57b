"""SmoothQuant: the same function, evenly divided ranges, less error where activations are rounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from compress_peft.errors import ConfigError
from compress_peft.loading import load
from compress_peft.models.layers import linear_layers
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.models.save import save_model
from compress_peft.models.walk import BlockWalk
from compress_peft.quantization import QUANTIZERS, quantize_folder, quantize_model
from compress_peft.quantization.smoothquant import smooth_block
from pipelines.run import main
from pipelines.steps.quantize import Quantize
from tests.conftest import build_tiny_llama

CALIBRATION = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))


def with_outliers(factor: float = 40.0) -> nn.Module:
    """Some channels of the norms' outputs are much larger than the others, as in trained models."""
    model = build_tiny_llama()
    for block in model.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data[[3, 17, 40]] *= factor
    return model


def walk(model: nn.Module, needs: tuple[str, ...] = ("largest",)) -> BlockWalk:
    return BlockWalk(model, CALIBRATION, dict(linear_layers(model)), False, needs)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(CALIBRATION).logits


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_ranges_are_divided_and_the_function_stays(alpha: float) -> None:
    model = with_outliers().double()
    before, held = logits(model), {name: layer.weight.clone() for name, layer in linear_layers(model)}
    for turn in walk(model):
        assert smooth_block(turn, (), alpha) == []
    assert (logits(model) - before).abs().max() <= 1e-10 * before.abs().max()
    for turn in walk(model):
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            layers = [turn.layers[f"{turn.name}.{name}"] for name in names]
            weights = torch.stack([layer.weight.abs().amax(0) for layer in layers]).amax(0).float()
            inputs = turn.statistics[f"{turn.name}.{names[0]}"].largest
            want = {0.0: (weights, torch.ones(64)), 0.5: (weights, inputs), 1.0: (inputs, torch.ones(64))}[alpha]
            assert torch.allclose(*want, rtol=1e-3)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            assert torch.equal(turn.layers[f"{turn.name}.{name}"].weight, held[f"{turn.name}.{name}"])


def test_the_statistics_follow() -> None:
    model = with_outliers()
    needs = ("largest", "hessian", "drift")
    turn = next(iter(walk(model, needs)))
    smooth_block(turn, (), 0.5)
    again = next(iter(walk(model, needs)))
    for name, stats in again.statistics.items():
        for key in ("largest", "hessian", "drift", "square_sum", "sum"):
            found, want = getattr(turn.statistics[name], key), getattr(stats, key)
            assert torch.allclose(found, want, rtol=1e-3, atol=1e-4 * float(want.abs().max())), (name, key)


def test_shared_norms_are_left_alone() -> None:
    model = with_outliers()
    first, second = model.model.layers
    second.input_layernorm.weight = first.input_layernorm.weight
    second.post_attention_layernorm.weight = first.post_attention_layernorm.weight
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    summary = quantize_model(model, QUANTIZERS.create("rtn", group_size=32), CALIBRATION, False, smooth=0.5)
    assert torch.equal(first.input_layernorm.weight, before["model.layers.0.input_layernorm.weight"])
    assert [name for name, text in summary.notes if "not smoothed" in text] == ["model.layers.0", "model.layers.1"]


def test_less_error_where_activations_are_rounded() -> None:
    want, errors = logits(with_outliers()), {}
    for smooth in (None, 0.5):
        model = with_outliers()
        quantize_model(model, QUANTIZERS.create("llm_int8", threshold=0.0), CALIBRATION, False, smooth=smooth)
        errors[smooth] = float((logits(model) - want).norm())
    assert errors[0.5] < 0.4 * errors[None]


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_out_of_core_gives_the_same_bytes(method: str, tmp_path: Path) -> None:
    model, quantizer = with_outliers(), QUANTIZERS.create(method, group_size=32)
    save_model(model, tmp_path / "dense", byte_tokenizer())
    quantize_folder(
        tmp_path / "dense",
        tmp_path / "out",
        quantizer,
        CALIBRATION,
        smooth=0.5,
        tokenizer=byte_tokenizer(),
        progress=False,
    )
    quantize_model(model, quantizer, CALIBRATION, False, smooth=0.5)
    found = load(tmp_path / "out")[0].state_dict()
    plain = with_outliers()
    quantize_model(plain, quantizer, CALIBRATION, False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name
    assert not torch.equal(plain.model.layers[0].input_layernorm.weight, model.model.layers[0].input_layernorm.weight)


def test_calibration_is_needed() -> None:
    with pytest.raises(ConfigError, match="smooth: needs calibration text"):
        quantize_model(build_tiny_llama(), QUANTIZERS.create("rtn", group_size=32), smooth=0.5)


def test_as_a_setting_of_the_quantize_step(tmp_path: Path) -> None:
    recipe = yaml.safe_load(Path("configs/smoke/awq.yaml").read_text())
    calibration = next(step["calibration"] for step in recipe["steps"] if "calibration" in step)
    step: dict[str, Any] = {"step": "quantize", "method": "llm_int8", "smooth": {"calibration": calibration}}
    recipe["steps"], recipe["evaluate"] = [step], {"perplexity": None, "profile": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main([str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out")]) == 0
    (facts,) = [item["details"] for item in json.loads((tmp_path / "out" / "report.json").read_text())["steps"]]
    assert facts["smooth"] == 0.5
    assert facts["calibration"]["samples"] == calibration["samples"]


def test_what_a_recipe_may_say() -> None:
    def smooth(value: Any, **settings: Any) -> Any:
        return Quantize.model_validate({"step": "quantize", "method": "rtn", "smooth": value} | settings)

    assert smooth(True).smooth.alpha == 0.5 and smooth(0.75).smooth.alpha == 0.75 and smooth(0).smooth.alpha == 0
    assert smooth(False).smooth is None and smooth(None).requires_data() is None
    assert "smooth calibrates on the training split" in smooth(True).requires_data()
    assert smooth(True).decoder_only() == "" and "out_of_core" in smooth(True, out_of_core=True).decoder_only()
    assert smooth(None, out_of_core=True).decoder_only() == ""
    for value, settings, message in (
        (1.5, {}, "less than or equal to 1"),
        ({"beta": 1}, {}, "Extra inputs"),
        ({"calibration": {"samples": 4}}, {"method": "gptq"}, "give calibration beside method"),
    ):
        with pytest.raises(ValidationError, match=message):
            smooth(value, **settings)
