"""GPTAQ: equal to the closed form at every column, GPTQ without drift, closer to the unchanged model with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress_peft.models.walk import InputStatistics
from compress_peft.quantization import QUANTIZERS, quantize_model
from compress_peft.tensors import affine
from tests.conftest import build_tiny_llama


def inputs(columns: int, seed: int = 0, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """What a layer gets, and the difference of what it got before anything was quantized; (tokens, columns)."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, 6, generator=generator) @ torch.randn(6, columns, generator=generator)
    given = (common + 0.5 * torch.randn(tokens, columns, generator=generator)) * torch.linspace(1.5, 0.5, columns)
    drift = 0.1 * given @ torch.randn(columns, columns, generator=generator) / columns**0.5
    return given, drift + 0.05 * torch.randn(tokens, columns, generator=generator)


def statistics(given: Tensor, drift: Tensor | None) -> InputStatistics:
    return InputStatistics(given.T @ given, len(given), drift=None if drift is None else drift.T @ given)


def naive(weight: Tensor, given: Tensor, drift: Tensor, order: list[int], alpha: float, bits: int = 4) -> Tensor:
    """Column by column: the least-squares change of all later columns, by a solver on the inputs themselves (float64).

    The damping enters as extra rows of inputs, in which nothing drifts.
    """
    x, d, work = given.double(), drift.double(), weight.double().clone()
    columns = weight.shape[1]
    root = (0.01 * x.square().sum(0).mean()).sqrt()
    x = torch.cat([x, root * torch.eye(columns, dtype=torch.float64)])
    d = torch.cat([d, torch.zeros(columns, columns, dtype=torch.float64)])
    scale, zero = (part[:, 0].double() for part in affine.find_grid(weight, bits, None, False))
    for position, j in enumerate(order):
        later = order[position + 1 :]
        now = work[:, j].clone()
        work[:, j] = ((now / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale
        if later:
            target = torch.outer(x[:, j], now - work[:, j]) + alpha * torch.outer(d[:, j], now)
            work[:, later] += torch.linalg.lstsq(x[:, later], target).solution.T
    return work


@pytest.mark.parametrize("order", ["static", None])
@pytest.mark.parametrize("columns", [40, 160])  # within a block of the sweep, and across
def test_equals_the_closed_form(columns: int, order: str | None) -> None:
    given, drift = inputs(columns)
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(9)) * 0.1
    stats = statistics(given, drift)
    places = stats.hessian.diagonal().argsort(descending=True, stable=True).tolist() if order else list(range(columns))
    for alpha in (1.0, 0.25):
        quantizer = QUANTIZERS.create("gptaq", group_size=None, act_order=order, alpha=alpha, grid="minmax")
        found = quantizer.quantize(weight, stats).dequantize()
        want = naive(weight, given, drift, places, alpha).float()
        same = (found - want).abs().amax(dim=1) < 1e-5
        assert int(same.sum()) >= 5, same  # a tie may be rounded the other way in float32


def test_without_drift_it_is_gptq() -> None:
    given, drift = inputs(128)
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(9)) * 0.1
    want = QUANTIZERS.create("gptq").quantize(weight, statistics(given, None)).components()
    for settings, stats in (
        ({}, statistics(given, None)),
        ({}, statistics(given, 0 * drift)),
        ({"alpha": 0.0}, statistics(given, drift)),
    ):
        found = QUANTIZERS.create("gptaq", **settings).quantize(weight, stats).components()
        assert all(torch.equal(found[name], part) for name, part in want.items())


@pytest.mark.parametrize("settings", [{"bits": 4}, {"bits": 3, "symmetric": True, "act_order": None}])
def test_closer_to_the_outputs_for_the_unchanged_inputs(settings: dict[str, Any]) -> None:
    wins = 0
    for seed in range(10):
        given, drift = inputs(128, seed)
        weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(seed)) * 0.1
        wanted = (given + drift) @ weight.T
        errors = []
        for name, extra in (("gptaq", {"alpha": 1.0}), ("gptq", {})):
            found = QUANTIZERS.create(name, **settings, **extra).quantize(weight, statistics(given, drift))
            errors.append(float((given @ found.dequantize().T - wanted).norm()))
        wins += errors[0] <= errors[1]
    assert wins >= 9


def test_on_a_model() -> None:
    """The first block meets no drift and is GPTQ's; the second makes up for it, and the model's outputs come closer."""
    calibration = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(0))
    dense = build_tiny_llama()
    with torch.no_grad():
        want = dense(calibration).logits
    errors, models = {}, {}
    for name in ("gptq", "gptaq"):
        model = models[name] = build_tiny_llama()
        quantize_model(model, QUANTIZERS.create(name, bits=3, group_size=32), calibration, progress=False)
        with torch.no_grad():
            errors[name] = float((model(calibration).logits - want).norm())
    for block, same in ((0, True), (1, False)):
        key = f"model.layers.{block}.self_attn.q_proj.weight"
        one, other = (model.get_parameter(key).unpacked() for model in models.values())
        assert torch.equal(one, other) == same
    assert errors["gptaq"] < errors["gptq"]
