"""Wanda++: Wanda with gradients within a block, and a few steps that bring the pruned block's outputs back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress_peft.models.walk import BlockTurn
from compress_peft.pruning.base import PRUNERS, Pruner, Sparsity
from compress_peft.tensors.masks import select
from compress_peft.weights import CompressedWeight


@PRUNERS.register
class WandaPlusPlus(Pruner):
    """Removes, in every row, the weights with the smallest (alpha * G_ij + ||X_j||) * |W_ij|, G being gradients within
    the block; before that, in rounds, removes them for a try and trains the block to give its dense outputs.

    A sample is what the walk passes through a block at once, up to 2,048 tokens as in the paper. Both parts of the
    score are root mean squares over the samples, as in Wanda's code, so that alpha means the same for any number of
    them. Gradients and norms are those of the dense block. The paper's scores of one round use the inputs of the M
    samples alone; here those of all samples.
    """

    paper: ClassVar[str] = "Wanda++, Yang et al. 2025, arXiv 2503.04992"
    needs: ClassVar[tuple[str, ...]] = ("inputs", "norms")
    block_copies: ClassVar[float] = 6.25
    keeps_activations: ClassVar[bool] = True

    method: Literal["wanda++"] = "wanda++"

    alpha: float = Field(default=100.0, ge=0)
    """How much the regional gradient counts."""

    rounds: int = Field(default=5, ge=0)
    """Rounds of regional optimization (the paper's K); 0: the score alone."""

    round_samples: int = Field(default=32, gt=0)
    """Samples in one round (the paper's M), one step for each."""

    learning_rate: float = Field(default=3e-7, gt=0)
    """Of RMSprop in the rounds."""

    seed: int = 0
    """Decides the samples of each round."""

    def prune_block(self, turn: BlockTurn, sparsity: dict[str, Sparsity]) -> dict[str, tuple[Tensor, Tensor]]:
        """Algorithm 1, in float32: in other dtypes the rounds' small steps would be lost. There the weights that are
        kept are rounded at the end, and little remains of the rounds but their choice."""
        layers = turn.layers
        dtypes = {name: layer.weight.dtype for name, layer in layers.items()}
        with _in_float32(turn) as wide:
            gradients = regional_gradients(wide)
            norms = {name: (turn.statistics[name].square_sum / len(turn.inputs)).sqrt() for name in layers}

            def pruned(name: str) -> tuple[Tensor, Tensor]:
                """Eq. 4."""
                weight = layers[name].weight.detach()
                score = (self.alpha * gradients[name] + norms[name]) * weight.abs()
                mask = select(score, sparsity[name])
                return weight * mask, mask

            if self.rounds:
                self._optimize(wide, pruned)
            found = {name: pruned(name) for name in layers}
        return {name: (weight.to(dtypes[name]), mask) for name, (weight, mask) in found.items()}

    def _optimize(self, turn: BlockTurn, pruned: Callable[[str], tuple[Tensor, Tensor]]) -> None:
        """Regional optimization (eq. 5): in every round, prune, then one step for each of M samples.

        The steps change all weights, also those that were just removed: the next round chooses anew.
        """
        draw = random.Random(f"{self.seed} {turn.name}")
        indices = [
            draw.sample(range(len(turn.inputs)), min(self.round_samples, len(turn.inputs))) for _ in range(self.rounds)
        ]
        with torch.no_grad():
            dense = {index: turn.run(turn.inputs[index]) for index in sorted({i for chosen in indices for i in chosen})}
        weights = [layer.weight for layer in turn.layers.values()]
        with _differentiable(turn.block, weights):
            optimizer = torch.optim.RMSprop(weights, lr=self.learning_rate)
            for chosen in indices:
                for name, layer in turn.layers.items():
                    layer.weight.data.copy_(pruned(name)[0])
                for index in chosen:
                    loss = (turn.run(turn.inputs[index]) - dense[index]).square().sum()
                    for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                        weight.grad = gradient
                    optimizer.step()
            optimizer.zero_grad()


def regional_gradients(turn: BlockTurn) -> dict[str, Tensor]:
    """Eq. 3: of each weight, the root mean square over the samples of the gradient of ||f(X)||_F, with f the block.

    Float32 (out, in) by layer.
    """
    weights = [layer.weight for layer in turn.layers.values()]
    squares = [torch.zeros(weight.shape, device=weight.device) for weight in weights]
    with _differentiable(turn.block, weights):
        for states in turn.inputs:
            norm = torch.linalg.vector_norm(turn.run(states).float())
            for total, gradient in zip(squares, torch.autograd.grad(norm, weights), strict=True):
                total += gradient.float().square()
    return {name: (total / len(turn.inputs)).sqrt() for name, total in zip(turn.layers, squares, strict=True)}


@contextmanager
def _in_float32(turn: BlockTurn) -> Iterator[BlockTurn]:
    """The block with float32 copies of its weights, for as long as the context lasts."""
    parameters = [p for p in turn.block.parameters() if not isinstance(p, CompressedWeight)]
    before = [parameter.data for parameter in parameters]
    run = turn.run
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.float32, copy=True)
    try:
        yield replace(turn, run=lambda states: run(states.float()))
    finally:
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data


@contextmanager
def _differentiable(block: nn.Module, weights: list[Tensor]) -> Iterator[None]:
    """Gradients to these weights of the block alone, whatever required them before."""
    before = [(parameter, parameter.requires_grad) for parameter in block.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
