"""Hidden states of the student, through learned projections, against those of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from compress_peft.training.distillation.base import LOSSES, Comparison, DistillationLoss
from compress_peft.training.distillation.outputs import bare, block_count


@LOSSES.register
class HiddenStates(DistillationLoss):
    """Mean squared distance of block outputs, averaged over the pairs of blocks.

    At the positions that predict a target, of which the paper takes all. The projections start as the identity where
    the sizes agree, and train together with the student.
    """

    paper: ClassVar[str] = "Jiao et al. 2020, TinyBERT, arXiv 1909.10351, eq. 8"
    needs: ClassVar[str] = "activations"

    method: Literal["hidden_states"] = "hidden_states"
    layers: dict[int, int] | None = None
    """Student block -> teacher block, counted from 0; default: every block to the one at the same relative depth."""
    projection: bool = True
    """false compares the states as they are; their sizes must agree then."""

    def pairs(self, blocks: tuple[int, int]) -> dict[int, int]:
        """Student block -> teacher block."""
        if self.layers is not None:
            return self.layers
        student, teacher = blocks
        return {
            block: (block + 1) * teacher // student - 1 for block in range(student) if (block + 1) * teacher >= student
        }

    def hidden_blocks(self, blocks: tuple[int, int]) -> tuple[Sequence[int], Sequence[int]]:
        pairs = self.pairs(blocks)
        return tuple(pairs), tuple(pairs.values())

    def problem(self, blocks: tuple[int, int]) -> str:
        wrong = [f"{s}: {t}" for s, t in self.pairs(blocks).items() if not (0 <= s < blocks[0] and 0 <= t < blocks[1])]
        if wrong or not self.pairs(blocks):
            what = f"layers has {', '.join(wrong) or 'no pair'}"
            return f"{what}; blocks count from 0 to {blocks[0] - 1} (student) and {blocks[1] - 1} (teacher)"
        return ""

    def learned_parts(self, student: Any, teacher: Any) -> nn.Module | None:
        configs: list[Any] = [bare(model).config for model in (student, teacher)]
        narrow, wide = (config.get_text_config().hidden_size for config in configs)
        if not self.projection:
            return None
        device = next(student.parameters()).device
        parts = nn.ModuleDict()
        for block in self.pairs((block_count(student), block_count(teacher))):
            layer = nn.Linear(narrow, wide, bias=False, device=device, dtype=torch.float32)
            nn.init.eye_(layer.weight) if narrow == wide else nn.init.orthogonal_(layer.weight)
            parts[str(block)] = layer
        return parts

    def value(self, comparison: Comparison, learned: nn.Module | None) -> Tensor:
        student, teacher = comparison.student.hidden, comparison.teacher
        assert teacher is not None
        pairs = self.pairs(comparison.blocks)
        total = torch.zeros(len(comparison.targets), device=comparison.targets.device)
        for own, other in pairs.items():
            state = student[own].float()
            if isinstance(learned, nn.ModuleDict):
                state = learned[str(own)](state)
            total = total + (state - teacher.hidden[other].float()).square().mean(-1)
        return total / len(pairs)
