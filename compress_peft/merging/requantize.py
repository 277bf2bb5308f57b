"""Adding to a compressed weight and rounding again."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from compress_peft.errors import Problem
from compress_peft.merging.base import MERGERS, MergeContext, Merger, adapter_kind
from compress_peft.merging.layers import (
    compressed_layers,
    merge_layer,
    merge_problems,
    set_weight,
    tuner_layers,
    weight_of,
)
from compress_peft.models.sparsity import kept_mask, pruned_layers
from compress_peft.weights.compressed import CompressedWeight
from compress_peft.weights.grid import GridWeight


@MERGERS.register
class Requantize(Merger):
    """Dequantize, merge in float32, and round to the grid that was there: scales and zeros stay byte for byte.

    It loses what is smaller than half a step of the grid, and of a usual LoRA that is most. The share of the update
    that is left, and the error, are in the report. With an update of zero no byte changes.
    """

    exact: ClassVar[bool] = False

    policy: Literal["requantize"] = "requantize"

    def refusal(self, adapter: Any, states: frozenset[str]) -> str:
        if "quantized" not in states:
            return 'nothing is quantized before it -> use the policy "dense"'
        return "" if "dense" in adapter.merge_policies else f'"{adapter.method}" has no weights that are equal to it'

    def problems(self, model: PeftModel) -> list[Problem]:
        problems = merge_problems(model, adapter_kind(model), self.policy)
        if not problems and not compressed_layers(model):
            problems.append(Problem("policy", "no adapted layer is compressed", 'use the policy "dense"'))
        return problems

    def _merge(self, model: PeftModel, context: MergeContext) -> nn.Module:
        pruned = pruned_layers(model)
        kept, wanted, missed = 0.0, 0.0, 0.0
        for name, layer in tuner_layers(model).items():
            old = weight_of(layer)
            if not isinstance(old, CompressedWeight):
                merge_layer(layer)
                continue
            plain, new, delta = rounded(layer, kept_mask(old) if name in pruned else None)
            change = new.dequantize(torch.float32) - old.dequantize(torch.float32)
            kept += float((change * delta).sum(dtype=torch.float64))
            wanted += float(delta.square().sum(dtype=torch.float64))
            missed += float((change - delta).square().sum(dtype=torch.float64))
            set_weight(plain, new)
        # Projected on the update: 1 if nothing is lost, 0 if nothing is left.
        context.facts["update_kept"] = kept / wanted if wanted else None
        context.facts["update_relative_error"] = (missed / wanted) ** 0.5 if wanted else None
        return model.unload()


@torch.no_grad()
def rounded(layer: Any, keep: Tensor | None) -> tuple[nn.Module, Any, Tensor]:
    """(layer under the adapters, its new weight on the old grid, the update in float32) of a compressed layer."""
    old = weight_of(layer)
    assert isinstance(old, GridWeight)
    base = old.dequantize(torch.float32)
    plain: Any = merge_layer(layer, base.clone())
    merged = plain.weight
    if isinstance(merged, CompressedWeight):
        merged = merged.dequantize(torch.float32)
    delta = merged.detach() - base
    return plain, old.add_on_grid(delta, None, keep), delta
