"""The kind of method that turns a dense weight into a compressed one."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress_peft.models.walk import BlockTurn, BlockWalk
from compress_peft.registry import Method, Registry
from compress_peft.weights import CompressedWeight
from compress_peft.weights.affine import affine_spec
from compress_peft.weights.compressed import stored_bits

Bits = Literal[2, 3, 4, 8]
"""Of an affine grid."""

GroupSize = Annotated[int, Field(gt=0, multiple_of=8)] | None
"""Of an affine grid; None: one group per row."""


@dataclass(frozen=True)
class Prepared:
    """What a method did with a whole block."""

    weights: dict[str, CompressedWeight] = field(default_factory=dict)
    """By full name of the layer: those that are quantized with this already."""
    notes: tuple[tuple[str, str], ...] = ()
    """(layer, what the user should know)."""


class Quantizer(Method):
    """Settings and the algorithm on one weight. Pure: no model, no hooks, no device logic."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Statistics of the layer's inputs that `quantize` uses."""

    keeps_zeros: ClassVar[bool] = False
    """Whether a pruned layer stays pruned (`quantize_pruned`); other methods are refused after pruning."""

    rounds_activations: ClassVar[bool] = False
    """Whether a product rounds its inputs too, so that it is not that of the dequantized weight."""

    fixed_codes: ClassVar[bool] = False
    """Whether no merge can choose other codes on the grid that is there."""

    plans: ClassVar[bool] = False
    """Whether a walk over the unchanged model comes first, in which `plan` gives each layer a quantizer of its own."""

    block_copies: ClassVar[float] = 0
    """Copies of the weights of a block, float32, that are held at once beside them."""

    keeps_activations: ClassVar[bool] = False
    """Whether all activations of a block are held at once, for a backward pass or to compare them."""

    method: str

    targets: tuple[str, ...] = ("*",)
    """Patterns (as in file names) of the linear layers to quantize. Only layers inside the decoder blocks count: the
    head and the embeddings stay as they are."""

    skip: tuple[str, ...] = Field(default=())
    """Patterns of the layers to leave alone."""

    def quantize(self, weight: Tensor, stats: Any = None) -> CompressedWeight:
        """weight: (out, in), finite. The result stands for it on the same device."""
        raise NotImplementedError

    def quantize_pruned(self, weight: Tensor, mask: Tensor, stats: Any = None) -> CompressedWeight:
        """`quantize` for a pruned weight: zero, in the result too, where mask, bool (out, in), is not set.

        What rounds every weight by itself, on a grid that has zero, needs no more than this.
        """
        return self.quantize(weight, stats)

    def prepare_block(self, turn: BlockTurn, shared: Container[str]) -> Prepared:
        """For methods that look at a whole block: called before the layers of the block are quantized one by one.

        May change the dense parameters and the statistics of the block, as long as the block computes the same, but
        for parameters in `shared`: full names of those that stand at several places of the model.
        """
        return Prepared()

    def plan(self, walk: BlockWalk) -> Mapping[str, Quantizer]:
        """The quantizers of single layers, by full name; asked for only where `plans` is set. walk: has calibration,
        and the layers that are to be quantized; nothing may be changed in it."""
        return {}

    def for_model(self, model: nn.Module, each: int) -> Quantizer:
        """The same with settings that refer to the whole model worked out. each: bytes of a weight that stays."""
        return self

    def estimate_bits(self, shape: tuple[int, int]) -> float:
        """Bits per weight of a layer (out, in), all storage counted."""
        raise NotImplementedError

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why a layer (out, in) cannot be quantized with these settings; None if it can."""
        return None


QUANTIZERS: Registry[Quantizer] = Registry("quantizer", "method")


def affine_bits(
    shape: tuple[int, int],
    bits: int,
    group_size: int | None,
    symmetric: bool,
    scale_dtype: torch.dtype = torch.float16,
) -> float:
    """Bits per weight of an affine grid with integer zeros (or none, if symmetric), all storage counted."""
    zero_dtype = None if symmetric else torch.uint8
    return stored_bits(affine_spec(shape, bits, group_size, zero_dtype, scale_dtype))


def affine_problem(shape: tuple[int, int], group_size: int | None) -> str | None:
    """Why groups of this size do not fit a layer (out, in), with the sizes that do; None if they fit."""
    if not math.prod(shape):
        return "the layer has no weights"
    columns = shape[1]
    if group_size is None or columns % group_size == 0:
        return None
    fitting = [size for size in range(8, columns, 8) if columns % size == 0]
    usual = [size for size in fitting if size % 32 == 0] or fitting
    nearest = sorted(sorted(usual, key=lambda size: abs(math.log(size / group_size)))[:4])
    sizes = " or ".join([*map(str, nearest), "null (per channel)"])
    return f"group_size {group_size} does not divide its {columns} inputs; use {sizes}"
