"""The FP4 weight: as NF4, with 4-bit floating-point numbers as grid points."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from compress_peft.errors import ModelError, Problem
from compress_peft.weights.nf4 import NF4Weight


class FP4Weight(NF4Weight):
    """Components, double quantization and kernels are those of NF4; only the 16 grid points differ."""

    kind: ClassVar[str] = "fp4"
    grid: ClassVar[str] = "fp4"

    def add_on_grid(self, delta: Tensor, dither: Tensor | None = None, keep: Tensor | None = None) -> NF4Weight:
        what = "codes of FP4 are not chosen again: its grid has two zeros, and codes that are not in order"
        raise ModelError(Problem("add_on_grid", what, "merge with another policy, or quantize with nf4"))
