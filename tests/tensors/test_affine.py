"""Affine grids: packing is the identity both ways, rounding is to the nearest, no group loses its largest weights."""

from __future__ import annotations

import pytest
import torch

from compress_peft.errors import ModelError
from compress_peft.tensors import affine


def weight(rows: int = 6, columns: int = 192, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize("bits", affine.BITS)
@pytest.mark.parametrize("columns", [1, 7, 8, 31, 32, 33, 100, 576])
def test_packing_is_bit_exact_both_ways(bits, columns):
    codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8)
    codes[0], codes[1] = 2**bits - 1, 0
    packed = affine.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (5, -(-columns * bits // 8))
    assert torch.equal(affine.unpack(packed, bits, columns), codes)
    anything = torch.randint(0, 256, (5, 3 * bits), dtype=torch.uint8)  # 24 codes fill their bytes
    assert torch.equal(affine.pack(affine.unpack(anything, bits, 24), bits), anything)


def test_the_bytes_are_those_of_the_description():
    """A file written today is read by every later version."""
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0, 7]], dtype=torch.uint8)
    assert affine.pack(codes, 3).tolist() == [[0b11010001, 0b01011000, 0b00011111, 0b00000111]]
    assert affine.pack(codes, 4).tolist() == [[0x21, 0x43, 0x65, 0x07, 0x07]]
    assert affine.pack(codes & 3, 2).tolist() == [[0b00111001, 0b00111001, 0b00000011]]
    assert affine.pack(codes, 8).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", affine.BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 32, 24])
@pytest.mark.parametrize("scale", [1.0, 1e-5, 3e-7])
def test_no_weight_is_further_than_half_a_step(bits, symmetric, group_size, scale):
    dense = weight(scale=scale)
    scales, zeros = affine.find_grid(dense, bits, group_size, symmetric)
    groups = 1 if group_size is None else 192 // group_size
    assert scales.shape == zeros.shape == (6, groups)
    assert torch.equal(scales.half().float(), scales) and torch.equal(zeros, zeros.round())
    assert zeros.min() >= 0 and zeros.max() < 2**bits
    codes = affine.quantize_affine(dense, scales, zeros, bits, group_size)
    error = affine.dequantize_affine(codes, scales, zeros, group_size) - dense
    # With the zero rounded and the scale in half precision, the ends of the range may lie a little further out.
    assert (error.view(6, groups, -1).abs().amax(2) <= scales * (0.5 + 2**bits * 2**-11)).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_are_the_nearest_of_all(symmetric):
    dense = weight(3, 64)
    grid = affine.find_grid(dense, 3, 32, symmetric)
    every = torch.stack(
        [affine.dequantize_affine(torch.full((3, 64), c, dtype=torch.uint8), *grid, 32) for c in range(8)]
    )
    best = (every - dense).abs().amin(0)
    error = (affine.dequantize_affine(affine.quantize_affine(dense, *grid, 3, 32), *grid, 32) - dense).abs()
    torch.testing.assert_close(error, best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", affine.BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_of_one_value(bits, symmetric):
    dense = torch.tensor([0.0, 0.5, -0.25, 3e-9])[:, None].expand(4, 32).contiguous()
    grid = affine.find_grid(dense, bits, None, symmetric)
    back = affine.dequantize_affine(affine.quantize_affine(dense, *grid, bits, None), *grid, None)
    assert (back[0] == 0).all() and (grid[0] > 0).all()
    # On a symmetric grid the largest positive weight may be cut by half a step.
    assert ((back - dense).abs() <= grid[0] * (0.5 * symmetric + 2**bits * 2**-11) + 3e-8).all()


def test_a_weight_on_a_grid_comes_back():
    codes = torch.randint(0, 16, (4, 96), dtype=torch.uint8)
    codes[:, ::32], codes[:, 1::32] = 0, 15
    scales = torch.rand(4, 3).add(0.5).half().float()
    zeros = torch.randint(0, 16, (4, 3)).float()
    dense = affine.dequantize_affine(codes, scales, zeros, 32)
    found = affine.find_grid(dense, 4, 32, symmetric=False)
    assert torch.equal(found[0], scales) and torch.equal(found[1], zeros)
    assert torch.equal(affine.quantize_affine(dense, *found, 4, 32), codes)


def test_scales_beyond_half_precision_are_refused():
    with pytest.raises(ModelError, match="float32"):
        affine.find_grid(weight(scale=1e7), 4, 64, False)
    scales, _ = affine.find_grid(weight(scale=1e7), 4, 64, False, torch.float32)
    assert torch.isfinite(scales).all()
