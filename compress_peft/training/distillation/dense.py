"""Training of all weights of a dense model in place, with the hooks of an adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress_peft.errors import ModelError, Problem
from compress_peft.models.layers import linear_layers
from compress_peft.models.sparsity import kept_mask, pruned_layers
from compress_peft.training.hooks import TrainingHooks
from compress_peft.weights import CompressedWeight


@dataclass
class DenseTraining(TrainingHooks):
    """The weights themselves train; those that were pruned stay zero."""

    masks: dict[str, Tensor] = field(default_factory=dict)

    def attach(self, model: nn.Module) -> nn.Module:
        """The same model with a gradient for every parameter.

        Raises:
            ModelError: it is compressed.
        """
        compressed = [name for name, layer in linear_layers(model) if isinstance(layer.weight, CompressedWeight)]
        if compressed:
            what = f"codes have no gradient, and {len(compressed)} layers are compressed, such as {compressed[0]}"
            raise ModelError(Problem("adapter", what, "train an adapter instead, e.g. adapter: {method: lora}"))
        self.masks = {name: kept_mask(layer.weight) for name, layer in pruned_layers(model).items()}
        return model.requires_grad_(True)

    def parameter_counts(self, model: nn.Module) -> dict[str, int]:
        total = sum(parameter.numel() for parameter in model.parameters())
        without = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("bias"))
        return {"trainable": total, "trainable_without_bias": without, "total": total}

    @torch.no_grad()
    def after_step(self, model: Any, step: int, total_steps: int) -> None:
        for name, mask in self.masks.items():
            model.get_submodule(name).weight.mul_(mask)
