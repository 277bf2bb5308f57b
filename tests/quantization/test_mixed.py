"""Mixed precision: budgets are met, the allocation is the best there is, and it pays."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from compress_peft.errors import ConfigError
from compress_peft.models.save import save_model
from compress_peft.models.walk import BlockWalk, InputStatistics
from compress_peft.quantization import quantize_folder, quantize_model
from compress_peft.quantization.apply import select_layers
from compress_peft.quantization.gptq import GPTQ
from compress_peft.quantization.mixed import STEPS, Mixed, allocate
from compress_peft.quantization.rtn import RTN
from compress_peft.weights import AffineWeight
from pipelines.plan import ModelShape
from pipelines.run import main
from pipelines.steps.quantize import Quantize
from tests.conftest import build_tiny_llama

CALIBRATION = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0))
INNER = {"method": "gptq", "group_size": 32}


def uneven_llama() -> Any:
    """Some layers have few large inputs, or outliers in their weights."""
    model = build_tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, ::9] *= 12
        model.model.layers[1].self_attn.v_proj.weight[:, ::7] *= 9
    return model


def total_size(sizes: list[list[int]], choice: Any) -> int:
    return sum(row[index] for row, index in zip(sizes, choice, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_the_allocation_is_that_of_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    costs = [[rng.random() for _ in range(3)] for _ in range(6)]
    sizes = [[rng.randrange(10, 60) for _ in range(3)] for _ in range(6)]
    least, most = (sum(pick(row) for row in sizes) for pick in (min, max))
    for limit in (least, (3 * least + most) // 4, (least + most) // 2, most):
        found = allocate(costs, sizes, limit)
        every = [c for c in itertools.product(range(3), repeat=6) if total_size(sizes, c) <= limit]
        best = min(sum(costs[i][k] for i, k in enumerate(c)) for c in every)
        assert total_size(sizes, found) <= limit
        assert sum(costs[i][k] for i, k in enumerate(found)) == pytest.approx(best, rel=1e-12)


def test_sizes_too_fine_for_the_table_never_exceed_the_budget() -> None:
    rng = random.Random(0)
    sizes = [sorted(rng.randrange(10**7, 10**8) for _ in range(3)) for _ in range(8)]
    costs = [sorted((rng.random() for _ in range(3)), reverse=True) for _ in range(8)]
    limit = sum(row[1] for row in sizes)
    assert limit - sum(row[0] for row in sizes) > 100 * STEPS
    found = allocate(costs, sizes, limit)
    for index in range(1, 3**8, 50):  # limits that one choice meets exactly, so that the least excess shows
        exact = total_size(sizes, [index // 3**item % 3 for item in range(8)]) - 1
        if exact >= sum(row[0] for row in sizes):
            assert total_size(sizes, allocate(costs, sizes, exact)) <= exact
    assert total_size(sizes, found) <= limit
    every = [c for c in itertools.product(range(3), repeat=8) if total_size(sizes, c) <= limit]
    best = min(sum(costs[i][k] for i, k in enumerate(c)) for c in every)
    assert sum(costs[i][k] for i, k in enumerate(found)) <= 1.001 * best


@pytest.mark.parametrize("budget", [2.8, 3.6, 4.4, 5.5])
def test_the_budget_is_met_and_used(budget: float) -> None:
    model = build_tiny_llama()
    summary = quantize_model(model, Mixed(budget=budget, quantizer=INNER), CALIBRATION, progress=False)
    weights = [rows * columns for rows, columns in (layer.shape for layer in summary.layers)]
    largest_step = 4 * max(weights) / sum(weights)
    assert budget - largest_step < summary.bits_per_weight <= budget
    assert set(summary.plan) == {layer.name for layer in summary.layers}
    for layer in summary.layers:
        assert layer.bits_per_weight == summary.plan[layer.name] + 0.75  # scale and zero of a group of 32
    assert len(set(summary.plan.values())) > 1


def test_the_sensitivity_walk_changes_nothing_and_falls_with_bits() -> None:
    model = uneven_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantizer = Mixed(quantizer=INNER)
    layers = dict(select_layers(model, quantizer)[0])
    errors = quantizer.sensitivities(BlockWalk(model, CALIBRATION, layers, progress=False))
    assert errors.keys() == layers.keys()
    assert all(few > many > 0 for row in errors.values() for few, many in itertools.pairwise(row))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    name = "model.layers.0.self_attn.q_proj"
    given: list[torch.Tensor] = []
    handle = layers[name].register_forward_pre_hook(lambda _, args: given.append(args[0].detach().flatten(0, 1)))
    model(CALIBRATION)
    handle.remove()
    dense = layers[name].weight.detach()
    hessian = given[0].T @ given[0]
    change = GPTQ(bits=3, group_size=32).quantize(dense, InputStatistics(hessian)).dequantize() - dense
    want = (given[0] @ change.T).square().sum() / (given[0] @ dense.T).square().sum()
    assert errors[name][1] == pytest.approx(float(want), rel=1e-4)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_better_than_one_grid_for_all_at_the_same_bits(method: str) -> None:
    inner = {"method": method, "group_size": 32}
    mixed = quantize_model(uneven_llama(), Mixed(budget=3.75, quantizer=inner), CALIBRATION, progress=False)
    uniform = quantize_model(
        uneven_llama(), Mixed(budget=3.75, candidates=[3], quantizer=inner), CALIBRATION, progress=False
    )
    assert mixed.bits_per_weight <= uniform.bits_per_weight == 3.75
    errors = [sum((layer.output_error or 0) ** 2 for layer in summary.layers) for summary in (mixed, uniform)]
    assert errors[0] < 0.9 * errors[1]


def test_a_budget_for_the_whole_model_with_a_tied_head() -> None:
    model = build_tiny_llama(tie_word_embeddings=True)
    quantizer = Mixed(budget="75 KB", quantizer=INNER)
    summary = quantize_model(model, quantizer, CALIBRATION, progress=False)
    chosen = {layer.name + ".weight" for layer in summary.layers}
    rest = sum(p.numel() * 4 for name, p in model.named_parameters() if name not in chosen)
    stored = rest + sum(layer.storage_bytes for layer in summary.layers)
    assert 0.97 * 75e3 < stored <= 75e3
    shape = ModelShape(build_tiny_llama(tie_word_embeddings=True), torch.float32, 64)
    shape.quantize(quantizer)
    assert shape.weight_bytes() == pytest.approx(75e3, abs=1)
    with pytest.raises(ConfigError, match=r"what is not quantized .* takes"):
        quantize_model(build_tiny_llama(), Mixed(budget="20 KB", quantizer=INNER), CALIBRATION, progress=False)


@pytest.mark.parametrize("budget", [2.9, 3.2, 3.6, 4.1])
def test_shared_weights_count_once(budget: float) -> None:
    model = build_tiny_llama()
    first, second = (block.mlp for block in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    summary = quantize_model(model, Mixed(budget=budget, quantizer=INNER), CALIBRATION, progress=False)
    names = [f"model.layers.{index}.mlp.up_proj" for index in (0, 1)]
    assert summary.plan[names[0]] == summary.plan[names[1]]
    assert second.up_proj.weight is first.up_proj.weight
    layers = [layer for layer in summary.layers if layer.name != names[1]]
    bits = 8 * sum(layer.storage_bytes for layer in layers) / sum(layer.shape[0] * layer.shape[1] for layer in layers)
    assert bits <= budget


def test_out_of_core_gives_the_same_model(tmp_path: Path) -> None:
    quantizer = Mixed(budget=3.6, quantizer=INNER)
    folder = save_model(build_tiny_llama(), tmp_path / "dense")
    model = build_tiny_llama()
    memory = quantize_model(model, quantizer, CALIBRATION, progress=False)
    disk = quantize_folder(folder, tmp_path / "out", quantizer, CALIBRATION, progress=False)
    assert disk.plan == memory.plan and len(set(disk.plan.values())) > 1
    assert [layer.output_error for layer in disk.layers] == [layer.output_error for layer in memory.layers]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]


def test_too_small_a_budget_is_refused_with_the_figures() -> None:
    model = build_tiny_llama()
    with pytest.raises(ConfigError, match=r"2\.600 bits per weight; 2 bits for every layer take 2\.750"):
        quantize_model(model, Mixed(budget=2.6, quantizer=INNER), CALIBRATION, progress=False)
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, torch.nn.Parameter)


def test_settings() -> None:
    assert Mixed(budget="3.6 bits").budget == 3.6 and Mixed(quantizer="rtn").quantizer == RTN()
    assert Mixed(budget="4 GB").in_bytes and not Mixed(budget=4).in_bytes
    assert Mixed(candidates=[8, 3, 3]).candidates == (3, 8)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"budget": "4 bananas"}, "expected bits per weight"),
        ({"budget": -1}, "positive"),
        ({"candidates": []}, "at least one"),
        ({"quantizer": {"method": "gptq", "bits": 4}}, "comes from the plan"),
        ({"quantizer": {"method": "gptq", "skip": ["*"]}}, "belongs beside"),
        ({"quantizer": {"method": "nf4"}}, "gptq"),
    ]
    for settings, message in wrong:
        with pytest.raises(ValidationError, match=message):
            Mixed(**settings)
    step = {"step": "quantize", "method": "mixed", "head_bits": 8}
    assert Quantize.model_validate(step | {"budget": 3.6}).head_bits == 8
    with pytest.raises(ValidationError, match="give the budget in bits"):
        Quantize.model_validate(step | {"budget": "4 GB"})


@pytest.mark.parametrize("out_of_core", [False, True])
def test_a_recipe_with_a_quantized_head(tmp_path: Path, out_of_core: bool, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = yaml.safe_load(Path("configs/smoke/mixed.yaml").read_text())
    recipe["steps"][0]["out_of_core"] = out_of_core
    recipe["evaluate"] = {"task": None, "perplexity": None, "profile": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main([str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out")]) == 0
    assert "bits per weight with scales and zeros" in capsys.readouterr().out
    folder = next((tmp_path / "out").rglob("model/config.json")).parent
    model = AutoModelForCausalLM.from_pretrained(folder)
    compressed = {n: m.weight for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), AffineWeight)}
    assert compressed.pop("lm_head").bits == 8
    bits = 8 * sum(weight.storage_bytes for weight in compressed.values())
    assert 3.3 < bits / sum(weight.numel() for weight in compressed.values()) <= 3.6
    assert len({weight.bits for weight in compressed.values()}) > 1
