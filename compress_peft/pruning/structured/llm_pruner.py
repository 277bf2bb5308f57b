"""LLM-Pruner: dependency groups by a Taylor expansion of the loss."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from compress_peft.pruning.structured.anatomy import anatomy
from compress_peft.pruning.structured.base import SHRINKERS, WidthShrinker
from compress_peft.pruning.structured.plan import Plan


@SHRINKERS.register
class LLMPruner(WidthShrinker):
    """Scores a group by how much the loss on the calibration text would change without it.

    Groups are a key/value head with its query heads and their columns of o_proj, and an MLP channel. Unlike the
    paper's code every block loses the same number of groups, the first and last blocks too, so that the result needs
    nothing but its configuration.
    """

    paper: ClassVar[str] = "Ma et al. 2023, arXiv 2305.11627"
    gradients: ClassVar[bool] = True

    method: Literal["llm_pruner"] = "llm_pruner"

    order: Literal["first", "second", "mixed"] = "second"
    """first: gradient times weight; second: half the diagonal Fisher information times the square of the weight;
    mixed: the first less the second (Eq. 5). The terms with the mean gradient can choose attention
    groups that the model does not work without (`benchmarks/pruning.py` has both orders)."""

    importance: Literal["element", "vector"] = "element"
    """element: absolute values are summed over the weights (Eq. 5); vector: the absolute value of a channel's sum
    (Eq. 3)."""

    aggregation: Literal["sum", "mean", "max", "last"] = "sum"
    """How the scores of the matrices of a group become one; last: of o_proj or down_proj alone."""

    def plan(self, model: nn.Module, calibration: Tensor) -> tuple[Plan, dict[str, list[float]]]:
        sizes, blocks = self.widths(model), anatomy(model)
        weights = {id(layer): layer.weight for parts in blocks for layer in parts.layers}
        gradients, fisher = loss_gradients(model, calibration, weights, self.order != "first")

        def score(layer: nn.Linear, dim: int, count: int) -> Tensor:
            second = fisher.get(id(layer))
            return self.score(layer.weight.detach(), gradients[id(layer)], second, dim).view(count, -1).sum(1)

        groups, channels = {}, {}
        for parts in blocks:
            heads = [score(layer, 1, parts.groups) for layer in (parts.q, parts.k, parts.v)]
            groups[parts.name] = self.aggregate([*heads, score(parts.o, 0, parts.groups)])
            rows = [score(layer, 1, parts.channels) for layer in parts.readers]
            channels[parts.name] = self.aggregate([*rows, score(parts.down, 0, parts.channels)])
        return self.choose(sizes, groups, channels), {name: value.tolist() for name, value in groups.items()}

    def score(self, weight: Tensor, gradient: Tensor, fisher: Tensor | None, dim: int) -> Tensor:
        """Importance of the rows (dim 1) or columns (dim 0) of a weight (out, in). gradient, fisher: (out, in)."""
        change = torch.zeros_like(weight, dtype=torch.float32)
        if self.order != "second":
            change = change + gradient * weight
        if self.order != "first":
            assert fisher is not None
            change = change - 0.5 * fisher * weight.float() ** 2
        return change.abs().sum(dim) if self.importance == "element" else change.sum(dim).abs()

    def aggregate(self, scores: list[Tensor]) -> Tensor:
        """scores: by matrix, (groups,), that of the group's last matrix last."""
        stacked = torch.stack(scores)
        if self.aggregation == "last":
            return stacked[-1]
        return stacked.amax(0) if self.aggregation == "max" else getattr(stacked, self.aggregation)(0)


def loss_gradients(
    model: Any, calibration: Tensor, weights: dict[int, Tensor], squares: bool
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Mean over the samples of the gradients of the next-token loss, and if asked for of their squares; float32."""
    wanted = {id(p) for p in weights.values()}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    first = {key: torch.zeros_like(p, dtype=torch.float32) for key, p in weights.items()}
    second = {key: torch.zeros_like(p, dtype=torch.float32) for key, p in weights.items()} if squares else {}
    device = next(model.parameters()).device
    try:
        model.eval()
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        with torch.enable_grad():
            for sample in tqdm(calibration.to(device).split(1), desc="gradients", unit="sample"):
                loss = model(input_ids=sample, labels=sample, use_cache=False).loss
                for key, found in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                    first[key] += found.float() / len(calibration)
                    if squares:
                        second[key] += found.float() ** 2 / len(calibration)
    finally:
        model.train(training)
        for parameter, value in before:
            parameter.requires_grad_(value)
    return first, second
