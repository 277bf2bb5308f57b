"""Relations among queries, among keys and among values of one block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from compress_peft.errors import ConfigError, Problem
from compress_peft.training.batches import IGNORED, Batch
from compress_peft.training.distillation.base import LOSSES, Comparison, DistillationLoss
from compress_peft.training.distillation.divergences import forward_kl


def relations(vectors: Tensor, heads: int, batch: Batch) -> Tensor:
    """Log-softmax of scaled products of the vectors with each other (Wang et al. 2021, MiniLMv2, eq. 4 and 6).

    vectors: (batch, length, width), cut into `heads` relation heads.
    Returns (N, heads, length), for the positions that predict the batch's targets.
    """
    rows, length, width = vectors.shape
    split = vectors.float().view(rows, length, heads, width // heads).transpose(1, 2)  # (batch, heads, length, size)
    keep = batch.targets.shape[1] + 1
    scores = split[:, :, -keep:-1] @ split.transpose(2, 3) / math.sqrt(width // heads)
    place = torch.arange(length, device=vectors.device)
    visible = (place[None, :] <= place[-keep:-1, None]) & batch.attention_mask[:, None, :].bool()
    scores = scores.masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
    return scores.log_softmax(-1).transpose(1, 2)[batch.targets != IGNORED]


@LOSSES.register
class AttentionRelations(DistillationLoss):
    """KL between the relations of teacher and student, the mean over relation heads of queries, keys and values, added
    up: independent of the number and size of their attention heads.

    Decoders see only what stands before a token, so a relation runs over these; rotary positions are applied later.
    With grouped-query attention the relation heads are cut from the fewer keys and values there are.
    """

    paper: ClassVar[str] = "Wang et al. 2021, MiniLMv2, arXiv 2012.15828, eq. 4 to 6"
    needs: ClassVar[str] = "activations"

    method: Literal["attention_relations"] = "attention_relations"
    heads: PositiveInt | None = None
    """Relation heads; must divide the widths of queries and keys of both models. Default: as many as it can be, up to
    the paper's 48."""
    student_layer: int = -1
    """Block of the student, from 0, or from the end with -1 the last."""
    teacher_layer: int = -1
    """Block of the teacher. The paper takes an upper middle one of large teachers."""

    def attention_blocks(self, blocks: tuple[int, int]) -> tuple[Sequence[int], Sequence[int]]:
        return (self.student_layer % blocks[0],), (self.teacher_layer % blocks[1],)

    def problem(self, blocks: tuple[int, int]) -> str:
        given = {"student_layer": (self.student_layer, blocks[0]), "teacher_layer": (self.teacher_layer, blocks[1])}
        wrong = [
            f"{key} is {layer} of {count} blocks"
            for key, (layer, count) in given.items()
            if not -count <= layer < count
        ]
        return ", ".join(wrong)

    def relation_heads(self, widths: Sequence[int]) -> int:
        """Raises:
        ConfigError: the wanted number does not divide the widths.
        """
        common = math.gcd(*widths)
        if self.heads is None:
            return max(count for count in range(1, min(48, common) + 1) if common % count == 0)
        if common % self.heads:
            what = f"{self.heads} does not divide all of the widths {', '.join(map(str, sorted(set(widths))))}"
            raise ConfigError(Problem("loss.heads", what, f"give a divisor of {common}, or leave it out"))
        return self.heads

    def value(self, comparison: Comparison, learned: nn.Module | None) -> Tensor:
        assert comparison.teacher is not None
        (block,), (wanted_block,) = self.attention_blocks(comparison.blocks)
        own, other = comparison.student.attention[block], comparison.teacher.attention[wanted_block]
        heads = self.relation_heads([tensor.shape[-1] for tensor in (*own, *other)])
        total = torch.zeros(len(comparison.targets), device=comparison.targets.device)
        for mine, wanted in zip(own, other, strict=True):
            total = total + forward_kl(
                relations(wanted, heads, comparison.batch), relations(mine, heads, comparison.batch)
            ).mean(-1)
        return total
