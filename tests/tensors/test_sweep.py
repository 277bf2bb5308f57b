"""The column sweep against brute-force optimal brain quantization, written naively in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress_peft.errors import ModelError
from compress_peft.tensors.sweep import (
    add_gram,
    fitting_block,
    inverse_factor,
    invert_triangle,
    mirror,
    sweep,
    weighted_error,
)

STEP = 0.25


def rounded(column: Tensor) -> Tensor:
    return (column / STEP).round() * STEP


def correlated(tokens: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=dtype) / columns**0.5
    return torch.randn(tokens, columns, generator=generator, dtype=dtype) @ (mixing + 0.5 * torch.eye(columns))


def brute_force(weight: Tensor, hessian: Tensor) -> Tensor:
    """Optimal brain quantization in the fixed order, one row at a time: after each column, the rest of the row moves
    by -(w_j - q_j) / [H_F^-1]_jj * [H_F^-1]_{:,j}, with the inverse of the Hessian of the columns that are left."""
    result = weight.clone()
    for row in result:
        for j in range(len(row)):
            inverse = torch.linalg.inv(hessian[j:, j:])
            error = row[j] - rounded(row[j])
            row[j:] = row[j:] - error / inverse[0, 0] * inverse[:, 0]
            row[j] = rounded(row[j])
    return result


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (8, 12), (3, 40)])
@pytest.mark.parametrize(("block", "inner"), [(1, 1), (5, 2), (6, 6), (128, 3), (128, 32)])
def test_equals_brute_force(rows: int, columns: int, block: int, inner: int) -> None:
    inputs = correlated(100, columns)
    hessian = inputs.T @ inputs
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = weight.clone()
    factor, notes = inverse_factor(hessian, damping=0.01)
    found = sweep(weight, factor, lambda _, current: rounded(current[:, :1]), block, inner)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    want = brute_force(weight, damped)
    assert torch.allclose(found, want, atol=1e-9) and not notes
    assert torch.equal(weight, before) and not torch.equal(want, rounded(weight))


def test_current_shows_the_updated_weights() -> None:
    """At every column of the first block, the columns of that block are those of brute force up to there."""
    inputs = correlated(100, 8)
    hessian = inputs.T @ inputs
    factor, _ = inverse_factor(hessian, damping=1e-9)
    weight = torch.randn(2, 8, dtype=torch.float64)
    seen = []

    def compress(index: int, current: Tensor) -> Tensor:
        assert current.shape == (2, 8 - index)
        seen.append(current.clone())
        return rounded(current[:, :1])

    sweep(weight, factor, compress)
    inverse = torch.linalg.inv(hessian)
    error = weight[:, :1] - rounded(weight[:, :1])
    assert torch.allclose(seen[1], (weight - error * inverse[0] / inverse[0, 0])[:, 1:], atol=1e-6)


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    inputs = correlated(50, 24)
    hessian = inputs.T @ inputs
    before = hessian.clone()
    factor, _ = inverse_factor(hessian, damping=0.1)
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    assert torch.equal(hessian, before) and torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-9, atol=1e-12)


def test_dead_columns_are_rounded_and_change_nothing_else() -> None:
    inputs = correlated(50, 10)
    inputs[:, [2, 7]] = 0
    hessian = inputs.T @ inputs
    weight = torch.randn(5, 10, dtype=torch.float64)
    factor, notes = inverse_factor(hessian, damping=0.5)
    assert "2 of 10 input columns" in notes[0]
    found = sweep(weight, factor, lambda _, current: rounded(current[:, :1]))
    assert torch.equal(found[:, [2, 7]], rounded(weight[:, [2, 7]]))
    live = [j for j in range(10) if j not in (2, 7)]
    part, _ = inverse_factor(hessian[live][:, live], damping=0.5)
    assert torch.allclose(factor[live][:, live], part)
    alone = sweep(weight[:, live], part, lambda _, current: rounded(current[:, :1]))
    assert torch.allclose(found[:, live], alone)
    nothing, _ = inverse_factor(torch.zeros(4, 4))
    assert torch.equal(nothing, torch.eye(4))


def test_more_damping_where_the_hessian_is_not_positive_definite() -> None:
    inputs = correlated(200, 6)
    hessian = inputs.T @ inputs
    values, vectors = torch.linalg.eigh(hessian)
    values[0] = -0.05 * hessian.diagonal().mean()
    broken = (vectors * values) @ vectors.T
    factor, notes = inverse_factor(broken, damping=0.01)
    assert notes == ["Hessian not positive definite: damping raised from 0.01 to 0.1"]
    damped = broken + 0.1 * broken.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    assert torch.allclose(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-6)


def test_what_no_damping_can_repair() -> None:
    with pytest.raises(ModelError, match="NaN"):
        inverse_factor(torch.full((3, 3), torch.nan))
    hopeless = torch.eye(3)
    hopeless[0, 1] = hopeless[1, 0] = 1e30
    with pytest.raises(ModelError, match="not positive definite"):
        inverse_factor(hopeless)


def test_blocks_start_where_groups_do() -> None:
    for size in (8, 32, 40, 64, 72, 96, 128, 144, 192, 256, 576, 11008):
        outer, inner = (fitting_block(size, limit) for limit in (128, 32))
        assert outer <= 128 and inner <= 32 and min(outer, inner) >= 8
        for start in range(0, 4 * size, size):
            assert start % outer % inner == 0 or start % outer % inner + size <= inner
            assert start % outer + size <= outer or start % outer == 0


@pytest.mark.parametrize(("columns", "block"), [(7, 3), (64, 256), (300, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_in_pieces(columns: int, block: int, dtype: torch.dtype) -> None:
    hessian = torch.zeros(columns, columns)
    pieces = [torch.randn(20, columns).to(dtype) for _ in range(3)]
    for piece in pieces:
        add_gram(hessian, piece, block)
    mirror(hessian)
    inputs = torch.cat(pieces).double()
    assert torch.allclose(hessian.double(), inputs.T @ inputs, atol=1e-4)
    assert torch.equal(hessian, hessian.T)


def test_weighted_error_is_the_change_of_the_outputs() -> None:
    inputs, error = correlated(30, 8), torch.randn(5, 8, dtype=torch.float64)
    outputs = inputs @ error.T
    assert weighted_error(error, inputs.T @ inputs) == pytest.approx(float((outputs**2).sum()))


@pytest.mark.parametrize("block", [1, 4, 5, 12, 13, 100])
def test_weighted_error_by_blocks(block: int) -> None:
    inputs, error = correlated(30, 13), torch.randn(5, 13, dtype=torch.float64)
    hessian = inputs.T @ inputs
    assert weighted_error(error, hessian, block) == pytest.approx(float((error @ hessian * error).sum()), rel=1e-12)


@pytest.mark.parametrize(("columns", "leaf"), [(1, 4), (4, 4), (5, 4), (8, 4), (9, 4), (31, 4), (33, 8), (600, 256)])
def test_the_inverse_of_a_triangle(columns: int, leaf: int) -> None:
    upper = torch.linalg.cholesky(
        torch.eye(columns) + (lambda x: x.T @ x)(correlated(columns, columns))
    ).mT.contiguous()
    inverse = upper.clone()
    invert_triangle(inverse, leaf)
    assert torch.equal(inverse, inverse.triu())
    torch.testing.assert_close(inverse @ upper, torch.eye(columns, dtype=torch.float64), rtol=0, atol=1e-10)
