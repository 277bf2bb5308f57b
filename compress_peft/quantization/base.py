"""The kind of method that turns a dense weight into a compressed one."""

from __future__ import annotations

import fnmatch
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from compress_peft.registry import Method, Registry
from compress_peft.weights import CompressedWeight


class Quantizer(Method):
    """Settings and the algorithm on one weight. Pure: no model, no hooks, no device logic."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Statistics of the layer's inputs that `quantize` uses."""

    method: str

    targets: tuple[str, ...] = ("*",)
    """Patterns (as in file names) of the linear layers to quantize. Only layers inside the decoder blocks count: the
    head and the embeddings stay as they are."""

    skip: tuple[str, ...] = Field(default=())
    """Patterns of the layers to leave alone."""

    def quantize(self, weight: Tensor, stats: Any = None) -> CompressedWeight:
        """weight: (out, in), finite. The result stands for it on the same device."""
        raise NotImplementedError

    def estimate_bits(self, shape: tuple[int, int]) -> float:
        """Bits per weight of a layer (out, in), all storage counted."""
        raise NotImplementedError

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why a layer (out, in) cannot be quantized with these settings; None if it can."""
        return None

    def selects(self, name: str) -> bool:
        """Whether a layer of this name is to be quantized."""
        return not self.skipped_by(name) and any(fnmatch.fnmatchcase(name, pattern) for pattern in self.targets)

    def skipped_by(self, name: str) -> str | None:
        """The pattern that excludes the layer, if one does."""
        return next((pattern for pattern in self.skip if fnmatch.fnmatchcase(name, pattern)), None)


QUANTIZERS: Registry[Quantizer] = Registry("quantizer", "method")
