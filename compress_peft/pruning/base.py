"""The kind of method that sets weights to zero, one by one or n of every m."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from compress_peft.data.blocks import CalibrationSettings
from compress_peft.models.walk import BlockTurn, InputStatistics
from compress_peft.registry import Method, Registry
from compress_peft.tensors.masks import Pattern, parse_pattern

PATTERN_TYPES = ("string", "integer", "null")
"""What an unquoted 2:4 is depends on the reader of the YAML."""

Sparsity = float | Pattern
"""What one layer gets: the share of its weights that becomes zero, or n of every m that stay."""


class Pruner(Method):
    """Settings and the algorithm on one weight. Pure: no model, no hooks, no device logic."""

    needs: ClassVar[tuple[str, ...]] = ()
    """What the method asks of the walk (compress_peft.models.walk.NEEDS)."""

    block_copies: ClassVar[float] = 1.25
    """Copies of the weights of a block, float32, that are held at once beside them: the pruned ones and their masks,
    all of which are there before the first is replaced."""

    keeps_activations: ClassVar[bool] = False
    """Whether all activations of a block are held at once, for a backward pass or to compare them."""

    method: str

    sparsity: float = Field(default=0.5, ge=0, lt=1)
    """Share of the weights that becomes zero. With `pattern` it is 1 - n/m and can be left out."""

    pattern: str | None = Field(default=None, json_schema_extra={"anyOf": [{"type": t} for t in PATTERN_TYPES]})
    """n:m keeps n of every m consecutive weights of a row, such as 2:4 or 4:8; null: the zeros may stand anywhere."""

    allocation: Literal["uniform", "owl"] | dict[str, float] = "uniform"
    """uniform: every layer gets `sparsity`; owl: blocks with many outliers get less, the mean stays (Yin et al. 2023,
    arXiv 2310.05175; worth it past 60%); or patterns of layers and their shares, `{"*.mlp.*": 0.6}`, the first that
    matches, other layers as `sparsity` says."""

    owl_m: float = Field(default=5.0, gt=1)
    """OWL's M: a weight is an outlier if its score is more than M times the mean of its block."""

    owl_lambda: float = Field(default=0.08, ge=0, lt=0.5)
    """OWL's lambda: no block's sparsity differs from another's by more than twice this."""

    targets: tuple[str, ...] = ("*",)
    """Patterns (as in file names) of the linear layers to prune. Only layers inside the decoder blocks count."""

    skip: tuple[str, ...] = ()
    """Patterns of the layers to leave alone."""

    calibration: CalibrationSettings = CalibrationSettings()
    """The calibration text, where the method or the allocation looks at activations."""

    @model_validator(mode="before")
    @classmethod
    def _read_pattern(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("pattern") is None:
            return values
        pattern = parse_pattern(values["pattern"])
        given = values.get("sparsity", pattern.sparsity)
        if given != pattern.sparsity:
            raise ValueError(f"pattern {pattern} is a sparsity of {pattern.sparsity:g}, not {given}: give one of them")
        if values.get("allocation", "uniform") != "uniform":
            raise ValueError(f"pattern {pattern} gives every layer the same sparsity: leave out allocation")
        return values | {"pattern": str(pattern), "sparsity": pattern.sparsity}

    @model_validator(mode="after")
    def _check_shares(self) -> Pruner:
        shares = self.allocation if isinstance(self.allocation, dict) else {}
        wrong = {pattern: share for pattern, share in shares.items() if not 0 <= share < 1}
        if wrong:
            raise ValueError(f"allocation: shares must be at least 0 and less than 1, got {wrong}")
        return self

    def prune(self, weight: Tensor, stats: InputStatistics | None, sparsity: Sparsity) -> tuple[Tensor, Tensor]:
        """weight: (out, in), finite; not changed. stats: of the layer's inputs, if the method needs any.

        Returns the new weight, (out, in) on the same device, dense of the same dtype or compressed, and its mask, bool
        (out, in), True = kept: the weight is zero elsewhere. Weights that are zero before are the first to go.
        """
        raise NotImplementedError

    def prune_block(self, turn: BlockTurn, sparsity: dict[str, Sparsity]) -> dict[str, tuple[Tensor, Tensor]]:
        """`prune` for all layers of a block, by full names, for methods that look at the block as a whole."""
        return {
            name: self.prune(layer.weight.detach(), turn.statistics.get(name), sparsity[name])
            for name, layer in turn.layers.items()
        }

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why a layer (out, in) cannot be pruned with these settings; None if it can."""
        if self.pattern is not None and shape[1] % parse_pattern(self.pattern).m:
            return f"pattern {self.pattern} does not divide its {shape[1]} inputs"
        return None

    def estimate_bits(self, shape: tuple[int, int]) -> float | None:
        """Bits per weight of a layer (out, in) that comes out quantized; None where it stays dense."""
        return None

    @property
    def calibrates(self) -> bool:
        """Whether calibration text is needed: by the method, or by the allocation."""
        return bool(self.needs) or self.allocation == "owl"

    @classmethod
    def quantizes(cls, settings: dict[str, Any]) -> bool:
        """Whether the layers come out quantized too, given the settings as they stand in the YAML."""
        return False


PRUNERS: Registry[Pruner] = Registry("pruner", "method")
