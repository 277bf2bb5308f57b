"""The search for the ends of a grid: equal to a plain loop over groups, never dearer than the whole range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress_peft.tensors import affine, grid_search
from compress_peft.tensors.grid_search import SHARES, search_grid

COLUMNS = 48


def given() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, COLUMNS, generator=generator)
    weight[:, ::7] *= 4
    return weight, torch.rand(COLUMNS, generator=generator) ** 3


def costs(weight: Tensor, importance: Tensor, grid: tuple[Tensor, Tensor], bits: int, size: int | None) -> Tensor:
    codes = affine.quantize_affine(weight, *grid, bits, size)
    error = affine.dequantize_affine(codes, *grid, size) - weight
    return (error.square() * importance).view(*grid[0].shape, -1).sum(dim=2)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "size"), [(2, 16), (3, None), (4, 24)])
@pytest.mark.parametrize("rows_at_a_time", [3, 100])
def test_each_group_has_the_cheapest_of_all_shares(
    bits: int, size: int | None, symmetric: bool, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_search, "SLICE", rows_at_a_time * COLUMNS)
    weight, importance = given()
    scales, zeros = search_grid(weight, importance, bits, size, symmetric, torch.float16)
    assert torch.equal(scales, scales.half().float()) and torch.equal(zeros, zeros.round())
    width, chosen = size or COLUMNS, set()
    for row in range(len(weight)):
        for group in range(COLUMNS // width):
            place = slice(group * width, (group + 1) * width)
            part = weight[row : row + 1, place]
            tried = []
            for share in SHARES:
                cut = part.clamp(share * part.min(), share * part.max())
                grid = affine.find_grid(cut, bits, None, symmetric)
                tried.append((float(costs(part, importance[place], grid, bits, None)), float(grid[0]), float(grid[1])))
            best = min(tried, key=lambda found: found[0])
            chosen.add(best[1] / tried[0][1] < 0.99)
            assert (float(scales[row, group]), float(zeros[row, group])) == best[1:]
    assert chosen == {True, False} or bits == 2  # some ranges are cut, some are not


def test_the_important_columns_decide() -> None:
    weight, importance = given()
    whole = affine.find_grid(weight, 3, 16, False)
    found = search_grid(weight, importance, 3, 16, False, torch.float16)
    alike = search_grid(weight, torch.ones(COLUMNS), 3, 16, False, torch.float16)
    mine, plain, range_ = (costs(weight, importance, grid, 3, 16) for grid in (found, alike, whole))
    assert (mine <= range_).all() and mine.sum() < 0.9 * range_.sum() and mine.sum() < plain.sum()
    assert (costs(weight, torch.ones(COLUMNS), alike, 3, 16) <= costs(weight, torch.ones(COLUMNS), found, 3, 16)).all()


def test_inputs_that_never_came_leave_the_whole_range() -> None:
    weight, _ = given()
    found = search_grid(weight, torch.zeros(COLUMNS), 4, 16, True, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(found, affine.find_grid(weight, 4, 16, True), strict=True))
