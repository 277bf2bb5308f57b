"""The merge that merge-aware training has run all along."""

from __future__ import annotations

from typing import Any, Literal

from peft import PeftModel
from torch import nn

from compress_peft.errors import Problem
from compress_peft.merging.base import MERGERS, MergeContext, Merger, adapter_kind
from compress_peft.merging.layers import merge_layer, merge_problems, tuner_layers


@MERGERS.register
class MergeAware(Merger):
    """merge_aware_lora only: the codes that its forward pass used become the codes of the weight.

    Scales and zeros stay byte for byte, and the merged model is the trained one: the same kernels on the same bytes.
    """

    policy: Literal["merge_aware"] = "merge_aware"

    def refusal(self, adapter: Any, states: frozenset[str]) -> str:
        if adapter.method == "merge_aware_lora":
            return ""
        return f'"{adapter.method}" was not trained through the rounding -> use the adapter merge_aware_lora'

    def problems(self, model: PeftModel) -> list[Problem]:
        kind = adapter_kind(model)
        if kind != "MERGE_AWARE_LORA":
            what = f'"merge_aware" takes MERGE_AWARE_LORA, and {kind} was not trained through the rounding'
            return [Problem("policy", what, "train with the adapter merge_aware_lora, or use another policy")]
        return merge_problems(model, kind, self.policy)

    def _merge(self, model: PeftModel, context: MergeContext) -> nn.Module:
        for layer in tuner_layers(model).values():
            merge_layer(layer)
        return model.unload()
