"""ShortGPT: the blocks that change the hidden states least go."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from compress_peft.errors import ModelError, Problem
from compress_peft.models.layers import decoder_layers
from compress_peft.models.walk import BlockWalk
from compress_peft.pruning.structured.base import SHRINKERS, Shrinker, best
from compress_peft.pruning.structured.plan import Plan


def block_influence(inputs: Tensor, outputs: Tensor) -> Tensor:
    """1 - cosine similarity of each hidden state before and after a block: (..., hidden) -> (...). Eq. 1."""
    return 1 - torch.cosine_similarity(inputs.double(), outputs.double(), dim=-1)


@SHRINKERS.register
class ShortGPT(Shrinker):
    """Drops the blocks with the least influence: 1 - the mean cosine similarity of their inputs and outputs."""

    paper: ClassVar[str] = "Men et al. 2024, arXiv 2403.03853"

    method: Literal["shortgpt"] = "shortgpt"

    def widths(self, model: nn.Module) -> Plan:
        count = len(decoder_layers(model))
        drop = round(self.sparsity * count)
        if not 0 < drop < count:
            what = f"sparsity {self.sparsity:g} of {count} blocks is {drop} blocks"
            raise ModelError(Problem("sparsity", what, f"give one from {1 / count:.3f} to {(count - 1) / count:.3f}"))
        return Plan(blocks=list(range(count - drop)))

    @torch.no_grad()
    def plan(self, model: nn.Module, calibration: Tensor) -> tuple[Plan, dict[str, list[float]]]:
        sizes = self.widths(model)
        assert sizes.blocks is not None
        influence = {}
        for turn in BlockWalk(model, calibration, {}, needs=("inputs",)):
            found = [block_influence(states, turn.run(states)).flatten() for states in turn.inputs]
            influence[turn.name] = float(torch.cat(found).mean())
        kept = best(torch.tensor(list(influence.values()), dtype=torch.float64), len(sizes.blocks))
        return Plan(blocks=kept), {name: [value] for name, value in influence.items()}
