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


class Straight(torch.autograd.Function):
    """What is rounded, with the gradient of what it was before."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def rounded_by_formula(weight: Tensor, found: Rounding, offset: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Equations 3 to 5, for autograd."""
    top = 7
    groups = weight.view(*high.shape[:2], -1)
    smallest, largest = (
        groups.amin(2, keepdim=True).clamp(max=0) * low,
        groups.amax(2, keepdim=True).clamp(min=0) * high,
    )
    if found.settings.symmetric:
        largest = torch.maximum(-smallest, largest)
        smallest = -largest
    scales = (largest - smallest) / top
    scales = Straight.apply(scales, affine.round_scales(scales.detach(), torch.float16))
    zeros = Straight.apply(-smallest / scales, (-smallest / scales).detach().round()).clamp(0, top)
    zeros = torch.full_like(scales, 4) if found.settings.symmetric else zeros
    codes = groups / scales + zeros + offset.view_as(groups)
    return ((Straight.apply(codes, codes.detach().round()).clamp(0, top) - zeros) * scales).view(weight.shape)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [16, None])
def test_gradients_are_autograds(symmetric: bool, size: int | None) -> None:
    """Straight through all roundings, where codes and zeros are cut, too; a group of zeros, and one of equal ends."""
    generator = torch.Generator().manual_seed(0)
    weight, upstream = (torch.randn(9, 48, generator=generator) for _ in range(2))
    weight[0], weight[1], weight[2, :16], weight[3] = weight[0].abs(), -weight[1].abs(), 0.0, weight[3].clamp(-0.5, 0.5)
    found = start(weight, autoround(symmetric=symmetric, group_size=size))
    for tensor, (least, most) in zip(found.tuned(True), ((-0.5, 0.5), (0.6, 1), (0.6, 1)), strict=True):
        tensor.uniform_(least, most, generator=generator)
    found.high[3], found.low[3] = 0.75, 0.75
    now = found.rounded()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in found.tuned(True)]
    reference = rounded_by_formula(weight, found, *leaves)
    assert torch.equal(now.weight, reference) and 0 < now.inside.float().mean() < 1
    want = torch.autograd.grad(reference, leaves, upstream)
    for got, one in zip(found.pull_back(now, upstream, clip=True), want, strict=True):
        assert torch.allclose(got, one, rtol=1e-4, atol=1e-5) and got.count_nonzero() > 3
    (alone,) = found.pull_back(now, upstream, clip=False)
    assert torch.equal(alone, found.pull_back(now, upstream, clip=True)[0])


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
        layer.weight = nn.Parameter(rounding[name].rounded().weight)
    nn.functional.mse_loss(twin_turn.run(turn.inputs[0]), wanted).backward()
    gradients = quantizer_gradients(quantizer, turn, rounding, wanted)
    for (name, layer), gradient in zip(twin_turn.layers.items(), gradients, strict=True):
        now = rounding[name].rounded()
        scales = now.grid.scales.expand_as(now.codes).reshape(layer.weight.shape)
        codes = now.codes.reshape(layer.weight.shape)
        inner = (codes > 0) & (codes < 7)
        assert torch.allclose(gradient[inner], (scales * layer.weight.grad)[inner], rtol=1e-3, atol=1e-9), name


def quantizer_gradients(quantizer: Any, turn: BlockTurn, rounding: Any, wanted: Tensor) -> list[Tensor]:
    return _Block(turn).gradients(rounding, False, [(turn.inputs[0], wanted)])[1]


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
