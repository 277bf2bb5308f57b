"""Low-rank updates that a merge can fold into the layer's own weight: what QA-LoRA and merge-aware LoRA share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress_peft.adapters.native import WrapConfig, WrapLayer


@dataclass
class LowRankConfig(WrapConfig):
    """r: rank. lora_alpha: the update is multiplied by lora_alpha / r."""

    r: int = 8
    lora_alpha: float = 16.0


class LowRankLayer(WrapLayer):
    """A linear layer with A (r, columns) and B (out, r) for each adapter.

    A subclass names the two in `adapter_layer_names` and says what a merge puts in the weight's place.
    """

    merges_compressed = True
    """`merge` keeps a compressed weight compressed, and is exact."""

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._unmerged: nn.Parameter | None = None
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())

    def columns(self, config: Any) -> int:
        """Number of inputs that A takes."""
        raise NotImplementedError

    def merged_weight(self, names: list[str]) -> Tensor:
        """What the weight is with these adapters folded in; the weight itself is left alone."""
        raise NotImplementedError

    def update_layer(self, adapter_name: str, config: Any, tuner: Any) -> None:
        """A is uniform as LoRA's, B is zero."""
        device = self.base_layer.weight.device
        first = torch.empty(config.r, self.columns(config), dtype=torch.float32, device=device)
        nn.init.kaiming_uniform_(first, a=math.sqrt(5))
        last = torch.zeros(self.base_layer.weight.shape[0], config.r, dtype=torch.float32, device=device)
        for name, tensor in zip(self.adapter_layer_names, (first, last), strict=True):
            getattr(self, name)[adapter_name] = nn.Parameter(tensor)
        self.scaling[adapter_name] = config.lora_alpha / config.r

    def factors(self, names: list[str]) -> tuple[Tensor, Tensor]:
        """A (ranks, columns) and B (out, ranks) of several adapters side by side; B holds their scalings."""
        first, last = (getattr(self, name) for name in self.adapter_layer_names)
        if len(names) == 1:
            return first[names[0]], last[names[0]] * self.scaling[names[0]]
        return torch.cat([first[name] for name in names]), torch.cat(
            [last[name] * self.scaling[name] for name in names], dim=1
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the merged weight in place; the tensors of the one before are not written to."""
        names = self.running() if adapter_names is None else [name for name in adapter_names if self.has(name)]
        if self.merged or not names:
            return
        old = self.base_layer.weight
        with torch.no_grad():
            merged = self.merged_weight(names)
        self._unmerged = old
        self.base_layer.weight = nn.Parameter(merged, requires_grad=False)
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Brings back the very weight from before."""
        if self._unmerged is not None:
            self.base_layer.weight = self._unmerged
        self._unmerged, self.merged_adapters = None, []

    def working(self) -> list[str]:
        """Adapters that `forward` has to apply itself."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return [] if self.merged else self.running()
