"""Token rows to distil on, and the key by which a row of a batch is found again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from compress_peft.training.batches import IGNORED, Batch, TokenPair


def row_key(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """Identity of a row: its tokens, and where its response starts."""
    ids = torch.tensor([*prompt, *response], dtype=torch.int64)
    return hashlib.sha256(ids.numpy().tobytes() + len(response).to_bytes(8, "little")).digest()[:16]


def batch_keys(batch: Batch) -> list[bytes]:
    """`row_key` of the batch's rows."""
    counts = (batch.targets != IGNORED).sum(1).tolist()
    rows = batch.input_ids.cpu(), batch.attention_mask.cpu().bool()
    keys = []
    for ids, real, count in zip(*rows, counts, strict=True):
        tokens = ids[real].tolist()
        keys.append(row_key(tokens[: len(tokens) - count], tokens[len(tokens) - count :]))
    return keys


def text_rows(blocks: Tensor) -> list[TokenPair]:
    """Blocks (count, length) of plain text: all tokens but the first are predicted, as for perplexity."""
    return [([first], rest) for first, *rest in blocks.tolist()]


def in_turn(answers: Sequence[TokenPair], rationales: Sequence[TokenPair]) -> list[TokenPair]:
    """Both rows of each problem beside each other: Hsieh et al. 2023 add up the losses of both tasks of a batch."""
    return [row for pair in zip(answers, rationales, strict=True) for row in pair]


def task_weights(answers: Sequence[TokenPair], rationales: Sequence[TokenPair], share: float) -> dict[bytes, float]:
    """Row -> weight of its tokens, so that the mean over all tokens is mean(answers) + share * mean(rationales).

    Hsieh et al. 2023 (eq. 3) add up the two means of a batch; these are means over the data set, so that the loop may
    weigh all tokens alike. They are close to it only in batches that hold both tasks of their problems (`in_turn`).
    """
    counts = [sum(len(response) for _, response in part) for part in (answers, rationales)]
    total = sum(counts)
    weights = {row_key(*pair): total / counts[0] for pair in answers}
    return weights | {row_key(*pair): share * total / counts[1] for pair in rationales}
