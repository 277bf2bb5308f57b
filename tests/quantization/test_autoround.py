"""AutoRound: starts as round to nearest, follows the sign of the true gradient, keeps the best, leaves no traces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress_peft.models.layers import linear_layers
from compress_peft.models.walk import BlockTurn, BlockWalk
from compress_peft.quantization import QUANTIZERS, quantize_model
from compress_peft.quantization.autoround import Rounding, _Block
from compress_peft.tensors import affine
from compress_peft.tensors.grid_search import search_grid
from compress_peft.weights import AffineWeight
from tests.conftest import build_tiny_llama

CALIBRATION = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))


def autoround(**settings: Any) -> Any:
    return QUANTIZERS.create("autoround", **{"bits": 3, "group_size": 32, "grid": "minmax"} | settings)


def start(weight: Tensor, quantizer: Any) -> Rounding:
    return Rounding.start(weight, quantizer, torch.ones(weight.shape[1]))


def quantized(quantizer: Any) -> tuple[nn.Module, Any]:
    model = build_tiny_llama()
    return model, quantize_model(model, quantizer, CALIBRATION, progress=False)


def codes(model: nn.Module) -> Tensor:
    return torch.cat([layer.weight.unpacked().flatten() for _, layer in linear_layers(model)])


def first_turn(model: nn.Module) -> BlockTurn:
    return next(iter(BlockWalk(model, CALIBRATION, dict(linear_layers(model)), False, ("inputs", "targets"))))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [32, None])
def test_no_steps_is_rounding_to_nearest(symmetric: bool, size: int | None) -> None:
    settings = {"bits": 3, "group_size": size, "symmetric": symmetric}
    found, _ = quantized(autoround(**settings, iters=0))
    plain = build_tiny_llama()
    quantize_model(plain, QUANTIZERS.create("rtn", **settings), progress=False)
    assert torch.equal(codes(found), codes(plain))
    for (_, one), (_, other) in zip(linear_layers(found), linear_layers(plain), strict=True):
        assert torch.equal(one.weight.dequantize(), other.weight.dequantize())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [32, None])
def test_ranges_start_where_rounding_costs_least(symmetric: bool, size: int | None) -> None:
    """Without a step, the codes of rounding to nearest on the searched grid of the layer's own inputs."""
    quantizer = autoround(iters=0, grid="weighted", group_size=size, symmetric=symmetric)
    model = build_tiny_llama()
    layers = dict(linear_layers(model))
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    first = next(iter(BlockWalk(model, CALIBRATION, layers, False, quantizer.needs)))
    found, _ = quantized(quantizer)
    narrower = 0
    for name, layer in linear_layers(found):
        if name not in first.layers:  # inputs of later blocks come from quantized ones
            continue
        inputs = first.statistics[name].square_sum
        grid = search_grid(before[name], inputs, 3, size, symmetric, torch.float16)
        assert torch.equal(layer.weight.unpacked(), affine.quantize_affine(before[name], *grid, 3, size)), name
        narrower += int((grid[0] < affine.find_grid(before[name], 3, size, symmetric)[0]).sum())
    assert narrower


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_pass_the_roundings(symmetric: bool) -> None:
    """Of the sum of G * rounded: scale * G by V where no code is clamped; by the range as derived by hand."""
    generator = torch.Generator().manual_seed(0)
    weight, upstream = (torch.randn(4, 32, generator=generator) for _ in range(2))
    settings = autoround(symmetric=symmetric, scale_dtype="float32")
    found = start(weight, settings)
    tuned = [tensor.requires_grad_() for tensor in found.tuned(clip=True)]
    (found.rounded() * upstream).sum().backward()
    with torch.no_grad():
        raw, scales, zeros = found.grid()
    inner = ((weight / scales[..., 0] + zeros[..., 0]).round() >= 0) & (
        (weight / scales[..., 0] + zeros[..., 0]).round() <= 7
    )
    assert torch.allclose(tuned[0].grad, torch.where(inner, scales[..., 0] * upstream, 0.0), atol=1e-6)
    # d rounded / d scale = code - zero - w / scale for inner codes (the zero follows its own, opposite way).
    if symmetric:
        slope = torch.where(inner, raw.view(4, 32) - 4 - weight / scales[..., 0], raw.view(4, 32) - 4)
        per_alpha = 2 * weight.abs().amax(1) / 7
        largest_high = weight.amax(1) >= -weight.amin(1)
        want = (slope * upstream).sum(1) * per_alpha
        got = torch.where(largest_high, tuned[1].grad[:, 0, 0], tuned[2].grad[:, 0, 0])
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    assert all(tensor.grad.abs().sum() > 0 for tensor in tuned)


def test_gradients_are_those_of_the_block_with_the_rounded_weights() -> None:
    model = build_tiny_llama()
    turn = first_turn(model)
    quantizer = autoround(iters=1, lr=1e-3, clip=False)
    rounding = {name: start(layer.weight, quantizer) for name, layer in turn.layers.items()}
    with torch.no_grad():
        wanted = turn.run(turn.inputs[0])
    twin = build_tiny_llama()
    twin_turn = first_turn(twin)
    for name, layer in twin_turn.layers.items():
        layer.weight = nn.Parameter(rounding[name].rounded().detach())
    nn.functional.mse_loss(twin_turn.run(turn.inputs[0]), wanted).backward()
    gradients = quantizer_gradients(quantizer, turn, rounding, wanted)
    for (name, layer), gradient in zip(twin_turn.layers.items(), gradients, strict=True):
        scales = rounding[name].grid()[1].expand(-1, -1, 32).reshape(layer.weight.shape)
        codes = rounding[name].grid()[0].reshape(layer.weight.shape)
        inner = (codes > 0) & (codes < 7)
        assert torch.allclose(gradient[inner], (scales * layer.weight.grad)[inner], rtol=1e-3, atol=1e-9), name


def quantizer_gradients(quantizer: Any, turn: BlockTurn, rounding: Any, wanted: Tensor) -> list[Tensor]:
    tuned = [found.offset for found in rounding.values()]
    return _Block(turn).gradients(rounding, tuned, [(turn.inputs[0], wanted)])[1]


def test_less_error_the_same_every_time_and_no_traces() -> None:
    with torch.no_grad():
        want = build_tiny_llama()(CALIBRATION).logits
    errors, found = [], []
    for quantizer in (autoround(iters=0), autoround(iters=20), autoround(iters=20), autoround(iters=20, seed=1)):
        model, summary = quantized(quantizer)
        found.append(codes(model))
        with torch.no_grad():
            errors.append(float((model(CALIBRATION).logits - want).norm()))
        for name, parameter in model.named_parameters():
            assert parameter.grad is None and isinstance(parameter, AffineWeight) == ("_proj" in name), name
        assert [name for name, _ in summary.notes] == ["model.layers.0", "model.layers.1"]
    assert errors[1] < 0.9 * errors[0] and errors[1] == errors[2]
    assert torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])
    # One chunk holds all samples here, so the order of the samples makes no difference.
    assert torch.equal(found[1], found[3])


def test_the_best_step_is_kept() -> None:
    """Steps far too large end nowhere good; what is kept is never worse than rounding to nearest."""
    turn = first_turn(build_tiny_llama())
    for lr, most in ((1.0, 1.0), (0.02, 0.8)):
        quantizer = autoround(iters=8, lr=lr)
        rounding = {name: start(layer.weight, quantizer) for name, layer in turn.layers.items()}
        assert quantizer.train(turn, rounding) <= most
        assert all(found.offset.abs().max() <= 0.5 and found.high.max() <= 1 for found in rounding.values())


def test_a_block_makes_up_for_those_before() -> None:
    """It comes closer to the unchanged model than one that aims at its own outputs for the changed inputs."""
    model = build_tiny_llama()
    quantizer = autoround(iters=40)
    turns = iter(BlockWalk(model, CALIBRATION, dict(linear_layers(model)), False, ("inputs", "targets")))
    for layer in next(turns).layers.values():
        layer.weight = nn.Parameter(QUANTIZERS.create("rtn", bits=2, group_size=32).quantize(layer.weight).dequantize())
    turn = next(turns)
    with torch.no_grad():
        local = [turn.run(states) for states in turn.inputs]
    distances = []
    for targets in (turn.targets, local):
        aimed = replace(turn, targets=targets)
        rounding = {name: start(layer.weight, quantizer) for name, layer in turn.layers.items()}
        quantizer.train(aimed, rounding)
        with torch.no_grad():
            distances.append(sum(_Block(turn).losses(rounding, turn.inputs, list(turn.targets))))
    assert distances[0] < 0.97 * distances[1]


def test_presets() -> None:
    assert autoround().schedule == (200, 1 / 200)
    assert autoround(preset="light").schedule == (50, 5e-3)
    assert autoround(iters=100).schedule == (100, 1 / 100) and autoround(iters=100, lr=0.1).schedule == (100, 0.1)


def test_layers_that_share_a_weight_go_on_sharing_it(tiny_llama) -> None:
    first, second = (block.mlp.up_proj for block in tiny_llama.model.layers)
    second.weight = first.weight
    quantize_model(tiny_llama, autoround(iters=2), CALIBRATION, progress=False)
    assert first.weight is second.weight and isinstance(first.weight, AffineWeight)
