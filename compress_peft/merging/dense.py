"""Adding a weight-space adapter to dense weights."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from compress_peft.errors import Problem
from compress_peft.merging.base import MERGERS, Calibration, Merger, adapter_kind

DENSE_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@MERGERS.register
class Dense(Merger):
    """LoRA, (IA)3 and others on dense backbones: peft's own merge, exact up to the rounding of the weights' dtype."""

    kinds: ClassVar[tuple[str, ...]] = (
        *("LORA", "IA3", "BOFT", "FOURIERFT", "LN_TUNING"),
        *("LOHA", "LOKR", "OFT", "RANDLORA", "VERA"),
    )
    """What is tested here; peft's merges of other methods are not allowed by default."""

    refuses: ClassVar[dict[str, str]] = {
        "quantized": "adding to compressed weights would undo the compression, and compressing again loses the update"
    }

    policy: Literal["dense"] = "dense"

    def problems(self, model: PeftModel) -> list[Problem]:
        kind = adapter_kind(model)
        if kind not in self.kinds:
            what = f'"dense" takes {", ".join(self.kinds)}, not {kind}'
            return [Problem("policy", what, 'use the policy "bundle", which is exact for every adapter')]
        problems = []
        for name, layer in model.get_base_model().named_modules():
            if not isinstance(layer, BaseTunerLayer):
                continue
            weight = layer.get_base_layer().weight
            plain = type(weight) is nn.Parameter and type(weight.data) is torch.Tensor
            if not plain or weight.dtype not in DENSE_TYPES:
                what = f"the weight is compressed ({type(weight.data).__name__}, {weight.dtype}): adding to it would"
                what += " undo the compression, and compressing it again loses most of a small update"
                problems.append(Problem(name, what, 'use the policy "bundle", or merge before compressing'))
        return problems

    def _merge(self, model: PeftModel, calibration: Calibration | None) -> nn.Module:
        return model.merge_and_unload()
