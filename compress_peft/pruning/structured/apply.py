"""Plan, then cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compress_peft.errors import ModelError, Problem
from compress_peft.models.layers import decoder_layers, is_encoder_decoder
from compress_peft.models.sparsity import pruning_pattern
from compress_peft.pruning.structured.base import Shrinker
from compress_peft.pruning.structured.plan import shrink
from compress_peft.weights import CompressedWeight


@dataclass(frozen=True)
class ShrinkSummary:
    """What was done, for the report."""

    method: str
    settings: dict[str, Any]
    removed: dict[str, Any]
    """blocks, groups (key/value), channels (of the MLP), hidden: what went, as ranges of indices; by block."""
    scores: dict[str, list[float]]
    """By block: of the block itself, or of its key/value groups."""
    block_parameters: tuple[int, int]
    """In the decoder blocks, before and after."""
    sizes: dict[str, int]
    """What the configuration says now."""

    @property
    def sparsity(self) -> float:
        """Share of the parameters in the decoder blocks that went."""
        return 1 - self.block_parameters[1] / self.block_parameters[0]


def check_model(model: nn.Module) -> None:
    """Raises:
    ModelError: the model has compressed or adapted layers or two stacks, or single weights are pruned."""
    where = type(model).__name__
    if is_encoder_decoder(model):
        raise ModelError(
            Problem(where, "is an encoder-decoder, and blocks of one stack are cut", "prune single weights")
        )
    if getattr(model, "peft_config", None):
        raise ModelError(Problem(where, "has an adapter", "merge it first, or shrink before finetune"))
    if any(isinstance(parameter, CompressedWeight) for parameter in model.parameters()):
        raise ModelError(Problem(where, "is compressed already", "shrink the original model, then quantize it"))
    if pruning_pattern(model) is not None:
        what = "single weights of it are pruned, by the names of layers and columns that would not hold any more"
        raise ModelError(Problem(where, what, "shrink the original model, then prune single weights"))


def shrink_model(model: nn.Module, shrinker: Shrinker, calibration: Tensor) -> ShrinkSummary:
    """Cut the model in place. calibration: (samples, length) int64 token ids, all of them real tokens.

    Raises:
        ModelError: the model cannot be cut like this; nothing was changed.
        DataError: the calibration does not fit the model.
    """
    check_model(model)
    before = block_parameters(model)
    plan, scores = shrinker.plan(model, calibration)
    removed = plan.removed(model)
    shrink(model, plan)
    config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return ShrinkSummary(
        method=shrinker.method,
        settings=shrinker.model_dump(mode="json"),
        removed=removed,
        scores=scores,
        block_parameters=(before, block_parameters(model)),
        sizes={key: getattr(config, key) for key in keys if isinstance(getattr(config, key, None), int)},
    )


def block_parameters(model: nn.Module) -> int:
    """Parameters in the decoder blocks."""
    return sum(parameter.numel() for _, block in decoder_layers(model) for parameter in block.parameters())
