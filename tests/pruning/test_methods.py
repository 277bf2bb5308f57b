"""Each pruner on one weight: its formula on hand-made layers, brute force, exact counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from compress_peft.models.walk import InputStatistics
from compress_peft.pruning import PRUNERS
from compress_peft.quantization import QUANTIZERS
from compress_peft.tensors import affine
from compress_peft.tensors.masks import Pattern
from compress_peft.tensors.sweep import weighted_error
from compress_peft.weights import AffineWeight

CALIBRATED = ("ria", "sparsegpt", "wanda")


def statistics(inputs: Tensor) -> InputStatistics:
    """inputs: (tokens, in)."""
    hessian = inputs.T @ inputs
    return InputStatistics(hessian, tokens=len(inputs))


def correlated(columns: int, tokens: int = 400, seed: int = 0) -> Tensor:
    """(tokens, columns) inputs as models have them: correlated, with very different norms."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * (0.1 + torch.rand(columns, generator=generator) ** 3)
    return torch.randn(tokens, columns, generator=generator) @ mixing


def test_wanda_on_a_hand_made_layer() -> None:
    # Norms of the inputs: 5, 1, 2, 10.
    inputs = torch.tensor([[3.0, 1.0, 0.0, 6.0], [4.0, 0.0, 2.0, 8.0]])
    weight = torch.tensor([[1.0, -4.0, 3.0, 0.1], [0.1, 0.4, -0.15, 0.02]])
    # Scores: 5 4 6 1 and 0.5 0.4 0.3 0.2: rows are compared each for itself.
    pruned, mask = PRUNERS.create("wanda").prune(weight, statistics(inputs), 0.5)
    assert torch.equal(pruned, torch.tensor([[1.0, 0, 3.0, 0], [0.1, 0.4, 0, 0]])) and torch.equal(mask, pruned != 0)
    whole, _ = PRUNERS.create("wanda", compare="layer").prune(weight, statistics(inputs), 0.5)
    assert torch.equal(whole != 0, torch.tensor([[True, True, True, True], [False] * 4]))


def test_magnitude_and_ria_on_a_hand_made_layer() -> None:
    weight = torch.tensor([[-4.0, -1.0], [2.0, 1.0]])
    assert PRUNERS.create("magnitude").prune(weight, None, 0.25)[0].tolist() == [[-4, 0], [2, 1]]
    assert PRUNERS.create("magnitude", compare="row").prune(weight, None, 0.5)[0].tolist() == [[-4, 0], [2, 0]]
    # |W| over its row's sum plus over its column's: [[4/5 + 4/6, 1/5 + 1/2], [2/3 + 2/6, 1/3 + 1/2]]; norms 1 and 9.
    ria = PRUNERS.create("ria")
    inputs = torch.diag(torch.tensor([1.0, 9.0]))
    expected = torch.tensor([[22 / 15, 7 / 10], [1.0, 5 / 6]]) * torch.tensor([1.0, 3.0])
    torch.testing.assert_close(ria.score(weight, statistics(inputs)), expected)
    assert ria.prune(weight, statistics(inputs), 0.5)[0].tolist() == [[0, -1], [0, 1]]
    dead = torch.cat([weight, torch.zeros(1, 2)])
    assert not ria.prune(dead, statistics(inputs), 1 / 3)[1][2].any()


def brute_force(weight: Tensor, hessian: Tensor, sparsity: float | Pattern, span: int) -> Tensor:
    """Optimal brain surgeon from left to right: in float64, with an inverse for each column.

    Of each span of columns, choose by the loss of removing a weight when only those right of it make up for it; then
    remove column by column and change the ones to its right as a linear system says.
    """
    weight, hessian = weight.double().clone(), hessian.double()
    columns = weight.shape[1]
    kept = torch.ones_like(weight, dtype=torch.bool)
    for j in range(columns):
        if j % span == 0:
            losses = torch.stack(
                [weight[:, k] ** 2 / torch.linalg.inv(hessian[k:, k:])[0, 0] for k in range(j, j + span)], dim=1
            )
            if isinstance(sparsity, Pattern):
                for row in range(len(weight)):
                    kept[row, j + losses[row].argsort()[: span - sparsity.n]] = False
            else:
                lowest = losses.flatten().argsort()[: round(sparsity * losses.numel())]
                block = kept[:, j : j + span].clone().flatten()
                block[lowest] = False
                kept[:, j : j + span] = block.view(losses.shape)
        for row in range(len(weight)):
            if not kept[row, j]:
                # min over d of (e, d) H (e, d)^T with e = -w_j given: H_RR d = w_j H_Rj
                if j + 1 < columns:
                    right = torch.linalg.solve(hessian[j + 1 :, j + 1 :], hessian[j + 1 :, j])
                    weight[row, j + 1 :] += weight[row, j] * right
                weight[row, j] = 0
    return weight


@pytest.mark.parametrize("sparsity", [0.5, 0.25, Pattern(2, 4), Pattern(1, 4)])
def test_sparsegpt_is_optimal_brain_surgeon(sparsity: float | Pattern) -> None:
    torch.manual_seed(1)
    weight, inputs = torch.randn(3, 8), correlated(8)
    damping = 1e-6
    pruner = PRUNERS.create("sparsegpt", damping=damping)
    pruned, mask = pruner.prune(weight, statistics(inputs), sparsity)
    hessian = (inputs.T @ inputs).double()
    hessian += damping * hessian.diagonal().mean() * torch.eye(8)
    span = 4 if isinstance(sparsity, Pattern) else 8
    expected = brute_force(weight, hessian, sparsity, span)
    assert torch.equal(mask, expected != 0)
    torch.testing.assert_close(pruned.double(), expected, rtol=2e-3, atol=2e-3)


def test_sparsegpt_over_several_blocks_of_columns() -> None:
    torch.manual_seed(2)
    weight, inputs = torch.randn(4, 96), correlated(96, 1000)
    hessian = (inputs.T @ inputs).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(96)
    for sparsity, span in ((0.5, 32), (Pattern(4, 8), 8)):
        pruned, mask = PRUNERS.create("sparsegpt", mask_block=32).prune(weight, statistics(inputs), sparsity)
        expected = brute_force(weight, damped, sparsity, span)
        assert (mask == (expected != 0)).float().mean() > 0.99
        gap = weighted_error(pruned.double() - weight, hessian) / weighted_error(expected - weight, hessian)
        assert gap == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("method", ["magnitude", *CALIBRATED])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, Pattern(2, 4), Pattern(4, 8)])
def test_counts_and_masks(method: str, sparsity: float | Pattern) -> None:
    weight, stats = torch.randn(24, 64), statistics(correlated(64))
    before = weight.clone()
    pruned, mask = PRUNERS.create(method).prune(weight, stats, sparsity)
    assert torch.equal(weight, before) and torch.equal(mask, pruned != 0) and pruned.dtype == weight.dtype
    if isinstance(sparsity, Pattern):
        assert (mask.view(-1, sparsity.m).sum(1) == sparsity.n).all()
    else:
        assert (~mask).sum() == round(24 * 64 * sparsity) or (~mask).sum(1).unique().tolist() == [round(64 * sparsity)]
    if sparsity == 0.0:
        assert torch.equal(pruned, weight)


def test_the_order_of_the_methods() -> None:
    """On correlated inputs: the Hessian beats norms, norms beat nothing."""
    weight, inputs = torch.randn(48, 96, generator=torch.Generator().manual_seed(3)), correlated(96, 2000)
    stats = statistics(inputs)

    def error(method: str, sparsity: float | Pattern) -> float:
        return weighted_error(PRUNERS.create(method).prune(weight, stats, sparsity)[0] - weight, stats.hessian)

    for sparsity in (0.5, Pattern(2, 4)):
        assert error("sparsegpt", sparsity) < 0.9 * error("wanda", sparsity) < 0.8 * error("magnitude", sparsity)


@pytest.mark.parametrize("method", ["magnitude", *CALIBRATED])
def test_pruning_again_keeps_the_zeros(method: str) -> None:
    weight, stats = torch.randn(16, 64), statistics(correlated(64))
    once, first = PRUNERS.create(method).prune(weight, stats, 0.4)
    twice, second = PRUNERS.create(method).prune(once, stats, 0.6)
    assert not (second & ~first).any() and torch.equal(second, twice != 0)


def test_zeros_stay_where_the_sweep_would_fill_them() -> None:
    weight, stats = torch.randn(16, 96), statistics(correlated(96, 1000))
    weight[:, 40:64] = 0
    for sparsity in (0.25, Pattern(3, 4)):
        pruned, mask = PRUNERS.create("sparsegpt", mask_block=32).prune(weight, stats, sparsity)
        assert (pruned[:, 40:64] == 0).all() and not mask[:, 40:64].any()
        assert (mask[:, 32:64].sum() == 16 * 8) == (sparsity == 0.25)  # there are more zeros than asked for already


def test_inputs_that_are_always_zero_cost_nothing() -> None:
    inputs = correlated(32)
    inputs[:, 8:16] = 0
    for method in ("wanda", "sparsegpt"):
        mask = PRUNERS.create(method).prune(torch.randn(8, 32), statistics(inputs), 0.25)[1]
        assert not mask[:, 8:16].any() and mask[:, :8].all() and mask[:, 16:].all()


@pytest.mark.parametrize("sparsity", [0.5, Pattern(2, 4)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_pruning_and_quantizing_in_one_sweep(sparsity: float | Pattern, symmetric: bool) -> None:
    torch.manual_seed(4)
    weight, stats = torch.randn(32, 128), statistics(correlated(128, 2000))
    settings = {"bits": 4, "group_size": 32, "symmetric": symmetric}
    joint, mask = PRUNERS.create("sparsegpt", quantize=settings).prune(weight, stats, sparsity)
    assert isinstance(joint, AffineWeight) and (joint.bits, joint.group_size) == (4, 32)
    dense = joint.dequantize()
    assert (dense[~mask] == 0).all() and (dense[mask] != 0).float().mean() > 0.85
    if isinstance(sparsity, Pattern):
        assert (mask.view(-1, 4).sum(1) == 2).all()
    # Rounding the pruned weight afterwards, without making up for it, is worse.
    pruned, _ = PRUNERS.create("sparsegpt").prune(weight, stats, sparsity)
    grid = affine.find_grid(pruned, 4, 32, symmetric)
    rounded = affine.dequantize_affine(affine.quantize_affine(pruned, *grid, 4, 32), *grid, 32)
    assert weighted_error(dense - weight, stats.hessian) < weighted_error(rounded - weight, stats.hessian)
    eight, _ = PRUNERS.create("sparsegpt", quantize=settings | {"bits": 8}).prune(weight, stats, sparsity)
    gap = weighted_error(eight.dequantize() - weight, stats.hessian) / weighted_error(pruned - weight, stats.hessian)
    assert gap == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("symmetric", [True, False])
def test_where_nothing_is_left_to_prune_the_joint_sweep_is_gptq(symmetric: bool) -> None:
    torch.manual_seed(4)
    weight, stats = torch.randn(32, 128), statistics(correlated(128, 2000))
    kept = torch.rand(32, 32, 4).argsort(dim=2).view(32, 128) < 2
    settings = {"bits": 3, "group_size": 32, "symmetric": symmetric}
    joint, mask = PRUNERS.create("sparsegpt", quantize=settings).prune(weight * kept, stats, Pattern(2, 4))
    alone = QUANTIZERS.create("gptq", **settings, act_order=None).quantize_pruned(weight * kept, kept, stats)
    assert torch.equal(mask, kept)
    assert all(torch.equal(part, alone.components()[name]) for name, part in joint.components().items())


@pytest.mark.parametrize(("pattern", "size"), [("2:4", 24), ("4:8", 96), ("16:32", 8), ("3:6", 48), ("32:64", 64)])
def test_groups_of_grids_and_patterns(pattern: str, size: int) -> None:
    n, m = map(int, pattern.split(":"))
    pruner = PRUNERS.create("sparsegpt", pattern=pattern, quantize={"group_size": size, "bits": 8})
    weight, stats = torch.randn(8, 192), statistics(correlated(192))
    assert pruner.check((8, 192)) is None
    joint, mask = pruner.prune(weight, stats, Pattern(n, m))
    assert (mask.view(-1, m).sum(1) == n).all() and (joint.dequantize()[~mask] == 0).all()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"pattern": "2:4", "sparsity": 0.6}, "a sparsity of 0.5, not 0.6"),
    ({"pattern": "4:2"}, "not a pattern n:m"),
    ({"pattern": "2:4", "allocation": "owl"}, "leave out allocation"),
    ({"sparsity": 1.0}, "less than 1"),
    ({"allocation": {"*": 1.5}}, "at least 0 and less than 1"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PRUNERS.create("wanda", **settings)


def test_settings() -> None:
    pruner = PRUNERS.create("magnitude", pattern=124)
    assert (pruner.pattern, pruner.sparsity) == ("2:4", 0.5)
    assert pruner.check((8, 6)) == "pattern 2:4 does not divide its 6 inputs"
    assert PRUNERS.create("magnitude", pattern="1:4").sparsity == 0.75
    unfit = PRUNERS.create("sparsegpt", pattern="2:4", quantize={"group_size": 64})
    assert unfit.check((8, 96)) == "quantize.group_size 64 does not divide its 96 inputs"
    assert "let one divide the other" in PRUNERS.create("sparsegpt", pattern="3:6", quantize={}).check((8, 192))
