"""Adapted tiny models, away from their initialization, so that wrong vectors change what they say."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from compress_peft.adapters import Para
from compress_peft.adapters.para_layer import ParaLayer


def perturb(model: nn.Module, seed: int = 1, size: float = 0.5) -> None:
    """Noise on everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator).to(parameter.device)


def adapted(model: nn.Module, seed: int = 1, **settings: object) -> PeftModel:
    """PARA with perturbed weights, in evaluation mode."""
    peft_model = Para(**settings).attach(model)
    perturb(peft_model, seed)
    return peft_model.eval()


def para_layers(model: nn.Module) -> list[ParaLayer]:
    return [module for module in model.modules() if isinstance(module, ParaLayer)]


def part_at(model: PeftModel, name: str, index: int = 0, adapter: str = "default") -> Any:
    """A part of a composite adapter, by the full name of its module."""
    return model.get_base_model().get_submodule(name).parts(adapter)[index]


class CountVectors:
    """Records the vectors that each block makes."""

    def __init__(self, model: nn.Module):
        self.made: list[tuple[int, Tensor]] = []
        for layer in para_layers(model):
            layer.make_vectors = self._recording(layer, layer.make_vectors)

    def _recording(self, layer: ParaLayer, original):
        def record(*args):
            vectors = original(*args)
            self.made.append((layer.index, vectors))
            return vectors

        return record

    @property
    def blocks(self) -> list[int]:
        return [index for index, _ in self.made]


def prompts(batch: int = 3, length: int = 9, seed: int = 0) -> Tensor:
    """(batch, length) token ids without special tokens."""
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(side: str, lengths: tuple[int, ...] = (4, 9, 6), seed: int = 0) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask (batch, longest), padded on one side."""
    longest = max(lengths)
    tokens, mask = prompts(len(lengths), longest, seed), torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, longest - length :] = 1
        if side == "right":
            mask[row] = mask[row].flip(0)
    return tokens * mask, mask
