"""Pruners on a model: exact counts, the walk, allocation, what is recorded and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress_peft.errors import ConfigError, ModelError
from compress_peft.models.layers import linear_layers
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.models.save import save_model
from compress_peft.models.sparsity import layer_masks, pruning_pattern
from compress_peft.models.walk import BlockWalk
from compress_peft.pruning import PRUNERS, prune_folder, prune_model
from compress_peft.pruning.owl import owl_sparsity
from compress_peft.pruning.wandapp import regional_gradients
from compress_peft.weights import AffineWeight
from compress_peft.weights.storage import split_state_dict
from tests.conftest import build_tiny_llama

METHODS = sorted(PRUNERS)
TEXT = torch.randint(3, 128, (16, 32), generator=torch.Generator().manual_seed(5))
UP = "model.layers.0.mlp.up_proj"


def prune(model: torch.nn.Module, method: str, **settings: Any) -> Any:
    return prune_model(model, PRUNERS.create(method, **settings), TEXT, progress=False)


def zeros(model: torch.nn.Module) -> dict[str, float]:
    return {name: 1 - float(mask.float().mean()) for name, mask in layer_masks(model).items()}


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"pattern": "2:4"}, {"pattern": "4:8"}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_a_model(method: str, settings: dict[str, Any]) -> None:
    model = build_tiny_llama()
    head, norm = model.lm_head.weight.clone(), model.model.norm.weight.clone()
    summary = prune(model, method, skip=["*.k_proj"], **settings)
    masks = layer_masks(model)
    assert len(masks) == 12 and [layer.name for layer in summary.layers] == list(masks)
    assert all(share == 0.5 for share in zeros(model).values()) and summary.sparsity == 0.5
    assert pruning_pattern(model) == settings.get("pattern", "unstructured")
    if "pattern" in settings:
        n, m = map(int, settings["pattern"].split(":"))
        assert all((mask.view(-1, m).sum(1) == n).all() for mask in masks.values())
    assert torch.equal(model.lm_head.weight, head) and torch.equal(model.model.norm.weight, norm)
    assert len(summary.left_alone) == 3 and (model.model.layers[0].self_attn.k_proj.weight != 0).all()
    assert all(0.01 < layer.relative_error < 1 for layer in summary.layers)
    assert all((layer.output_error is not None) == (method == "sparsegpt") for layer in summary.layers)
    assert all(parameter.requires_grad for parameter in model.parameters())


def uneven_llama() -> torch.nn.Module:
    """With inputs of very different sizes, as trained models have them."""
    model = build_tiny_llama(num_hidden_layers=3)
    for block in model.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data = torch.rand(64, generator=torch.Generator().manual_seed(6)) ** 2 * 3
    return model


def outputs_moved(method: str, **settings: Any) -> float:
    dense, model = uneven_llama(), uneven_llama()
    prune(model, method, **settings)
    with torch.no_grad():
        return float((model(TEXT).logits - dense(TEXT).logits).square().mean())


def test_better_methods_move_the_outputs_less() -> None:
    moved = {method: outputs_moved(method, sparsity=0.4) for method in METHODS}
    assert moved["sparsegpt"] < 0.8 * moved["wanda"] < 0.8 * 0.8 * moved["magnitude"], moved
    assert moved["ria"] < 0.8 * moved["magnitude"] and moved["wanda++"] < moved["magnitude"], moved


def test_later_blocks_see_the_pruned_ones() -> None:
    """The second block is pruned as if the model with the first one pruned had been given."""
    once, twice = build_tiny_llama(), build_tiny_llama()
    prune(once, "sparsegpt")
    prune(twice, "sparsegpt", targets=["model.layers.0.*"])
    prune(twice, "sparsegpt", targets=["model.layers.1.*"])
    for (name, first), second in zip(once.named_parameters(), twice.parameters(), strict=True):
        assert torch.equal(first, second), name
    assert layer_masks(once).keys() == layer_masks(twice).keys()
    other = build_tiny_llama()
    prune(other, "sparsegpt", targets=["model.layers.1.*"])
    assert not torch.equal(other.model.layers[1].mlp.up_proj.weight, once.model.layers[1].mlp.up_proj.weight)


def test_sparsity_by_layer() -> None:
    model = build_tiny_llama()
    prune(model, "wanda", sparsity=0.25, allocation={"*.mlp.*": 0.75, "*.o_proj": 0.0})
    for name, share in zeros(model).items():
        assert share == (0.75 if ".mlp." in name else 0.0 if "o_proj" in name else 0.25)
    with pytest.raises(ModelError, match=r"(?s)2 problems.*allocation\.\*\.nlp\.\*.*layers are named like"):
        prune(build_tiny_llama(), "magnitude", allocation={"*.nlp.*": 0.75, "*.gate": 0.1})


def test_owl_spares_blocks_with_outliers() -> None:
    model = build_tiny_llama(num_hidden_layers=4)
    for layer in model.model.layers[2].mlp.up_proj, model.model.layers[2].self_attn.q_proj:
        layer.weight.data[::7, ::5] *= 20
    summary = prune(model, "magnitude", sparsity=0.7, allocation="owl")
    blocks = [sum(v for k, v in zeros(model).items() if f"layers.{i}." in k) / 7 for i in range(4)]
    assert blocks[2] == pytest.approx(max(blocks) - 0.16, abs=2e-3) and min(blocks) == blocks[2]
    assert summary.sparsity == pytest.approx(0.7, abs=1e-3)
    assert summary.outliers is not None and max(summary.outliers, key=summary.outliers.get) == "model.layers.2"


def test_the_shares_of_owl() -> None:
    found = owl_sparsity([0.02, 0.10, 0.06], [1, 1, 1], 0.7, 0.08)
    assert found == pytest.approx([0.78, 0.62, 0.70])  # the authors' code: span 2 lambda, mean kept
    weighted = owl_sparsity([0.02, 0.10], [3, 1], 0.6, 0.05)
    assert weighted[0] - weighted[1] == pytest.approx(0.1) and (3 * weighted[0] + weighted[1]) / 4 == pytest.approx(0.6)
    cut = owl_sparsity([0.0, 1.0], [1, 1], 0.97, 0.08)
    assert max(cut) < 1 and sum(cut) / 2 == pytest.approx(0.97)
    assert owl_sparsity([0.5, 0.5], [1, 2], 0.3, 0.08) == [0.3, 0.3]


def test_regional_gradients_are_those_of_the_blocks_norm() -> None:
    model = build_tiny_llama().double()
    layers = {UP: model.get_submodule(UP)}
    text = torch.randint(3, 128, (128, 32), generator=torch.Generator().manual_seed(8))
    turn = next(iter(BlockWalk(model, text, layers, progress=False, needs=("norms",))))
    chunks = [states.clone() for states in turn.inputs]
    assert len(chunks) == 2
    found = regional_gradients(turn)[UP]
    assert not any(p.grad is not None for p in model.parameters()) and all(p.requires_grad for p in model.parameters())
    weight, step = layers[UP].weight, 1e-4
    with torch.no_grad():
        for place in ((0, 0), (5, 9), (100, 63)):
            slopes = []
            for states in chunks:
                norms = []
                for sign in (1, -1):
                    weight[place] += sign * step
                    norms.append(float(turn.run(states).norm()))
                    weight[place] -= sign * step
                slopes.append((norms[0] - norms[1]) / (2 * step))
            expected = (sum(slope**2 for slope in slopes) / len(slopes)) ** 0.5
            assert float(found[place]) == pytest.approx(expected, rel=1e-3)


def test_alpha_means_the_same_for_any_number_of_samples() -> None:
    text = torch.randint(3, 128, (64, 32), generator=torch.Generator().manual_seed(8))
    models = [build_tiny_llama(), build_tiny_llama()]
    for model, given in zip(models, (text, torch.cat([text, text])), strict=True):
        pruner = PRUNERS.create("wanda++", alpha=1.0, rounds=0, targets=["model.layers.0.*"])
        prune_model(model, pruner, given, progress=False)
    first, second = (layer_masks(model) for model in models)
    assert all((first[name] == second[name]).float().mean() > 0.999 for name in first)


def test_rounds_bring_the_outputs_of_a_block_back() -> None:
    moved = [
        outputs_moved("wanda++", rounds=rounds, learning_rate=1e-3, sparsity=0.4, targets=["model.layers.0.*"])
        for rounds in (0, 8)
    ]
    assert moved[1] < 0.9 * moved[0]
    without = build_tiny_llama()
    prune(without, "wanda++", alpha=0.0, rounds=0)
    plain = build_tiny_llama()
    prune(plain, "wanda")
    assert all(torch.equal(a, b) for a, b in zip(without.parameters(), plain.parameters(), strict=True))


def test_rounds_are_in_float32_whatever_the_model_is() -> None:
    """Weights of 0.1 lie 0.0005 apart in bfloat16, where a step of 3e-5 would be none."""
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for rounds in (0, 8):
            model = uneven_llama().to(dtype)
            before = dict(model.named_parameters())
            prune(model, "wanda++", rounds=rounds, learning_rate=3e-5, targets=["model.layers.0.*"], sparsity=0.4)
            assert all(before[name] is p and p.dtype == dtype for name, p in model.named_parameters())
            found.append(torch.cat([layer.weight.flatten() for _, layer in linear_layers(model)]).double())
        kept = (found[0] != 0) & (found[1] != 0)
        moved.append(float((found[1] - found[0])[kept].norm()))
    assert moved[0] > 0.1 and moved[1] == pytest.approx(moved[0], rel=0.1)


def test_pruned_and_quantized_at_once() -> None:
    model = build_tiny_llama()
    summary = prune(model, "sparsegpt", pattern="2:4", quantize={"bits": 4, "group_size": 32})
    weight = model.get_submodule(UP).weight
    assert isinstance(weight, AffineWeight) and pruning_pattern(model) == "2:4"
    assert all(share >= 0.5 for share in zeros(model).values())
    assert all(layer.bits_per_weight == weight.bits_per_weight for layer in summary.layers)
    with pytest.raises(ModelError, match=r"(?s)is compressed already.*then quantize it"):
        prune(model, "magnitude")


def test_layers_that_share_a_weight() -> None:
    for settings in ({}, {"quantize": {"group_size": 32}}):
        model = build_tiny_llama()
        first, second = (layer.mlp.up_proj for layer in model.model.layers)
        second.weight = first.weight
        summary = prune(model, "sparsegpt", **settings)
        assert second.weight is first.weight and len(summary.layers) == 14
        found = {layer.name: layer for layer in summary.layers}
        assert found["model.layers.1.mlp.up_proj"].relative_error == found[UP].relative_error


def test_pruning_further() -> None:
    model = build_tiny_llama()
    prune(model, "wanda", pattern="2:4", targets=["*.mlp.*"])
    first = layer_masks(model)
    prune(model, "sparsegpt", sparsity=0.75)
    second = layer_masks(model)
    assert len(second) == 14 and pruning_pattern(model) == "unstructured"
    assert not any((second[name] & ~first[name]).any() for name in first)
    assert second[UP].float().mean() == 0.25
    prune(model, "magnitude", pattern="1:4", targets=["*.mlp.*"])
    assert pruning_pattern(model) == "unstructured"  # not all layers have the pattern


def broken(name: str, value: Tensor) -> torch.nn.Module:
    model = build_tiny_llama()
    model.get_submodule(name).weight.data[0, 0] = value
    return model


def test_what_cannot_be_pruned_changes_nothing() -> None:
    pruner = PRUNERS.create("wanda")
    with pytest.raises(ConfigError, match=r"(?s)wanda: needs calibration text.*magnitude"):
        prune_model(build_tiny_llama(), pruner, progress=False)
    with pytest.raises(ConfigError, match="needs calibration text"):
        prune_model(build_tiny_llama(), PRUNERS.create("magnitude", allocation="owl"), progress=False)
    with pytest.raises(ModelError, match=r"up_proj: has NaN or infinite weights"):
        prune(broken(UP, torch.tensor(torch.nan)), "magnitude")
    with pytest.raises(ModelError, match=r"(?s)head.*never pruned"):
        prune(build_tiny_llama(), "magnitude", targets=["lm_head"])
    model = build_tiny_llama(hidden_size=60, num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(ModelError, match=r"(?s)problems.*pattern 4:8 does not divide its 60 inputs"):
        prune(model, "magnitude", pattern="4:8")
    assert all((parameter != 0).all() for name, parameter in model.named_parameters() if "proj" in name)


FOLDER_CASES: list[tuple[str, dict[str, Any]]] = [
    ("magnitude", {"pattern": "2:4"}),
    ("wanda", {"sparsity": 0.6, "allocation": "owl"}),
    ("sparsegpt", {"quantize": {"group_size": 32}}),
    ("wanda++", {"rounds": 2}),
]


@pytest.mark.parametrize(("method", "settings"), FOLDER_CASES)
def test_block_by_block_from_folder_to_folder(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, pruner = build_tiny_llama(vocab_size=320), PRUNERS.create(method, **settings)
    save_model(model, tmp_path / "source", byte_tokenizer())
    expected = prune_model(model, pruner, TEXT, progress=False)

    def stop(block: str) -> None:
        if block.endswith(".0"):
            raise KeyboardInterrupt

    given = (tmp_path / "source", tmp_path / "target", pruner, TEXT)
    with pytest.raises(KeyboardInterrupt):
        prune_folder(*given, progress=False, on_block=stop)
    found = prune_folder(*given, progress=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    split, other = split_state_dict(model), split_state_dict(again)
    assert split[1] == other[1] and split[0].keys() == other[0].keys()
    assert all(torch.equal(split[0][name], other[0][name]) for name in split[0])
    assert pruning_pattern(again) == pruning_pattern(model) and zeros(again) == zeros(model)
    assert found.layers == expected.layers and found.left_alone == expected.left_alone
    assert {path.name for path in tmp_path.iterdir()} == {"source", "target"}
