"""Minitron: width by the size of activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from compress_peft.errors import ModelError, Problem
from compress_peft.pruning.structured.anatomy import Parts, anatomy
from compress_peft.pruning.structured.base import SHRINKERS, WidthShrinker, best
from compress_peft.pruning.structured.plan import Plan

Aggregate = Literal["mean", "l2"]


@SHRINKERS.register
class Minitron(WidthShrinker):
    """Scores heads, MLP channels and channels of the residual stream by their activations on the calibration text.

    Heads: the norm of each head's output before o_proj, summed over a key/value group; MLP channels: the inputs of
    down_proj; residual stream: the outputs of all norms, summed over them (section 2.2). The paper searches the widths
    and distils afterwards; here `hidden_size` is given and the other widths follow from `sparsity`.
    """

    paper: ClassVar[str] = "Muralidharan et al. 2024, arXiv 2407.14679"

    method: Literal["minitron"] = "minitron"

    hidden_size: PositiveInt | None = None
    """Channels of the residual stream that stay (and with them of embeddings and head); null: all. The rest of
    `sparsity` comes from heads and MLP."""

    over_tokens: Aggregate = "mean"
    """How absolute activations of the tokens of a sample become one."""

    over_samples: Aggregate = "l2"
    """How those of the samples become one."""

    def widths(self, model: nn.Module) -> Plan:
        if self.hidden_size is None:
            return super().widths(model)
        size = model.config.get_text_config().hidden_size  # type: ignore[union-attr,operator]
        rest = 1 - (1 - self.sparsity) * size / self.hidden_size  # every matrix of a block has one side of this size
        if self.hidden_size >= size or rest < -0.005:
            what = f"{self.hidden_size} of {size} channels at a sparsity of {self.sparsity:g}"
            fix = f"give from {round((1 - self.sparsity) * size)} to {size - 1}, or change sparsity"
            raise ModelError(Problem("hidden_size", what, fix))
        hidden = list(range(self.hidden_size))
        if rest < 0.005:
            return Plan(hidden=hidden)
        sizes = self._widths(model, rest)
        return Plan(groups=sizes.groups, channels=sizes.channels, hidden=hidden)

    @torch.no_grad()
    def plan(self, model: Any, calibration: Tensor) -> tuple[Plan, dict[str, list[float]]]:
        sizes, blocks = self.widths(model), anatomy(model)
        totals: dict[str, Tensor] = {}
        handles = []

        def add(key: str, values: Tensor) -> None:
            """values: (samples, tokens, n), not negative."""
            found = self.aggregate(values.double(), self.over_tokens, 1)
            found = found.sum(0) if self.over_samples == "mean" else found.square().sum(0)
            totals[key] = totals[key] + found if key in totals else found

        def heads(parts: Parts) -> Callable[[nn.Module, tuple[Tensor]], None]:
            size = parts.k.out_features // parts.groups

            def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
                norms = inputs[0].unflatten(-1, (parts.groups, -1, size)).norm(dim=-1)
                add(f"{parts.name} heads", norms.sum(-1))

            return hook

        def channels(parts: Parts) -> Callable[[nn.Module, tuple[Tensor]], None]:
            return lambda _, inputs: add(f"{parts.name} channels", inputs[0].abs())

        def stream(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda _, inputs, output: add(f"stream {name}", output.abs())

        training, width = model.training, model.config.get_text_config().hidden_size
        for parts in blocks:
            handles += [parts.o.register_forward_pre_hook(heads(parts))]
            handles += [parts.down.register_forward_pre_hook(channels(parts))]
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if self.hidden_size is not None and isinstance(weight, Tensor) and tuple(weight.shape) == (width,):
                handles += [module.register_forward_hook(stream(name))]
        try:
            model.eval()
            for sample in calibration.to(next(model.parameters()).device).split(1):
                model(input_ids=sample, use_cache=False)
        finally:
            model.train(training)
            for handle in handles:
                handle.remove()
        groups = {parts.name: totals[f"{parts.name} heads"] for parts in blocks}
        chosen = self.choose(sizes, groups, {parts.name: totals[f"{parts.name} channels"] for parts in blocks})
        if sizes.hidden is not None:
            streams = [
                total if self.over_samples == "mean" else total.sqrt()
                for key, total in totals.items()
                if key.startswith("stream ")
            ]
            kept = best(torch.stack(streams).sum(0), len(sizes.hidden))
            chosen = Plan(groups=chosen.groups, channels=chosen.channels, hidden=kept)
        return chosen, {name: value.tolist() for name, value in groups.items()}

    @staticmethod
    def aggregate(values: Tensor, how: Aggregate, dim: int) -> Tensor:
        """The mean or the Euclidean norm over a dimension."""
        return values.mean(dim) if how == "mean" else values.norm(dim=dim)
